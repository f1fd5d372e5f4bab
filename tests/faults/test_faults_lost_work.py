"""Full disks, damaged files, overflow, too little memory, interrupts: nothing that was reached is lost, and nothing is lost silently."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import luthier
from luthier import disk
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.recipe import read_recipe
from luthier.training import checkpoint
from luthier.training.checkpoint import FACTS, TENSORS
from luthier.training.engine import Work
from tests.faults.runs import checkpoints, facts_of, full_disk, half_done, outcome, recipe, steps_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run leaves."""
    return outcome(luthier.train(recipe(tmp_path_factory.mktemp("whole"), tune="lora")).folder)


def at_step(step: int, do: Callable[[Any], None]) -> Callable[[Any, Any, Any], None]:
    """Something that happens right after a step, before its checkpoint."""

    def tell(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == step:
            do(plan)

    return tell


class StoppedError(Exception):
    """As good as a kill: nothing catches it."""


def stopped_after(step: int, out: Path, **keys: Any) -> Path:
    """A run that was torn off, with checkpoints up to the step before."""

    def stop(plan: Any) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        luthier.train(recipe(out, **keys), tell=at_step(step, stop))
    return out / "run-1"


# --- a full disk ---


def test_a_full_disk_stops_with_a_remedy_and_costs_no_checkpoint(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Fault 27: the checkpoint that did not fit leaves nothing behind, and the run goes on from the one before."""
    with ExitStack() as until, pytest.raises(LuthierError) as caught:
        luthier.train(recipe(tmp_path, tune="lora"), tell=at_step(4, lambda plan: until.enter_context(full_disk(20_000))))
    folder = tmp_path / "run-1"
    assert caught.value.what.startswith("the disk is full") and caught.value.where == str(folder / "checkpoints" / "step-4")
    assert str(folder / "checkpoints") in caught.value.fix and "train.keep_checkpoints" in caught.value.fix
    assert f"--resume {folder}" in caught.value.fix
    assert checkpoints(folder) == ["step-2", "step-3"] and half_done(folder) == []
    assert outcome(luthier.train(recipe(tmp_path, tune="lora"), resume=folder).folder) == whole


def test_a_disk_too_full_to_note_the_failure_does_not_hide_it(tmp_path: Path, whole: dict[str, Any]) -> None:
    said: list[str] = []
    with ExitStack() as until, pytest.raises(LuthierError, match="the disk is full") as caught:
        fill = at_step(3, lambda plan: until.enter_context(full_disk(0)))
        luthier.train(recipe(tmp_path, tune="lora"), tell=fill, say=said.append)
    folder = tmp_path / "run-1"
    assert caught.value.where == str(folder / "checkpoints" / "step-3")
    assert said[-1].startswith("that the run failed could not be noted: ")
    assert facts_of(folder)["status"] == "running" and half_done(folder) == []
    assert outcome(luthier.train(recipe(tmp_path, tune="lora"), resume=folder).folder) == whole


def test_what_was_trained_survives_a_result_that_cannot_be_saved(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Also where no checkpoint was asked for: one stands from the end of training to the end of the run."""
    keys: dict[str, Any] = {"tune": "lora", "train": {"save_every": None}}

    def fill(text: str) -> None:
        if text == "comparing the weights with the base":
            until.enter_context(full_disk(1000))

    with ExitStack() as until, pytest.raises(LuthierError, match="the disk is full") as caught:
        luthier.train(recipe(tmp_path, **keys), say=fill)
    folder = tmp_path / "run-1"
    assert caught.value.where == str(folder / "delta.safetensors") and checkpoints(folder) == ["step-6"]
    said: list[str] = []
    run = luthier.train(recipe(tmp_path, **keys), resume=folder, say=said.append)
    assert "resuming from step-6" in said
    assert outcome(run.folder) == {**whole, "checkpoints": []} and not (folder / "checkpoints").exists()


def test_no_room_for_a_checkpoint_that_nobody_asked_for_stops_nothing(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = disk.written

    def refuse(path: Path, fix: str = "") -> Any:
        if path.name.startswith("step-"):
            raise LuthierError("the disk is full")
        return written(path, fix)

    monkeypatch.setattr(disk, "written", refuse)
    said: list[str] = []
    run = luthier.train(recipe(tmp_path, tune="lora", train={"save_every": None}), say=said.append)
    assert "going on without a checkpoint of what was trained: the disk is full" in said
    assert outcome(run.folder) == {**whole, "checkpoints": []}


def test_damaged_results_of_the_base_are_measured_again(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"tune": "lora", "evaluate": {"prose": {"rows": [{"text": "The door."}], "metric": "loss"}}}
    folder = stopped_after(3, tmp_path, **keys)
    (folder / "before.json").write_text("{")
    said: list[str] = []
    luthier.train(recipe(tmp_path, **keys), resume=folder, say=said.append)
    assert any(text.startswith("before.json cannot be read (JSONDecodeError: ") for text in said)
    assert outcome(folder) == outcome(luthier.train(recipe(tmp_path, **keys)).folder)


# --- damaged checkpoints ---


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = bytearray((folder / name).read_bytes())
        values[len(values) * 2 // 3] ^= 1
        (folder / name).write_bytes(values)

    return damage


def truncate(folder: Path) -> None:
    os.truncate(folder / TENSORS, (folder / TENSORS).stat().st_size // 2)


def replace_step(folder: Path) -> None:
    """Still good JSON, with another number in it."""
    text = (folder / FACTS).read_text()
    assert '"tokens": ' in text
    (folder / FACTS).write_text(text.replace('"tokens": ', '"tokens": 1', 1))


def fails_to_read(folder: Path) -> None:
    """A file that is there, and that the system cannot read."""
    (folder / TENSORS).unlink()
    (folder / TENSORS).symlink_to("/proc/self/mem")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit in the tensors": (flip(TENSORS), f"the checksum differs ({TENSORS})"),
    "a flipped bit in the facts": (flip(FACTS), ""),
    "another number in the facts": (replace_step, f"the checksum differs ({FACTS})"),
    "cut short": (truncate, f"the checksum differs ({TENSORS})"),
    "no facts": (lambda folder: (folder / FACTS).unlink(), "No such file"),
    "facts of another kind": (lambda folder: (folder / FACTS).write_text("[1]"), ""),
    "facts without a checksum": (lambda folder: (folder / FACTS).write_text("{}"), "own_sha256"),
    "empty": (lambda folder: (folder / TENSORS).write_bytes(b""), f"the checksum differs ({TENSORS})"),
    "an error of the disk": (fails_to_read, "Input/output error"),
}


@pytest.fixture(scope="module")
def torn_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was torn off in its fifth step."""
    return stopped_after(5, tmp_path_factory.mktemp("torn"), tune="lora")


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_aloud(name: str, torn_off: Path, tmp_path: Path) -> None:
    """Fault 27: a damaged file is found, named, and the checkpoint before it is taken."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(torn_off / "checkpoints", folder)
    damage, reason = DAMAGE[name]
    damage(folder / "step-4")
    said: list[str] = []
    assert checkpoint.latest(folder, said.append) == folder / "step-3"
    assert len(said) == 1 and said[0].startswith("passed over step-4: this checkpoint cannot be read: ") and reason in said[0]
    checkpoint.prune(folder, 1)
    assert checkpoints(tmp_path) == ["step-3", "step-4"], "the only one that can be read stays"
    damage(folder / "step-3")
    with pytest.raises(LuthierError, match=r"none of this run's checkpoints can be read: step-4: .*step-3: ") as caught:
        checkpoint.latest(folder)
    assert caught.value.where == str(folder) and "begin again at the first step" in caught.value.fix


def test_a_run_resumes_past_a_damaged_checkpoint_to_the_same_bytes(torn_off: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    """Fault 27: the steps since the last good checkpoint are taken again; the damaged one is replaced."""
    shutil.copytree(torn_off, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    flip(TENSORS)(folder / "step-4")
    (folder / ".step-5.4711").mkdir()
    said: list[str] = []
    run = luthier.train(recipe(torn_off.parent, tune="lora"), resume=tmp_path / "run", say=said.append)
    assert any(text.startswith("passed over step-4: ") for text in said) and "resuming from step-3" in said
    assert outcome(run.folder) == whole


def test_a_run_without_a_readable_checkpoint_does_not_begin_again_silently(torn_off: Path, tmp_path: Path) -> None:
    shutil.copytree(torn_off, tmp_path / "run")
    for name in checkpoints(tmp_path / "run"):
        truncate(tmp_path / "run" / "checkpoints" / name)
    with pytest.raises(LuthierError, match="none of this run's checkpoints"):
        luthier.train(recipe(torn_off.parent, tune="lora"), resume=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    said: list[str] = []
    luthier.train(recipe(torn_off.parent, tune="lora"), resume=tmp_path / "run", say=said.append)
    assert "there is no checkpoint yet: starting from the first step" in said


# --- numbers that are not finite ---


def test_fault_4_overflow_saves_nothing_and_the_run_can_be_resumed(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Fault 4: a loss that is not finite names its rows, and the checkpoint before it stands and is resumed from."""

    def break_model(plan: Any) -> None:
        plan.model.get_submodule(plan.parts.head).weight.data.fill_(float("nan"))

    with pytest.raises(LuthierError, match="the loss is not a finite number") as caught:
        luthier.train(recipe(tmp_path, tune="lora", train={"save_every": 2}), tell=at_step(3, break_model))
    assert caught.value.where.startswith("rows ")
    folder = tmp_path / "run-1"
    assert checkpoints(folder) == ["step-2"] and half_done(folder) == []
    facts = facts_of(folder)
    assert facts["status"] == "failed" and "not a finite number" in facts["warnings"][-1] and len(facts["history"]) == 3
    again = luthier.train(recipe(tmp_path, tune="lora", train={"save_every": 2}), resume=folder)
    left = outcome(again.folder)
    assert {**left, "checkpoints": whole["checkpoints"]} == whole and left["checkpoints"] == ["step-4", "step-6"]


# --- memory ---


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let memory run out after backward of every micro-batch of more tokens."""
    plain = Work.backward

    def limit(tokens: int) -> None:
        def backward(self: Work, batch: Any) -> None:
            plain(self, batch)
            if batch.token_ids_BT.numel() > tokens:
                torch.empty(1 << 60, dtype=torch.uint8)

        monkeypatch.setattr(Work, "backward", backward)

    return limit


def test_too_little_memory_halves_the_micro_batches_for_the_rest_of_the_run(
    tmp_path: Path, little_memory: Callable[[int], None]
) -> None:
    """Fault 27: the run equals one with small micro-batches from the start bit for bit, one with large ones up to rounding, and
    keeps to the small ones when it is resumed where there is memory enough."""
    large = luthier.train(recipe(tmp_path / "large", tune="lora"))
    little_memory(90)
    said: list[str] = []
    run = luthier.train(recipe(tmp_path / "tried", tune="lora"), say=said.append)
    notes = [text for text in run.facts["warnings"] if "ran out of memory" in text]
    assert notes and notes == [text for text in said if "ran out of memory" in text]
    tokens = int(notes[-1].split()[3])
    assert notes[-1] == f"micro-batches halved to {tokens} tokens after step 1 ran out of memory" and tokens <= 90
    little_memory(10**6)
    small = luthier.train(recipe(tmp_path / "small", tune="lora", train={"micro_batch_tokens": tokens}))
    assert outcome(run.folder) == outcome(small.folder)
    assert outcome(run.folder)["weights"] != outcome(large.folder)["weights"]
    losses = [[step["loss"] for step in steps_of(one.folder)] for one in (run, large)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    little_memory(90)
    folder = stopped_after(4, tmp_path / "resumed", tune="lora")
    little_memory(10**6)
    again = luthier.train(recipe(tmp_path / "resumed", tune="lora"), resume=folder)
    assert outcome(again.folder) == outcome(run.folder) and notes[-1] in again.facts["warnings"]


def test_updates_inside_backward_go_on_from_the_checkpoint_with_smaller_micro_batches(
    tmp_path: Path, little_memory: Callable[[int], None]
) -> None:
    keys: dict[str, Any] = {"tune": "lora", "gradient_estimator": "per_layer", "optimizer": "adamw"}
    little_memory(90)
    with pytest.raises(LuthierError, match="cannot be taken back") as caught:
        luthier.train(recipe(tmp_path, **keys))
    assert "resume with a smaller train.micro_batch_tokens" in caught.value.fix
    folder, said = tmp_path / "run-1", []
    with pytest.raises(LuthierError, match="another recipe"):
        luthier.train(recipe(tmp_path, **keys, train={"learning_rate": 2e-3}), resume=folder)
    smaller = recipe(tmp_path, **keys, train={"micro_batch_tokens": 80})
    run = luthier.train(smaller, resume=folder, say=said.append)
    note = (
        "micro-batches of at most 80 tokens from step 1 on, as asked for when the run was resumed: the same steps, up to rounding"
    )
    assert note in said and note in run.facts["warnings"]
    assert outcome(run.folder) == outcome(luthier.train(smaller).folder)
    assert read_recipe(folder / "recipe.yaml").train.micro_batch_tokens == 80, "another resumption keeps to it"


# --- interrupts ---


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_stops_at_once_and_costs_no_checkpoint(tmp_path: Path, whole: dict[str, Any]) -> None:
    def twice(plan: Any) -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        luthier.train(recipe(tmp_path, tune="lora"), tell=at_step(3, twice))
    assert checkpoints(tmp_path / "run-1") == ["step-1", "step-2"] and half_done(tmp_path / "run-1") == []
    assert outcome(luthier.train(recipe(tmp_path, tune="lora"), resume=tmp_path / "run-1").folder) == whole


def test_an_interrupt_while_a_checkpoint_is_written(tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits for it; a second tears it off, and nothing half-written is left."""
    force = disk.force

    def interrupted(path: Path) -> None:
        if path.name.startswith(".step-3."):
            interrupt()
            if times == 2:
                interrupt()
        force(path)

    monkeypatch.setattr(disk, "force", interrupted)
    times = 1
    run = luthier.train(recipe(tmp_path / "once", tune="lora"))
    assert run.facts["status"] == "stopped" and run.facts["steps"] == 4
    times = 2
    with pytest.raises(KeyboardInterrupt):
        luthier.train(recipe(tmp_path / "twice", tune="lora"))
    folder = tmp_path / "twice" / "run-1"
    assert checkpoints(folder) == ["step-1", "step-2"] and half_done(folder) == []
    monkeypatch.setattr(disk, "force", force)
    for out in ("once", "twice"):
        assert outcome(luthier.train(recipe(tmp_path / out, tune="lora"), resume=tmp_path / out / "run-1").folder) == whole


def test_an_early_stop_stands_when_the_run_is_resumed(tmp_path: Path) -> None:
    """Fault 27: a run that ended by itself takes no further step when it is killed, or asked to stop, before it was saved."""
    sets = {"prose": {"rows": [{"text": "A plain sentence that training makes worse."}], "metric": "loss"}}
    train = {"steps": 12, "evaluate_every": 1, "best": "prose", "patience": 2, "learning_rate": 5e-2}
    keys: dict[str, Any] = {"tune": "lora", "evaluate": sets, "train": train}
    whole = luthier.train(recipe(tmp_path / "whole", **keys))
    last = len(steps_of(whole.folder))
    assert last < 12, "it stops early"
    run = luthier.train(recipe(tmp_path / "asked", **keys), tell=at_step(last, lambda plan: interrupt()))
    assert run.facts["status"] == "stopped"
    again = luthier.train(recipe(tmp_path / "asked", **keys), resume=run.folder)
    assert outcome(again.folder) == outcome(whole.folder)


def test_interrupted_at_the_command_line_it_says_how_to_go_on(tmp_path: Path) -> None:
    """Ctrl-C finishes the step, saves, says how to resume, and ends with the exit code that shells give it."""
    written = {**recipe(tmp_path / "killed", tune="lora", train={"steps": 60}), "name": "small"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(written))
    folder = tmp_path / "killed" / "small-1"
    words = [sys.executable, "-m", "luthier", "train", str(tmp_path / "small.yaml")]
    child = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    waited = time.monotonic() + 60
    while len(steps_of(folder)) < 2 and time.monotonic() < waited:
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    steps = len(steps_of(folder))
    assert child.returncode == 130, said
    assert f"luthier train --resume {folder}" in said.replace("\n", "")
    assert facts_of(folder)["status"] == "stopped" and checkpoints(folder)[-1] == f"step-{steps}" and steps < 60
    done = CliRunner().invoke(app, ["train", "--resume", str(folder), "--quiet"])
    assert done.exit_code == 0, done.output
    whole = luthier.train({**written, "out": str(tmp_path / "whole")})
    assert outcome(folder) == outcome(whole.folder)
