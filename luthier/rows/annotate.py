"""Numbers for each token of a row, which token weights ask for: given once, when rows are encoded, and kept with them."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from luthier.errors import LuthierError
from luthier.kinds import Annotation, TokenWeight, Written
from luthier.rows.ids import canonical


def annotations_of(values: Iterable[Any]) -> tuple[Annotation, ...]:
    """What the token weights among some values ask for, each once.

    Raises:
        LuthierError: two of them mean different numbers by one name.
    """
    found: dict[str, Annotation] = {}
    for value in values:
        one = value.annotation if isinstance(value, TokenWeight) else None
        if one is not None and found.setdefault(one.name, one) != one:
            raise LuthierError(
                f"two token weights give tokens different numbers under the name `{one.name}`",
                where="token_weight",
                fix="use one of them, or give them the same options",
            )
    return tuple(found.values())


def token_columns(annotations: Sequence[Annotation], written: Written) -> dict[str, tuple[float, ...]]:
    """The numbers of one row's tokens by name, as fp32 holds them.

    Raises:
        LuthierError: an annotation refuses the row.
    """
    found = {one.name: tuple(array("f", one.annotate(written, **one.options))) for one in annotations}
    for name, numbers in found.items():
        if len(numbers) != len(written.token_ids) or not all(map(math.isfinite, numbers)):
            finite, tokens = sum(map(math.isfinite, numbers)), len(written.token_ids)
            raise RuntimeError(f"`{name}` gave {finite} finite numbers for {tokens} tokens: fix its `annotate`")
    return found


def check_streamed(annotations: Iterable[Annotation], workers: int) -> None:
    """Refuse what cannot be kept between runs, or told to another process.

    Raises:
        LuthierError: `annotate` stands inside another function, or, with workers, in a file that a new process cannot import.
    """
    for one in annotations:
        module = sys.modules.get(one.annotate.__module__)
        if getattr(module, one.annotate.__name__, None) is not one.annotate or _source(one) is None:
            raise LuthierError(
                f"the numbers that `{one.name}` gives tokens cannot be kept between runs",
                where="rows.streaming",
                fix="leave streaming off, or put its `annotate` at the top of a file",
            )
        if workers and importlib.util.find_spec(one.annotate.__module__.split(".")[0]) is None:
            raise LuthierError(
                f"other processes cannot import the file that holds `{one.name}`",
                where="rows.workers",
                fix="leave workers out, or install the technique as a package",
            )


def fingerprint(annotations: Iterable[Annotation]) -> list[list[str]]:
    """Everything the numbers follow from but the row: name, options and code, as text."""
    return [
        [one.name, canonical(one.options), one.annotate.__qualname__, hashlib.sha256((_source(one) or "").encode()).hexdigest()]
        for one in annotations
    ]


def _source(annotation: Annotation) -> str | None:
    """The text of the module that an annotation's function stands in; None where there is none, as in a console."""
    try:
        return inspect.getsource(sys.modules[annotation.annotate.__module__])
    except (OSError, TypeError, KeyError):
        return None
