"""Prompts in whole runs: they fit the context, stand by themselves in what a run kept, and can be left away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.kinds import Prompt
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.registry import Part
from luthier.results.opened import open_base, open_run
from luthier.runs.train import train
from tests.toys.helpers import model_of

ROWS = [{"prompt": f"what is {i}", "completion": f"it is {i}"} for i in range(12)]


def recipe(out: Path, tune: Any, **train: Any) -> dict[str, Any]:
    return {
        "model": "workshop-small",
        "name": "prompts",
        "out": str(out),
        "repeat_baseline": False,
        "tune": tune,
        "rows": {"train": ROWS},
        "train": {"steps": 4, "batch_rows": 4, "precision": "fp32", "device": "cpu", "threads": 1, **train},
    }


def logits(tune: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = tune.model(torch.tensor([ids])).logits
    return found


def test_a_prompt_that_leaves_no_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="a prompt of 4000 and a row of"):
        make_plan(make_recipe(recipe(tmp_path, {"prompt_tuning": {"length": 4000}})))


def test_tuned_weights_can_be_used_without_the_prompt(tmp_path: Path) -> None:
    run = train(recipe(tmp_path, [{"promot": {"share": 0.5, "length": 3}}, "full"], learning_rate=1e-3))
    whole, _ = open_run(run)
    bare, _ = open_run(run, weights_only=True)
    base, _ = open_base(run)
    assert whole.prompt_length == 3 and bare.prompt_length == 0
    ids = [5, 6, 7, 8]
    assert torch.equal(logits(whole, ids), logits(bare, ids)) and not torch.equal(logits(bare, ids), logits(base, ids))


@pytest.mark.parametrize("tune", ["corda", "lora_sb", "svfit", "adalora", "lora_xs"])
def test_a_run_opens_without_the_rows_it_was_calibrated_on(tmp_path: Path, tune: str) -> None:
    run = train(recipe(tmp_path, {tune: {}}, learning_rate=1e-2))
    merged, _ = open_run(run)
    beside, _ = open_run(run, merged=False)
    ids = [5, 6, 7, 8]
    assert torch.allclose(logits(merged, ids), logits(beside, ids), atol=1e-4)
    with beside.off():
        assert torch.equal(logits(beside, ids), logits(open_base(run)[0], ids))


@pytest.mark.parametrize("architecture", ["gemma", "gemma3_text", "llama"])
def test_a_prompt_begins_with_embeddings_as_rows_meet_them(engine: Any, architecture: str) -> None:
    seen: list[torch.Tensor] = []

    def start(table_VD: torch.Tensor, services: Any) -> dict[str, torch.Tensor]:
        seen.append(table_VD[:4])
        return {"prompt": torch.zeros(1, table_VD.shape[1])}

    model = model_of(architecture)
    wanted = model.get_input_embeddings()(torch.arange(4))
    value = Prompt(start, lambda tensors, ids_BT, embeds_BTD: embeds_BTD, length=1)
    run = engine([Part(name="some", kind="prompt", options={}, values=(value,))], model=model)
    assert torch.allclose(seen[0], wanted, atol=1e-6)
    assert not any(one.decay for one in run.tune.trained.values())
