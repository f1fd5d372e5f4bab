"""Whole sweeps on the small packaged model: what is run, what is kept, what is shown."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from threading import Thread
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from filelock import FileLock
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.lab import benchmark
from luthier.report.words import percent, size
from luthier.results.folder import list_runs, read_run
from luthier.sweep import sweep as story
from luthier.sweep.grid import read_words, variants_of
from luthier.sweep.processes import local, on_ray
from luthier.sweep.runs import Job, is_done, job_of, outcome, train_here
from luthier.sweep.sweep import sweep

ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "three", "four")]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    new = [{"prompt": row["prompt"], "answer": row["completion"]} for row in ROWS]
    for name, rows in (("rows", ROWS), ("new", new), ("old", benchmark.rows("topic", "held_out", 8))):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: workshop-small\n"
        "rows: {train: rows.jsonl}\n"
        "train: {steps: 3, batch_rows: 4, precision: fp32, threads: 1, device: cpu}\n"
        "evaluate:\n"
        "  new: {rows: new.jsonl, metric: loss}\n"
        "  old: {rows: old.jsonl, metric: equal, role: retention, max_new_tokens: 6}\n"
        "repeat_baseline: false\n"
    )
    return path


@pytest.mark.parametrize("changed", ["base/model.safetensors", "folder/more.jsonl"])
def test_a_run_of_another_base_or_other_rows_is_another_run(changed: str, recipe: Path) -> None:
    """A sweep took finished runs of a base, or of a folder of rows, that had changed under its name."""
    for folder in ("base", "folder"):
        Path(folder).mkdir()
    for name in ("base/config.json", "base/model.safetensors", "folder/rows.jsonl", "folder/more.jsonl"):
        Path(name).write_text("as it was")
    words = ["tune=full,half", "model=base", "rows.train=folder"]

    def names() -> list[str]:
        return [job_of(variant, 1e-4, 0, Path("sweep")).name for variant in variants_of(recipe, read_words(words))]

    before = names()
    assert names() == before
    Path(changed).write_text("as it is now")
    assert not set(names()) & set(before)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The runs that are made, in this process, so that no test waits for imports."""
    return into_this_process(monkeypatch)


def into_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    found: list[Job] = []

    def here(jobs: Sequence[Job]) -> Generator[Job, None, None]:
        for job in jobs:
            found.append(job)
            train_here(job)
            yield job

    monkeypatch.setattr(story, "local", lambda count: here)
    return found


