"""The synthetic benchmark as a benchmark: profiles of models and runs, the radar chart, and its sets beside a recipe's own."""

from __future__ import annotations

import io
import json
import math
import os
import re
import runpy
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import luthier
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.evaluate.compare import compare
from luthier.evaluate.intervals import wilson
from luthier.evaluate.metrics import METRICS
from luthier.evaluate.sets import EvalSet, measure
from luthier.lab import benchmark
from luthier.lab import profile as profiles
from luthier.lab.benchmark_sets import named, with_world
from luthier.lab.profile import headline, profile
from luthier.lab.profile_page import profile_page, profile_table, write_profile
from luthier.recipe import make_recipe, read_recipe
from luthier.report.facts import Estimate, sets_of
from luthier.report.html import report_page
from luthier.report.radar import Axis, axes_of, benchmark_figure, radar_figure
from luthier.report.story import headline as story
from luthier.rows.read import read
from tests.unit.browser import Browser
from tests.unit.test_evaluate_sets import TOKENIZER, saying

SKILLS = ("boxes", "sort", "traces", "stories")
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of rows go into a cache of the test's own."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def recipe_data(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of a few steps on a tiny model."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in benchmark.rows("sort", "train", 16)))
    return {
        "name": "sorting",
        "model": "tiny:llama",
        "rows": {"train": str(rows)},
        "train": {"steps": 4, "batch_rows": 4, "precision": "fp32", "learning_rate": 1e-2},
        "repeat_baseline": False,
        "out": str(folder / "runs"),
    } | changes


def call(*words: object) -> Result:
    """Call the command line."""
    return CliRunner().invoke(app, [str(word) for word in words])


def facts_of(result: Result, code: int = 0) -> Any:
    """The one JSON document on standard output."""
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def entry(before: float | None, after: float | None, *, higher: bool = True, note: str = "") -> dict[str, Any]:
    """A skill's facts, with made-up values."""
    verdict = "not measured" if before is None or after is None else "better" if after > before else "no change"
    return {
        "meaning": "do <this>",
        "taught": True,
        "metric": "equal" if higher else "loss",
        "role": "retention",
        "higher_is_better": higher,
        "n": 10,
        "before": before,
        "before_interval": None if before is None else (max(0.0, before - 0.1), before + 0.1),
        "after": after,
        "after_interval": None,
        "difference": None if before is None or after is None else after - before,
        "difference_interval": None,
        "verdict": verdict,
        "note": note,
        "retained": None,
        "items": (),
    }


def profile_facts(skills: dict[str, dict[str, Any]], model: str = "some model", compares: bool = False) -> dict[str, Any]:
    return {"model": model, "luthier": "0", "count": 10, "seed": 0, "compares": compares, "skills": skills}


