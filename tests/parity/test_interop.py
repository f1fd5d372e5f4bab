"""What is trained here goes on elsewhere, and what was trained elsewhere goes on here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from luthier.export import export_model, export_peft, load_peft
from luthier.kinds import Now
from luthier.methods.weight_delta.lora import lora
from luthier.models import map_parts, tiny, tiny_tokenizer
from luthier.runs.export import export
from luthier.runs.train import train
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.tolerance import TINY, assert_rounded

peft = pytest.importorskip("peft")

IDS = torch.arange(6, 46).reshape(2, 20)
STEPS, RATE = 4, 0.05


def attached(technique: Any) -> Tune:
    tune = Tune(tiny(), map_parts(tiny()), keep_base=True)
    tune.add("lora", technique, RunServices(tune, "lora", Now(seed=0)), {})
    return tune


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def trained_by_peft(folder: Path, steps: int) -> tuple[Any, list[float]]:
    """An adapter after some steps of plain gradient descent in PEFT, saved, and its losses."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny(), config)
    losses = descend_peft(model, steps)
    model.save_pretrained(folder)
    return model, losses


def descend_peft(model: Any, steps: int) -> list[float]:
    weights = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=RATE)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def descend_here(tune: Tune, steps: int) -> list[float]:
    """The same steps on the tensors luthier trains."""
    losses = []
    for _ in range(steps):
        loss = tune.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        after = {}
        for name, one in tune.trained.items():
            assert one.gradient is not None
            after[name] = one.master - RATE * one.gradient
            one.gradient = None
        tune.set(after)
        losses.append(float(loss.detach()))
    return losses


def test_an_adapter_trained_by_peft_goes_on_training_here(tmp_path: Path) -> None:
    theirs, before = trained_by_peft(tmp_path / "adapter", STEPS)
    assert before[-1] < before[0] - 0.01
    tune = attached(load_peft(tmp_path / "adapter", Tune(tiny(), map_parts(tiny()))))
    assert_rounded(logits(tune.model), logits(theirs), TINY)
    assert float((logits(tune.model) - logits(tiny())).abs().max()) > 0.01
    here, there = descend_here(tune, STEPS), descend_peft(theirs, STEPS)
    assert here == pytest.approx(there, rel=1e-5) and here[-1] < before[-1]
    torch.testing.assert_close(logits(tune.model), logits(theirs), rtol=1e-4, atol=1e-4)
    # And back: what was trained on is an adapter again.
    export_peft(tune, tmp_path / "again", "tiny:llama")
    again = peft.PeftModel.from_pretrained(tiny(), tmp_path / "again")
    assert_rounded(logits(again), logits(tune.model), TINY)


def test_an_adapter_trained_here_goes_on_training_in_peft(tmp_path: Path) -> None:
    tune = attached(lora(rank=3))
    before = descend_here(tune, STEPS)
    assert before[-1] < before[0]
    export_peft(tune, tmp_path / "adapter", "tiny:llama")
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path / "adapter", is_trainable=True)
    assert_rounded(logits(theirs), logits(tune.model), TINY)
    assert descend_peft(theirs, STEPS) == pytest.approx(descend_here(tune, STEPS), rel=1e-5)


def test_a_merged_export_is_the_adapter_that_peft_merges(tmp_path: Path) -> None:
    tune = attached(lora(rank=3))
    descend_here(tune, STEPS)
    export_peft(tune, tmp_path / "adapter", "tiny:llama")
    export_model(tune, tiny_tokenizer(), tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    merged: Any = peft.PeftModel.from_pretrained(tiny(), tmp_path / "adapter").merge_and_unload()
    assert_rounded(logits(plain), logits(merged), TINY)
    assert_rounded(logits(plain), logits(tune.model), TINY)


def test_a_run_leaves_in_every_form_with_the_same_logits(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {number}.", "completion": f" {number}"} for number in range(4)]
    run = train(
        {
            "model": "tiny:llama",
            "rows": {"train": rows},
            "tune": "lora",
            "train": {"steps": 3, "batch_rows": 4, "device": "cpu", "precision": "fp32", "learning_rate": 0.01},
            "out": str(tmp_path / "runs"),
        }
    )
    expected = logits(run.model)
    assert float((expected - logits(tiny())).abs().max()) > 0.01
    export(str(run.folder), tmp_path / "model")
    export(str(run.folder), tmp_path / "adapter", form="peft")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = peft.PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    for model in (plain, adapted):
        assert_rounded(logits(model), expected, TINY)
