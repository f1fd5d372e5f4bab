"""`luthier replicate`: what people and scripts see, the files it writes, and the page made from them."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import runpy
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.lab import calibrating, command, replications, verdict
from luthier.lab.command import minutes_of
from luthier.lab.figure import draw
from luthier.lab.overview import draw_effects, effect_of
from luthier.lab.pool import workers
from luthier.lab.results import expected, file_stem, looked, save, shown, spread
from luthier.lab.runner import here
from luthier.lab.verdict import Design
from luthier.lab.verdicts import NOT_AGAIN, entry, load, under_rule
from luthier.report.words import size

TOY = runpy.run_path(str(Path(__file__).with_name("lab_toys.py")))["TOY"]
RESULT: dict[str, Any] = {
    "replication": "toy",
    "title": "A <toy> | one",
    "papers": ["2404.18466"],
    "rows": [8],
    "says": "Half is as good as [all].",
    "question": "Is half enough?",
    "unit": "share of items",
    "rule": {"looks": [8, 16], "level": 0.028, "lab": True},
    "verdict": "cannot tell",
    "expectations": [
        {
            "measure": "held_out",
            "variant": "half",
            "versus": "full",
            "direction": "not_less",
            "margin": 0.05,
            "says": "",
            "differences": [0.1, 0.2, 0.3],
            "mean": 0.2,
            "interval": [-0.0484, 0.448],
            "verdict": "holds",
            "note": "",
        },
        {
            "measure": "held_out",
            "variant": "half",
            "versus": "full",
            "direction": "more",
            "margin": 0.5,
            "says": "much better",
            "differences": [0.1, 0.2, 0.3],
            "mean": 0.2,
            "interval": [-0.0484, 0.448],
            "verdict": "does not hold",
            "note": "",
        },
    ],
    "measures": ["held_out", "nothing"],
    "variants": [
        {
            "name": "full",
            "meaning": "all numbers",
            "rate": 0.001,
            "rate_note": "the chosen rate 0.001 is the largest that was tried",
            "tried": [{"rate": 0.0003, "score": None}, {"rate": 0.001, "score": 0.5}],
            "numbers": {"held_out": [0.5, 0.25, 0.75], "nothing": [None, None, None]},
        },
        {
            "name": "half",
            "meaning": "",
            "rate": None,
            "rate_note": "its stages name their own learning rates",
            "tried": [],
            "numbers": {"held_out": [0.6, None, 1.05], "nothing": [None, None, None]},
        },
    ],
    "notes": "Smaller.",
    "short": [],
    "edge": ["full: the chosen rate 0.001 is the largest that was tried"],
    "seeds": [0, 1, 2],
    "model": {"name": "tiny:llama", "fingerprint": "0"},
    "versions": {"luthier": "0.1", "torch": "2", "transformers": "5", "python": "3"},
    "machine": "a processor, 2 cores, 8 GiB",
    "runs": 8,
    "seconds": 120.0,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of replications, beside a cache of their own; jobs are done in this process."""
    monkeypatch.setenv("LUTHIER_REPLICATIONS", str(tmp_path))
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    own = Path(command.replications.__file__).parent
    monkeypatch.setattr(
        command.replications, "names", lambda: sorted(path.stem for path in tmp_path.glob("*.py") if path.parent != own)
    )
    (tmp_path / "toy.py").write_text(TOY)
    return tmp_path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are done in this process, which has loaded everything already."""

    class Here:
        def __init__(self, count: int) -> None:
            assert count >= 1

        def __enter__(self) -> Callable[..., Any]:
            return here

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(command, "workers", Here)


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["replicate", *map(str, words)])


def facts(result: Result, code: int = 0) -> Any:
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_a_replication_from_the_command_line_in_processes_of_its_own(folder: Path) -> None:
    out = folder / "out"
    found = facts(call("toy", "--seeds", 2, "--jobs", 1, "--out", out, "--json"))
    assert found["replication"] == "toy" and found["seeds"] == [0, 1] and found["runs"] == 6
    assert found == json.loads((out / "toy.json").read_text())
    assert found["variants"][0]["rate"] == 1e-3 and len(found["variants"][0]["numbers"]["loss"]) == 2
    ElementTree.fromstring((out / "toy.svg").read_text())
    listed = facts(call("--list", "--out", out, "--json"))
    told = {key: entry(found)[key] for key in ("verdict", "words")}
    assert listed == [{"name": "toy", "title": "A toy", **told, "minutes": 1}]
    assert told["verdict"] == NOT_AGAIN, "two seeds are not the lab's rule"
    assert "not measured" in call("--list", "--out", folder / "elsewhere").output
    assert (folder / "cache" / "lab" / "stages").is_dir()
    assert facts(call("--forget", "--json")) == {"forgotten": str(folder / "cache" / "lab")}
    assert not (folder / "cache" / "lab").exists() and (folder / "cache").exists()


@pytest.mark.usefixtures("in_process")
def test_replications_whose_data_sets_are_not_there_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_DATA", str(folder / "data"))
    (folder / "data" / "mawps").mkdir(parents=True)
    (folder / "data" / "mawps" / "train.jsonl").write_text("{}")
    needing = TOY.replace('name="toy"', 'name="needing"').replace("minutes=1,", 'minutes=1, data=("mawps/train", "mawps/test"),')
    (folder / "needing.py").write_text(needing)
    found = facts(call("--all", "--seeds", 1, "--out", folder / "out", "--json"))
    assert [one["replication"] for one in found["results"]] == ["toy"]
    assert found["left_out"] == [{"name": "needing", "minutes": 1, "missing": ["mawps/test"]}]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("least", [1, 2**40])
def test_what_finished_runs_take_is_told_once_it_is_much(folder: Path, monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(command, "TOLD_BYTES", least)
    said = call("toy", "--seeds", 1, "--out", folder / "out").output.replace("\n", " ")
    taken = sum(path.stat().st_size for path in (folder / "cache" / "lab").rglob("*") if path.is_file())
    told = f"finished runs take {size(taken)}" in said and "--forget" in said
    assert taken > 1000 and told == (least == 1), said


@pytest.mark.usefixtures("in_process")
def test_all_replications_within_a_budget(folder: Path) -> None:
    long = TOY.replace('name="toy"', 'name="long"').replace("minutes=1,", "minutes=50,")
    (folder / "long.py").write_text(long)
    out = folder / "out"
    found = facts(call("--all", "--seeds", 1, "--budget", "30m", "--out", out, "--json"))
    assert [one["replication"] for one in found["results"]] == ["toy"]
    assert found["left_out"] == [{"name": "long", "minutes": 50}]
    assert found["results"][0]["verdict"] == "cannot tell", "one seed has no interval"
    everything = facts(call("--all", "--seeds", 1, "--out", out, "--json"))
    assert [one["replication"] for one in everything["results"]] == ["toy", "long"] and not everything["left_out"]


@pytest.mark.usefixtures("in_process")
def test_a_replication_that_stops_does_not_keep_the_others_from_running(folder: Path) -> None:
    (folder / "broken.py").write_text(TOY.replace('name="toy"', 'name="broken"').replace('"tune": "half"', '"tune": "hlaf"'))
    found = facts(call("--all", "--seeds", 1, "--out", folder / "out", "--json"), code=2)
    assert "these replications stopped: broken" in found["error"] and "hlaf" in found["error"]
    assert (folder / "out" / "toy.json").is_file() and not (folder / "out" / "broken.json").exists()


@pytest.mark.usefixtures("in_process")
def test_another_model_has_a_result_of_its_own(folder: Path) -> None:
    found = facts(call("toy", "--seeds", 1, "--model", "tiny:qwen3", "--out", folder, "--json"))
    assert found["model"]["name"] == "tiny:qwen3"
    assert (folder / "toy.tiny-qwen3.json").is_file() and not (folder / "toy.json").exists()


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["toyy"], "there is no replication `toyy`", "did you mean `toy`?"),
        (["toy", "--seeds", 0], "0 seeds", "use 1 or more"),
        (["toy", "--jobs", 0], "0 jobs", "use 1 or more"),
        (["--all", "--budget", "soon"], "`soon` is no length of time", "90s, 60m or 2h"),
        (["toy", "--budget", "1h"], "a budget is for all replications", "--all"),
        ([], "a replication is missing", "--list"),
        (["toy", "--list"], "only one thing", "--list"),
        (["--calibrate", "--seeds", 3], "the lab's own test is fixed", "leave --seeds out"),
    ],
)
def test_mistakes(folder: Path, words: list[object], what: str, fix: str) -> None:
    found = facts(call(*words, "--json"), code=2)
    assert what in found["error"] and fix in found["fix"]
    assert call(*words).exit_code == 2


def test_budgets() -> None:
    assert (minutes_of("90s"), minutes_of("60m"), minutes_of("1.5h"), minutes_of(None)) == (1.5, 60, 90, None)


def test_a_worker_that_dies_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(LuthierError, match="ended before its work was done"), workers(1) as run_all:
        # A worker does to itself what the system does when memory runs out.
        list(run_all(signal.raise_signal, [signal.SIGKILL]))  # type: ignore[arg-type, list-item]


def test_an_interrupt_ends_workers_at_once() -> None:
    others, began = set(active_children()), time.monotonic()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    # Processes started in the background ignore interrupts, and their children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), workers(1) as run_all:
            timer.start()
            list(run_all(time.sleep, [600]))  # type: ignore[arg-type, list-item]
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 100 and set(active_children()) <= others
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "interrupts are heard again"


def test_words_of_a_result() -> None:
    one = RESULT["expectations"][0]
    assert expected(one) == "held_out: half not less than full, within 0.05"
    assert expected({**one, "direction": "more", "margin": 0}) == "held_out: half more than full"
    assert expected({**one, "direction": "less"}) == "held_out: half less than full, by 0.05"
    assert spread([0.5, 0.25, 0.75]) == "0.5 ± 0.25" and spread([0.5]) == "0.5" and spread([None]) == "none"


def test_the_terminal_shows_every_number() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(shown(RESULT))
    text = console.export_text()
    for part in (
        "0.5 ± 0.25",
        "by the recipes",
        "0.2 (-0.0484 to 0.448)",
        "cannot tell at this scale: held_out 0.2 share of items (-0.0484 to 0.448), half minus full, 3 seeds",
        "[all]",
        "largest that was tried",
    ):
        assert part in text


def test_the_figure_places_every_number() -> None:
    svg = ElementTree.fromstring(draw(RESULT))
    space = "{http://www.w3.org/2000/svg}"
    points = [float(one.get("cx", "")) for one in svg.iter(f"{space}circle")]
    means = [float(one.get("x1", "")) for one in svg.iter(f"{space}line") if one.get("class") == "mean"]
    assert len(points) == 5 and len(means) == 2
    # full: 0.5, 0.25, 0.75 with the mean at its first; half: 0.6 and 1.05.
    assert means[0] == points[0] and points[1] < points[0] < points[3] < points[2] < points[4]
    assert means[1] == pytest.approx((points[3] + points[4]) / 2, abs=0.02)
    empty = draw({**RESULT, "measures": ["nothing"]})
    assert "no variant has a number" in empty and "<circle" not in empty


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What fills the pages, with results of its own."""
    spec = importlib.util.spec_from_file_location("docs_generate", Path(__file__).parents[2] / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.replications, "REPLICATIONS", tmp_path / "replications")
    return module


