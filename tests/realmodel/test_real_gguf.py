"""A tuned SmolLM2 as a GGUF file: its tokenizer, its tied head and its rotary rows are the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from luthier.export import export_gguf
from luthier.kinds import Now
from luthier.methods.weight_delta.lora import lora
from luthier.models import load_model, load_tokenizer, map_parts
from luthier.training.services import RunServices
from luthier.tune import Tune

pytestmark = pytest.mark.realmodel


def test_smollm2_in_gguf_answers_the_same(tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2-135m-instruct", dtype=torch.bfloat16), load_tokenizer("smollm2-135m-instruct")
    tune = Tune(model, map_parts(model))
    tune.add("lora", lora(rank=2, target_modules=("attention_query", "mlp_down")), RunServices(tune, "lora", Now(seed=0)), {})
    rng = torch.Generator().manual_seed(0)
    tune.set({key: 0.02 * torch.randn(one.master.shape, generator=rng) for key, one in tune.trained.items()})
    found = export_gguf(tune, tokenizer, tmp_path / "smollm2.gguf")
    assert found["weights"] == "bf16" and found["max_logit_difference"] == 0.0 and found["same_greedy_tokens"] == 1.0
    # Two bytes a number; embedding and head are one matrix.
    assert found["bytes"] < 2.1 * model.num_parameters()
    fields = GGUFReader(tmp_path / "smollm2.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.convert_tokens_to_ids("<|im_end|>")
