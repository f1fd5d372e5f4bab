"""Trackers: what they are told, in their own words, and that one that fails costs nothing but itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.results.folder import read_run
from luthier.runs.trackers import Trackers, make_trackers, run_numbers, start_trackers
from luthier.runs.train import train


class Recorder:
    """Writes down what it is told."""

    def __init__(self, fails_at: str = "") -> None:
        self.told: list[tuple[Any, ...]] = []
        self.fails_at = fails_at

    def _note(self, *what: Any) -> None:
        self.told.append(what)
        if what[0] == self.fails_at:
            raise OSError("no route to host")

    def start(self, name: str, recipe_facts: Mapping[str, Any]) -> None:
        self._note("start", name, dict(recipe_facts))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._note("log", step, dict(numbers))

    def finish(self, facts: Mapping[str, float]) -> None:
        self._note("finish", dict(facts))


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    rows = [{"prompt": f"Say {number}.", "completion": f" {number}"} for number in range(4)]
    return {
        "model": "tiny:llama",
        "rows": {"train": rows},
        "tune": "lora",
        "train": {"steps": 2, "batch_rows": 2, "device": "cpu", "evaluate_every": 1},
        "evaluate": {"said": {"rows": rows, "metric": "loss"}},
        "repeat_baseline": False,
        "out": str(folder),
        **more,
    }


def test_only_finite_numbers_are_logged() -> None:
    one = Recorder()
    Trackers([one]).log(3, {"loss": 0.5, "perplexity": float("inf"), "why": "text", "nothing": None, "rows": 2})
    assert one.told == [("log", 3, {"loss": 0.5, "rows": 2.0})]


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(moment: str) -> None:
    bad, good = Recorder(fails_at=moment), Recorder()
    trackers = Trackers([bad, good])
    trackers.start("run", {})
    trackers.log(1, {"loss": 1.0})
    trackers.log(2, {"loss": 0.5})
    trackers.finish({"steps": 2})
    trackers.finish({"steps": 2})
    assert [told[0] for told in good.told] == ["start", "log", "log", "finish"]
    assert bad.told[-1][0] == moment and [told[0] for told in bad.told].count(moment) == 1
    assert trackers.warnings == ["the tracker Recorder failed and was left out: no route to host"]


def test_the_numbers_of_a_run_by_hand() -> None:
    metrics = {"facts": {"before": 0.25, "after": 0.75, "metric": "accuracy"}, "text": {"before": 2.0, "after": None}}
    facts = {"status": "finished", "steps": 2, "final_loss": None, "retained": 0.9, "metrics": metrics}
    assert run_numbers(facts) == {"steps": 2, "retained": 0.9, "facts/before": 0.25, "facts/after": 0.75, "text/before": 2.0}


def test_unknown_trackers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=r"(?s)`tensorbord`.*`tensorboard`"):
        make_trackers(["tensorbord"], tmp_path)
    with pytest.raises(LuthierError, match="`tensorbord`"):
        train(recipe(tmp_path / "runs", track="tensorbord"))
    assert not (tmp_path / "runs").exists()
    assert make_trackers(None, tmp_path) == []


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_missing_package_says_how_to_install_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(LuthierError, match=r"(?s)" + name + r'.*pip install "luthier\[tracking\]"'):
        make_trackers(name, tmp_path)


def fake_wandb() -> tuple[ModuleType, Recorder]:
    told = Recorder()
    run = SimpleNamespace(
        log=lambda numbers, step: told.log(step, numbers),
        summary=SimpleNamespace(update=told.finish),
        finish=lambda: told.told.append(("closed",)),
    )
    module = ModuleType("wandb")
    module.init = lambda **options: told.told.append(("init", options)) or run  # type: ignore[attr-defined]
    return module, told


@pytest.mark.parametrize("mode", [None, "online"])
def test_wandb_stays_offline_unless_told_otherwise(mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, told = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if mode is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", mode)
    trackers = start_trackers("wandb", tmp_path, "first", {"seed": 7})
    trackers.log(1, {"loss": 0.5})
    trackers.finish({"steps": 1})
    options = {"project": "luthier", "name": "first", "config": {"seed": 7}, "dir": str(tmp_path), "mode": mode or "offline"}
    assert told.told == [("init", options), ("log", 1, {"loss": 0.5}), ("finish", {"steps": 1.0}), ("closed",)]
    assert trackers.warnings == []


def test_trackio_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    module = ModuleType("trackio")
    module.init = lambda **options: told.append(options)  # type: ignore[attr-defined]
    module.log = lambda numbers, step=None: told.append((step, numbers))  # type: ignore[attr-defined]
    module.finish = lambda: told.append("closed")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    trackers = start_trackers(["trackio"], tmp_path, "first", {"seed": 7})
    trackers.log(1, {"loss": 0.5})
    trackers.finish({"steps": 1})
    assert told == [
        {"project": "luthier", "name": "first", "config": {"seed": 7}},
        (1, {"loss": 0.5}),
        (None, {"run/steps": 1.0}),
        "closed",
    ]
    assert trackers.warnings == []


def test_a_run_in_tensorboard_reads_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(recipe(tmp_path, track=["tensorboard"]))
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    steps = [json.loads(line) for line in (run.folder / "steps.jsonl").read_text().splitlines()]
    assert [one.step for one in events.Scalars("loss")] == [1, 2]
    assert [one.value for one in events.Scalars("loss")] == pytest.approx([line["loss"] for line in steps])
    assert [one.value for one in events.Scalars("learning_rate")] == pytest.approx([line["learning_rate"] for line in steps])
    assert [one.value for one in events.Scalars("said")] == pytest.approx(
        [line["metrics"]["said"] for line in run.facts["evaluations"]]
    )
    metric = run.facts["metrics"]["said"]
    assert metric["before"] != metric["after"]
    for when in ("before", "after"):
        assert events.Scalars(f"run/said/{when}")[0].value == pytest.approx(metric[when])
    assert b"tiny:llama" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def test_a_failing_tracker_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Recorder(fails_at="log")
    monkeypatch.setattr("luthier.runs.train.start_trackers", lambda *facts: Trackers([bad]))
    run = train(recipe(tmp_path))
    assert run.facts["status"] == "finished" and run.facts["steps"] == 2
    warnings = read_run(run.folder).facts["warnings"]
    assert warnings.count("the tracker Recorder failed and was left out: no route to host") == 1


def test_a_failed_run_is_finished_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Recorder()
    monkeypatch.setattr("luthier.runs.train.start_trackers", lambda *facts: Trackers([one]))

    def fail(*facts: Any, **more: Any) -> None:
        raise LuthierError("the loss is not finite")

    monkeypatch.setattr("luthier.runs.train.run_loop", fail)
    with pytest.raises(LuthierError, match="not finite"):
        train(recipe(tmp_path))
    assert [told[0] for told in one.told] == ["finish"]
