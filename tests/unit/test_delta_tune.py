"""Deltas of tunes: from kept bases or a second model, low-rank where the technique is, and back into a tune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier import registry
from luthier.delta import Delta, Dense, LowRank, Sparse
from luthier.delta.forms import bits
from luthier.errors import LuthierError
from luthier.export import merged
from luthier.kinds import Now, Place, Select, Selective, Services, Tensors, WeightDelta
from luthier.kinds.parts import Parts
from luthier.methods.weight_delta.lora import lora
from luthier.models import fingerprint, map_parts, tiny
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.tolerance import TINY, assert_rounded


def attach(model: nn.Module, **values: Any) -> Tune:
    """A tune with techniques by slot, on a base it keeps."""
    tune = Tune(model, map_parts(model), keep_base=True)
    for slot, value in values.items():
        tune.add(slot, value, RunServices(tune, slot, Now(seed=0)), {})
    return tune


def train(tune: Tune, seed: int = 0) -> None:
    """Move everything that trains a little."""
    rng = torch.Generator().manual_seed(seed)
    noise = {name: 0.05 * torch.randn(one.master.shape, generator=rng) for name, one in tune.trained.items()}
    tune.set({name: one.master.detach() + noise[name] for name, one in tune.trained.items()})


def some_rows(role: str) -> Selective:
    """Every third output row of a role's matrices."""

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {
            place: Select("rows", torch.arange(0, len(services.weight(place)), 3)) for place in parts.select(target_modules=[role])
        }

    return Selective(choose)


def some_entries(role: str) -> Selective:
    """A few entries of a role's matrices."""

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {place: Select("flat", torch.tensor([0, 7, 33])) for place in parts.select(target_modules=[role])}

    return Selective(choose)


def half_started(scale: float = 2.0) -> WeightDelta:
    """Factors that start at something and are taken out of the base."""
    plain = lora(rank=2, alpha=2 * scale, target_modules=("mlp_up", "attention_value"))

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        tensors = plain.start(place, weight_OI, services)
        return {**tensors, "up": torch.full_like(tensors["up"], 0.1)}

    return plain._replace(start=start, subtract=True)


