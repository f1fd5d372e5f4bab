"""The page of a sweep: what it says, and that nothing in it runs."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from luthier.lab.verdict import t_quantile
from luthier.report.compare import write_comparison
from luthier.report.html import write_report
from luthier.report.words import number, percent
from luthier.sweep.facts import forgotten, seconds_per_step, set_facts, summary
from luthier.sweep.figure import Point, tradeoff_figure
from luthier.sweep.page import cell_of, cost_cell, failures_of, headline, step_time, sweep_page, sweep_summary, write_sweep
from tests.unit.browser import Browser
from tests.unit.test_report_pages import SAMPLE

GAP = "\u00a0"
HOSTILE = "<script>window.hit = 1</script>\"'><img src=x onerror=window.hit=1></svg></title>"


def sample(text: str = "plain") -> dict[str, Any]:
    """A sweep of two variants, of which the second failed at one seed; every text of a user holds `text`."""
    error = {"error": f"no memory {text}", "where": f"log {text}", "fix": f"fix {text}"}

    def variant(name: str, skill: list[float | None], lost: list[float | None], errors: list[Any]) -> dict[str, Any]:
        runs = [{"seed": seed, "run": f"runs/{name}-{seed}-1", "error": one} for seed, one in enumerate(errors)]
        trial = {"seed": 10_000, "run": "runs/search-1", "error": None}
        return {
            "name": name,
            "changes": {"tune": name},
            "learning_rate": 3e-4,
            "learning_rate_center": 1e-4,
            "learning_rate_source": f"{text}'s default",
            "learning_rate_note": "the chosen rate 0.0003 is the largest that was tried",
            "learning_rate_side": 1,
            "learning_rates_added": [9e-4, 2.7e-3],
            "tuned": name.startswith("one"),
            "search": [{**trial, "learning_rate": 1e-4, "value": 0.25}, {**trial, "learning_rate": 3e-4, "value": 0.75}],
            "runs": runs,
            "target": summary(skill),
            "forgetting": summary(lost),
            "trained_parameters": summary([None if one is None else 4096 for one in skill]),
            "peak_memory_bytes": summary([None if one is None else 2**30 for one in skill]),
            "seconds_per_step": summary([None if one is None else 0.125 for one in skill]),
            "sets": {f"new {text}": summary(skill)},
        }

    return {
        "luthier": "1.2.3",
        "name": f"small {text}",
        "folder": "sweeps/small",
        "recipe": f"{text}.yaml",
        "command": f"luthier sweep {text}",
        "made": "2026-11-21T12:00:00+00:00",
        "model": f"model {text}",
        "keys": [f"tune {text}"],
        "seeds": [0, 1],
        "learning_rates": 2,
        "choosing_seed": 10_000,
        "chosen_by": f"new {text}",
        "target": f"new {text}",
        "where": "this machine",
        "jobs": 2,
        "sets": {
            f"new {text}": {
                "metric": "equal",
                "role": "target",
                "n": 8,
                "before": 0.125,
                "higher_is_better": True,
                "is_share": True,
            }
        },
        "warnings": [{"warning": f"8 items stand in the rows {text}", "runs": [f"one-{text}"], "who": f"one-{text}"}],
        "answer": {
            "sentence": f"Take one {text}: it is better.",
            "take": f"one {text}",
            "sure": True,
            "run_again": [],
            "notes": [f"Two more were tried for one {text}."],
            "beside": [],
        },
        "variants": [
            variant(f"one {text}", [0.5, 0.75], [0.0, 0.25], [None, None]),
            variant(f"two {text}", [0.25, None], [0.5, None], [None, error]),
        ],
    }


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("<main>")[2]))


def test_the_page_tells_rates_means_intervals_seeds_and_failures() -> None:
    text = words_of(sweep_page(sample()))
    assert "1. one plain 62.5 % 0 to 100 % 50 %, 75 % 12.5 % 0 to 100 % 0 %, 25 % 4,096 1.0 GiB 125 ms 0.0003 2 of 2" in text
    assert "2. two plain not tuned 25 % 25 %, not measured 50 % 50 %, not measured 4,096 1.0 GiB 125 ms 0.0003 1 of 2" in text
    assert "0.0001: 25 % 0.0003: 75 % chosen" in text and "the chosen rate 0.0003 is the largest that was tried" in text
    assert (
        "1 run gave no result" in text and "two plain , learning rate 0.0003, seed 1: no memory plain log plain fix plain" in text
    )
    assert "judged by new plain at seed 10000" in text and "The same set shows the target" in text
    assert "new plain equal, target, 8 items 12.5 %" in text
    assert (
        "0.0009 and 0.0027 added beyond its end; the chosen rate" in text and "not tuned: no learning rate taught anything" in text
    )
    assert "1 warning 8 items stand in the rows plain (one-plain)" in text
    header = re.sub(r"<[^>]+>", "", sweep_page(sample()).partition("</header>")[0].partition("<h1>")[2])
    assert header.split("\n")[1:3] == ["Take one plain: it is better.", "Two more were tried for one plain."]
    assert headline(sample()) == "2 variants of tune plain, 2 seeds each."


def test_a_sweep_of_which_nothing_was_finished_has_a_page() -> None:
    facts = sample()
    for variant in facts["variants"]:
        variant |= {
            "learning_rate": None,
            "runs": [],
            "search": [],
            "sets": {},
            "learning_rate_note": "no learning rate gave a score",
        }
        variant |= {
            key: summary([]) for key in ("target", "forgetting", "trained_parameters", "peak_memory_bytes", "seconds_per_step")
        }
    facts["sets"] = {}
    text = words_of(sweep_page(facts))
    assert "1. one plain not measured not measured not measured not measured not measured none 0 of 2" in text
    assert "No figure" in text and "no run was finished" in text and "<svg" not in text


def test_numbers_over_seeds() -> None:
    found = summary([0.2, None, 0.6])
    half = t_quantile(1) * 0.2
    assert found["values"] == [0.2, None, 0.6] and found["mean"] == pytest.approx(0.4)
    assert found["interval"] == pytest.approx([0.4 - half, 0.4 + half]) and (found["low"], found["high"]) == (0.2, 0.6)
    assert summary([0.5])["interval"] is None and summary([None])["mean"] is None
    assert forgotten({"retained": 0.75}) == 0.25 and forgotten({"retained": None}) is None
    assert seconds_per_step({"seconds": 3.0, "steps": 12}) == 0.25 and seconds_per_step({"seconds": 3.0}) is None


def test_cells_replication_no_more_than_the_seeds_show() -> None:
    assert cell_of(summary([0.5, 0.5, 0.5]), percent) == (f"50{GAP}%", "", f"all 50{GAP}%")
    assert cell_of(summary([0.5]), percent) == (f"50{GAP}%", "", "")
    assert cell_of(summary([12.0, 14.0]), number) == ("13", "0.294 to 25.7", "12, 14")
    assert cell_of(summary([-1.0, 1.0]), number).interval == "-12.7 to 12.7"
    assert cost_cell(summary([0.25, 0.5]), step_time) == (f"375{GAP}ms", f"250 to 500{GAP}ms", "")
    assert step_time(2.5) == f"2.5{GAP}s"


def test_a_set_that_did_not_begin_alike_has_no_value_before() -> None:
    def run(before: float) -> dict[str, Any]:
        return {
            "metrics": {
                "new": {"metric": "loss", "role": "target", "n": 8, "before": before, "after": 0.5, "higher_is_better": False}
            }
        }

    assert set_facts([run(2.0), run(2.0001)])["new"]["before"] == 2.0
    assert set_facts([run(2.0), run(2.5)])["new"]["before"] is None
    assert set_facts([run(2.0)])["new"]["is_share"] is False


def test_the_figure_draws_every_seed_and_numbers_the_variants() -> None:
    variants = [Point("one", [0.5, 0.75], [0.0, 0.25], 0.625, 0.125), Point("none", [None], [None], None, None)]
    drawn = tradeoff_figure([*variants, Point("three", [0.25], [0.5], 0.25, 0.5)], "new", percent, base=0.125)
    assert drawn.count('class="seed"') == 3 and drawn.count('class="mean"') == 2 and drawn.count("dot before") == 1
    assert re.findall(r'text-anchor="middle">(\d)</text>', drawn) == ["1", "3"], "a variant without numbers keeps its own"
    assert "one: 50\u00a0%, forgot 0\u00a0%" in drawn
    assert tradeoff_figure(variants[1:], "new", percent) == ""
    assert tradeoff_figure([variants[0]._replace(tuned=False)], "new", percent).count('class="mean hollow"') == 1


def test_hostile_text_is_escaped_and_nothing_runs(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write_sweep(sample(HOSTILE), tmp_path / "sweep.html"))
    shown = page.text()
    assert shown.count("<script>window.hit = 1</script>") >= 10, "it is shown, as text"
    assert page.value("window.hit === undefined && document.scripts.length === 0 && document.images.length === 0")
    assert not page.complaints()
    for width in (1100, 390):
        page.resize(width)
        assert page.value("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_every_cell_says_its_column_where_a_narrow_window_stacks_them(tmp_path: Path) -> None:
    """On a narrow window the tables and the figure of a sweep and of a comparison lay beyond its edge."""
    runs = [{"name": name, "recipe": {"seed": seed}, "seconds": 1.0} for seed, name in enumerate(("one", "two"))]
    for path in (write_sweep(sample(), tmp_path / "sweep.html"), write_comparison(runs, tmp_path / "compare.html")):
        page = path.read_text(encoding="utf-8")
        tables = re.findall(r"<table[^>]*>.*?</table>", page, re.DOTALL)
        assert len(tables) >= 2
        for table in tables:
            assert "stacked" in table.partition(">")[0]
            assert table.count("<td") == table.count("data-label=") > 0
    assert ".scroll > svg.tradeoff { width: 100%; }" in page


def test_a_narrow_window_cuts_nothing(browser: Browser, tmp_path: Path) -> None:
    """Nothing that could be scrolled sideways is wider than its place."""
    runs = [SAMPLE.sample_run(), SAMPLE.sample_run(run="runs/a-second-run-of-a-rather-long-name-1")]
    files = (
        write_sweep(sample(), tmp_path / "sweep.html"),
        write_comparison(runs, tmp_path / "compare.html"),
        write_report(runs[0], tmp_path / "report.html"),
    )
    for file in files:
        page = browser.open(file, 390)
        page.text()
        assert page.value("[...document.querySelectorAll('.scroll')].every(one => one.scrollWidth <= one.clientWidth)"), file.name
        beyond = (
            "[...document.querySelectorAll('main *, header *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1)"
        )
        assert page.value(f"{beyond}.length") == 0, file.name
        assert page.value("[...document.querySelectorAll('svg')].every(one => one.getBoundingClientRect().width >= 100)"), file.name


def test_the_terminal_shows_the_same() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sweep_summary(sample("[red]x")))
    text = console.export_text()
    assert text.startswith("Take one [red]x: it is better.") and "two [red]x (not tuned)" in text
    assert "warning: 8 items stand in the rows [red]x (one-[red]x)" in text
    assert "one [red]x" in text and f"62.5{GAP}%" in text and "seed 1: no memory [red]x" in text
    assert [one.what for one in failures_of(sample())] == ["no memory plain"]
