"""The report and the comparison as a browser shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from luthier.report.compare import write_comparison
from luthier.report.html import write_report
from luthier.report.story import headline
from tests.unit.browser import Browser, Page
from tests.unit.test_report_pages import SAMPLE, with_text

HOSTILE = (
    "<script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 1">',
    "' onmouseover='window.hit=1' autofocus onfocus='window.hit=1",
    '<a href="javascript:window.hit=1" id=link>click</a>',
    "</style></title></svg></details><iframe src=http://luthier.invalid/></iframe>",
    "<svg onload='window.hit=1'><style>h1 { display: none }</style>",
    "<base href=http://luthier.invalid/><meta http-equiv=refresh content='0;url=http://luthier.invalid/'>",
    "&lt;b&gt; \u05d0\u05d1 abc \u0627 \U0001f3bb",
)
ELEMENTS = "[...document.querySelectorAll('*')].map(one => one.tagName + ' ' + one.getAttributeNames().join(' '))"
FIGURES = "[...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect()).map(box => [box.width, box.height])"
MARKS = "[...document.querySelectorAll('svg')].map(one => one.getBBox()).map(box => [box.width, box.height])"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def report(run: Mapping[str, Any], folder: Path) -> Path:
    return write_report(run, folder / "report.html")


def comparison(run: Mapping[str, Any], folder: Path) -> Path:
    return write_comparison([SAMPLE.sample_run(run="runs/control-1"), run], folder / "compare.html")


def elements_of(page: Page) -> list[str]:
    """Every element with the names of its attributes, but for the policy."""
    found: list[str] = page.value(ELEMENTS)
    return [one for one in found if one != "META http-equiv content"]


@cache
def harmless_elements(browser: Browser, make: Any) -> list[str]:
    """The elements of a page whose texts are all plain words."""
    with TemporaryDirectory() as folder:
        page = browser.open(make(with_text("harmless"), Path(folder)))
        page.text()
        return elements_of(page)


def only_itself(page: Page, file: Path) -> None:
    """The page asked for nothing but its own file, said nothing and ran nothing."""
    assert page.requests() == [file.resolve().as_uri()]
    assert page.complaints() == []
    assert page.value("window.hit") is None


def test_a_page_that_does_wrong_is_seen_doing_it(browser: Browser, tmp_path: Path) -> None:
    """The checks below would all fail on this page."""
    file = tmp_path / "wrong.html"
    file.write_text(
        "<body><img src=http://luthier.invalid/x.png onerror='window.hit = 1'>"
        "<script>console.error('said'); alert('asked'); missing()</script><svg width=0 height=0></svg>"
    )
    page = browser.open(file)
    assert page.requests() == [file.as_uri(), "http://luthier.invalid/x.png"]
    assert page.value("window.hit") == 1
    said = "\n".join(page.complaints())
    assert all(word in said for word in ("said", "asked", "missing is not defined", "ERR_NAME_NOT_RESOLVED"))
    assert page.value(FIGURES) == [[0, 0]]
    file.write_text("<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\"><script>window.hit = 1</script>")
    page = browser.open(file)
    assert page.value("window.hit") is None and "Content Security Policy" in "\n".join(page.complaints())


@pytest.mark.parametrize("width", [1200, 400])
def test_the_report_is_drawn(browser: Browser, tmp_path: Path, width: int) -> None:
    run = SAMPLE.sample_run()
    file = report(run, tmp_path)
    page = browser.open(file, width)
    assert page.value("document.querySelector('h1').innerText") == headline(run)
    assert page.value("document.querySelector('h1').getBoundingClientRect().height") > 30
    # A figure for each set, the curves and the heat map.
    for drawn in (page.value(FIGURES), page.value(MARKS)):
        assert len(drawn) == len(run["metrics"]) + 2 and all(min(box) >= 10 for box in drawn), drawn
    assert page.value("getComputedStyle(document.querySelector('.card')).borderTopWidth") == "3px", "the style sheet applies"
    assert page.value(OVERFLOW) <= 0, "the page as a whole does not scroll sideways"
    assert "The plan" in page.text() and page.value(OVERFLOW) <= 0
    only_itself(page, file)


@pytest.mark.parametrize("width", [1200, 400])
def test_the_comparison_is_drawn(browser: Browser, tmp_path: Path, width: int) -> None:
    file = comparison(SAMPLE.sample_run(run="runs/tuned-1"), tmp_path)
    page = browser.open(file, width)
    assert page.value("document.querySelector('h1').innerText") == "control-1, tuned-1, side by side."
    for drawn in (page.value(FIGURES), page.value(MARKS)):
        # A figure for each set of each run, and the curves.
        assert len(drawn) == 7 and all(min(box) >= 10 for box in drawn), drawn
    assert page.value(OVERFLOW) <= 0
    only_itself(page, file)


@pytest.mark.parametrize("policy", [True, False], ids=["with policy", "without policy"])
@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("make", [report, comparison])
def test_text_from_data_is_shown_and_does_nothing(browser: Browser, tmp_path: Path, make: Any, text: str, policy: bool) -> None:
    """Escaping alone must hold: without the page's own policy, which is the belt, nothing runs either."""
    file = make(with_text(text), tmp_path)
    if not policy:
        whole = file.read_text(encoding="utf-8")
        bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", whole)
        assert bare != whole
        file.write_text(bare, encoding="utf-8")
    page = browser.open(file)
    assert " ".join(text.split()) in " ".join(page.text().split())
    assert page.value("document.querySelector('h1').getBoundingClientRect().height") > 30
    page.value("document.querySelectorAll('*').forEach(one => one.dispatchEvent(new Event('mouseover')))")
    assert elements_of(page) == harmless_elements(browser, make)
    only_itself(page, file)


def test_text_cannot_turn_the_line_around(browser: Browser, tmp_path: Path) -> None:
    """Overrides of the writing direction are replaced, and right-to-left text stays within its own box."""
    file = report(with_text("safe\u202egpj.exe\u2066"), tmp_path)
    page = browser.open(file)
    shown = page.text()
    assert "safe\ufffdgpj.exe\ufffd" in shown and not re.search("[\u202a-\u202e\u2066-\u2069]", shown)
    only_itself(page, file)
    page = browser.open(report(with_text("\u05e9\u05dc\u05d5\u05dd 123"), tmp_path))
    page.text()
    assert page.value("getComputedStyle(document.querySelector('.sample .text')).unicodeBidi") == "isolate"
    assert page.value("getComputedStyle(document.querySelector('.sample h4 small')).direction") == "ltr"
