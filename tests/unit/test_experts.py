"""Deltas at experts whose matrices stand in stacks, and at routers: as if every expert were a linear map of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from luthier import registry
from luthier.delta import Delta
from luthier.delta.forms import LowRank
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.weight_delta.lora import lora
from luthier.models.experts import mixture_of
from luthier.models.parts import map_parts
from luthier.models.quantized import count
from luthier.models.tiny import tiny
from luthier.training.checkpoint import restore, save
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import split
from tests.toys.helpers import gap, gradients, rows_of_eight, rows_of_pairs
from tests.toys.mixtures import MIXTURES, mixture
from tests.unit.test_kinds_resume import assert_equal, everything

IDS = torch.arange(6, 30).reshape(2, 12)
REACHED = ("expert", "router")


def tuned(model: Any, *techniques: Any, train: float = 0.1) -> Tune:
    """A tune with techniques attached, everything that trains moved by noise."""
    tune = Tune(model, map_parts(model), keep_base=True)
    for number, technique in enumerate(techniques):
        tune.add(f"slot{number}", technique, RunServices(tune, f"slot{number}", Now(seed=0)), {})
    rng = torch.Generator().manual_seed(5)
    tune.set(
        {
            name: one.master.detach() + train * torch.randn(one.master.shape, generator=rng, dtype=torch.float64)
            for name, one in tune.trained.items()
            if train
        }
    )
    return tune


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


class Unfused(nn.Module):
    """Experts as a plain loop over matrices of their own, with factors of their own."""

    def __init__(self, experts: Any, family: str, factors: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
        super().__init__()
        self.family, self.like = family, experts
        self.factors = {
            name: [
                (down.detach().clone().requires_grad_(), up.detach().clone().requires_grad_())
                for down, up in zip(*pair, strict=True)
            ]
            for name, pair in factors.items()
        }
        self.matrices = {name: list(experts.get_parameter(name).detach()) for name in factors}
        self.scale = scale

    def times(self, name: str, expert: int, x: Tensor) -> Tensor:
        stored, (down_RI, up_OR) = self.matrices[name][expert], self.factors[name][expert]
        turned = self.family in ("gpt_oss", "llama4_text")
        base = x @ stored if turned else x @ stored.t()
        return base + self.scale * (x @ down_RI.t()) @ up_OR.t()

    def one(self, expert: int, x: Tensor) -> Tensor:
        both = self.times("gate_up_proj", expert, x)
        if self.family != "gpt_oss":
            gate, up = both.chunk(2, dim=-1)
            return self.times("down_proj", expert, nn.functional.silu(gate) * up)
        both = both + self.like.gate_up_proj_bias[expert]
        gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
        inside = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return self.times("down_proj", expert, inside) + self.like.down_proj_bias[expert]

    def forward(self, x: Tensor, index: Any = None, weights: Any = None) -> Tensor:
        experts = len(self.matrices["down_proj"])
        if index is None:
            return torch.cat([self.one(expert, part) for expert, part in enumerate(x.view(experts, -1, x.shape[-1]))])
        y = torch.zeros_like(x)
        for expert in range(experts):
            share = (weights * (index == expert)).sum(-1, keepdim=True)
            y = y + share * self.one(expert, x)
        return y


@pytest.mark.parametrize("family", MIXTURES)
def test_each_experts_gradients_are_those_of_an_unfused_copy(family: str) -> None:
    technique = lora(rank=2, alpha=6.0, target_modules=("expert",))
    tune = tuned(mixture(family), technique)
    copied = mixture(family)
    held: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for one in tune.additions:
        assert one.place is not None
        tensors = one.masters()
        held.setdefault(one.place.module, {})[one.place.tensor] = (tensors["down"], tensors["up"])
    plain = {name: Unfused(copied.get_submodule(name), family, factors, 3.0) for name, factors in held.items()}
    for name, module in plain.items():
        owner, _, last = name.rpartition(".")
        setattr(copied.get_submodule(owner), last, module)
    ours, theirs = tune.model(IDS).logits, copied(IDS).logits
    assert far(ours, theirs) < 1e-11 and far(ours, logits(mixture(family))) > 0.05
    for result in (ours, theirs):
        result.log_softmax(-1)[..., 7].sum().backward()
    for one in tune.additions:
        assert one.place is not None
        factors = plain[one.place.module].factors[one.place.tensor]
        for number, name in enumerate(("down", "up")):
            wanted = torch.stack(
                [torch.zeros_like(pair[number]) if pair[number].grad is None else pair[number].grad for pair in factors]
            )
            found = one.trained[name].gradient
            assert found is not None and float(wanted.abs().max()) > 1e-3
            assert far(found, wanted) < 1e-11 * float(wanted.abs().max()), (one.place, name)
    assert all(parameter.grad is None for parameter in tune.model.parameters())


@pytest.mark.parametrize("family", MIXTURES)
def test_merged_is_unmerged_and_the_base_is_never_lost(family: str) -> None:
    model = mixture(family)
    base, before = logits(model), {name: one.detach().clone() for name, one in model.named_parameters()}
    tune = tuned(model, lora(rank=2, target_modules=REACHED))
    beside = logits(model)
    assert far(beside, base) > 0.1
    tune.merge()
    assert far(logits(model), beside) < 1e-12
    tune.unmerge()
    assert torch.equal(logits(model), beside)
    with tune.off():
        assert torch.equal(logits(model), base)
    tune.detach()
    assert torch.equal(logits(model), base)
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())


def test_merged_is_unmerged_in_fp32() -> None:
    tune = tuned(tiny("mixtral"), lora(rank=2, target_modules=REACHED))
    beside = logits(tune.model)
    tune.merge()
    assert 0.0 < far(logits(tune.model), beside) + 1e-12 < 1e-5 * float(beside.abs().max())


def test_experts_start_with_other_factors_and_at_the_base() -> None:
    model = mixture("mixtral")
    base = logits(model)
    tune = tuned(model, lora(rank=3, target_modules=("experts",)), train=0.0)
    assert torch.equal(logits(model), base)
    for one in tune.additions:
        down_ERI = one.masters()["down"]
        assert down_ERI.shape[:2] == (4, 3) and one.masters()["up"].abs().max() == 0.0
        assert all(far(down_ERI[i], down_ERI[j]) > 0.01 for i in range(4) for j in range(i))
        assert float(down_ERI.abs().max()) <= down_ERI.shape[-1] ** -0.5
    assert {one.place.tensor for one in tune.additions if one.place is not None} == {"gate_up_proj", "down_proj"}


def test_one_of_the_stacks_can_be_named() -> None:
    tune = tuned(mixture("gpt_oss"), lora(rank=2, target_modules=("experts.down_proj",)))
    assert [str(one.place) for one in tune.additions] == [f"model.layers.{block}.mlp.experts.down_proj" for block in (0, 1)]
    for wrong in ("experts.up_proj", "weight", "expert.down_proj"):
        with pytest.raises(LuthierError, match="is no module type, no group of them and no module"):
            tune.parts.select([wrong])


def test_a_router_chooses_by_its_delta() -> None:
    """It returned logits with the delta in them, and chose by those without."""
    tune = tuned(mixture("mixtral"), lora(rank=2, target_modules=("router",)), train=0.5)
    place = tune.parts.select("router")[0]
    router = tune.model.get_submodule(place.module)
    x_ND = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = next(one for one in tune.additions if one.place == place)
    weight_EI = tune.region(place) + one.delta(one.masters())
    found, shares, index = router(x_ND)
    assert far(found, x_ND @ weight_EI.t()) < 1e-12
    assert torch.equal(index, (x_ND @ weight_EI.t()).topk(2).indices)
    assert not torch.equal(index, (x_ND @ tune.region(place).t()).topk(2).indices)
    assert shares.requires_grad


@pytest.mark.parametrize("name", ["loca", "lora_xs", "said", "svfit"])
def test_other_deltas_stand_at_each_expert_as_at_a_matrix_alone(name: str) -> None:
    part = registry.make({name: {"target_modules": ("expert",), **({"rank": 2} if name == "lora_xs" else {})}}, ("weight_delta",))
    model = mixture("mixtral")
    base = logits(model)
    tune = tuned(model, part.values[0], train=0.3)
    beside = logits(model)
    assert far(beside, base) > 0.05
    for one in tune.additions:
        tensors = one.masters()
        own = {*one.trained, *one.frozen}
        alone = [one.value.delta({key: values[e] if key in own else values for key, values in tensors.items()}) for e in range(4)]
        assert torch.equal(one.delta(tensors), torch.stack(alone))
    tune.merge()
    assert far(logits(model), beside) < 1e-12
    tune.unmerge()
    beside.zero_().add_(logits(model))
    delta = Delta.of(tune)
    other = mixture("mixtral")
    delta.apply(other)
    assert far(logits(other), beside) < 1e-11


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_delta_of_experts_is_low_rank_and_comes_back(family: str, tmp_path: Path) -> None:
    tune = tuned(mixture(family), lora(rank=2, target_modules=REACHED), lora(rank=1, alpha=3.0, target_modules=("expert",)))
    wanted = logits(tune.model)
    Delta.of(tune).save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    assert all(isinstance(form, LowRank) for name in delta for form in delta[name])
    other = mixture(family)
    delta.apply(other)
    assert far(logits(other), wanted) < 1e-11
    delta.remove(other)
    assert far(logits(other), logits(mixture(family))) < 1e-11
    # Side by side, and halved.
    (0.5 * (delta + delta)).apply(other, force=True)
    assert far(logits(other), wanted) < 1e-11
    again = tuned(
        mixture(family), lora(rank=2, target_modules=REACHED), lora(rank=1, alpha=3.0, target_modules=("expert",)), train=0.0
    )
    delta.restore(again)
    assert far(logits(again.model), wanted) < 1e-11


def test_a_damaged_delta_of_experts_is_refused(tmp_path: Path) -> None:
    tune = tuned(mixture("mixtral"), lora(rank=2, target_modules=("expert",)))
    delta = Delta.of(tune)
    name = next(iter(delta))
    form = delta[name][0]
    assert isinstance(form, LowRank)
    for up in (form.up_OR[:3], form.up_OR[0], form.up_OR[..., :1]):
        broken = Delta({name: (LowRank(up, form.down_RI, form.scale, form.shape),)}, delta.base)
        broken.save(tmp_path / "delta.safetensors")
        with pytest.raises(LuthierError, match="the delta is damaged"):
            Delta.load(tmp_path / "delta.safetensors")


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "lora": ({"dropout": 0.1}, REACHED, "drops entries of what enters its delta"),
    "adalora": ({}, ("expert",), "looks at its own tensors as those of one matrix"),
    "corda": ({"rank": 2}, ("expert",), "starts from what the model does with rows"),
    "lora_sb": ({"rank": 2}, ("expert",), "starts from what the model does with rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_stand_at_experts_is_refused_by_name(name: str) -> None:
    options, reached, said = REFUSED[name]
    for role in reached:
        part = registry.make({name: {**options, "target_modules": (role,)}}, ("weight_delta",))
        model = mixture("mixtral")
        before = {key: one.clone() for key, one in model.state_dict().items()}
        tune = Tune(model, map_parts(model))
        with pytest.raises(LuthierError, match=said) as error:
            tune.add(name, part.values[0], RunServices(tune, name, Now(seed=0)), {})
        assert f"`{name}`" in str(error.value) and error.value.fix and not tune.trained
        assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())


@pytest.mark.parametrize("role", REACHED)
def test_edits_and_slices_inside_routers_and_experts_are_refused(role: str) -> None:
    """An edit behind a router came after its choice, and a slice's gradient was that of the logits alone."""
    model = mixture("mixtral")
    tune = Tune(model, map_parts(model))
    edit = registry.make({"adapter": {}}, ("representation_edit",)).values[0]._replace(target_modules=(role,))
    with pytest.raises(LuthierError, match="out of reach inside"):
        tune.add("adapter", edit, RunServices(tune, "adapter", Now(seed=0)), {})
    sparse = registry.make({"spiel": {"target_modules": (role,)}}, ("selective",)).values[0]
    with pytest.raises(LuthierError, match="of which only the whole can train"):
        tune.add("spiel", sparse, RunServices(tune, "spiel", Now(seed=0)), {})