def elementwise() -> WeightDelta:
    """A delta that is no product of two factors."""

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        return {"change": torch.zeros(weight_OI.shape)}

    return WeightDelta(
        start,
        lambda tensors, x: nn.functional.linear(x, tensors["change"]),
        lambda tensors: tensors["change"],
        target_modules=("mlp_down", "attention_key"),
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert [name for name in right if not torch.equal(bits(left[name]), bits(right[name]))] == []


TECHNIQUES: dict[str, Callable[[], dict[str, Any]]] = {
    "full": lambda: {"full": registry.make("full", ("selective",)).values[0]},
    "half": lambda: {"half": registry.make("half", ("selective",)).values[0]},
    "rows": lambda: {"rows": some_rows("attention_query")},
    "entries": lambda: {"entries": some_entries("mlp_down")},
    "lora": lambda: {"lora": lora(rank=3)},
    "two loras": lambda: {"lora": lora(rank=3), "lora.2": lora(rank=2, alpha=7.0, target_modules=("attention",))},
    "subtract": lambda: {"started": half_started()},
    "elementwise": lambda: {"elementwise": elementwise()},
    "everything": lambda: {"rows": some_rows("mlp_up"), "started": half_started(), "elementwise": elementwise()},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_applied_to_the_base_it_gives_the_merged_model(name: str, architecture: str, dtype: torch.dtype) -> None:
    base = tiny(architecture, dtype=dtype)
    tune = attach(tiny(architecture, dtype=dtype), **TECHNIQUES[name]())
    train(tune)
    own, second = Delta.of(tune), Delta.of(tune, base)
    assert own.base == second.base and own.base.fingerprint == fingerprint(base)
    tune.merge()
    expected = state(tune.model)
    for delta in (own, second):
        model = tiny(architecture, dtype=dtype)
        delta.apply(model)
        assert_same(state(model), expected)


def test_forms_follow_the_techniques() -> None:
    def forms(name: str) -> set[type]:
        tune = attach(tiny(), **TECHNIQUES[name]())
        train(tune)
        return {type(form) for forms in Delta.of(tune).changes.values() for form in forms}

    assert forms("full") == {Dense}
    assert forms("rows") == forms("entries") == {Sparse}
    assert forms("lora") == {LowRank}
    assert forms("elementwise") == {Dense}


def test_a_delta_beside_untouched_weights_needs_no_kept_base() -> None:
    model = tiny()
    tune = Tune(model, map_parts(model), keep_base=False)
    tune.add("lora", lora(rank=2), RunServices(tune, "lora", Now(seed=0)), {})
    train(tune)
    assert Delta.of(tune, name="tiny").base.fingerprint == fingerprint(tiny())


def test_without_base_or_kept_numbers_there_is_no_delta() -> None:
    model = tiny()
    tune = Tune(model, map_parts(model), keep_base=False)
    tune.add("rows", some_rows("mlp_up"), RunServices(tune, "rows", Now(seed=0)), {})
    train(tune)
    with pytest.raises(LuthierError, match="not kept"):
        Delta.of(tune)
    assert len(Delta.of(tune, tiny())) == 2


def test_a_merged_tune_has_no_delta() -> None:
    tune = attach(tiny(), lora=lora(rank=2))
    tune.merge()
    with pytest.raises(LuthierError, match="merged"):
        Delta.of(tune)


def test_a_delta_does_not_follow_later_training() -> None:
    tune = attach(tiny(), rows=some_rows("mlp_up"), lora=lora(rank=2, target_modules=("attention",)))
    train(tune)
    delta = Delta.of(tune)
    before = {name: delta.spread(name).clone() for name in delta}
    train(tune, seed=1)
    assert all(torch.equal(delta.spread(name), before[name]) for name in delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "two loras", "subtract"])
def test_restore_puts_factors_beside_the_weights_again(name: str, architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tune = attach(tiny(architecture, dtype=dtype), **TECHNIQUES[name]())
    train(tune)
    Delta.of(tune).save(tmp_path / "delta.safetensors")
    again = attach(tiny(architecture, dtype=dtype), **TECHNIQUES[name]())
    Delta.load(tmp_path / "delta.safetensors").restore(again)
    assert_same(state(again.model), state(tune.model))
    for key, one in tune.trained.items():
        assert torch.equal(again.trained[key].master, one.master)
    ids = torch.arange(3, 15)[None]
    assert torch.equal(again.model(ids).logits, tune.model(ids).logits)


def test_restore_applies_what_was_in_place() -> None:
    tune = attach(tiny(), rows=some_rows("mlp_up"), lora=lora(rank=2))
    train(tune)
    again = attach(tiny(), lora=lora(rank=2))
    Delta.of(tune).restore(again)
    ids = torch.arange(3, 15)[None]
    assert torch.equal(again.model(ids).logits, tune.model(ids).logits)


def test_the_base_can_be_run_after_restoring() -> None:
    tune = attach(tiny(), rows=some_rows("mlp_up"), lora=lora(rank=2))
    train(tune)
    model = tiny()
    again = Tune(model, map_parts(model), keep_base=False)
    again.add("lora", lora(rank=2), RunServices(again, "lora", Now(seed=0)), {})
    Delta.of(tune).restore(again)
    ids = torch.arange(3, 15)[None]
    with again.at("base"):
        assert torch.equal(again.model(ids).logits, tiny()(ids).logits)
    assert torch.equal(again.model(ids).logits, tune.model(ids).logits)


@pytest.mark.parametrize("head", [lora(rank=2, target_modules=("head",)), elementwise()._replace(target_modules=("head",))])
def test_a_tied_embedding_that_trains_under_a_head_with_a_delta(head: WeightDelta) -> None:
    tune = attach(
        tiny(tied=True),
        embedding=registry.make({"full": {"target_modules": ["embedding"]}}, ("selective",)).values[0],
        head=head,
    )
    train(tune)
    delta = Delta.of(tune)
    ids = torch.arange(3, 15)[None]
    expected = tune.model(ids).logits
    model = tiny(tied=True)
    delta.apply(model)
    assert_rounded(model(ids).logits, expected, TINY)
    with merged(tune):
        assert_same(state(model), state(tune.model))
    again = attach(tiny(tied=True), head=head)
    delta.restore(again)
    assert_rounded(again.model(ids).logits, expected, TINY)


def test_restore_takes_factors_of_another_rank_and_scale() -> None:
    tune = attach(tiny(), lora=lora(rank=3, alpha=6.0))
    train(tune)
    again = attach(tiny(), lora=lora(rank=8, alpha=8.0))
    Delta.of(tune).restore(again)
    ids = torch.arange(3, 15)[None]
    assert_rounded(again.model(ids).logits, tune.model(ids).logits, TINY)
    # What was restored trains.
    again.model(ids).logits.sum().backward()
    assert all(one.gradient is not None for one in again.trained.values())


def test_restore_refuses_what_it_cannot_place() -> None:
    tune = attach(tiny(), lora=lora(rank=2))
    train(tune)
    delta = Delta.of(tune, name="small")
    with pytest.raises(LuthierError, match="no technique that is attached"):
        delta.restore(attach(tiny(), lora=lora(rank=2, target_modules=("attention",))))
    with pytest.raises(LuthierError, match="trains in place"):
        delta.restore(attach(tiny(), rows=some_rows("mlp_up")))
    with pytest.raises(LuthierError, match="small"):
        delta.restore(attach(tiny(seed=1), lora=lora(rank=2)))
    started = attach(tiny(), started=half_started())
    train(started)
    model = tiny()
    forgetful = Tune(model, map_parts(model), keep_base=False)
    forgetful.add("started", half_started(), RunServices(forgetful, "started", Now(seed=0)), {})
    with pytest.raises(LuthierError, match="not kept"):
        Delta.of(started).restore(forgetful)
    with pytest.raises(LuthierError, match="not kept"):
        Delta.of(forgetful)
