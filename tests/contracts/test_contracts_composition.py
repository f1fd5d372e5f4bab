"""Techniques together: few combinations in which every technique meets every other kind, all that frees numbers meets, and all that is
learnt meets. Each part keeps what it promises beside the others."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from luthier.columns.chunked import passes_of, resolve
from luthier.columns.losses import nll
from luthier.errors import LuthierError
from luthier.kinds import Column, LossTerm, TokenWeight, View
from luthier.registry import key_of, kinds_under
from luthier.training.services import view_of
from tests.conftest import split
from tests.contracts.combinations import (
    BESIDE,
    REFUSED,
    Technique,
    arrays,
    has_room,
    pairs,
    refusals,
    refused,
    runnable,
    traits,
    try_out,
)
from tests.contracts.covering import covering, uncovered
from tests.contracts.fixtures import FREES, LEARNING, NOW, TOGETHER, engine_of, part_of, rows_for
from tests.contracts.invariants import check
from tests.toys.helpers import toys  # noqa: F401

ARRAYS = arrays()


@pytest.mark.parametrize("number", range(len(ARRAYS)))
def test_they_go_together_and_each_keeps_what_it_promises(number: int) -> None:
    try:
        check(ARRAYS[number])
    except LuthierError:
        for some in runnable(ARRAYS[number]):
            check(some)


def test_everything_meets() -> None:
    """What the arrays promise, counted again."""
    wanted = [pair for pair in pairs() if refused(*pair) is None]
    assert {frozenset(pair) for pair in combinations(FREES, 2)} <= {frozenset(pair) for pair in pairs()}
    assert not uncovered(ARRAYS, wanted)
    met = {(one, other[0]) for chosen in ARRAYS for one in chosen for other in chosen}
    kinds = {kind for kind, _ in TOGETHER}
    missing = [
        (one, kind)
        for one in TOGETHER
        for kind in kinds - {one[0]}
        if (one, kind) not in met and any(refused(one, other) is None for other in TOGETHER if other[0] == kind)
    ]
    assert not missing
    assert set(BESIDE) <= {name for _, name in FREES} and all(kind for kind, _ in LEARNING)
    assert {kind for kind, _ in FREES} == set(kinds_under("tune"))
    assert all(has_room(chosen[:-1], chosen[-1]) for chosen in ARRAYS)


PROMISED = [("dft", "kl"), ("sstoken", "tl_weights"), ("q_tuning", "masked_thought")]


@pytest.mark.parametrize(("one", "other"), PROMISED)
def test_these_are_promised_to_go_together(one: str, other: str) -> None:
    assert any({one, other} <= {name for _, name in chosen} for chosen in ARRAYS)


COMPARING = [
    one
    for one in LEARNING
    if any(other.at for value in part_of(*one).values for other in passes_of(resolve(getattr(value, "columns", ()))))
]
"""Techniques that compare the model with other weights."""
MAPS = [one for one in LEARNING if one[0] == "input_map"]


@pytest.mark.parametrize("one", COMPARING, ids=lambda one: one[1])
@pytest.mark.parametrize("given", MAPS, ids=lambda one: one[1])
def test_both_sides_of_a_comparison_read_the_same(one: Technique, given: Technique) -> None:
    """The model read the changed input and the base the clean rows, so that a model that is its base differed from it."""
    kinds = {one[0]: part_of(*one), given[0]: part_of(*given)}
    learnt = [part for kind, part in kinds.items() if key_of(kind) == "objective"]
    weights = [part for kind, part in kinds.items() if key_of(kind) == "token_weight"]
    comparing = ["dpo"] if one[0] == "reference" else []
    run = engine_of(objective=["cross_entropy", *comparing, *learnt], token_weight=weights)
    batch, now = rows_for(kinds), NOW._replace(step=NOW.steps - 1)
    passes = [other for other in passes_of(run.objective.columns()) if other.at]
    columns = [Column(f"nll of {p.name}", lambda chunk, p=p: nll(chunk.others[p.name], chunk.label_C), (p,)) for p in passes]
    read = run.inputs.read(batch, now)
    embed = run.inputs.embed(read, now)
    view = view_of(run.tune, batch, [*resolve(["nll"]), *columns], now, read=read, embed=embed)
    clean = view_of(run.tune, batch, resolve(["nll"]), now)
    assert passes and not torch.allclose(view["nll"], clean["nll"])
    for column in columns:
        assert torch.allclose(view[column.name], view["nll"].detach(), atol=1e-5), column.name


BESIDE_A_LEARNT_PROMPT = [
    one for one in LEARNING if refused(one, ("prompt", "cpt")) is None and one[0] not in ("input_map", "reference")
]


@pytest.mark.parametrize("one", BESIDE_A_LEARNT_PROMPT, ids=lambda one: one[1])
def test_rules_over_rows_see_the_rows_own_targets(one: Technique) -> None:
    """Targets of a context that stands before every row were taken for the row's own by what goes by rows."""
    seen: list[torch.Tensor] = []
    batch = rows_for([one[0]])
    own = {(row, int(where)) for row, b in zip(batch.row_ids, batch.label_BT) for where in (b >= 0).nonzero()}  # noqa: B905

    def watch_view(view: View) -> None:
        seen.append(view.batch.token_ids_BT[view.row_N, view.position_N])
        assert int(view.targets_by_row().sum()) == int(view.batch.targets_by_row().sum()) == len(view["nll"]) <= len(own)

    def watched(value: Any) -> Any:
        if isinstance(value, TokenWeight):
            weigh, look, count = value.weigh, value.look, value.count
            return value._replace(
                weigh=weigh and (lambda view: (watch_view(view), weigh(view))[1]),
                look=look and (lambda table: (seen.append(table.position_M - length), look(table))[1]),
                count=count and (lambda rows: (seen.append(rows.token_ids_BT[rows.label_BT >= 0]), count(rows))[1]),
            )
        if isinstance(value, LossTerm) and value.unit == "row":
            total, count_rows = value.total, value.count
            return value._replace(
                total=lambda view, tensors: (watch_view(view), total(view, tensors))[1],
                count=count_rows and (lambda rows: (seen.append(rows.token_ids_BT[rows.label_BT >= 0]), count_rows(rows))[1]),
            )
        return value

    part = part_of(*one)
    part = replace(part, values=tuple(watched(value) for value in part.values))
    run = engine_of(tune=[part_of("prompt", "cpt")], **{key_of(one[0]): [part]})
    length = run.tune.prompt_length
    assert int((run.tune.prompt_labels >= 0).sum()) > 0
    result = run.step(split(batch, (5, 3)), NOW._replace(step=NOW.steps - 1))
    assert math.isfinite(result.loss) and all(bool((some >= 0).all()) for some in seen)


