"""More steps for a run that has finished: from its last state, by the schedule of the longer run, and told."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.errors import LuthierError
from luthier.results.folder import read_run
from luthier.results.opened import open_run
from luthier.runs.resume import RECIPE
from luthier.training.schedule import cosine, factor
from tests.recipes.test_recipes import ASKED, recipe

SAID = "continued from step 2"


def keys(tmp_path: Path, steps: int = 2, **train: Any) -> dict[str, Any]:
    kept = {"save_every": 2, "steps": steps, "warmup": 1, **train}
    return recipe(tmp_path, tune="lora", evaluate={"facts": {"rows": ASKED, "max_new_tokens": 4}}, train=kept)


def test_it_goes_on_from_its_last_state(tmp_path: Path) -> None:
    """With its moments: the steps are those that one run would have taken whose learning rates had been these."""
    first = luthier.train(keys(tmp_path))
    assert first.facts["status"] == "finished" and first.facts["continued"] == []
    again = luthier.train(keys(tmp_path, steps=6), resume=first.folder)
    facts = read_run(first.folder).facts
    assert facts["status"] == "finished" and facts["steps"] == 6 and facts["continued"] == [2]
    assert [line["step"] for line in facts["history"]] == [1, 2, 3, 4, 5, 6]
    assert facts["history"][:2] == first.facts["history"]
    rates = [1e-3 * factor(cosine, step, 6, 1) for step in range(6)]
    assert [line["learning_rate"] for line in facts["history"][2:]] == pytest.approx(rates[2:])
    assert SAID in " ".join(facts["warnings"]) and SAID in again.report.read_text()
    assert facts["recipe"]["train"]["steps"] == 6 and "steps: 6" in (first.folder / RECIPE).read_text()
    # What was measured before training is that of the base, as ever; after it, that of the longer run.
    assert facts["metrics"]["facts"]["before"] == first.facts["metrics"]["facts"]["before"]
    opened, _ = open_run(first.folder)
    ids = torch.tensor([[5, 80, 90, 100]])
    with torch.no_grad():
        assert torch.allclose(opened.model(ids).logits, again.model(ids).logits, atol=1e-5)  # type: ignore[operator,misc]
    # With a constant rate the two parts are the one run, bit for bit.
    whole = luthier.train(keys(tmp_path, steps=4, schedule="constant", warmup=0))
    part = luthier.train(keys(tmp_path, schedule="constant", warmup=0))
    part = luthier.train(keys(tmp_path, steps=4, schedule="constant", warmup=0), resume=part.folder)
    assert part.facts["weights_sha256"] == whole.facts["weights_sha256"] != first.facts["weights_sha256"]


def test_stopped_while_it_goes_on_it_is_still_a_continued_run(tmp_path: Path) -> None:
    first = luthier.train(keys(tmp_path))

    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    stopped = luthier.train(keys(tmp_path, steps=6), resume=first.folder, tell=interrupt)
    assert stopped.facts["status"] == "stopped" and stopped.facts["steps"] == 3
    ended = luthier.train(keys(tmp_path, steps=6), resume=first.folder)
    assert ended.facts["status"] == "finished" and ended.facts["continued"] == [2]
    assert " ".join(ended.facts["warnings"]).count(SAID) == 1


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ({}, {}, "has finished with 2 steps, and the recipe asks for 2"),
        ({}, {"steps": 1}, "has finished with 2 steps, and the recipe asks for 1"),
        ({"save_every": None}, {"steps": 4}, "its last state was not kept"),
        ({}, {"steps": 4, "batch_rows": 2}, "another recipe: train.batch_rows"),
        ({}, {"steps": 4, "learning_rate": 1e-2}, "another recipe: train.learning_rate"),
    ],
)
def test_what_cannot_go_on_is_refused_and_left_as_it_is(
    first: dict[str, Any], then: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run = luthier.train(keys(tmp_path, **first))
    facts = (run.folder / "run.json").read_bytes()
    with pytest.raises(LuthierError, match=said):
        luthier.train(keys(tmp_path, **{**first, **then}), resume=run.folder)
    assert (run.folder / "run.json").read_bytes() == facts


def test_a_run_whose_last_checkpoint_is_gone_is_refused(tmp_path: Path) -> None:
    """An earlier one would silently take steps anew with other learning rates."""
    run = luthier.train(keys(tmp_path, steps=3, save_every=2))
    newest = run.folder / "checkpoints" / "step-3"
    assert newest.is_dir()
    (newest / "state.json").write_text("{}")
    with pytest.raises(LuthierError, match="its last state was not kept"):
        luthier.train(keys(tmp_path, steps=6), resume=run.folder)


def test_early_stopping_begins_to_count_again(tmp_path: Path) -> None:
    """A run that had stopped by itself takes the steps that it is asked for now."""
    stopping = {"evaluate_every": 1, "best": "facts", "patience": 1, "save_every": 1, "learning_rate": 1e-12}
    run = luthier.train(keys(tmp_path, steps=8, **stopping))
    assert run.facts["status"] == "finished" and run.facts["steps"] < 8
    taken = run.facts["steps"]
    again = luthier.train(keys(tmp_path, steps=9, **stopping), resume=run.folder)
    assert again.facts["steps"] > taken and again.facts["continued"] == [taken]
