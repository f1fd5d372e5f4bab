"""The options of metrics of answers that should be JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from luthier.errors import LuthierError
from luthier.evaluate.scoring import Scoring
from luthier.rows import json_answers


def json_match(*, required: tuple[str, ...] = (), tolerance: float = 0.0) -> Scoring:
    """The share of answers that are JSON and equal an accepted answer. The order of keys does not count, that of lists does.

    Types count: 3 is neither "3" nor true, while 3 and 3.0 are the same number. Anything beside the JSON, such as a fence, makes it none.

    Args:
        required: only what stands under these keys of the outermost object has to be there and right; none: everything, and nothing else.
        tolerance: how far a number may be from the expected one.

    Raises:
        LuthierError: the tolerance is below 0.
    """
    return _scoring(json_answers.json_match, required, tolerance)


def json_key_accuracy(*, required: tuple[str, ...] = (), tolerance: float = 0.0) -> Scoring:
    """Of all keys that an answer or the accepted one has, the share under which both hold the same, a mean; 0 where it is no JSON.

    Keys are counted down to the values: `{"a": {"b": 1}, "c": [2, 3]}` has `a.b`, `c[0]` and `c[1]`. One too many counts as much as one too
    few, so an answer has 1 here where it has 1 in `json_match`.

    Args:
        required, tolerance: as in `json_match`.

    Raises:
        LuthierError: the tolerance is below 0.
    """
    return _scoring(json_answers.json_key_accuracy, required, tolerance)


def _scoring(score: Callable[..., float], required: tuple[str, ...], tolerance: float) -> Scoring:
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise LuthierError(f"`tolerance` is {tolerance:g}", where="tolerance", fix="give a number from 0")
    return Scoring(
        partial(score, required=required, tolerance=tolerance), readable=partial(json_answers.can_match, required=required)
    )