def test_the_page_of_replications(generate: ModuleType) -> None:
    assert generate.WRITERS["replications"]() == "No results are stored."
    save(RESULT, generate.replications.REPLICATIONS, "toy")
    page = generate.WRITERS["replications"]()
    told = "**cannot tell**: held_out 0.2 share of items (-0.0484 to 0.448), half minus full, 3 seeds"
    assert f"| [`toy`](#replication-toy) | [arXiv:2404.18466](https://arxiv.org/abs/2404.18466) | {told} |" in page
    assert "### Is half enough?" in page and "Not run again" not in page
    assert '<a id="replication-toy"></a>\n\n## `toy`: A &lt;toy&gt; \\| one\n' in page
    assert "| held_out | 0.5 ± 0.25 | 0.825 ± 0.32 |" in page and "| nothing | none | none |" in page
    assert "0.2 (-0.0484 to 0.448) | does not hold" in page and "0.0003: none, 0.001: 0.5" in page
    assert "(replications/toy.svg)" in page and "Smaller." in page and "2 minutes of training" in page
    (generate.replications.REPLICATIONS / "toy.svg").unlink()
    assert "toy.svg" not in generate.WRITERS["replications"]()


def test_a_technique_links_to_its_replication(generate: ModuleType) -> None:
    assert generate.replications.tested_by("") == "" and generate.replications.tested_by("toy") == "`toy`"
    save(RESULT, generate.replications.REPLICATIONS, "toy")
    assert generate.replications.tested_by("toy").startswith(
        "[`toy`](replications.md#replication-toy): cannot tell at this scale: held_out 0.2 share"
    )


