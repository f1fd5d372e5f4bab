"""Going on with a run: only where nobody else works on it, and only with what it was begun with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.methods.weight_delta.lora import lora
from luthier.models import load
from luthier.models.hub import HubUnavailableError
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.recipe import differences, make_recipe
from luthier.registry import add_folder, remove_folder
from luthier.results.folder import list_runs, read_run
from luthier.runs.rows import look_at_rows

ROWS = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(6)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows, a model and a technique of one's own, to run in."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "held", "calibrate"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS)
    tiny("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "taught")
    return tmp_path


def recipe(**keys: Any) -> dict[str, Any]:
    """Six steps of two rows; rows, evaluation rows and base in files."""
    train = {"steps": 6, "batch_rows": 2, "precision": "fp32", "learning_rate": 1e-3, "save_every": 1, **keys.pop("train", {})}
    sets = {"held": {"rows": "held.jsonl"}}
    return {"model": "base", "rows": {"train": "rows.jsonl"}, "evaluate": sets, "repeat_baseline": False, **keys, "train": train}


def broken_off(step: int = 2, **keys: Any) -> Path:
    """A run that an error broke off."""

    def stop(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == step:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        luthier.train(recipe(**keys), tell=stop)
    return list_runs()[-1].folder


def other_rows(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_rows(folder / f"{name}.jsonl", [*ROWS[:-1], {**ROWS[-1], "completion": "It is 11."}])

    return change


def other_weights(folder: Path) -> None:
    tiny("llama", seed=7).save_pretrained(folder / "base")


def other_template(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'Be brief. ' }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(folder / "base")


def other_teacher(folder: Path) -> None:
    tiny("llama", seed=9).save_pretrained(folder / "taught")


def other_token(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder / "base")


@pytest.mark.parametrize(
    ("change", "told", "keys"),
    [
        (other_rows("rows"), "rows.train", {}),
        (other_rows("rows"), "rows.train", {"rows": {"train": "rows.jsonl", "streaming": True}}),
        (
            lambda folder: write_rows(folder / "rows.jsonl", ROWS[:4]),
            "rows.train: 6 rows",
            {"train": {"epochs": 2.0, "steps": None}},
        ),
        (other_rows("held"), "evaluate.held.rows", {}),
        (other_rows("calibrate"), "corda.calibration_source", {"tune": {"corda": {"calibration_source": "calibrate.jsonl"}}}),
        (other_weights, "model", {"tune": "lora"}),
        (other_template, "the chat template", {}),
        (other_token, "the tokenizer", {}),
        (other_teacher, "models.teacher", {"objective": "distill", "models": {"teacher": "taught"}}),
    ],
)
def test_a_run_goes_on_only_with_what_it_was_begun_with(
    change: Callable[[Path], None], told: str, keys: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rows, another base or other evaluation rows under the same names were trained on without a word."""
    monkeypatch.setenv("LUTHIER_CACHE", str(place / "cache"))
    folder = broken_off(**keys)
    change(place)
    taken: list[int] = []
    with pytest.raises(LuthierError) as caught:
        luthier.train(recipe(**keys), resume=folder, tell=lambda plan, progress, result: taken.append(progress.step))
    assert told in caught.value.what and not taken
    assert read_run(folder).facts["status"] == "failed" and len(read_run(folder).facts["history"]) == 2


def test_a_run_goes_on_only_with_the_techniques_it_was_begun_with(place: Path) -> None:
    """A technique's own file that was changed between two halves of a run was not noticed."""
    own = place / "mine" / "token_weight" / "half_as_much.py"
    own.parent.mkdir(parents=True)
    source = (
        "from luthier.registry import method\nfrom luthier.kinds import TokenWeight\n\n\n"
        '@method(title="Half as much")\ndef half_as_much():\n    """Count every token half."""\n'
        '    return TokenWeight(lambda view: 0.5 + 0 * view["nll"].detach(), ("nll",))\n'
    )
    own.write_text(source, encoding="utf-8")
    add_folder(place / "mine")
    try:
        folder = broken_off(token_weight="half_as_much")
        own.write_text(source.replace("0.5", "0.25"), encoding="utf-8")
        with pytest.raises(LuthierError, match="the file of half_as_much"):
            luthier.train(recipe(token_weight="half_as_much"), resume=folder)
    finally:
        remove_folder(place / "mine")


def test_what_is_as_it_was_goes_on(place: Path) -> None:
    """Files that were copied, with other times, are the same files."""
    folder = broken_off()
    for name in ("rows.jsonl", "held.jsonl"):
        shutil.copy(name, "copy")
        os.replace("copy", name)
    assert luthier.train(recipe(), resume=folder).facts["status"] == "finished"


def test_another_recipe_is_told_by_its_keys(place: Path) -> None:
    """The refusal named two hashes instead of the keys that differ, and advised to use the very file in use."""
    folder = broken_off(tune="lora")
    with pytest.raises(LuthierError) as caught:
        luthier.train(recipe(tune={"lora": {"rank": 4}}, train={"steps": 9}), resume=folder)
    assert "train.steps: 6, now 9" in caught.value.what and "tune.lora.rank: 8, now 4" in caught.value.what
    assert "learning_rate" not in caught.value.what and "recipe.yaml" not in caught.value.fix


