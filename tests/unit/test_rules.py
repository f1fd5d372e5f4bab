"""The targets of a step as rules see them: their order, their places, and what is left of a micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier import draws
from luthier.kinds import Now
from luthier.training.rules import gathered, places_in, pruned, table_of
from luthier.training.world import World
from tests.conftest import make_batch


def table(rows: list[int], positions: list[int], **more: Tensor) -> dict[str, Tensor]:
    return {"row": torch.tensor(rows), "position": torch.tensor(positions), **more}


def test_targets_are_sorted_by_row_and_position() -> None:
    tables = [
        table([30, 30, 10], [5, 2, 7], nll=torch.tensor([1.0, 2.0, 3.0])),
        table([20, 10], [1, 2], nll=torch.tensor([4.0, 5.0])),
    ]
    whole, of_rows = gathered(tables, ["nll"], World())
    assert whole["row"].tolist() == [10, 10, 20, 30, 30] and whole["position"].tolist() == [2, 7, 1, 2, 5]
    assert whole["nll"].tolist() == [5.0, 3.0, 4.0, 2.0, 1.0] and whole["nll"].dtype == torch.float32 and not of_rows
    assert [places_in(whole, one).tolist() for one in tables] == [[4, 3, 1], [2, 0]]
    nothing, _ = gathered([], ["nll"], World())
    assert [len(values) for values in nothing.values()] == [0, 0, 0] and not len(places_in(nothing, nothing))


def test_rows_tell_each_of_their_targets_what_they_carry() -> None:
    """Numbers, texts, and what one micro-batch has as a text and another as a number; rows without them have none."""
    first, second = make_batch([(4, 2), (3, 1)]), make_batch([(3, 2)], first=2)
    first = first._replace(columns={"score": torch.tensor([0.5, 1.5])}, texts={"task": ("code", "chat")})
    second = second._replace(columns={"task": torch.tensor([3.0])})
    tables = [table_of(None, one, (), Now(), {}) for one in (first, second)]  # type: ignore[arg-type]
    assert [one["position"].tolist() for one in tables] == [[2, 3, 2], [1, 2]]
    assert tables[0]["row"].tolist() == draws.seeds_of(("row0", "row0", "row1")).tolist()
    assert tables[0]["rows score"].tolist() == [0.5, 0.5, 1.5]
    whole, of_rows = gathered(tables, [], World())
    place_N = torch.cat([places_in(whole, one) for one in tables])
    score_N, task_N = of_rows["score"][place_N], of_rows["task"][place_N]
    assert score_N[:3].tolist() == [0.5, 0.5, 1.5] and score_N[3:].isnan().all() and score_N.dtype == torch.float64
    names = [draws.seed_of("code")] * 2 + [draws.seed_of("chat")] + draws.seeds_of_numbers(torch.tensor([3.0, 3.0])).tolist()
    assert task_N.tolist() == names and all(len(one) == 5 for one in (*whole.values(), *of_rows.values()))


def test_many_targets_of_few_rows_are_sorted_too() -> None:
    position_N = torch.arange(256).flip(0)
    whole, _ = gathered([table((position_N % 3).tolist(), position_N.tolist())], [], World())
    keys = (whole["row"] * 1000 + whole["position"]).tolist()
    assert keys == sorted(keys) and len(set(keys)) == 256


def test_a_row_does_not_run_into_the_next() -> None:
    """The last position of one row and the first of the next, right behind it."""
    whole = table([10, 10, 20, 20], [0, 1, 0, 1])
    assert places_in(whole, whole).tolist() == [0, 1, 2, 3]


def test_a_row_stays_as_long_as_any_weight_is_left_of_it() -> None:
    """Rows of 2, 1 and 2 targets, of which one is the token 0; weights may be small, or below 0."""
    batch = make_batch([(4, 2), (3, 1), (3, 2)])
    batch.token_ids_BT[0, 3] = batch.label_BT[0, 3] = 0
    left, left_N = pruned(batch, torch.tensor([0.0, 0.25, 0.0, -0.5, 0.0]))
    assert left.row_ids == ("row0", "row2") and left_N.tolist() == [0.0, 0.25, -0.5, 0.0]
    same, same_N = pruned(batch, torch.tensor([0.0, 0.25, 0.5, -0.5, 0.0]))
    assert same is batch and same_N.tolist() == [0.0, 0.25, 0.5, -0.5, 0.0]
    nothing, nothing_N = pruned(batch, torch.zeros(5))
    assert nothing.row_ids == () and len(nothing_N) == 0


def test_virtual_tokens_keep_their_weight() -> None:
    batch = make_batch([(3, 2), (3, 2)])
    batch.token_ids_BT[:, 1] = -2
    left, left_N = pruned(batch, torch.tensor([0.0, 0.5]))
    assert left.row_ids == ("row1",) and left_N.tolist() == [1.0, 0.5]