def test_a_profile_is_what_the_checkers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says `box A` to everything is right exactly where that is the answer."""
    monkeypatch.setattr(profiles, "open_model", lambda *given, **options: (saying("box A"), TOKENIZER))
    found = profile("anything", skills=SKILLS, count=20)
    right = sum(row["answer"] == "box A" for row in benchmark.rows("boxes", "held_out", 20))
    assert 0 < right < 20
    boxes = found["skills"]["boxes"]
    assert (boxes["after"], boxes["after_interval"], boxes["n"]) == (right / 20, wilson(right, 20), 20)
    assert (boxes["before"], boxes["verdict"], boxes["metric"], boxes["taught"]) == (None, "not measured", "equal", True)
    assert {item["after"] for item in boxes["items"]} == {"box A"} and len(boxes["items"]) == 20
    assert list(found["skills"]) == list(SKILLS) and not found["compares"]
    assert found["skills"]["sort"]["after"] == 0.0 and found["skills"]["sort"]["taught"] is False
    assert found["skills"]["stories"]["higher_is_better"] is False and found["skills"]["stories"]["after"] > 1
    assert headline(found) == "At least half right in 0 of 3 skills with answers."


def test_every_skill_has_rows_its_metric_takes() -> None:
    sets = benchmark.sets(count=3)
    assert list(sets) == list(benchmark.SKILLS)
    for name, one in sets.items():
        made = EvalSet(name, read(one["rows"]), one["metric"], one["role"], one["max_new_tokens"])
        assert len(made.used) == 3 and made.chosen_metric in METRICS


def test_a_skill_that_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(tune: Any, tokenizer: Any, sets: Sequence[EvalSet], **options: Any) -> Any:
        if sets[0].name in failing:
            raise LuthierError("93 tokens exceed the model's context of 64")
        return measure(tune, tokenizer, sets, **options)

    failing = {"sort"}
    monkeypatch.setattr(profiles, "measure", refused)
    monkeypatch.setattr(profiles, "open_model", lambda *given, **options: (saying("box A"), TOKENIZER))
    found = profile("anything", skills=["boxes", "sort"], count=6)["skills"]
    assert found["sort"]["after"] is None and found["sort"]["n"] is None and "exceed" in found["sort"]["note"]
    assert found["boxes"]["after"] is not None
    failing.add("boxes")
    with pytest.raises(LuthierError, match="exceed"):
        profile("anything", skills=["boxes", "sort"], count=6)


def test_a_profile_of_a_run_compares_with_its_base(tmp_path: Path) -> None:
    """The profile of a run says the same as the run itself where it measured the same items."""
    run = luthier.train(with_world(make_recipe(recipe_data(tmp_path)), skills=SKILLS, count=6))
    found = profile(str(run.folder), skills=SKILLS, count=6)
    assert found["compares"] and "without a change" in headline(found)
    for name in SKILLS:
        told, measured = run.metrics[f"benchmark/{name}"], found["skills"][name]
        for key in ("metric", "n", "before", "after", "verdict"):
            assert measured[key] == pytest.approx(told[key], abs=1e-6), (name, key)
    assert found["skills"]["stories"]["before"] != found["skills"]["stories"]["after"], "training changed something"


def test_the_radar_stands_where_the_numbers_say() -> None:
    """Three axes at 0, 120 and 240 degrees from the top, clockwise; center (320, 242), radius 190."""
    axes = [
        Axis("all", Estimate(0.0), Estimate(1.0)),
        Axis("half", Estimate(1.0), Estimate(0.5)),
        Axis("no", Estimate(0.5), Estimate(0.0)),
    ]
    svg = ElementTree.fromstring(str(radar_figure(axes)))
    areas = {one.get("class"): one.get("points") for one in svg.iter("polygon")}
    x, y = 190 * math.sin(math.radians(120)), -190 * math.cos(math.radians(120))
    assert areas["area after"] == f"320,52 {320 + x / 2:.2f},{242 + y / 2:g} 320,242"
    assert areas["area before"] == f"320,242 {320 + x:.2f},{242 + y:g} {320 - x / 2:.2f},{242 + y / 2:g}"
    assert {one.text for one in svg.iter("text")} >= {"all", "half", "no", "before", "after"}
    assert (
        svg.get("aria-label") == "all 100\u00a0%, 0\u00a0% before; half 50\u00a0%, 100\u00a0% before; no 0\u00a0%, 50\u00a0% before"
    )
    assert str(radar_figure(axes[:2])) == "", "two axes have no area"
    alone = str(radar_figure([one._replace(before=Estimate(None)) for one in axes]))
    assert "area after" in alone and "before" not in alone


def test_only_shares_that_were_measured_are_axes() -> None:
    values = {
        "benchmark/two_hop": entry(0.5, 0.7),
        "benchmark/stories": entry(1.5, 1.4, higher=False),
        "benchmark/tools": entry(0.5, None),
        "held_out": entry(0.0, 1.0),
    }
    axes = axes_of(sets_of({"metrics": values}))
    assert [axis.name for axis in axes] == ["two hop", "held out"]
    assert (axes[0].before, axes[0].after.value) == (Estimate(0.5, 0.4, 0.6), 0.7)
    only_after = axes_of(sets_of({"metrics": {"sort": entry(None, 0.2), "case": entry(None, None)}}))
    assert only_after == [Axis("sort", Estimate(None), Estimate(0.2))]


def test_a_report_draws_the_world_and_nothing_else() -> None:
    values = {f"benchmark/{name}": entry(0.5, 0.7) for name in ("copy", "sort", "case")}
    assert 'class="radar"' in report_page({"metrics": {**values, "held_out": entry(0.0, 1.0)}})
    assert 'class="radar"' not in report_page({"metrics": {name.removeprefix("benchmark/"): one for name, one in values.items()}})
    assert "held" not in str(benchmark_figure(sets_of({"metrics": {**values, "held_out": entry(0.0, 1.0)}})))


def test_many_sets_that_got_worse_are_counted() -> None:
    worse = {f"benchmark/{name}": {**entry(0.9, 0.1), "verdict": "worse"} for name in ("copy", "sort", "case", "count")}
    told = story({"metrics": worse, "status": "finished"})
    assert told.count("got worse on benchmark/") == 2 and "got worse on 2 more sets below" in told


def test_the_page_of_a_profile() -> None:
    hostile = '<script>x</script>"><img src=x>'
    skills = {
        "copy": entry(None, 0.5),
        "sort": entry(None, 1.0),
        "case": entry(None, 0.25),
        "tools": entry(None, None, note=hostile),
    }
    skills["copy"]["items"] = [{"id": hostile, "prompt": hostile, "expected": hostile, "after": hostile, "after_score": 0.0}]
    page = profile_page(profile_facts(skills, model=hostile))
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") >= 5
    assert 'class="radar"' in page and "not measured" in page and "Before" not in page
    assert not re.search(r"(?:src|href)=", page.replace("src=x", "")), "nothing is fetched"
    compared = profile_page(profile_facts({name: entry(0.5, 0.9) for name in skills}, compares=True))
    assert "Of 4 skills: 4 better, 0 worse, 0 without a change, 0 unclear." in compared and "Before" in compared


def test_the_table_fits_a_narrow_terminal() -> None:
    skills = {name: entry(0.5, 0.9) for name in benchmark.SKILLS}
    for compares in (False, True):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(profile_table(profile_facts(skills, compares=compares)))
        lines = console.export_text().splitlines()
        assert len(lines) == 2 + len(skills) and all("90\u00a0%" in line for line in lines[2:])


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_is_drawn(browser: Browser, tmp_path: Path, width: int) -> None:
    skills = {name: entry(0.5, 0.7) for name in benchmark.SKILLS}
    skills["tools"] = entry(None, None, note="93 tokens and an answer of up to 48 exceed the model's context of 128")
    file = write_profile(profile_facts(skills, compares=True), tmp_path / "page.html")
    page = browser.open(file, width)
    box = page.value("(one => [one.width, one.height])(document.querySelector('svg.radar').getBoundingClientRect())")
    assert min(box) >= 250 and page.value(OVERFLOW) <= 0
    assert page.complaints() == [] and page.requests() == [file.resolve().as_uri()]


def test_the_world_joins_a_recipe_as_files(tmp_path: Path, own_cache: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"prompt": "Say one.", "answer": "one"}) + "\n")
    plain = make_recipe(recipe_data(tmp_path, evaluate={"asked": {"rows": str(asked)}}))
    joined = with_world(plain, skills=["boxes", "stories"], count=5)
    assert list(joined.evaluate) == ["asked", "benchmark/boxes", "benchmark/stories"] and list(plain.evaluate) == ["asked"]
    boxes = joined.evaluate["benchmark/boxes"]
    assert (boxes.metric, boxes.role, boxes.max_new_tokens) == ("equal", "retention", benchmark.SKILLS["boxes"].max_new_tokens)
    file = Path(boxes.rows)
    assert file.parent == own_cache / "world"
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept == benchmark.rows("boxes", "held_out", 5)
    written = tmp_path / "written.yaml"
    written.write_text(joined.as_yaml())
    assert read_recipe(written).hash() == joined.hash() == with_world(joined, skills=["boxes", "stories"], count=5).hash()
    other = with_world(plain, skills=["boxes"], count=4).evaluate["benchmark/boxes"].rows
    assert other != boxes.rows
    for damage in (file.unlink, lambda: file.write_text("{}\n")):
        damage()
        with_world(plain, skills=["boxes"], count=5)
        assert [json.loads(line) for line in file.read_text().splitlines()] == kept


def test_a_run_with_the_world_stops_and_resumes(tmp_path: Path) -> None:
    """Fault 27: resuming from the run's own recipe, which names the rows' files, ends as if it had not stopped."""
    recipe = with_world(make_recipe(recipe_data(tmp_path)), skills=["boxes", "stories"], count=6)
    whole = luthier.train(recipe)

    def ask(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = luthier.train(recipe, tell=ask)
    assert stopped.facts["status"] == "stopped"
    resumed = facts_of(call("train", "--resume", stopped.folder, "--json"))
    assert resumed["status"] == "finished" and resumed["weights_sha256"] == whole.facts["weights_sha256"]
    assert resumed["metrics"].keys() == {"benchmark/boxes", "benchmark/stories"}
    assert resumed["metrics"]["benchmark/stories"]["after"] == whole.metrics["benchmark/stories"]["after"]


def test_commands_with_the_world(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(recipe_data(tmp_path)))
    world_of = ("--benchmark", "--skills", "boxes, copy,sort", "--count", 3, "--json")
    planned = json.dumps(facts_of(call("plan", file, *world_of)))
    assert "benchmark/copy" in planned and "benchmark/case" not in planned
    run = facts_of(call("train", file, *world_of))
    assert (
        list(run["metrics"]) == ["benchmark/boxes", "benchmark/copy", "benchmark/sort"]
        and run["metrics"]["benchmark/copy"]["n"] == 3
    )
    assert run["command"].endswith("--benchmark --skills 'boxes, copy,sort' --count 3")
    assert 'class="radar"' in Path(run["run"], "report.html").read_text()
    page = tmp_path / "page.html"
    found = facts_of(call("eval", "tiny:llama", *world_of, "--page", page))
    assert list(found["skills"]) == ["boxes", "copy", "sort"] and found["count"] == 3
    assert 'class="radar"' in page.read_text()
    shown = call("eval", "tiny:llama", "--benchmark", "--skills", "copy", "--count", 3)
    assert shown.exit_code == 0 and "copy" in shown.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("eval", "tiny:llama", "--benchmark", "--skills", "srot"), "sort"),
        (("eval", "tiny:llama", "--benchmark", "--skills", "sort,sort"), "twice"),
        (("eval", "tiny:llama", "--benchmark", "--skills", "sort,"), "skill ``"),
        (("eval", "tiny:llama", "--benchmark", "--tasks", "task"), "more than one"),
        (("eval", "tiny:llama", "--skills", "sort"), "--benchmark"),
        (("eval", "tiny:llama", "--page", "x.html"), "--benchmark"),
        (("eval", "tiny:llama", "--count", "5"), "--benchmark"),
        (("rows", "benchmark", "tools", "--count", "5000", "--split", "held_out", "--out", "x.jsonl"), "ask for"),
        (("eval", "tiny:llama"), "--benchmark"),
        (("rows", "benchmark", "srot", "--out", "x.jsonl"), "sort"),
        (("rows", "benchmark", "sort", "--split", "test", "--out", "x.jsonl"), "held_out"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = facts_of(call(*words, "--json"), code=2)
    assert told in error["error"] + (error["fix"] or "")
    assert list(tmp_path.iterdir()) == []


def test_skills_without_the_world_are_refused_in_training(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(recipe_data(tmp_path)))
    assert "--benchmark" in facts_of(call("train", file, "--skills", "sort", "--json"), code=2)["fix"]
    assert not (tmp_path / "runs").exists()


def test_rows_of_the_world_as_a_file(tmp_path: Path) -> None:
    target = tmp_path / "some" / "sort.jsonl"
    words = ("rows", "benchmark", "sort", "--count", 7, "--split", "held_out", "--seed", 3, "--difficulty", 2, "--out", target)
    told = facts_of(call(*words, "--json"))
    assert told == {"file": str(target), "skill": "sort", "split": "held_out", "rows": 7, "seed": 3, "difficulty": 2}
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert lines == benchmark.rows("sort", "held_out", 7, seed=3, difficulty=2)
    before = target.read_bytes()
    assert "exists" in facts_of(call(*words, "--json"), code=2)["error"] and target.read_bytes() == before
    assert named("") is None and named("sort, case") == ["sort", "case"]


def test_sets_without_accepted_answers() -> None:
    """Prompts alone are enough where the answer alone is measured; nothing there is right, so nothing is kept or lost."""
    prompts = [{"id": str(number), "prompt": f"Tell me {number}."} for number in range(6)]
    one = EvalSet("free", read(prompts), "type_token_ratio", "retention", max_new_tokens=8)
    found = measure(saying("a b a b"), TOKENIZER, [one])["free"]
    assert found.value == 0.5 and found.higher_is_better and {item.expected for item in found.items} == {""}
    answered = EvalSet("free", read([{**row, "answer": "a"} for row in prompts]), "repetition", max_new_tokens=16)
    assert measure(saying("a a a a a"), TOKENIZER, [answered])["free"].value == 0.5
    compared = compare(found, found)
    assert compared["retained"] is None and compared["verdict"] == "no change"
    assert sets_of({"metrics": {"free": compared}})[0].samples == ()
    with pytest.raises(LuthierError, match="`contains` needs rows with a `prompt` and an `answer`") as refused:
        EvalSet("free", read(prompts), "contains")
    assert "type_token_ratio, repetition" in refused.value.fix


@pytest.mark.parametrize(("metric", "answer"), [("last_number", "none"), ("tool_call", "weather(3)")])
def test_an_answer_that_nothing_can_equal_is_refused(metric: str, answer: str) -> None:
    """Such a row would count every answer as wrong, silently."""
    with pytest.raises(LuthierError, match="no answer could ever equal") as refused:
        EvalSet("asked", read([{"id": "first", "prompt": "How many?", "answer": ["3", answer]}][:1]), metric)
    assert "row first" in refused.value.where


def test_the_page_on_the_world_is_made_from_the_code() -> None:
    generate = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "generate.py"))
    skills = generate["world"]().splitlines()
    assert len(skills) == 2 + len(benchmark.SKILLS) + 2
    (row,) = benchmark.rows("copy", "train", 1)
    assert f"{row['prompt']}<br>**{row['completion']}**" in next(line for line in skills if line.startswith("| `copy` |"))
    tools = next(line for line in skills if line.startswith("| `tools` |"))
    assert tools.count("|") == 6 and "| `tool_call` | no |" in tools
    metrics = generate["metrics"]().splitlines()
    assert len(metrics) == 2 + len(METRICS)
    assert next(line for line in metrics if "`repetition`" in line).endswith("| a `prompt` | lower |")