def test_recipes_of_runs_from_before_a_key_was_there_ask_for_the_same() -> None:
    """A run that was begun before there were other models could not be gone on with."""
    now = make_recipe(recipe(rows={"train": ROWS})).as_plain()
    before = {key: value for key, value in now.items() if key != "models"}
    before["rows"] = {key: value for key, value in before["rows"].items() if key != "numbers"}
    assert now["models"] == {} and not differences(before, now) and not differences(now, before)


def test_a_run_is_resumed_by_its_name(place: Path) -> None:
    """What `luthier runs` lists was refused as no run's folder, and a key to set was read as a recipe's file."""
    (place / "short.yaml").write_text(json.dumps(recipe(name="short")), encoding="utf-8")
    folder = broken_off(name="short")
    command = CliRunner().invoke(app, ["train", "--resume", "short-1", "train.steps=7", "--json"])
    assert command.exit_code == 2 and "train.steps: 6, now 7" in json.loads(command.stdout)["error"]
    command = CliRunner().invoke(app, ["train", "--resume", "short-1", "--json"])
    assert command.exit_code == 0 and read_run(folder).facts["status"] == "finished"


def test_what_was_given_in_python_is_gone_on_with_in_python(place: Path) -> None:
    """A run whose technique was a value in Python was refused because no technique has the value's description for a name."""
    folder = broken_off(tune=lora(rank=2))
    command = CliRunner().invoke(app, ["train", "--resume", str(folder), "--json"])
    told = json.loads(command.stdout)
    assert (
        command.exit_code == 2 and "`tune` was given in Python" in told["error"] and "luthier.train(recipe, resume=" in told["fix"]
    )
    assert luthier.train(recipe(tune=lora(rank=2)), resume=folder).facts["status"] == "finished"


def test_a_run_that_is_under_way_is_left_alone(place: Path) -> None:
    """A run that was still training could be resumed beside itself, and both wrote into its folder."""
    refused: list[str] = []

    def resume_too(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == 2:
            with pytest.raises(LuthierError) as caught:
                luthier.train(recipe(), resume=list_runs()[0].folder)
            refused.append(caught.value.what)
            assert list_runs()[0].facts["status"] == "running"

    folder = luthier.train(recipe(), tell=resume_too).folder
    assert [one.startswith(f"this run is still running: process {os.getpid()} on ") for one in refused] == [True]
    assert len((folder / "steps.jsonl").read_text().splitlines()) == 6


def test_a_killed_run_keeps_its_steps_and_what_was_measured(place: Path) -> None:
    """A killed run showed no steps and nothing that had been measured, and was called running for ever."""

    kept: dict[str, bytes] = {}

    def stop(plan: Any, progress: Any, result: Any) -> None:
        kept.setdefault("facts", (place / "runs" / "run-1" / "run.json").read_bytes())
        if progress.step == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        luthier.train(recipe(), tell=stop)
    folder = place / "runs" / "run-1"
    # As a kill leaves it: the facts of the beginning, and half a line in the log.
    (folder / "run.json").write_bytes(kept["facts"])
    with (folder / "steps.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 3, "lo')
    facts = list_runs()[0].facts
    assert facts["status"] == "crashed" and [line["step"] for line in facts["history"]] == [1, 2]
    held = facts.get("metrics", {}).get("held", {})
    assert facts["planned_steps"] == 6 and held.get("before", 0.0) > 0 and held["after"] is None


@pytest.mark.parametrize("use", ["train", "open_model", "probe", "look_at_rows"])
def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(use: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong number in a run's name sent the name to the hub instead of naming the runs that there are."""
    asked: list[str] = []

    def ask(name: str, **keys: Any) -> Path:
        asked.append(name)
        raise HubUnavailableError("not there")

    monkeypatch.setattr(load, "fetch_snapshot", ask)
    luthier.train(recipe(name="support"))
    uses: dict[str, Callable[[str], Any]] = {
        "train": lambda name: luthier.train(recipe(model=name)),
        "open_model": luthier.open_model,
        "probe": lambda name: luthier.probe("intruder_dimensions", name, "support-1"),
        "look_at_rows": lambda name: look_at_rows("rows.jsonl", name),
    }
    with pytest.raises(LuthierError) as caught:
        uses[use]("support-2")
    assert "there is no run `support-2`" in caught.value.what and "`support-1`" in caught.value.fix and not asked


def test_a_run_is_opened_by_its_name(place: Path) -> None:
    """A name or a folder, as other functions take it, was an AttributeError."""
    folder = luthier.train(recipe()).folder
    for named in ("run-1", "runs/run-1", folder):
        assert luthier.open_run(named)[0].parts.blocks
    with pytest.raises(LuthierError, match="there is no run `run-7`"):
        luthier.open_run("run-7")
    assert look_at_rows("rows.jsonl", "run-1").rows


def test_a_checkpoint_that_a_kill_kept_from_being_deleted_goes_when_the_run_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the last checkpoint was written and before an older one was deleted, a run kept one more than was asked for."""

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(luthier.Delta, "save", broken)
        luthier.train(recipe())
    folder = list_runs()[-1].folder
    checkpoints = folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-5", "step-6"]
    shutil.copytree(checkpoints / "step-5", checkpoints / "step-4")
    luthier.train(make_recipe(recipe()), resume=folder)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-5", "step-6"]
