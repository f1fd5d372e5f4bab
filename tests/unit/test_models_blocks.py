"""One block by itself: what it makes of hidden states is what the model makes of them, and nothing else has a part in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.weight_delta.lora import lora
from luthier.models import blocks
from luthier.models.attention import use_attention
from luthier.models.parts import map_parts
from luthier.models.quantized import quantize
from luthier.models.tiny import tiny
from luthier.training.services import RunServices
from luthier.tune import Tune

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "phi", "phi3", "gpt2", "gpt_neox"]
FAMILIES += ["opt", "mixtral", "qwen3_moe"]
LENGTHS = (80, 9, 31)
"""Longer than the window of the families that have one, which is 64."""


def attend(left: bool) -> Tensor:
    attend_BT = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return attend_BT.flip(1) if left else attend_BT


def seen(model: Any, parts: Any, block: int, attend_BT: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    """What a block reads and returns in the model's own forward pass."""
    found: list[Tensor] = []

    def look(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        found.append(arguments[0] if arguments else named["hidden_states"])
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(parts.block_modules[block]).register_forward_hook(look, with_kwargs=True)
    ids_BT = torch.randint(5, 250, attend_BT.shape, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {}
    if left:
        given = {"attention_mask": attend_BT.long(), "position_ids": (attend_BT.long().cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        model(input_ids=ids_BT, use_cache=False, **given)
    handle.remove()
    return found[0], found[1]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_block_alone_is_the_block_in_the_model(architecture: str, left: bool) -> None:
    """Of every family, in both of its kinds of blocks where it has two, with padding on either side."""
    for own in (False, True):
        model = tiny(architecture, seed=1, layers=2)
        if own and not use_attention(model):
            continue
        parts, attend_BT = map_parts(model), attend(left)
        for block in (0, 1):
            before_BTD, after_BTD = seen(model, parts, block, attend_BT, left)
            with torch.no_grad():
                found_BTD = blocks.run(model, parts, block, blocks.weights(model, parts, block), before_BTD, attend_BT)
            assert torch.allclose(found_BTD[attend_BT], after_BTD[attend_BT], rtol=1e-5, atol=1e-5)
            assert float((after_BTD - before_BTD)[attend_BT].abs().max()) > 0.1


def test_given_weights_stand_in_and_alone_get_gradients() -> None:
    """Neither what stands beside the weights, nor checkpointing, nor dropout reaches a block that runs by itself."""
    model, other = tiny("llama", seed=1).double(), tiny("llama", seed=2).double()
    parts = map_parts(model)
    tune = Tune(model, parts)
    services = RunServices(tune, "any", Now())
    tune.add("lora", lora(rank=2, dropout=0.5), services, {})
    tune.set({name: torch.randn(one.master.shape) for name, one in tune.trained.items()})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train().requires_grad_(True)
    attend_BT, rng = attend(False), torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(3, 80, 32, generator=rng, dtype=torch.float64, requires_grad=True)
    theirs = {name: one.requires_grad_(True) for name, one in blocks.weights(other, parts, 0).items()}
    found_BTD = services.run_block(0, theirs, hidden_BTD, attend_BT)
    plain_BTD = blocks.run(other, parts, 0, blocks.weights(other, parts, 0), hidden_BTD, attend_BT)
    assert torch.equal(found_BTD, plain_BTD) and model.training and not tune.is_off
    found_BTD.square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(one.grad is not None and float(one.grad.abs().max()) > 0 for one in theirs.values())
    assert all(one.grad is None for one in model.parameters()) and all(one.gradient is None for one in tune.trained.values())
    way = torch.randn(theirs["mlp.up_proj.weight"].shape, generator=rng, dtype=torch.float64)
    ends = []
    for step in (1e-4, -1e-4):
        moved = {**theirs, "mlp.up_proj.weight": theirs["mlp.up_proj.weight"] + step * way}
        ends.append(float(services.run_block(0, moved, hidden_BTD, attend_BT).detach().square().sum()))
    slope = theirs["mlp.up_proj.weight"].grad
    assert slope is not None and float((slope * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3)


def test_the_weights_of_a_block_are_a_copy() -> None:
    model = tiny("gpt2", seed=1)
    parts = map_parts(model)
    found = blocks.weights(model, parts, 1)
    assert {f"{parts.block_modules[1]}.{name}" for name in found} <= set(dict(model.named_parameters()))
    found["attn.c_attn.weight"].zero_()
    assert float(model.get_submodule(parts.block_modules[1]).get_parameter("attn.c_attn.weight").abs().max()) > 0


def test_quantized_blocks_and_unknown_ones_are_refused() -> None:
    model = tiny("llama", seed=1)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(LuthierError, match="a block with linear_attention cannot be run by itself"):
        blocks.weights(model, map_parts(model), 1)
    del model.config.layer_types
    quantize(model, map_parts(model), "int8")
    with pytest.raises(LuthierError, match="a copy of a block cannot train where the weights are quantized"):
        blocks.weights(model, map_parts(model), 1)