def test_two_tunes_on_one_model_let_go_in_any_order() -> None:
    model = mixture("mixtral")
    base = logits(model)
    first = tuned(model, lora(rank=2, target_modules=("expert",)))
    alone = logits(model)
    second = tuned(model, lora(rank=1, target_modules=("expert",)))
    with first.off():
        other = logits(model)
    assert far(other, base) > 0.1 and far(alone, base) > 0.1
    first.detach()
    assert torch.equal(logits(model), other)
    second.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("family", "chosen", "experts"),
    [("mixtral", 2, 4), ("qwen3_moe", 2, 4), ("gpt_oss", 2, 4), ("llama4_text", 1, 4), ("glm4_moe", 2, 4)],
)
def test_a_token_passes_through_some_of_the_parameters(family: str, chosen: int, experts: int) -> None:
    model = mixture(family)
    found = mixture_of(model, map_parts(model))
    stacks = sum(one.numel() for name, one in model.named_parameters() if ".experts." in name)
    assert found is not None and (found.chosen, found.experts) == ((chosen,), (experts,))
    assert stacks and found.active == count(model) - stacks * (experts - chosen) // experts
    assert found.described(count(model)).startswith(f"{chosen} of {experts} experts for a token: {found.active:,} of ")


def test_a_model_without_experts_is_no_mixture() -> None:
    model = tiny("llama")
    assert mixture_of(model, map_parts(model)) is None


