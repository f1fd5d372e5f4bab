"""Prefixes against attention by hand, prompts against embeddings put in front, and what padding must not change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from luthier.errors import LuthierError
from luthier.kinds import Batch, Now
from luthier.models.attention import Context, attention
from luthier.tune.forward import hidden
from tests.conftest import make_batch, split
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight, toys  # noqa: F401

RNG = torch.Generator().manual_seed(3)


def by_hand(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Attention of every query to the whole prefix and to the tokens up to its own; [B, H, T, W] to [B, T, H, W]."""
    rows, heads, time, width = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(rows, time, heads, width, dtype=query.dtype)
    for b in range(rows):
        for h in range(heads):
            for t in range(time):
                keys = torch.cat([prefix[0][h // group], key[b, h // group, : t + 1]])
                values = torch.cat([prefix[1][h // group], value[b, h // group, : t + 1]])
                score = (keys @ query[b, h, t]) * scale
                weight = (score - score.max()).exp()
                out[b, t, h] = (weight / weight.sum()) @ values
    return out


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=RNG)


def test_attention_with_a_prefix_equals_attention_by_hand_for_grouped_queries() -> None:
    query, key, value = draw(2, 4, 5, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8)
    prefix = (draw(2, 3, 8), draw(2, 3, 8))
    module = torch.nn.Module()
    module.layer_idx, module.num_key_value_groups, module.is_causal = 0, 2, True  # type: ignore[assignment]
    context = Context((({}, lambda tensors, block: prefix),))
    found, _ = attention(module, query, key, value, None, luthier=context, scaling=0.3)
    assert torch.allclose(found, by_hand(query, key, value, prefix, 0.3), rtol=1e-12, atol=1e-12)


def test_a_model_with_a_prefix_computes_attention_by_hand(engine: Any) -> None:
    model = model_of(layers=1)
    run = engine("plain_prefix", model=model)
    batch = make_batch([(6, 3), (6, 2)])
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda m, a, o: seen.update(x=o["hidden_states"]), with_kwargs=True)
    layer.o_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    with torch.no_grad():
        hidden(run.tune, batch)
        x = seen["x"]
        shape = (2, 6, -1, 8)
        query, key, value = (f(x).view(shape).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
        cos, sin = model.model.rotary_emb(x, torch.arange(6)[None])
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        own = run.tune.prefixes[0][0].tensors()
        expected = by_hand(query, key, value, (own["key_LHPW"][0], own["value_LHPW"][0]), 8**-0.5)
    assert torch.allclose(seen["out"], expected.reshape(2, 6, 32), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_equals_its_embeddings_put_in_front(engine: Any, architecture: str) -> None:
    model = model_of(architecture)
    plain = copy.deepcopy(model)
    run = engine({"plain_prompt": {"length": 3}}, model=model)
    batch = make_batch([(6, 3), (6, 2)])
    prompt_PD = next(iter(run.tune.trained.values())).master.detach()
    embeds = plain.get_input_embeddings()(batch.token_ids_BT)
    with torch.no_grad():
        whole = torch.cat([prompt_PD.expand(2, -1, -1), embeds], dim=1)
        backbone = plain.get_submodule(run.tune.parts.backbone)
        expected = backbone(inputs_embeds=whole, use_cache=False).last_hidden_state[:, 3:]
        assert torch.allclose(hidden(run.tune, batch).values, expected, rtol=1e-12, atol=1e-12)


def pad_left(batch: Batch, more: int = 0) -> Batch:
    """The same rows, padded on the left."""
    time = batch.token_ids_BT.shape[1] + more
    rows = []
    for b in range(len(batch.row_ids)):
        n = int(batch.attend_BT[b].sum())
        rows.append((batch.token_ids_BT[b, :n], batch.label_BT[b, :n], n))
    ids, label = torch.zeros(len(rows), time, dtype=torch.long), torch.full((len(rows), time), -100)
    attend, position = torch.zeros(len(rows), time, dtype=torch.bool), torch.zeros(len(rows), time, dtype=torch.long)
    for b, (row, targets, n) in enumerate(rows):
        ids[b, time - n :], label[b, time - n :], attend[b, time - n :] = row, targets, True
        position[b, time - n :] = torch.arange(n)
    return Batch(ids, attend, position, label, batch.row_ids)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("tune", ["full", "plain_prefix", "plain_prompt", "some_rows", "bottleneck"])
def test_padding_left_right_and_none_give_the_same_loss(engine: Any, now: Now, tune: str, architecture: str) -> None:
    """Fault 14: left and right padding give the same loss, and so does no padding at all."""
    run = engine(tune, model=model_of(architecture))
    batch = make_batch([(6, 4), (9, 3), (4, 4)])
    # A label on a row's first token has nothing before it, wherever the padding stands.
    assert batch.label_BT[2, 0] >= 0 and batch.supervised == pad_left(batch).supervised == 10
    assert pad_left(batch, 3).label_BT[2, -4] >= 0
    plain = gradients(run, split(batch, (1, 1, 1)), now)
    for other in ([batch], [pad_left(batch)], [pad_left(batch, 3)], [make_batch([(6, 4), (9, 3), (4, 4)], pad_to=20)]):
        assert gap(gradients(run, other, now), plain) < 1e-10


def test_off_masks_virtual_ids_in_the_row_and_recounts_positions(engine: Any) -> None:
    model = model_of()
    plain = copy.deepcopy(model)
    run = engine({"plain_prompt": {"length": 2}}, model=model)
    ids = torch.tensor([[-1, -2, 30, 31, 32, 33], [30, 31, -1, 32, -2, 33]])
    batch = Batch(
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        torch.arange(6).expand(2, -1),
        torch.full_like(ids, -100),
        ("a", "b"),
    )
    with torch.no_grad():
        expected = plain.model(torch.tensor([[30, 31, 32, 33]])).last_hidden_state[0]
        with run.tune.off():
            found = hidden(run.tune, batch).values
    assert torch.allclose(found[0, 2:], expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(found[1, [0, 1, 3, 5]], expected, rtol=1e-12, atol=1e-12)


def test_prefix_and_prompt_and_delta_together(engine: Any, now: Now) -> None:
    run = engine(["plain_prefix", "plain_prompt", "lora"], model=model_of(), optimizer="adamw", keep_base=True)
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    for i in range(2):
        run.step([rows_of_eight()], now._replace(step=i, learning_rate=0.01))
    assert all(not torch.equal(one.master, before[name]) for name, one in run.tune.trained.items())


def test_a_prefix_is_refused_where_attention_caps_its_scores(engine: Any) -> None:
    with pytest.raises(LuthierError, match="a prefix cannot join the attention of gemma2"):
        engine("plain_prefix", model=model_of("gemma2"))


def test_a_second_prompt_is_refused(engine: Any) -> None:
    with pytest.raises(LuthierError, match=r"`plain_prompt\.2` is a second prompt"):
        engine(["plain_prompt", "plain_prompt"])


def test_two_prefixes_both_take_part(engine: Any, now: Now) -> None:
    run = engine(["plain_prefix", {"plain_prefix": {"length": 2}}], model=model_of())
    assert {name: bool(g.abs().sum() > 0) for name, g in gradients(run, [rows_of_eight()], now).items()} == {
        f"{slot}.{name}": True for slot in ("plain_prefix", "plain_prefix.2") for name in ("key_LHPW", "value_LHPW")
    }