def test_the_arrays_are_the_same_every_time() -> None:
    assert arrays() == ARRAYS


@pytest.mark.parametrize("entry", REFUSED, ids=" and ".join)
def test_what_is_said_to_be_refused_is_refused_by_name(entry: tuple[str, str]) -> None:
    tried = [(one, other) for found, one, other in refusals() if found == entry]
    assert tried, f"nothing is like {entry}: take it out of the table"
    for one, other in tried:
        with pytest.raises(LuthierError) as error:
            try_out((one, other))
        said = str(error.value)
        assert REFUSED[entry] in said, f"{one[1]} with {other[1]}: {said}"
        assert error.value.fix and (one[1] in said or other[1] in said)


def test_the_traits_of_refusals_are_those_of_techniques() -> None:
    known = frozenset().union(*traits.values())
    assert {name for entry in REFUSED for name in entry} <= known


def test_a_covering_array_covers_and_grows_slowly() -> None:
    """By hand: pairs of 30 items in combinations of 6 need 29 at least, greedily at most twice as many."""
    items = [("kind", str(i)) for i in range(30)]
    found = covering(items, combinations(items, 2), room=lambda chosen, one: len(chosen) < 6)
    assert not uncovered(found, combinations(items, 2)) and 29 <= len(found) <= 58
    groups: dict[Technique, str] = {item: "even" if int(item[1]) % 2 else "odd" for item in items}
    met = covering(items, [], groups=groups, room=lambda chosen, one: len(chosen) < 2)
    assert len(met) == 15 and {item for pair in met for item in pair} == set(items)
