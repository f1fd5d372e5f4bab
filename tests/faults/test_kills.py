"""A process that is killed at any moment loses nothing: the resumed run ends in the same bytes."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

import luthier
from luthier import registry
from tests.faults import runs
from tests.faults.runs import checkpoints, facts_of, outcome
from tests.toys.helpers import TOYS

KILLS, STEPS = 20, 30
STEP = "a step was taken"
# One process imports everything once, and every run is forked from it.
RUNS = multiprocessing.get_context("forkserver")
RUNS.set_forkserver_preload([__name__, "luthier.runs.train", "transformers.models.llama.modeling_llama"])


def recipe(out: Path) -> dict[str, Any]:
    """Factors, entries that come and go by what is observed, moments and a running average: all that a checkpoint must hold."""
    return runs.recipe(
        out,
        tune=["some_entries", {"lora": {"rank": 2, "target_modules": ["attention"]}}],
        callbacks="average",
        train={"steps": STEPS, "batch_rows": 2, "micro_batch_tokens": 48},
        evaluate={"prose": {"rows": [{"text": "The door of the mill."}], "metric": "loss"}},
    )


def train(out: Path, resume: Path | None, ear: Connection) -> None:
    """What a child does."""
    torch.set_num_threads(1)
    registry.add_folder(TOYS)
    luthier.train(recipe(out), resume=resume, say=ear.send, tell=lambda plan, progress, result: ear.send(STEP))


class Child(NamedTuple):
    """A process that trains, and where it speaks; it would stumble if nobody held the other end."""

    process: BaseProcess
    ear: Connection

    def kill_after(self, steps: int, seconds: float) -> int | None:
        """Kill it so long after a number of steps, unless it ends before that. Returns its exit code."""
        with contextlib.suppress(EOFError):
            while steps:
                steps -= self.ear.recv() == STEP
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def start(out: Path, resume: Path | None = None) -> Child:
    """A child whose training has just begun."""
    ear, mouth = RUNS.Pipe(duplex=False)
    process = RUNS.Process(target=train, args=(out, resume, mouth))
    process.start()
    mouth.close()
    try:
        while not ear.recv().startswith("training:"):
            pass
    except EOFError:
        process.join()
        raise AssertionError(f"the run ended with {process.exitcode} before it trained") from None
    return Child(process, ear)


def finish(out: Path, resume: Path | None = None) -> float:
    """Let a child run to its end. Returns the seconds from the start of training."""
    child = start(out, resume)
    began = time.perf_counter()
    child.process.join()
    assert child.process.exitcode == 0
    return time.perf_counter() - began


def test_fault_27_twenty_kills_of_twenty_are_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    """Fault 27: SIGKILL at 20 random moments, from the first step into the final saving; each run resumes to the same bytes."""
    seconds = finish(tmp_path / "whole")
    wanted = outcome(tmp_path / "whole" / "run-1")
    assert len(wanted["steps"]) == STEPS and wanted["half done"] == []
    moments = random.Random(27)
    reached = []
    for number in range(3 * KILLS):
        out = tmp_path / str(number)
        code = start(out).kill_after(moments.randrange(STEPS + 1), moments.uniform(0.0, seconds / STEPS))
        if facts_of(out / "run-1")["status"] == "finished":
            continue
        assert code == -signal.SIGKILL
        reached.append(next(reversed(checkpoints(out / "run-1")), "none"))
        finish(out, out / "run-1")
        assert outcome(out / "run-1") == wanted, f"killed after the checkpoint {reached[-1]}"
        if len(reached) == KILLS:
            break
    assert len(reached) == KILLS and len(set(reached)) > 5, "the kills fell at different moments"


def test_fault_27_a_run_killed_again_and_again_arrives(tmp_path: Path) -> None:
    """Fault 27: a run that is never left alone for longer than a few steps ends in the same bytes."""
    seconds = finish(tmp_path / "whole")
    moments = random.Random(28)
    folder, resume, kills = tmp_path / "killed" / "run-1", None, 0
    while kills < 6:
        start(tmp_path / "killed", resume).kill_after(
            moments.randint(STEPS // 8, STEPS // 4), moments.uniform(0.0, seconds / STEPS)
        )
        resume, kills = folder, kills + 1
        if facts_of(folder)["status"] == "finished":
            break
    else:
        finish(tmp_path / "killed", resume)
    assert kills > 2
    assert outcome(folder) == outcome(tmp_path / "whole" / "run-1")
