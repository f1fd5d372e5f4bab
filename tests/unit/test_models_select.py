"""Selecting from the map of a model: roles, groups, blocks and what is refused."""

from __future__ import annotations

import pytest

from luthier.errors import LuthierError
from luthier.kinds import Place
from luthier.kinds.parts import GROUPS, ROLES, expand_roles
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny


def test_select_narrows_by_role_block_and_tensor() -> None:
    parts = map_parts(tiny("qwen2", layers=3))
    assert [str(place) for place in parts.select(["attention_query"], blocks=[2, 0])] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
    ]
    assert {place.role for place in parts.select("attention", tensor="bias")} == {
        "attention_query",
        "attention_key",
        "attention_value",
    }
    assert len(parts.select(tensor=None)) == len(parts.places)
    assert parts.select("all", tensor=None) == list(parts.places)
    assert all(place.block == 1 for place in parts.by_block(1))
    assert sum(len(parts.by_block(block)) for block in (None, 0, 1, 2)) == len(parts.places)


def test_select_refuses_what_is_not_there() -> None:
    parts = map_parts(tiny("llama"))
    with pytest.raises(LuthierError, match="no block 2, 7"):
        parts.select(blocks=[0, 7, 2])
    with pytest.raises(LuthierError, match="did you mean `attention_query`"):
        parts.select("attention_qery")
    with pytest.raises(LuthierError, match="not a kind of tensor"):
        parts.select(tensor="weights")


def test_roles_expand_in_order_and_once() -> None:
    assert expand_roles("mlp") == ("mlp_up", "mlp_gate", "mlp_gate_up", "mlp_down")
    assert expand_roles(["head", "attention_query", "attention"]) == (*GROUPS["attention"], "head")
    assert expand_roles("linear") == (*GROUPS["attention"], *GROUPS["mlp"], *GROUPS["mixer"], "linear_other")
    assert expand_roles("all") == tuple(role for role in ROLES if role != "other_modality")
    assert set(expand_roles("norm")) == {role for role in ROLES if role.endswith("_norm")}
    assert expand_roles([]) == ()


def test_describe_names_roles_and_ties() -> None:
    text = map_parts(tiny("gpt2")).describe()
    assert text.startswith("gpt2: 2 blocks, width 32, 4 heads of 8 (4 key-value), vocabulary 259")
    assert "  attention_query: weights 2, biases 2" in text.splitlines()
    assert text.endswith("lm_head is tied to transformer.wte")


def test_places_print_their_rows() -> None:
    assert str(Place("a.b", "weight", "mlp_up", 0, 4, 8)) == "a.b.weight[4:8]"


def test_modules_go_by_the_models_own_names_too() -> None:
    """Who comes from PEFT writes `q_proj`; whole names and their ends do as well, and stand beside module types."""
    parts = map_parts(tiny("llama"))
    assert parts.select("q_proj") == parts.select("attention_query")
    assert parts.select(["mlp.down_proj", "attention_value"]) == parts.select(["mlp_down", "attention_value"])
    assert parts.select("model.layers.1.mlp.up_proj") == parts.select("mlp_up", blocks=[1])
    assert parts.select("q_proj", blocks=[0]) == parts.select("attention_query", blocks=[0])
    with pytest.raises(LuthierError, match="`q_porj` is no module type, no group of them and no module of this model") as caught:
        parts.select("q_porj")
    assert "`q_proj`" in caught.value.fix
    with pytest.raises(LuthierError, match="`proj`"):
        parts.select("proj")
