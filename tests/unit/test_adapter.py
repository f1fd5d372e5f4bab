"""Adapters against the formulas of their papers: what they read, where they add, how they start, how many numbers they train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.draws import drawing, dropout
from luthier.errors import LuthierError
from luthier.kinds import Now, Place, RepresentationEdit
from luthier.methods.representation_edit._bottleneck import bottleneck
from luthier.methods.representation_edit.adapter import adapter
from luthier.methods.representation_edit.mam import mam
from luthier.methods.representation_edit.parallel_adapter import parallel_adapter
from luthier.methods.representation_edit.scaled_parallel_adapter import scaled_parallel_adapter
from luthier.methods.representation_edit.serial_adapter import serial_adapter
from luthier.methods.weight_delta.lora import lora
from luthier.models.parts import map_parts
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import make_batch
from tests.toys.helpers import logits_of, model_of

BATCH = make_batch([(7, 3), (7, 4)])
PLACE = Place("mlp", "", "mlp_layer", 0)


def services() -> RunServices:
    model = model_of()
    return RunServices(Tune(model, map_parts(model)), "adapter", Now())


def moved(run: Any, seed: int = 3) -> Any:
    """The run with everything that trains at random values."""
    rng = torch.Generator().manual_seed(seed)
    run.tune.set({name: 0.3 * torch.randn(one.master.shape, generator=rng).double() for name, one in run.tune.trained.items()})
    return run


def by_hand(own: dict[str, Tensor], read: Tensor, scale: float) -> Tensor:
    """s * (ReLU(z W_down + b) W_up + b'), written as the paper does, with the matrices turned."""
    inner = torch.clamp(read @ own["down"].T + own["down_bias"], min=0)
    return scale * (inner @ own["up"].T + own["up_bias"])


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("insertion", ["serial", "parallel"])
def test_an_adapter_at_both_sublayers_is_the_papers_formula(engine: Any, insertion: Any, scale: float) -> None:
    model = model_of()
    run = moved(engine(adapter(width=5, insertion=insertion, place="both", scale=scale), model=model))
    own = {one.place.role: one.masters() for one in run.tune.owns if one.place.block == 1}
    layer, seen = model.model.layers[1], {}

    def see(name: str, of: str) -> None:
        module = layer.get_submodule(name)
        module.register_forward_hook(lambda m, a, y: seen.update({of: y, f"{of} input": a[0] if a else None}))

    see("input_layernorm", "attention x")
    see("self_attn.o_proj", "attention h")
    see("post_attention_layernorm", "mlp x")
    see("mlp.down_proj", "mlp h")
    layer.register_forward_hook(lambda m, a, y: seen.update(out=y))
    logits_of(model, BATCH)
    between, found = seen["mlp x input"], seen["out"]
    for role, before, after in (("attention", seen["attention x input"], between), ("mlp", between, found)):
        x, h = seen[f"{role} x"], seen[f"{role} h"]
        expected = before + h + by_hand(own[f"{role}_layer"], h if insertion == "serial" else x, scale)
        assert torch.allclose(after, expected, rtol=1e-12, atol=1e-12)
        other = before + h + by_hand(own[f"{role}_layer"], x if insertion == "serial" else h, scale)
        assert float((after - other).abs().max()) > 1e-2


def test_a_linear_parallel_adapter_without_biases_is_lora(engine: Any) -> None:
    roles, rank, alpha = ("attention_query", "mlp_up", "mlp_down"), 4, 12.0
    edit = bottleneck(target_modules=roles, insertion="parallel", width=rank, scale=alpha / rank, form="linear")
    runs = [engine(edit, model=model_of()), engine(lora(rank=rank, alpha=alpha, target_modules=roles), model=model_of())]
    rng = torch.Generator().manual_seed(2)
    for left, right in zip(*[run.tune.owns for run in runs], strict=True):
        assert left.place == right.place
        for name in ("down", "up"):
            value = torch.randn(right.trained[name].master.shape, generator=rng).double()
            for run, own in zip(runs, (left, right), strict=True):
                run.tune.set({own.trained[name].name: value})
    one, other = (logits_of(run.tune.model, BATCH) for run in runs)
    assert float((one - logits_of(model_of(), BATCH)).abs().max()) > 0.1
    assert torch.allclose(one, other, rtol=1e-11, atol=1e-11)


def test_a_relu_is_in_the_bottleneck_and_not_in_the_linear_form() -> None:
    tensors = {"down": torch.eye(2), "up": torch.eye(2), "down_bias": torch.zeros(2), "up_bias": torch.zeros(2)}
    x = torch.tensor([[-1.0, 2.0]])
    assert adapter(width=2, scale=1.0).apply(tensors, x, torch.zeros(1, 2)).tolist() == [[0.0, 2.0]]
    assert adapter(width=2, scale=1.0, form="linear").apply(tensors, x, torch.zeros(1, 2)).tolist() == [[-1.0, 2.0]]


def test_the_scale_is_applied_behind_the_bias() -> None:
    edit = scaled_parallel_adapter(width=3, scale=4.0)
    tensors = edit.start(PLACE, 2, 2, services())
    tensors["up_bias"] += 1.0
    y = torch.zeros(1, 2)
    assert not tensors["up"].any() and edit.apply(tensors, torch.ones(1, 2), y).tolist() == [[4.0, 4.0]]


def test_only_a_serial_adapter_sees_what_the_sublayer_returns() -> None:
    rng = torch.Generator().manual_seed(1)
    x, y, more = (torch.randn(3, 6, generator=rng).double() for _ in range(3))

    def change(edit: RepresentationEdit, returned: Tensor) -> Tensor:
        tensors = {name: value.double() for name, value in edit.start(PLACE, 6, 6, services()).items()}
        return edit.apply(tensors, x, returned) - returned

    parallel, serial = adapter(width=4, init="bert", scale=1.0), serial_adapter(width=4, init="bert")
    assert torch.allclose(change(parallel, y), change(parallel, y + more), rtol=0, atol=1e-14)
    assert float((change(serial, y) - change(serial, y + more)).abs().max()) > 1e-4


def test_starting_like_bert_is_not_the_base(engine: Any) -> None:
    wanted = logits_of(model_of(), BATCH)
    for init, same in (("lora", True), ("bert", False)):
        run = engine(serial_adapter(width=8, init=init), model=model_of())  # type: ignore[arg-type]
        assert torch.equal(logits_of(run.tune.model, BATCH), wanted) == same


def test_the_starts_draw_what_they_say() -> None:
    like_lora = adapter(width=64).start(PLACE, 256, 256, services())
    assert float(like_lora["down"].abs().max()) <= 1 / 16 and abs(float(like_lora["down"].std()) - 1 / 16 / 3**0.5) < 5e-4
    like_bert = adapter(width=64, init="bert").start(PLACE, 256, 256, services())
    assert all(abs(float(like_bert[name].std()) - 0.02) < 5e-4 for name in ("down", "up"))
    assert not any(one[name].any() for one in (like_lora, like_bert) for name in ("down_bias", "up_bias"))


MEMBERS = {
    "serial": (serial_adapter(width=6), adapter(width=6, insertion="serial", place="both", scale=1.0)),
    "behind the MLP": (serial_adapter(width=6, place="mlp"), adapter(width=6, insertion="serial", place="mlp", scale=1.0)),
    "parallel": (parallel_adapter(width=6, place="attention"), adapter(width=6, place="attention", scale=1.0)),
    "scaled parallel": (scaled_parallel_adapter(width=6), adapter(width=6)),
    "scaled by 1": (scaled_parallel_adapter(width=6, scale=1.0), parallel_adapter(width=6)),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_named_adapters_are_points_of_one_space(engine: Any, name: str) -> None:
    runs = [moved(engine(value, model=model_of())) for value in MEMBERS[name]]
    assert list(runs[0].tune.trained) == list(runs[1].tune.trained)
    assert torch.equal(*[logits_of(run.tune.model, BATCH) for run in runs])


def test_dropout_stands_behind_the_relu_and_only_in_training() -> None:
    edit = adapter(width=6, init="bert", dropout=0.5)
    tensors = {name: value.double() for name, value in edit.start(PLACE, 4, 4, services()).items()}
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(edit.apply(tensors, x, x), adapter(width=6, init="bert").apply(tensors, x, x))
    with drawing(torch.arange(5), "adapter"):
        found = edit.apply(tensors, x, x)
        inner = dropout(torch.relu(x @ tensors["down"].T), 0.5)
    assert (inner == 0).any() and torch.allclose(found, x + 4 * inner @ tensors["up"].T, rtol=0, atol=1e-14)


def test_the_number_of_trained_numbers_is_the_papers(engine: Any) -> None:
    run = engine(parallel_adapter(width=5), model=model_of())
    width = run.tune.parts.width
    assert run.tune.numbers() == 2 * (2 * width * 5 + 5 + width)


def test_the_mam_adapter_trains_the_papers_share_of_bart_large() -> None:
    # 24 layers of width 1024 with 36 attentions, since a decoder's layer has two; 406 million numbers.
    prefix, edit = mam(reparameterization="none")
    beside_mlps = 24 * sum(one.numel() for one in edit.start(PLACE, 1024, 1024, services()).values())
    like_bart = replace(map_parts(model_of()), blocks=36, key_value_heads=16, head_width=64)
    in_attention = sum(one.numel() for one in prefix.start(like_bart, services()).values())
    assert (beside_mlps, in_attention) == (25_202_688, 2_211_840)
    assert round((beside_mlps + in_attention) / 406e6, 4) == 0.0675


def test_the_mam_adapter_is_a_prefix_and_a_scaled_parallel_adapter(engine: Any) -> None:
    prefix, edit = mam(length=3, width=5, scale=2.0)
    run = moved(engine((prefix, edit), model=model_of()))
    apart = engine([prefix, scaled_parallel_adapter(width=5, scale=2.0)], model=model_of())
    # As one technique they share a slot; apart each has its own.
    names = {name: name.replace("prefix/", "representation_edit/") for name in run.tune.trained}
    apart.tune.set({names[name]: one.master.detach() for name, one in run.tune.trained.items()})
    assert len(run.tune.trained) == 5 + 4 * 2
    assert torch.equal(*[logits_of(one.tune.model, BATCH) for one in (run, apart)])


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3_moe", "gemma3_text", "phi3"])
def test_adapters_find_the_sublayers_of_other_families(engine: Any, architecture: str) -> None:
    wanted = logits_of(model_of(architecture), BATCH)
    run = engine(serial_adapter(width=4), model=model_of(architecture))
    assert torch.equal(logits_of(run.tune.model, BATCH), wanted)
    assert float((logits_of(moved(run).tune.model, BATCH) - wanted).abs().max()) > 1e-2


def test_a_model_whose_mlp_is_no_module_is_refused(engine: Any) -> None:
    with pytest.raises(LuthierError, match="the mlp of a block is no module of its own"):
        engine(parallel_adapter(), model=model_of("opt"))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"width": 0}, "the width is 0"), ({"scale": 0.0}, "the scale is 0"), ({"dropout": 1.0}, "the dropout is 1.0")],
)
def test_impossible_adapters_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LuthierError, match=said):
        adapter(**options)


def test_an_adapter_may_be_one_wide_and_draws_where_it_drops() -> None:
    assert {name: tuple(one.shape) for name, one in adapter(width=1, scale=0.01).start(PLACE, 4, 4, services()).items()} == {
        "down": (1, 4),
        "up": (4, 1),
        "down_bias": (1,),
        "up_bias": (4,),
    }
    assert [adapter(dropout=dropout).draws for dropout in (0.0, 0.01, 0.9)] == [False, True, True]
    assert not any(made().draws for made in (serial_adapter, parallel_adapter, scaled_parallel_adapter))


def test_an_adapter_does_not_merge(engine: Any) -> None:
    run = engine(parallel_adapter(width=4), model=model_of())
    with pytest.raises(LuthierError, match="cannot be merged"):
        run.tune.merge()
