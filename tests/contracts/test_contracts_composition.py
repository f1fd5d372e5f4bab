"""Techniques together: few combinations in which every technique meets every other kind, all that frees numbers meets, and all that is
learnt meets. Each part keeps what it promises beside the others."""

from __future__ import annotations

from itertools import combinations

import pytest

from luthier.errors import LuthierError
from luthier.registry import kinds_under
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
from tests.contracts.fixtures import FREES, LEARNING, RUNS
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
    kinds = {kind for kind, _ in RUNS}
    missing = [
        (one, kind)
        for one in RUNS
        for kind in kinds - {one[0]}
        if (one, kind) not in met and any(refused(one, other) is None for other in RUNS if other[0] == kind)
    ]
    assert not missing
    assert set(BESIDE) <= {name for _, name in FREES} and all(kind for kind, _ in LEARNING)
    assert {kind for kind, _ in FREES} == set(kinds_under("tune"))
    assert all(has_room(chosen[:-1], chosen[-1]) for chosen in ARRAYS)


PROMISED = [("dft", "kl"), ("sstoken", "tl_weights"), ("q_tuning", "masked_thought")]


@pytest.mark.parametrize(("one", "other"), PROMISED)
def test_these_are_promised_to_go_together(one: str, other: str) -> None:
    assert any({one, other} <= {name for _, name in chosen} for chosen in ARRAYS)


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
        assert error.value.mend and (one[1] in said or other[1] in said)


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
