"""Numbers and names as people read them. Whatever was not measured reads `not measured`, never 0 or OK."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

NOT_MEASURED = "not measured"

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """The text without what could steer a terminal or turn a line around: controls, direction overrides, half characters."""
    return _UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n"))


def measured(value: Any) -> bool:
    """Whether there is a finite number to show."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def shown(value: Any, form: Callable[[float], str]) -> str:
    """A number in some form, or that it was not measured."""
    return form(value) if measured(value) else NOT_MEASURED


def count(value: float) -> str:
    """1234567 as `1,234,567`."""
    return f"{round(value):,}"


def short(value: float) -> str:
    """134515008 as `134.5 M`; below a million every digit."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:,.1f} {unit}"
    return count(value)


def number(value: float) -> str:
    """Three digits or more where they count: `20.1`, `0.0123`, `1,234`, `1.5e-06`."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-4 else f"{value:.2g}"


def percent(share: float) -> str:
    """A share as `97 %` or `0.12 %`; only exactly all is `100 %` and only exactly nothing is `0 %`."""
    return f"{_hundredths(share)} %"


def points(difference: float) -> str:
    """A difference of two shares, in percentage points: `+3.3 points`."""
    return f"{_sign(difference)}{_hundredths(abs(difference))} points"


def signed(difference: float) -> str:
    """A difference of two numbers: `-0.12`."""
    return _sign(difference) + number(abs(difference))


def duration(seconds: float) -> str:
    """151 as `2 min 31 s`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next(index for index, (amount, _) in enumerate(parts) if amount)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[first : first + 2] if amount)


def size(number_of_bytes: float) -> str:
    """Bytes as `1.9 GiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number_of_bytes >= 1024**power:
            return f"{number_of_bytes / 1024**power:.1f} {unit}"
    return f"{count(number_of_bytes)} bytes"


def plural(amount: int, one: str, many: str = "") -> str:
    """`1 item`, `2 items`."""
    return f"{count(amount)} {one if amount == 1 else many or one + 's'}"


def spaced(name: str) -> str:
    """The name of a role or a metric as words: `attention query`."""
    return name.replace("_", " ")


def _hundredths(share: float) -> str:
    value = 100 * share
    if value != 0 and abs(value) < 1:
        return f"{value:.2g}"
    # Decimals are added until a share that is almost everything no longer rounds to everything.
    texts = (f"{value:.{decimals}f}" for decimals in range(1, 9))
    text = next((text for text in texts if value == 100 or float(text) != 100), f"{value}")
    return text.rstrip("0").rstrip(".")


def _sign(value: float) -> str:
    return "+" if value > 0 else "\u2212" if value < 0 else "\u00b1"