SAVED, STEPS = (1, 3), 5


def test_killed_and_resumed_it_goes_on_bit_for_bit(engine: Any, now: Now, tmp_path: Path) -> None:
    """Factors of every expert beside matrices of some of them that train themselves, and a router's."""

    def build() -> Any:
        tune = ["half", {"lora": {"rank": 2, "target_modules": ["expert", "router"]}}]
        return engine(tune, model=mixture("gpt_oss"), optimizer="adamw", objective=["cross_entropy", "load_balance"])

    def go(run: Any, first: int) -> None:
        run.tune.model.train()
        for i in range(first, STEPS):
            if first == 0 and i in SAVED:
                save(tmp_path / f"step-{i}", run, {"step": i})
            run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))

    run = build()
    go(run, 0)
    assert any(one.form == "rows" and one.master.ndim == 3 for one in run.tune.trained.values())
    wanted = everything(run)
    for k in SAVED:
        fresh = build()
        restore(tmp_path / f"step-{k}", fresh)
        go(fresh, k)
        assert_equal(everything(fresh), wanted)


def test_in_bf16_experts_compute_with_what_is_exported(engine: Any, now: Now) -> None:
    """fp32 masters, bf16 weights: the copy that an expert multiplies with is rounded as the merged weight is."""
    model = tiny("mixtral", dtype=torch.bfloat16)
    run = engine(
        [{"half": {"embeddings": "freeze", "target_modules": ["expert"]}}, {"lora": {"rank": 2, "target_modules": ["expert"]}}],
        model=model,
        optimizer="adamw",
        dtype=torch.bfloat16,
    )
    for step in range(3):
        run.step([rows_of_eight()], now._replace(step=step, learning_rate=0.01))
    beside = logits(model)
    run.tune.merge()
    assert torch.equal(logits(model), beside)
    assert all(one.master.dtype == torch.float32 for one in run.tune.trained.values())