def test_a_result_from_before_the_rule_is_listed_and_told_of_nowhere_else(generate: ModuleType) -> None:
    before = {**RESULT, "verdict": "refuted", "expectations": [{**RESULT["expectations"][0], "verdict": "supported"}]}
    for name in ("rule", "question", "unit"):
        del before[name]
    save(RESULT, generate.replications.REPLICATIONS, "toy")
    (generate.replications.REPLICATIONS / "old.json").write_text(json.dumps({**before, "replication": "old"}))
    page = generate.WRITERS["replications"]()
    assert page.count("`old`") == 1 and "[`old`](replications/old.json)" in page and "refuted" not in page
    assert generate.replications.tested_by("old") == "[`old`](replications.md#not-run-again): not run again under the rule"
    result = load(generate.replications.REPLICATIONS, "old")
    assert result is not None and result["verdict"] == "does not hold" and result["rule"] is None
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(shown(result))
    assert "from before the lab's rule" in console.export_text()
    asked = {**RESULT, "rule": {"looks": [3], "level": 0.05, "lab": False}}
    assert not under_rule(asked) and not under_rule(result) and under_rule(RESULT)
    assert under_rule({**RESULT, "rule": {"looks": [5], "level": 0.05, "lab": True}})
    assert "not the lab's rule" in looked(asked["rule"])


