"""Prefix tuning against attention's algebra: what a prefix adds, how it is made, and when it adds nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.prefix.prefix_tuning import prefix_tuning
from luthier.models.attention import Context, attention
from luthier.models.parts import map_parts
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import make_batch
from tests.tolerance import assert_rounded
from tests.toys.helpers import logits_of, model_of

RNG = torch.Generator().manual_seed(4)
BATCH = make_batch([(7, 3), (7, 4)])
HEADS, GROUPS, TIME, WIDTH, LENGTH = 4, 2, 4, 8, 3


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=RNG)


def module() -> nn.Module:
    one = nn.Module()
    one.layer_idx, one.num_key_value_groups, one.is_causal = 0, HEADS // GROUPS, True  # type: ignore[assignment]
    return one


def attend(query: Tensor, key: Tensor, value: Tensor, *prefix: Tensor) -> Tensor:
    context = Context((({}, lambda tensors, block: prefix),)) if prefix else None  # type: ignore[arg-type,return-value]
    return attention(module(), query, key, value, None, luthier=context, scaling=WIDTH**-0.5)[0].transpose(1, 2)


def share_of_prefix(query: Tensor, key: Tensor, prefix_key: Tensor, scale: float) -> Tensor:
    """lambda of each query and head, [B, H, T]: what all rows of the prefix get of the weight."""
    group = HEADS // GROUPS
    own = (query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scale).exp().tril().sum(-1)
    theirs = (query @ prefix_key.repeat_interleave(group, 0).transpose(-1, -2) * scale).exp().sum(-1)
    return theirs / (theirs + own)


def test_a_prefix_is_a_gate_between_attention_and_attention_to_the_prefix() -> None:
    query, key, value = draw(2, HEADS, TIME, WIDTH), draw(2, GROUPS, TIME, WIDTH), draw(2, GROUPS, TIME, WIDTH)
    prefix_key, prefix_value = draw(GROUPS, LENGTH, WIDTH), draw(GROUPS, LENGTH, WIDTH)
    found = attend(query, key, value, prefix_key, prefix_value)
    repeated_key, repeated_value = (one.repeat_interleave(HEADS // GROUPS, 0) for one in (prefix_key, prefix_value))
    to_prefix = (query @ repeated_key.transpose(-1, -2) * WIDTH**-0.5).softmax(-1) @ repeated_value
    plain = attend(query, key, value)

    def mixed(scale: float) -> Tensor:
        share = share_of_prefix(query, key, prefix_key, scale)[..., None]
        return (1 - share) * plain + share * to_prefix

    assert torch.allclose(found, mixed(WIDTH**-0.5), rtol=0, atol=1e-12)
    assert float((found - mixed(1.0)).abs().max()) > 1e-2


def test_with_equal_scores_the_share_falls_with_what_a_query_sees() -> None:
    query, key = torch.zeros(1, HEADS, TIME, WIDTH), draw(1, GROUPS, TIME, WIDTH).float()
    # Values of 1 in the prefix and 0 in the row make the output the share itself.
    found = attend(query, key, torch.zeros_like(key), torch.randn(GROUPS, LENGTH, WIDTH), torch.ones(GROUPS, LENGTH, WIDTH))
    assert torch.allclose(found[0, 0, :, 0], torch.tensor([3 / 4, 3 / 5, 3 / 6, 3 / 7]), rtol=0, atol=1e-6)


def test_no_prefix_and_a_prefix_that_no_query_scores_leave_attention_alone() -> None:
    query, key, value = draw(1, HEADS, TIME, WIDTH).abs(), draw(1, GROUPS, TIME, WIDTH), draw(1, GROUPS, TIME, WIDTH)
    plain = attend(query, key, value)
    nothing = draw(GROUPS, 0, WIDTH)
    assert_rounded(attend(query, key, value, nothing, nothing), plain, WIDTH + TIME, size=float(value.abs().max()))
    far = torch.full((GROUPS, LENGTH, WIDTH), -1e4, dtype=torch.float64)
    # With a mask that covers a prefix, attention may take another kernel.
    assert_rounded(attend(query, key, value, far, draw(GROUPS, LENGTH, WIDTH)), plain, WIDTH + TIME, size=float(value.abs().max()))


def services(architecture: str = "llama") -> RunServices:
    model = model_of(architecture)
    return RunServices(Tune(model, map_parts(model)), "prefix", Now())


def test_the_network_is_an_embedding_two_maps_and_a_tanh() -> None:
    own = services()
    prefix = prefix_tuning(length=5, hidden=6)
    tensors = prefix.start(own.parts, own)
    blocks, heads, width = own.parts.blocks, own.parts.key_value_heads, own.parts.head_width
    made = 2 * blocks * heads * width
    network = nn.Sequential(nn.Linear(own.parts.width, 6), nn.Tanh(), nn.Linear(6, made))
    with torch.no_grad():
        network[0].weight.copy_(tensors["down"])
        network[0].bias.copy_(tensors["down_bias"])
        network[2].weight.copy_(tensors["up"].reshape(made, 6))
        network[2].bias.copy_(tensors["up_bias"])
        expected = network(tensors["embedding"]).reshape(5, blocks, 2, heads, width)
    for block in range(blocks):
        for kind, found in enumerate(prefix.keyvalue(tensors, block)):
            assert found.shape == (heads, 5, width)
            assert torch.allclose(found, expected[:, block, kind].transpose(0, 1), rtol=0, atol=1e-6)


def test_the_network_starts_as_pytorch_starts_linear_maps() -> None:
    """Evenly within one over the root of the width that is read, biases too; the embedding is normal."""
    own = services()
    tensors = prefix_tuning(length=30, hidden=100).start(own.parts, own)
    assert float(tensors["embedding"].std()) == pytest.approx(1.0, abs=4 * (2 * 30 * own.parts.width) ** -0.5)
    for name, width_in in (("down", own.parts.width), ("down_bias", own.parts.width), ("up", 100), ("up_bias", 100)):
        even = tensors[name].double().flatten() * width_in**0.5
        assert float(even.abs().max()) <= 1 + 1e-6
        # The variance of what is even is a third, that of its square 4 / 45.
        assert abs(float(even.mean())) < 4 * (3 * len(even)) ** -0.5
        assert float(even.square().mean()) == pytest.approx(1 / 3, abs=4 * (4 / 45 / len(even)) ** 0.5)


def test_the_network_can_go_once_it_made_its_keys_and_values(engine: Any) -> None:
    made = prefix_tuning(length=4, hidden=6)
    run = engine(made, model=model_of())
    wanted = logits_of(run.tune.model, BATCH)
    tensors = run.tune.prefixes[0][0].masters()
    each = [made.keyvalue(tensors, block) for block in range(run.tune.parts.blocks)]
    direct = engine(prefix_tuning(length=4, reparameterization="none"), model=model_of())
    direct.tune.set({f"prefix.{name}": torch.stack([kv[i] for kv in each]) for i, name in enumerate(("key", "value"))})
    assert torch.equal(logits_of(direct.tune.model, BATCH), wanted)
    assert float((wanted - logits_of(model_of(), BATCH)).abs().max()) > 1e-2


def test_how_many_numbers_train() -> None:
    own = services()
    like_bart = replace(own.parts, blocks=36, width=1024, key_value_heads=16, head_width=64)
    direct = prefix_tuning(length=30, reparameterization="none").start(like_bart, own)
    assert sum(one.numel() for one in direct.values()) == 2_211_840
    by_network = prefix_tuning(length=30, hidden=8).start(like_bart, own)
    made = 2 * 36 * 1024
    assert sum(one.numel() for one in by_network.values()) == 30 * 1024 + (1024 * 8 + 8) + (8 * made + made)


def test_biases_of_the_network_do_not_decay(engine: Any) -> None:
    run = engine(prefix_tuning(length=2, hidden=4), model=model_of())
    assert {name.split(".")[-1]: one.decay for name, one in run.tune.trained.items()} == {
        "embedding": True,
        "down": True,
        "down_bias": False,
        "up": True,
        "up_bias": False,
    }


@pytest.mark.parametrize("options", [{"length": 0}, {"hidden": 0}])
def test_impossible_prefixes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LuthierError, match="is 0"):
        prefix_tuning(**options)


def test_a_prefix_may_be_one_long_and_its_network_one_wide() -> None:
    own = services()
    for options in ({"length": 1}, {"hidden": 1}):
        prefix = prefix_tuning(**options)
        key_HPW, _ = prefix.keyvalue(prefix.start(own.parts, own), 0)
        assert key_HPW.shape == (own.parts.key_value_heads, options.get("length", 30), own.parts.head_width)
