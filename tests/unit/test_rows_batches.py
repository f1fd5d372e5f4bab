"""Batches and the plan of an epoch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.rows.batches import collate, padding_share, plan_epoch
from luthier.rows.encode import Encoded


def encoded(*token_ids: int, first_target: int = 1, id: str = "r", **columns: float | int | str) -> Encoded:
    supervised = tuple(place >= first_target for place in range(len(token_ids)))
    return Encoded(id, token_ids, supervised, "here", columns, 0, "text")


def lengths_like_text(count: int, seed: int = 0) -> list[int]:
    draws = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return [max(2, int(length)) for length in (draws * 0.7 + 4.5).exp().tolist()]


def test_a_batch_by_hand() -> None:
    batch = collate([encoded(5, 6, 7, first_target=2, id="a"), encoded(8, -1, id="b")], pad_to_multiple=2)
    assert batch.token_ids_BT.tolist() == [[5, 6, 7, 0], [8, -1, 0, 0]]
    assert batch.attend_BT.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert batch.label_BT.tolist() == [[-100, -100, 7, -100], [-100, -1, -100, -100]]
    assert batch.row_ids == ("a", "b")
    left = collate([encoded(5, 6, 7, first_target=2), encoded(8, 9)], side="left", pad_to_multiple=4)
    assert left.token_ids_BT.tolist() == [[0, 5, 6, 7], [0, 0, 8, 9]]
    assert left.position_BT.tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]
    assert left.label_BT.tolist() == [[-100, -100, -100, 7], [-100, -100, -100, 9]]
    assert left.attend_BT.sum(dim=1).tolist() == [3, 2]


def test_columns_do_not_depend_on_the_mates() -> None:
    batch = collate([encoded(1, 2, score=1, source="web"), encoded(1, 2, score=0.5, rank=3)])
    assert set(batch.columns) == {"score", "rank"}
    assert batch.columns["score"].tolist() == [1.0, 0.5]
    assert math.isnan(batch.columns["rank"][0]) and batch.columns["rank"][1] == 3
    assert batch.columns["score"].dtype == collate([encoded(1, 2, score=1)]).columns["score"].dtype == torch.float64


def test_an_empty_batch() -> None:
    batch = collate([])
    assert batch.token_ids_BT.shape == batch.label_BT.shape == (0, 0)
    assert batch.tokens == batch.supervised == 0


def _flat(plan: list[list[list[int]]]) -> list[int]:
    return [index for step in plan for rows in step for index in rows]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("size", [{"batch_tokens": 2000}, {"batch_rows": 16}])
def test_every_row_once_within_the_sizes(world_size: int, size: dict[str, Any]) -> None:
    lengths = lengths_like_text(500)
    plans = [
        plan_epoch(
            lengths,
            micro_batch_tokens=700,
            seed=1,
            epoch=0,
            world_size=world_size,
            rank=rank,
            pad_to_multiple=8,
            **size,
        )
        for rank in range(world_size)
    ]
    assert sorted(index for plan in plans for index in _flat(plan)) == list(range(500))
    assert len({len(plan) for plan in plans}) == 1
    for rows in (rows for plan in plans for step in plan for rows in step):
        padded = len(rows) * math.ceil(max(lengths[index] for index in rows) / 8) * 8
        assert padded <= 700 or len(rows) == 1
    for steps in zip(*plans, strict=True):
        step = [index for part in steps for rows in part for index in rows]
        tokens = sum(lengths[index] for index in step)
        assert len(step) <= 16 if "batch_rows" in size else tokens <= 2000 or len(step) == 1


def test_a_step_is_filled_in_the_shuffled_order() -> None:
    lengths = lengths_like_text(100)
    options: dict[str, Any] = {"micro_batch_tokens": 10**6, "seed": 3, "epoch": 2}
    order = _flat(plan_epoch(lengths, batch_rows=1, **options))
    steps = [sorted(_flat([step])) for step in plan_epoch(lengths, batch_tokens=900, **options)]
    start = 0
    for step in steps:
        assert step == sorted(order[start : start + len(step)])
        start += len(step)
        if start < len(order):
            assert sum(lengths[index] for index in step) + lengths[order[start]] > 900


def test_a_plan_is_a_pure_function_of_seed_and_epoch() -> None:
    lengths = lengths_like_text(60)

    def plan(seed: int, epoch: int) -> list[list[list[int]]]:
        return plan_epoch(lengths, micro_batch_tokens=500, batch_rows=8, seed=seed, epoch=epoch)

    torch.manual_seed(1)
    first = plan(0, 0)
    torch.manual_seed(2)
    assert plan(0, 0) == first
    assert len({tuple(_flat(plan(seed, epoch))) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_the_steps_of_many_processes_are_those_of_one() -> None:
    lengths = lengths_like_text(200)
    options: dict[str, Any] = {"micro_batch_tokens": 800, "batch_tokens": 3000, "seed": 0, "epoch": 0}
    whole = plan_epoch(lengths, **options)
    parts = [plan_epoch(lengths, world_size=4, rank=rank, **options) for rank in range(4)]
    for step, *shares in zip(whole, *parts, strict=True):
        assert sorted(_flat([step])) == sorted(index for share in shares for index in _flat([share]))


def test_processes_get_alike_work() -> None:
    lengths = lengths_like_text(4000)
    plans = [
        plan_epoch(lengths, micro_batch_tokens=4096, batch_tokens=32768, seed=0, epoch=0, world_size=4, rank=rank)
        for rank in range(4)
    ]
    ratios = []
    for steps in list(zip(*plans, strict=True))[:-1]:
        work = [sum(len(rows) * max(lengths[index] for index in rows) for rows in step) for step in steps]
        ratios.append(max(work) / (sum(work) / len(work)))
    assert sum(ratios) / len(ratios) < 1.02


def test_sorting_leaves_little_padding() -> None:
    lengths = lengths_like_text(4000)
    plan = plan_epoch(lengths, micro_batch_tokens=4096, batch_tokens=32768, seed=0, epoch=0)
    order = _flat(plan_epoch(lengths, micro_batch_tokens=1, batch_rows=1, seed=0, epoch=0))
    unsorted = [[order[start : start + 32]] for start in range(0, len(order), 32)]
    assert padding_share(plan, lengths) < 0.1 < 0.5 < padding_share(unsorted, lengths)


def test_micro_batches_by_hand() -> None:
    options: dict[str, Any] = {"micro_batch_tokens": 160, "batch_rows": 7, "seed": 0, "epoch": 0}
    lengths = [40, 38, 32, 31, 60, 60, 30]
    # Beside 40, 38 and 32 there is room for 31, but padding would be 19 tokens, and a sixteenth of 160 is 10.
    assert plan_epoch(lengths, **options) == [[[4, 5], [0, 1, 2], [3, 6]]]


def test_padding_share_by_hand() -> None:
    assert padding_share([[[0, 1]], [[2]]], [4, 2, 3]) == pytest.approx(1 - 9 / 11)
    assert padding_share([[[0, 1]], [[2]]], [4, 2, 3], pad_to_multiple=4) == pytest.approx(1 - 9 / 12)
    assert padding_share([[]], []) == 0.0


def test_long_rows_and_idle_processes() -> None:
    options: dict[str, Any] = {"micro_batch_tokens": 10, "batch_tokens": 20, "seed": 0, "epoch": 0}
    assert sorted(plan_epoch([50, 60], **options)) == [[[0]], [[1]]]
    shares = [plan_epoch([50], world_size=2, rank=rank, **options) for rank in range(2)]
    assert shares == [[[[0]]], [[]]]
    assert plan_epoch([], **options) == []


def test_the_last_step_can_be_left_out() -> None:
    options: dict[str, Any] = {"micro_batch_tokens": 10, "seed": 0, "epoch": 0}
    assert len(plan_epoch([1] * 7, batch_rows=3, **options)) == 3
    assert len(plan_epoch([1] * 7, batch_rows=3, drop_last=True, **options)) == 2
    assert len(plan_epoch([1] * 6, batch_rows=3, drop_last=True, **options)) == 2


def test_sizes_are_checked() -> None:
    options: dict[str, Any] = {"micro_batch_tokens": 10, "seed": 0, "epoch": 0}
    with pytest.raises(LuthierError, match="must be given once"):
        plan_epoch([1], **options)
    with pytest.raises(LuthierError, match="must be given once"):
        plan_epoch([1], batch_rows=1, batch_tokens=1, **options)
    with pytest.raises(LuthierError, match="batch_rows is 0"):
        plan_epoch([1], batch_rows=0, **options)
    with pytest.raises(LuthierError, match="rank 2 is not one of 2"):
        plan_epoch([1], batch_rows=1, world_size=2, rank=2, **options)


def test_rows_stand_in_one_micro_batch_without_padding_unless_asked() -> None:
    assert plan_epoch([3, 3], micro_batch_tokens=6, batch_rows=2, seed=0, epoch=0) == [[[0, 1]]]
    assert collate([encoded(5, 6, 7)]).token_ids_BT.tolist() == [[5, 6, 7]]
    assert padding_share([[[0]]], [3]) == 0.0


def test_mates_count_in_the_padding_of_a_micro_batch() -> None:
    """Two of each, so 4 tokens of padding; a sixteenth of 48 is 3, of 64 it is 4."""
    options: dict[str, Any] = {"members": [2, 2], "batch_rows": 2, "seed": 0, "epoch": 0}
    assert plan_epoch([10, 8], micro_batch_tokens=48, **options) == [[[0], [1]]]
    assert plan_epoch([10, 8], micro_batch_tokens=64, **options) == [[[0, 1]]]


def test_numbers_with_more_digits_than_a_float_holds_are_infinite() -> None:
    batch = collate([encoded(1, 2, n=10**400), encoded(1, 2, n=-(10**400))])
    assert batch.columns["n"].tolist() == [math.inf, -math.inf]


def test_several_numbers_of_a_token_are_padded_as_one_is() -> None:
    one = replace(encoded(5, 6, 7), token_columns={"n": torch.arange(6.0).reshape(3, 2).numpy()})
    two = replace(encoded(8, 9), token_columns={"n": torch.ones(2, 2).numpy()})
    found = collate([one, two]).token_columns["n"]
    assert found.tolist() == [[[0, 1], [2, 3], [4, 5]], [[1, 1], [1, 1], [0, 0]]]