@pytest.mark.parametrize("tune", [{"lora": {"target_modules": ["expert", "router"]}}, {"half": {"target_modules": ["expert"]}}])
def test_checkpointed_blocks_give_the_same_gradient(engine: Any, now: Now, tune: Any) -> None:
    found = []
    for checkpointing in (False, True):
        model = mixture("mixtral")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = engine([tune], model=model)
        run.tune.model.train()
        run.step([rows_of_eight()], now)
        found.append(gradients(run, split(rows_of_eight(), (5, 3)), now._replace(step=1)))
    assert gap(found[1], found[0]) == 0.0


def test_a_model_spread_over_processes_is_refused() -> None:
    model = mixture("mixtral")
    tune = Tune(model, map_parts(model), root=cast(Any, object()))
    with pytest.raises(LuthierError, match="`lora` adds to what a router or experts compute with, which a model spread"):
        tune.add("lora", lora(target_modules=("expert",)), RunServices(tune, "lora", Now(seed=0)), {})


COMBINED: dict[str, dict[str, Any]] = {
    "pairs": {"objective": ["dpo", "load_balance"], "tune": [{"lora": {"target_modules": ["expert", "router"]}}]},
    "a prompt": {
        "objective": ["cross_entropy", "load_balance"],
        "tune": ["prompt_tuning", {"lora": {"target_modules": ["expert"]}}],
    },
    "the base": {"objective": ["cross_entropy", "kl", "load_balance"], "tune": ["half"]},
    "a rule": {"objective": ["cross_entropy", "load_balance"], "token_weight": "q_tuning", "tune": ["full"]},
    "noise": {
        "objective": ["cross_entropy", "neftune", "load_balance"],
        "tune": [{"lora": {"target_modules": ["expert"]}}, "adapter"],
    },
    "layer by layer": {"objective": ["cross_entropy", "load_balance"], "tune": ["full"], "gradient_estimator": "per_layer"},
}


@pytest.mark.parametrize("name", COMBINED)
def test_it_goes_with_other_techniques_however_a_step_is_split(engine: Any, now: Now, name: str) -> None:
    keys = dict(COMBINED[name])
    tune = keys.pop("tune")
    batch, moved = rows_of_pairs() if name == "pairs" else rows_of_eight(), []
    for sizes in ((8,), (2, 6)):
        run = engine(tune, model=mixture("mixtral"), optimizer="sgd", keep_base=True, **keys)
        base = logits(run.tune.model)
        losses = [run.step(split(batch, sizes), now._replace(step=step, learning_rate=0.01)).loss for step in range(2)]
        assert all(loss == loss for loss in losses)
        moved.append({key: one.master.detach().clone() for key, one in run.tune.trained.items()})
        with run.tune.off():
            assert torch.equal(logits(run.tune.model), base)
    if name != "layer by layer":
        assert gap(*moved) < 1e-9
