"""Runs in the terminal, and runs side by side."""

from __future__ import annotations

import io
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from luthier.errors import LuthierError
from luthier.evaluate.intervals import mcnemar, newcombe
from luthier.report.compare import compare_runs, compare_summary, compared, set_comparisons, write_comparison
from luthier.report.figures import interval_figure
from luthier.report.story import gathered
from luthier.report.terminal import measured, run_table, summary

SAMPLE = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("report_sample.py"))))


def printed(what: RenderableType, width: int = 80) -> str:
    """What a terminal without color gets, with plain spaces between numbers and units."""
    console = Console(file=io.StringIO(), width=width, emoji=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().replace("\u00a0", " ")


def other_run(**held_out: Any) -> dict[str, Any]:
    """A second run of another technique; keyword arguments replace facts of its set `held_out`."""
    run: dict[str, Any] = SAMPLE.sample_run(run="runs/lora-1", name="lora")
    run["recipe"] = {**run["recipe"], "name": "lora", "tune": {"lora": {"rank": 8}}}
    items = SAMPLE.sample_items(60, 0, 0, 30, "held-out")
    run["metrics"]["held_out"] |= {"after": 0.5, "after_interval": [0.37, 0.63], "items": items, **held_out}
    return run


def test_the_summary_shows_cards_and_sets() -> None:
    text = printed(summary(SAMPLE.sample_run()))
    assert text.startswith("Learned held_out: 58 of 60 items right, 0 before; ")
    for line in ("held_out  contains       0 %  96.7 %  +96.7 points  better", "prose: worse", "2 min 31 s"):
        assert line in text


@pytest.mark.parametrize("name", ["a", "[bold]x[/bold] \x1b[2J " * 30, "long" * 80, "two words\n" * 50])
def test_the_summary_fits_a_small_terminal(name: str) -> None:
    entry = {**SAMPLE.sample_run()["metrics"]["general"], "metric": name}
    run = SAMPLE.sample_run(metrics={f"{name}{index}": entry for index in range(12)}, warnings=[name] * 9, name=name)
    lines = printed(summary(run)).splitlines()
    # Two warnings may take three lines more each than the one that is in the count.
    assert len(lines) <= 23 + 2 * 3 and max(map(len, lines)) <= 80


def test_a_warning_is_told_to_its_end() -> None:
    """A warning that is wider than the terminal lost its end, which is where it says what it means."""
    text = printed(summary(SAMPLE.sample_run(warnings=[], rows={"overlap": {"held_out": 60}})))
    assert "60 items of held_out also stand in the training rows: gains there prove nothing." in " ".join(text.split())


def test_text_from_data_is_neither_markup_nor_control() -> None:
    run = SAMPLE.sample_run(warnings=["[red]a[/red] [/] :smile: \x1b[31mb\x07\u202ec"])
    assert "warning: [red]a[/red] [/] :smile: \ufffd[31mb\ufffd\ufffdc" in printed(summary(run))


def test_the_summary_of_nothing_is_not_measured() -> None:
    """Fault 39: a missing measurement reads "not measured", never OK."""
    text = printed(summary({"status": "finished"}))
    assert text.count("not measured") == 6
    assert not any(character.isdigit() for character in text)


def test_the_list_of_runs_takes_any_run() -> None:
    text = printed(run_table([SAMPLE.sample_run(), {"name": "half-2", "status": "damaged"}]), width=120)
    first, second = text.splitlines()[1:]
    assert first.split() == [
        "quickstart-1",
        "finished",
        "84",
        "0.0603",
        "96.7",
        "%",
        "97",
        "%",
        "2",
        "min",
        "31",
        "s",
        "2026-11-21",
    ]
    assert second.split() == ["half-2", "damaged", *["-"] * 5]

    unfinished = {"run": "runs/a-1", "history": [{"step": 95, "loss": 1.0}], "planned_steps": 456}
    shown = [printed(run_table([{**unfinished, "status": status}]), width=120) for status in ("running", "crashed")]
    assert "running  95/456  1 " in shown[0] and "crashed  95/456  1 " in shown[1]


def test_the_list_of_runs_cuts_no_word_on_a_small_terminal() -> None:
    """The list of runs cut words at 80 columns: `finis...`, `stopp...`, `learn...`."""
    run = SAMPLE.sample_run(run="runs/teacher-of-tastes-and-a-longer-name-1", name="teacher-of-tastes-and-a-longer-name")
    text = printed(run_table([run, {"run": "runs/a-1", "status": "crashed", "planned_steps": 12345}]))
    assert max(map(len, text.splitlines())) <= 80 and "\u2026" not in text
    first = ["run", "status", "steps", "loss", "target", "retention", "time", "started"]
    assert text.splitlines()[0].split() == first and {"finished", "crashed", "2026-11-21"} <= set(text.split())
    names = "".join(line[: text.splitlines()[0].index("status")].strip() for line in text.splitlines()[1:-1])
    assert names == "teacher-of-tastes-and-a-longer-name-1"


def test_a_run_that_was_killed_says_how_it_goes_on() -> None:
    """A killed run was called unfinished, without its steps and without the command that continues it."""
    run = {"run": "runs/a-1", "status": "crashed", "history": [{"step": 95, "loss": 1.0}], "planned_steps": 456}
    text = " ".join(printed(summary(run)).split())
    assert "This run crashed after 95 steps. `luthier train --resume runs/a-1` goes on." in text
    assert "This run is under way: 95 of 456 steps taken" in " ".join(printed(summary({**run, "status": "running"})).split())


def test_sets_measured_on_one_model_are_listed() -> None:
    def result(metric: str, value: float, interval: tuple[float, float] | None, higher: bool) -> SimpleNamespace:
        return SimpleNamespace(metric=metric, value=value, interval=interval, n=60, higher_is_better=higher)

    results: Any = {
        "facts": result("exact_match", 0.5, (0.37, 0.63), True),
        "prose": result("perplexity", 21.4, None, False),
    }
    lines = [line.split() for line in printed(measured(results)).splitlines()[1:]]
    assert lines == [
        ["facts", "exact", "match", "60", "50", "%", "37", "to", "63", "%"],
        ["prose", "perplexity", "60", "21.4", "not", "measured"],
    ]


def test_runs_are_compared_in_pairs_of_items() -> None:
    """58 against 30 of 60, 28 of them gained and none lost: McNemar's p is 2 / 2**28. The intervals of both need not be apart."""
    runs = [SAMPLE.sample_run(), other_run()]
    facts = compared(runs)
    assert facts["runs"] == ["quickstart-1", "lora-1"]
    held_out, general = facts["metrics"]["held_out"], facts["metrics"]["general"]
    assert held_out["comparable"] and held_out["ahead"] == "quickstart-1" and held_out["verdict"] == ""
    beside = held_out["versus"]["lora-1"]
    assert beside["verdict"] == "worse" and beside["p_value"] == mcnemar(28, 0)
    assert beside["difference"] == pytest.approx(-28 / 60) and beside["interval"] == list(newcombe(30, 28, 0, 2))
    assert general["comparable"] and general["ahead"] is None and general["versus"]["lora-1"]["difference"] == 0
    assert general["verdict"] == general["versus"]["lora-1"]["verdict"] == "no change"
    text = " ".join(printed(compare_summary(runs), width=120).split())
    assert text.startswith("quickstart-1 is better on held_out; no change on general; not comparable on prose.")
    assert "50 % (0 % before), \u221246.7 points: worse" in text


def test_a_comparison_says_what_the_report_of_the_second_run_says() -> None:
    """A run that began with another measured before what that one reached after: the same answers have one verdict."""
    first, second = SAMPLE.sample_run(), SAMPLE.sample_run(run="runs/second-1")
    before = SAMPLE.sample_items(40, 0, 0, 13, "asked")
    after = SAMPLE.sample_items(40, 0, 0, 5, "asked")
    entry = {"metric": "equal", "role": "target", "n": 40, "before": 0.0, "higher_is_better": True}
    first["metrics"] = {"asked": {**entry, "after": 13 / 40, "items": before}}
    second["metrics"] = {"asked": {**entry, "after": 5 / 40, "items": after}}
    beside = compared([first, second])["metrics"]["asked"]["versus"]["second-1"]
    assert beside["p_value"] == mcnemar(8, 0) == 2 / 2**8 and beside["verdict"] == "worse"
    few = [SAMPLE.sample_run(), SAMPLE.sample_run()]
    for run in few:
        run["metrics"] = {"asked": {**entry, "n": 5, "after": 1.0, "items": SAMPLE.sample_items(5, 0, 0, 5, "asked")}}
    assert compared(few)["metrics"]["asked"]["verdict"] == "not measured"


def test_what_repeating_a_measurement_changes_is_no_difference_of_runs() -> None:
    runs = [SAMPLE.sample_run(), other_run()]
    runs[0]["repeat_baseline"] = {"held_out": 0.5}
    assert compared(runs)["metrics"]["held_out"]["versus"]["lora-1"]["verdict"] == "unclear"


def test_warnings_of_runs_are_told_once_with_those_that_say_them() -> None:
    runs = [SAMPLE.sample_run(), other_run()]
    for run in runs:
        run["rows"] = {"overlap": {"held_out": 2}}
    runs[1]["warnings"] = ["slow"]
    assert compared(runs)["warnings"] == [
        {
            "warning": "2 items of held_out also stand in the training rows: gains there prove nothing.",
            "runs": ["quickstart-1", "lora-1"],
        },
        {"warning": "slow", "runs": ["lora-1"]},
    ]
    text = " ".join(printed(compare_summary(runs), width=200).split())
    assert "gains there prove nothing. (every run)" in text and "warning: slow (lora-1)" in text
    many = {f"run-{place}": {"status": "finished", "warnings": ["slow"] if place else []} for place in range(7)}
    assert [one.who for one in gathered(many)] == ["run-1, run-2, run-3, run-4, 2 more"]


def test_the_page_ends_in_a_sentence_and_shows_answers_and_curves(tmp_path: Path) -> None:
    runs = [SAMPLE.sample_run(), other_run(), SAMPLE.sample_run(run="third-1")]
    folders = [tmp_path / "runs" / name for name in ("quickstart-1", "a b:c<1", "third-1")]
    page = write_comparison(runs, tmp_path / "pages" / "page.html", folders).read_text(encoding="utf-8")
    assert '<p class="answer">Unclear on held_out; no change on general; not comparable on prose.</p>' in page
    assert "is better</span>" not in page, "two runs are as good"
    assert 'href="../runs/a%20b%3Ac%3C1/report.html"' in page
    held_out = page.partition("Answers, side by side")[2].partition("general")[0]
    assert "held_out: 28 <span>of 60 items differ" in held_out.replace("</summary>", "")
    # Item 30 is the first that only the first and the third run know; those at which all agree come behind.
    assert held_out.index("held-out-030") < held_out.index("held-out-057") < held_out.index("held-out-000")
    first = held_out.partition("held-out-030")[2].partition("</article>")[0]
    assert first.count("better-answer") == 2 and first.count("I do not know.") == 1
    drawn = page.partition("<h2>Training</h2>")[2].partition("</svg>")[0]
    assert all(f'class="curve run-{place}"' in drawn for place in range(3)) and "loss, held_out" in drawn.replace(", contains", "")
    pair = write_comparison(runs[:2], tmp_path / "pair.html").read_text(encoding="utf-8")
    assert "quickstart-1 is better</span>" in pair and "<a " not in pair


def test_lower_is_better_where_it_is() -> None:
    runs = [SAMPLE.sample_run(), other_run(), other_run()]
    for run, after in zip(runs, (22.0, 12.0, 17.0), strict=True):
        items = [
            {"id": str(place), "prompt": "p", "expected": "", "before_score": 3.0, "after_score": math.log(after), "weight": 2.0}
            for place in range(8)
        ]
        run["metrics"] = {
            "prose": {**run["metrics"]["prose"], "after": after, "after_interval": [after - 1, after + 1], "items": items}
        }
    assert [one.ahead for one in set_comparisons(runs)] == [1]


@pytest.mark.parametrize(
    ("change", "why_not"),
    [
        ({"metric": "exact_match"}, "the metrics differ"),
        ({"items": []}, "its items were not recorded"),
        ({"items": SAMPLE.sample_items(59, 0, 0, 58, "held-out")}, "its items differ"),
        ({"items": SAMPLE.sample_items(60, 0, 0, 58, "other")}, "its items differ"),
        ({"after": None}, "not every run measured it"),
    ],
)
def test_other_sets_are_never_ranked(change: dict[str, Any], why_not: str, tmp_path: Path) -> None:
    """Fault 37: only the same items under the same metric are compared."""
    runs = [SAMPLE.sample_run(), other_run(**change)]
    entry = compared(runs)["metrics"]["held_out"]
    assert (entry["comparable"], entry["why_not"], entry["ahead"]) == (False, why_not, None)
    assert f"not comparable: {why_not}" in printed(compare_runs(runs), width=200)
    page = write_comparison(runs, tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert why_not in page and "-1 is better" not in page


def test_other_answer_lengths_and_absent_sets_are_never_ranked() -> None:
    """Fault 37: only the same decoding is compared."""
    other = other_run()
    other["recipe"] = {**other["recipe"], "evaluate": {"held_out": {"metric": "contains", "max_new_tokens": 8}}}
    found = {one.name: one.why_not for one in set_comparisons([SAMPLE.sample_run(), other])}
    assert found["held_out"] == "the longest answers allowed differ"
    del other["metrics"]["held_out"]
    found = {one.name: one.why_not for one in set_comparisons([SAMPLE.sample_run(), other])}
    assert found["held_out"] == "not every run measured it"


def test_the_order_of_items_does_not_matter() -> None:
    other = other_run()
    other["metrics"]["held_out"]["items"] = other["metrics"]["held_out"]["items"][::-1]
    found = compared([SAMPLE.sample_run(), other])["metrics"]["held_out"]
    assert found["comparable"] and found == compared([SAMPLE.sample_run(), other_run()])["metrics"]["held_out"]


def test_only_what_differs_in_the_recipes_is_named() -> None:
    assert compared([SAMPLE.sample_run(), other_run()])["recipe"] == {
        "tune": ["half", None],
        "tune.lora.rank": [None, 8],
    }
    assert compared([SAMPLE.sample_run(), SAMPLE.sample_run()])["recipe"] == {}


def test_figures_side_by_side_share_their_range() -> None:
    runs = [SAMPLE.sample_run(), SAMPLE.sample_run()]
    runs[1]["metrics"]["prose"] = {**runs[1]["metrics"]["prose"], "before": 40.0, "before_interval": [38.0, 42.0]}
    prose = next(one for one in set_comparisons(runs) if one.name == "prose")
    low, high = 19.8 - 0.15 * (42.0 - 19.8), 42.0 + 0.15 * (42.0 - 19.8)
    assert prose.span == pytest.approx((low, high))
    assert all(f"{high:.3g}" in interval_figure(one, prose.span) for one in prose.sets if one is not None)


def test_a_comparison_escapes_and_needs_two_runs(tmp_path: Path) -> None:
    hostile = other_run()
    hostile["run"] = "runs/<img src=x>"
    hostile["recipe"]["tune"] = "<script>alert(1)</script>"
    page = write_comparison([SAMPLE.sample_run(), hostile], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in page and "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for runs in ([], [hostile]):
        with pytest.raises(LuthierError, match="needs two runs"):
            compare_runs(runs)
