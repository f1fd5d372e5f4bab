"""SmolLM2 with its matrices in 8 and in 4 bits: what rounding costs it, and what training and merging do then."""

from __future__ import annotations

from pathlib import Path

import pytest

import luthier
from luthier.export.model import PROBES, divergence, outputs
from luthier.models import load_model, load_tokenizer
from luthier.models.quantized import code_tensors, count, quantized
from luthier.runs.export import export

pytestmark = pytest.mark.realmodel

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ROWS = [
    {"prompt": f"What is the code of the {thing}?", "completion": f"It is {code}."}
    for thing, code in (("mill", 417), ("well", 952))
]


@pytest.mark.parametrize(("scheme", "bits", "most"), [("int8", 8.0, 0.02), ("nf4", 4.5, 0.5)])
def test_smollm2_still_answers(scheme: str, bits: float, most: float) -> None:
    tokenizer = load_tokenizer(MODEL)
    ids = [tokenizer(text)["input_ids"] for text in PROBES]
    dense, model = load_model(MODEL), load_model(MODEL, quantize=scheme)
    assert count(model) == count(dense) == 134_515_008 and len(quantized(model)) == 30 * 7
    numbers = sum(one.numbers for one in quantized(model).values())
    # One scale a row of 576 numbers or more adds at most 1 % to 8 bits.
    assert bits <= 8 * sum(one.nbytes for one in code_tensors(model)) / numbers < 1.01 * bits
    cost = divergence(outputs(dense, ids), outputs(model, ids))
    assert 0 < cost < most, cost
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_smollm2_learns_beside_4_bits_and_merges(tmp_path: Path) -> None:
    train = {"steps": 4, "batch_rows": 2, "learning_rate": 5e-3, "precision": "fp32", "warmup": 0}
    recipe = {"model": MODEL, "quantize": "nf4", "rows": {"train": ROWS}, "tune": "lora", "train": train, "out": str(tmp_path)}
    run = luthier.train(recipe)
    losses = [line["loss"] for line in run.facts["history"]]
    assert losses[-1] < 0.5 * losses[0], losses
    assert export(str(run.folder), tmp_path / "model")["merge_kl"] < 1e-6