def test_rates_are_chosen_alike_then_every_seed_runs_and_the_page_tells_the_runs_numbers(recipe: Path, made: list[Job]) -> None:
    found = sweep(recipe, ["tune=full,lora", "seeds=2"])
    searched, reported = made[:10], made[10:]
    # Three steps teach more the larger the rate is, so both grids grow at that end, by as many rates.
    assert [(job.variant, job.rate, job.seed) for job in searched] == [
        *(("full", rate, 10_000) for rate in (3.33e-5, 1e-4, 3e-4)),
        *(("lora", rate, 10_000) for rate in (3.33e-4, 1e-3, 3e-3)),
        *(("full", rate, 10_000) for rate in (9e-4, 2.7e-3)),
        *(("lora", rate, 10_000) for rate in (9e-3, 2.7e-2)),
    ]
    assert [variant["learning_rates_added"] for variant in found["variants"]] == [[9e-4, 2.7e-3], [9e-3, 2.7e-2]]
    chosen = {variant["name"]: variant["learning_rate"] for variant in found["variants"]}
    assert [(job.variant, job.rate, job.seed) for job in reported] == [
        (variant, chosen[variant], seed) for variant in ("full", "lora") for seed in (0, 1)
    ]

    page = Path("sweeps/small/sweep.html").read_text(encoding="utf-8")
    kept = json.loads(Path("sweeps/small/sweep.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(found))
    for variant in kept["variants"]:
        losses = {one["learning_rate"]: one["value"] for one in variant["search"]}
        told = {
            job.rate: read_run(job.folder).facts["metrics"]["new"]["after"] for job in searched if job.variant == variant["name"]
        }
        assert losses == told and variant["learning_rate"] == min(losses, key=lambda rate: (losses[rate], rate))
        facts = [read_run(Path("sweeps/small", run["run"])).facts for run in variant["runs"]]
        assert [one["seed"] for one in facts] == [0, 1]
        assert {one["recipe"]["train"]["learning_rate"] for one in facts} == {variant["learning_rate"]}
        assert variant["target"]["values"] == [one["metrics"]["new"]["after"] for one in facts]
        assert variant["forgetting"]["values"] == [1 - one["retained"] for one in facts]
        assert variant["trained_parameters"]["mean"] == facts[0]["trained_parameters"]
        assert variant["peak_memory_bytes"]["values"] == [one["peak_memory_bytes"] for one in facts]
        assert variant["seconds_per_step"]["mean"] == pytest.approx(fmean(one["seconds"] / 3 for one in facts))
        (row,) = re.findall(rf"<th role=\"rowheader\" scope=\"row\">\d\. {variant['name']}</th>(.*?)</tr>", page, re.DOTALL)
        shown = [
            f"{fmean(one['metrics']['new']['after'] for one in facts):.3g}",
            percent(fmean(1 - one["retained"] for one in facts)),
        ]
        shown += [
            f"{facts[0]['trained_parameters']:,}",
            size(fmean(one["peak_memory_bytes"] for one in facts)),
            f"{variant['learning_rate']:g}",
        ]
        assert all(one in row for one in shown)

    assert kept["answer"]["sentence"] in re.sub(r"&#39;", "'", page) and kept["answer"]["take"] in ("full", "lora")
    assert kept["answer"]["notes"][0].endswith("beyond it: full at 0.0009 and 0.0027; lora at 0.009 and 0.027.")

    overlap = "4 items of new also stand in the training rows: gains there prove nothing."
    (warned,) = [one for one in kept["warnings"] if one["warning"] == overlap]
    assert len(warned["runs"]) == len(made) and warned["who"] == "every run" and overlap in page
    assert any(line.startswith("warning") and overlap in line for line in facts[0]["plan"]), (
        "the plan says it before anything trains"
    )

    made.clear()
    again = sweep(recipe, ["tune=lora,full", "seeds=3"])
    assert [(job.variant, job.seed) for job in made] == [("lora", 2), ("full", 2)], "what is finished is not run again"
    assert [variant["target"]["values"][:2] for variant in again["variants"]] == [
        variant["target"]["values"] for variant in reversed(found["variants"])
    ]


def test_listed_rates_are_variants_and_without_a_search_the_advised_rate_is_taken(recipe: Path, made: list[Job]) -> None:
    found = sweep(recipe, ["train.learning_rate=1e-4,3e-4", "seeds=1"])
    assert [(job.rate, job.seed) for job in made] == [(1e-4, 0), (3e-4, 0)]
    assert "the learning rate that the sweep lists" in Path("sweeps/small/sweep.html").read_text(encoding="utf-8")
    made.clear()
    found = sweep(recipe, ["tune=full,half", "seeds=1", "learning_rates=1", "seed=7"], folder="other")
    assert [(job.rate, job.seed) for job in made] == [(1e-4, 7), (2e-4, 7)]
    assert [variant["learning_rate_note"] for variant in found["variants"]] == ["the advised learning rate, without a search"] * 2
    made.clear()
    Path("rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    sweep(recipe, ["tune=full,half", "seeds=1", "learning_rates=1", "seed=7"], folder="other")
    assert len(made) == 2, "other rows under the same name are another run"


def test_a_failed_variant_is_shown_with_its_error_and_the_others_go_on(recipe: Path, made: list[Job]) -> None:
    words = ["rows.max_length=4,64", "seeds=1", "learning_rates=2"]
    found = sweep(recipe, words)
    short, long = found["variants"]
    assert short["learning_rate"] is None and short["runs"] == [] and short["learning_rate_note"] == "no learning rate gave a score"
    assert all("tokens" in one["error"]["error"] and one["error"]["fix"] for one in short["search"])
    assert long["runs"][0]["error"] is None and long["target"]["mean"] > 0
    page = Path("sweeps/small/sweep.html").read_text(encoding="utf-8")
    assert "2 runs gave no result" in page
    made.clear()
    sweep(recipe, words)
    assert [job.variant for job in made] == ["4", "4"], "a mistake that may have been mended is tried again"


def test_a_sweep_of_which_every_run_failed_is_no_success(recipe: Path, made: list[Job]) -> None:
    Path("rows.jsonl").unlink()
    result = CliRunner().invoke(app, ["sweep", str(recipe), "seeds=1", "learning_rates=1", "--json"])
    assert result.exit_code == 2 and len(made) == 1
    (run,) = json.loads(result.stdout)["variants"][0]["runs"]
    assert "rows.jsonl" in json.dumps(run["error"]) and Path("sweeps/small/sweep.html").is_file()


def test_numbers_that_are_not_finite_are_not_made_again(recipe: Path, made: list[Job]) -> None:
    words = ["train.learning_rate=1e-4,1e30", "seeds=1"]
    found = sweep(recipe, words)
    assert [variant["runs"][0]["error"] is None for variant in found["variants"]] == [True, False]
    assert "finite" in found["variants"][1]["runs"][0]["error"]["error"]
    made.clear()
    assert sweep(recipe, words)["variants"] == found["variants"] and not made


def test_two_sweeps_do_not_work_in_one_folder(recipe: Path, made: list[Job]) -> None:
    folder = recipe.parent / "shared"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(LuthierError, match="another process works on this sweep"):
        sweep(recipe, ["seeds=1", "learning_rates=1"], folder=folder)
    assert not made
    sweep(recipe, ["seeds=1", "learning_rates=1"], folder=folder)
    assert len(made) == 1, "the lock ends with its holder"


def jobs_of(recipe: Path, count: int) -> list[Job]:
    """Runs of one variant at several seeds."""
    (variant,) = variants_of(recipe, read_words([]))
    return [job_of(variant, 1e-4, seed, Path("sweep").resolve()) for seed in range(count)]


def test_each_run_has_a_process_of_its_own_and_one_that_dies_is_told(recipe: Path) -> None:
    good, bad = jobs_of(recipe, 2)
    bad = bad._replace(cwd=str(recipe.parent / "nowhere"))
    assert sorted(job.seed for job in local(2)([good, bad])) == [0, 1]
    facts = outcome(good).facts
    assert facts is not None and facts["machine"]["threads"] == 1 and is_done(good)
    error = outcome(bad).error
    assert error is not None and "exit code 1" in error["error"] and error["where"] == str(bad.log) and not is_done(bad)
    assert "nowhere" in bad.log.read_text()


class FakeRay:
    """What the sweep asks of Ray, with two processes of this machine as its cluster."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self) -> None:
        self.pool = concurrent.futures.ProcessPoolExecutor(2, get_context("spawn"))
        self.options: dict[str, Any] = {}
        self.open = False

    def init(self, ignore_reinit_error: bool, log_to_driver: bool) -> None:
        self.open = ignore_reinit_error and not log_to_driver

    def shutdown(self) -> None:
        self.pool.shutdown()
        self.open = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def remote(self, **options: Any) -> Callable[[Callable[[Job], None]], Any]:
        self.options = options
        return lambda work: SimpleNamespace(remote=lambda job: self.pool.submit(work, job))

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        assert self.open and num_returns == 1
        done = next(concurrent.futures.as_completed(references))
        return [done], [one for one in references if one is not done]

    def get(self, reference: Any) -> None:
        try:
            reference.result()
        except OSError as error:
            raise RuntimeError(f"task failed:\n{error}") from None


def test_ray_makes_the_runs_and_a_task_that_fails_is_told(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    first, second, bad = jobs_of(recipe, 3)
    bad = bad._replace(cwd=str(recipe.parent / "nowhere"))
    assert sorted(job.seed for job in on_ray([first, second, bad])) == [0, 1, 2]
    assert [one.facts["seed"] for one in (outcome(first), outcome(second)) if one.facts is not None] == [0, 1]
    assert "nowhere" in (outcome(bad).error or {})["error"]
    assert ray.options == {"num_cpus": 1, "num_gpus": 0, "max_calls": 1, "max_retries": 0} and not ray.open


def test_without_ray_the_error_names_what_to_install(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(app, ["sweep", str(recipe), "--ray", "--json"])
    assert result.exit_code == 2 and "luthier[ray]" in json.loads(result.stdout)["fix"]
    assert not Path("sweeps").exists()


def begun(recipe: Path, words: list[str]) -> subprocess.Popen[bytes]:
    """A sweep in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(luthier.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-m", "luthier", "sweep", str(recipe), *words, "--quiet"], env=environment)


def wait_for(ready: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def steps_of(folder: Path) -> int:
    """Steps that a sweep's runs have written down."""
    return sum(len(path.read_text().splitlines()) for path in folder.glob("runs/*/steps.jsonl"))


@pytest.fixture
def heard() -> Iterator[None]:
    """Interrupts reach this process, also where it was begun in the background by a shell, which has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_an_interrupt_saves_and_a_kill_ends_all_and_the_same_command_goes_on(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.write_text(recipe.read_text().replace("steps: 3", "steps: 100, save_every: 10"))
    words = ["seeds=1", "learning_rates=1"]
    folder = Path("sweeps/small")

    def interrupt() -> None:
        wait_for(lambda: steps_of(folder) >= 12)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt, daemon=True).start()
    assert CliRunner().invoke(app, ["sweep", str(recipe), *words]).exit_code == 130
    (stopped,) = list_runs(folder / "runs")
    assert stopped.facts["status"] == "stopped" and 12 <= stopped.facts["steps"] < 100

    process = begun(recipe, words)
    wait_for(lambda: steps_of(folder) >= stopped.facts["steps"] + 12)
    others = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(60)
    assert others and not psutil.wait_procs(others, timeout=30)[1], "its runs end with it"
    assert steps_of(folder) < 100
    (log,) = (folder / "logs").iterdir()
    told = log.read_text(encoding="utf-8")
    assert f"stopped after step {stopped.facts['steps']};" in told and f"resuming from step-{stopped.facts['steps']}" in told

    into_this_process(monkeypatch)
    ours = sweep(recipe, words)["variants"][0]["runs"][0]
    theirs = sweep(recipe, words, folder="uninterrupted")["variants"][0]["runs"][0]
    assert ours["error"] is None and len(list_runs(folder / "runs")) == 1
    one, other = read_run(folder / ours["run"]), read_run(Path("uninterrupted", theirs["run"]))
    assert one.facts["weights_sha256"] == other.facts["weights_sha256"]
