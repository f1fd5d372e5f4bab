"""Numbers and names as people read them. Whatever was not measured reads `not measured`, never 0 or OK."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, TypeGuard

NOT_MEASURED = "not measured"
_GAP = "\u00a0"
"""Between a number and its unit, so that no line breaks there."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """The text without what could steer a terminal or turn a line around: controls, overrides, half characters."""
    return _UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n"))


def measured(value: Any) -> TypeGuard[float]:
    """Whether there is a finite number to show."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def shown(value: Any, form: Callable[[float], str]) -> str:
    """A number in some form, or that it was not measured."""
    return form(value) if measured(value) else NOT_MEASURED


def between(low: float, high: float, form: Callable[[float], str]) -> str:
    """An interval with its unit said once: `56 to 75 %`."""
    last = form(high)
    return f"{form(low).removesuffix(_GAP + last.partition(_GAP)[2])} to {last}"


def count(value: float) -> str:
    """1234567 as `1,234,567`."""
    return f"{round(value):,}"


def short(value: float) -> str:
    """134515008 as `134.5 M`; below a million every digit."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:,.1f}{_GAP}{unit}"
    return count(value)


def number(value: float) -> str:
    """Three digits, or all before the point: `20.1`, `0.0123`, `1,234`, `1.5e-06`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as `97 %` or `0.12 %`; only exactly all is `100 %` and only exactly nothing is `0 %`."""
    return f"{_hundredths(share)}{_GAP}%"


def points(difference: float) -> str:
    """A difference of two shares, in percentage points: `+3.3 points`."""
    text = _hundredths(abs(difference))
    return f"{_sign(difference)}{text}{_GAP}{'point' if text == '1' else 'points'}"


def signed(difference: float) -> str:
    """A difference of two numbers: `-0.12`."""
    return _sign(difference) + number(abs(difference))


def duration(seconds: float) -> str:
    """151 as `2 min 31 s`."""
    if seconds < 59.95:
        return f"{seconds:.1f}{_GAP}s"
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next(index for index, (amount, _) in enumerate(parts) if amount)
    return " ".join(f"{amount}{_GAP}{unit}" for amount, unit in parts[first : first + 2] if amount)


def size(number_of_bytes: float) -> str:
    """Bytes as `1.9 GiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number_of_bytes >= 1024**power:
            return f"{number_of_bytes / 1024**power:.1f}{_GAP}{unit}"
    return f"{count(number_of_bytes)}{_GAP}bytes"


def plural(amount: int, one: str, many: str = "") -> str:
    """`1 item`, `2 items`."""
    return f"{count(amount)} {one if amount == 1 else many or one + 's'}"


def moment(text: str) -> str:
    """An ISO time to the minute, `2026-11-21 12:00 UTC`; any other text as it is."""
    try:
        at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return text
    return at.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


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