def test_the_figure_of_all_replications_turns_effects_towards_the_replication() -> None:
    more = {**RESULT["expectations"][0], "direction": "more", "differences": [1.0, 2.0, 3.0], "mean": 2.0, "interval": [-0.5, 4.5]}
    less, within = {**more, "direction": "less"}, {**more, "direction": "not_less"}
    right, left, allowed = (effect_of({**RESULT, "expectations": [{**one, "margin": 0.5}]}) for one in (more, less, within))
    assert right is not None and left is not None and allowed is not None
    # The differences deviate by 1.
    assert right[2:] == (2.0, -0.5, 4.5, 0.5) and left[2:] == (-2.0, -4.5, 0.5, 0.5) and allowed.margin == -0.5
    assert effect_of({**RESULT, "expectations": [{**more, "interval": None}]}) is None
    svg = draw_effects([RESULT, {**RESULT, "question": "", "expectations": [{**less, "mean": 9.0, "interval": [6.5, 11.5]}]}])
    assert "Is half enough?" in svg and "Other questions" in svg and "polygon" in svg
    ElementTree.fromstring(svg)


@pytest.mark.usefixtures("in_process")
def test_the_lab_tests_itself(folder: Path, monkeypatch: pytest.MonkeyPatch, generate: ModuleType) -> None:
    assert "Not measured yet" in generate.replications.calibration() and "Not measured yet" in generate.replications.comparisons()
    toy = replications.find("toy")
    far = toy.main._replace(margin=50.0)
    null = toy._replace(main=far._replace(direction="more"), also=[far._replace(direction="less")])
    monkeypatch.setattr(verdict, "TWO_LOOKS", Design((3, 4), 0.028))
    for name, found in (("EFFECTS", toy), ("NULLS", null), ("FURTHER", toy)):
        monkeypatch.setattr(calibrating, name, [found])
    told = facts(call("--calibrate", "--out", generate.replications.REPLICATIONS, "--json"))
    assert told["counts"] == {"effects": [1, 1], "nulls": [0, 1], "further": [1, 1]}
    assert told == json.loads((generate.replications.REPLICATIONS / "calibration.json").read_text())
    assert "support 1 of 1 effects" in generate.replications.calibration() and "0 of 1 nulls" in generate.replications.calibration()
    assert "| nulls | A toy |" in generate.replications.comparisons()
    assert generate.replications.replications() == "No results are stored.", "the lab's test of itself is no replication"


def test_the_rule_on_the_page_is_the_one_in_the_code(generate: ModuleType) -> None:
    page = generate.WRITERS["replication_rule"]()
    for direction in ("more", "less", "not_less", "not_more"):
        assert f"| {direction} |" in page


def test_names_of_files() -> None:
    class Named:
        name, model = "toy", "workshop"

    assert file_stem(Named, None) == file_stem(Named, "workshop") == "toy"  # type: ignore[arg-type]
    assert file_stem(Named, "../some model:x") == "toy.some-model-x"  # type: ignore[arg-type]
