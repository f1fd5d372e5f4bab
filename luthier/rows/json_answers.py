"""How an answer that should be JSON is scored: whether it is what was expected, and how much of it is.

An answer is JSON and nothing beside it. Keys may come in any order, lists may not. Types count: 3 is neither "3" nor true, while 3 and 3.0
are the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luthier.rows.answers import strict_json

Leaves = Mapping[tuple[str | int, ...], Any]
"""What stands at each path through objects and lists: texts, numbers, truths, null, and what is empty."""


def json_match(answer: str, accepted: Sequence[str], *, required: Sequence[str] = (), tolerance: float = 0.0) -> float:
    """1 where the answer is JSON and equals an accepted answer, else 0. The order of keys does not count.

    Args:
        answer: what the model said.
        accepted: JSON, as text.
        required: only what stands under these keys of the outermost object has to be there and right; none: everything, and nothing else.
        tolerance: how far a number may be from the expected one.
    """
    return float(_best(answer, accepted, required, tolerance) == 1.0)


def json_key_accuracy(answer: str, accepted: Sequence[str], *, required: Sequence[str] = (), tolerance: float = 0.0) -> float:
    """Of all keys that the answer or the accepted one has, the share under which both hold the same; 0 where the answer is no JSON.

    Keys are counted down to the values: of `{"a": {"b": 1}, "c": [2, 3]}` there are `a.b`, `c[0]` and `c[1]`. A key too many counts as much
    as one too few, so 1 says the same as `json_match`. Of several accepted answers the best.

    Args:
        answer, accepted, required, tolerance: as in `json_match`.
    """
    return _best(answer, accepted, required, tolerance)


def can_match(accepted: str, required: Sequence[str] = ()) -> bool:
    """Whether an accepted answer is JSON, and has the required keys."""
    leaves = _leaves(accepted)
    return leaves is not None and {*required} <= {path[0] for path in leaves if path}


def _best(answer: str, accepted: Sequence[str], required: Sequence[str], tolerance: float) -> float:
    mine = _leaves(answer)
    if mine is None:
        return 0.0
    found = (_share(mine, theirs, required, tolerance) for one in accepted if (theirs := _leaves(one)) is not None)
    return max(found, default=0.0)


def _share(mine: Leaves, theirs: Leaves, required: Sequence[str], tolerance: float) -> float:
    if required:
        mine, theirs = ({path: one for path, one in some.items() if path and path[0] in required} for some in (mine, theirs))
    right = sum(path in mine and _same(mine[path], one, tolerance) for path, one in theirs.items())
    paths = len({*mine, *theirs})
    return right / paths if paths else 0.0


def _leaves(text: str) -> Leaves | None:
    """A text's values by their paths; None where it is no JSON."""
    try:
        return dict(_walk(strict_json(text), ()))
    # Also a number of thousands of digits, or brackets a thousand deep.
    except (ValueError, RecursionError):
        return None


def _walk(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if not isinstance(value, dict | list) or not value:
        yield path, value
        return
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _walk(one, (*path, key))


def _same(one: Any, other: Any, tolerance: float) -> bool:
    numbers = [isinstance(each, int | float) and not isinstance(each, bool) for each in (one, other)]
    if not all(numbers):
        return type(one) is type(other) and bool(one == other)
    try:
        # First as they are: infinity, which 1e999 is read as, has no distance to itself.
        return bool(one == other or abs(one - other) <= tolerance)
    except OverflowError:
        return False
