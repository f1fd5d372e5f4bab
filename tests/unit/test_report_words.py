"""The report's words, scales and colors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib.resources import files

import pytest

from luthier.report import words
from luthier.report.svg import Scale, ticks


def said(text: str) -> str:
    """With plain spaces between numbers and units."""
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (words.percent, 0.0, "0 %"),
        (words.percent, 1.0, "100 %"),
        (words.percent, 0.97, "97 %"),
        (words.percent, 58 / 60, "96.7 %"),
        (words.percent, 0.00123, "0.12 %"),
        (words.percent, 0.99996, "99.996 %"),
        (words.percent, 1e-9, "1e-07 %"),
        (words.percent, -0.5, "-50 %"),
        (words.points, 0.033, "+3.3 points"),
        (words.points, -0.01, "\u22121 point"),
        (words.points, 0.0, "\u00b10 points"),
        (words.signed, -0.12, "\u22120.12"),
        (words.number, 20.134, "20.1"),
        (words.number, 1234.4, "1,234"),
        (words.number, 0.0123456, "0.0123"),
        (words.number, 1e-5, "1e-05"),
        (words.number, 0, "0"),
        (words.count, 1234567, "1,234,567"),
        (words.short, 134515008, "134.5 M"),
        (words.short, 1.24e9, "1.2 B"),
        (words.short, 999999, "999,999"),
        (words.duration, 12.34, "12.3 s"),
        (words.duration, 59.97, "1 min"),
        (words.duration, 151.2, "2 min 31 s"),
        (words.duration, 3720, "1 h 2 min"),
        (words.duration, 90000, "1 d 1 h"),
        (words.size, 2040109465, "1.9 GiB"),
        (words.size, 512, "512 bytes"),
    ],
)
def test_numbers_read_as_people_write_them(form: Callable[[float], str], value: float, text: str) -> None:
    assert said(form(value)) == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "12", {}])
def test_what_is_no_number_is_not_measured(value: object) -> None:
    assert words.shown(value, words.percent) == "not measured"


def test_an_interval_says_its_unit_once() -> None:
    assert said(words.between(0.56, 0.75, words.percent)) == "56 to 75 %"
    assert said(words.between(-0.04, 0.06, words.points)) == "\u22124 to +6 points"
    assert words.between(19.8, 23.2, words.number) == "19.8 to 23.2"


def test_times_are_shown_to_the_minute_in_utc() -> None:
    assert words.moment("2026-11-21T12:00:59Z") == "2026-11-21 12:00 UTC"
    assert words.moment("2026-11-21T14:00:00+02:00") == "2026-11-21 12:00 UTC"
    assert words.moment("yesterday") == "yesterday"


def test_nothing_that_steers_a_terminal_is_left() -> None:
    assert words.clean("a\x1b[31mb\u202ec\ud800d\te\r\nf\rg") == "a\ufffd[31mb\ufffdc\ufffdd\te\nf\ufffdg"


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0, 84, 8, [0, 20, 40, 60, 80]),
        (0.0, 1.0, 3, [0, 0.5, 1]),
        (-0.08, 1.08, 3, [0, 0.5, 1]),
        (0.3, 0.61, 4, [0.3, 0.4, 0.5, 0.6]),
        (5, 5, 4, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, most: int, expected: list[float]) -> None:
    assert ticks(low, high, most) == expected


@pytest.mark.parametrize("most", [2, 3, 5, 8])
@pytest.mark.parametrize("span", [1e-6, 0.37, 1.0, 99.0, 12345.0])
def test_ticks_lie_within_and_are_never_too_many(most: int, span: float) -> None:
    found = ticks(0.123, 0.123 + span, most)
    assert len(found) <= most
    assert all(0.123 - 1e-9 * span <= tick <= 0.123 + span * (1 + 1e-9) for tick in found)


def test_a_scale_maps_ends_to_ends() -> None:
    up = Scale(0.0, 4.0, 100.0, 20.0)
    assert [up.at(value) for value in (0.0, 1.0, 4.0)] == [100.0, 80.0, 20.0]
    assert Scale(3.0, 3.0, 0.0, 10.0).at(3.0) == 5.0


def luminance(color: str) -> float:
    """Relative luminance by the Web Content Accessibility Guidelines 2.2."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """From 1 (the same) to 21 (black on white)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "behind"),
    [
        *[(text, behind) for text in ("ink", "muted", "accent", "worse") for behind in ("paper", "card")],
        ("muted", "faint"),
        ("ink", "faint"),
        ("ink", "worse-wash"),
        ("accent", "accent-wash"),
        ("worse", "worse-wash"),
    ],
)
def test_every_text_can_be_read(scheme: int, text: str, behind: str) -> None:
    css = (files("luthier.report") / "templates" / "style.css").read_text(encoding="utf-8")
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", css, re.DOTALL)[scheme]))
    assert contrast(colors[text], colors[behind]) >= 4.5


def test_contrast_is_measured_right() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
