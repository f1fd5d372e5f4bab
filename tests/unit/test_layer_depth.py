"""What treats layers by their depth: freezing lower ones, learning rates that decay downwards, top blocks that begin anew."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from luthier.errors import LuthierError
from luthier.kinds import Now, Place
from luthier.methods.selective._depth import depth
from luthier.methods.selective.freeze_lower import frozen_blocks
from luthier.methods.selective.reinitialized_top import fresh
from luthier.models.parts import map_parts
from luthier.models.tiny import ARCHITECTURES, tiny, tiny_kind
from tests.conftest import split
from tests.toys.helpers import gradients, model_of, rows_of_eight


def values_of(model: Any) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def trained_in(engine: Any, now: Now, tune: Any, *, steps: int = 3, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and the model's numbers after some steps of AdamW with weight decay in fp32."""
    model = tiny("llama", seed=1, layers=4, tied=False)
    run = engine(tune, model=model, optimizer={"adamw": {"weight_decay": 0.1}}, dtype=torch.float32, **options)
    losses = [run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01)).loss for i in range(steps)]
    return losses, values_of(model)


def assert_full(engine: Any, now: Now, tune: Any) -> None:
    """A technique is full fine-tuning, bit for bit."""
    losses, values = trained_in(engine, now, tune)
    full_losses, full = trained_in(engine, now, "full")
    assert losses == full_losses
    assert all(torch.equal(value, full[name]) for name, value in values.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_depths_cover_every_number_once(architecture: str) -> None:
    model = tiny(architecture, layers=3)
    parts = map_parts(model)
    depths = {place: depth(place, parts) for place in parts.places}
    assert set(depths.values()) <= {0, 1, 2, 3, 4} and {0, 1, 2, 3} <= set(depths.values())
    for place, found in depths.items():
        if place.block is not None:
            assert found == place.block + 1
        elif place.role in ("final_norm", "head"):
            assert found == 4
        else:
            assert found == (4 if "pooler" in place.module or "project_out" in place.module else 0), str(place)
    of_numbers = {place: model.get_parameter(place.parameter).numel() for place in parts.places if place.start is None}
    fused = {place.parameter for place in parts.places if place.start is not None}
    total = sum(of_numbers.values()) + sum(model.get_parameter(name).numel() for name in fused)
    assert total == sum(one.numel() for one in model.parameters())


def test_embedding_norms_and_projections_are_embeddings_and_poolers_are_not() -> None:
    bert, opt = map_parts(tiny("bert")), map_parts(tiny("opt"))
    found = {place.module: depth(place, bert) for place in bert.places if place.block is None}
    assert found["embeddings.LayerNorm"] == found["embeddings.token_type_embeddings"] == 0 and found["pooler.dense"] == 3
    projections = {place.module.rpartition(".")[2]: depth(place, opt) for place in opt.places if place.role == "other"}
    assert projections == {"project_in": 0, "project_out": 3}


@pytest.mark.parametrize("frozen", range(5))
@pytest.mark.parametrize("embeddings", ["freeze", "train"])
def test_frozen_layers_keep_every_bit_and_nothing_else_stands_still(engine: Any, now: Now, frozen: int, embeddings: str) -> None:
    """From the embeddings alone to all blocks, which leaves the final norm and the head."""
    before = values_of(tiny("llama", seed=1, layers=4, tied=False))
    tune = {"freeze_lower": {"blocks": frozen, "embeddings": embeddings}}
    losses, after = trained_in(engine, now, tune)
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    wanted = {name for name in before if any(name.startswith(f"model.layers.{i}.") for i in range(frozen))}
    wanted |= {"model.embed_tokens.weight"} if embeddings == "freeze" else set()
    assert still == wanted
    assert losses[0] == trained_in(engine, now, "full", steps=1)[0][0], "the first loss is the base's"


def test_nothing_frozen_is_full_fine_tuning_bit_for_bit_and_frozen_embeddings_are_not(engine: Any, now: Now) -> None:
    assert_full(engine, now, {"freeze_lower": {"blocks": 0, "embeddings": "train"}})
    assert trained_in(engine, now, {"freeze_lower": {"blocks": 0}})[0] != trained_in(engine, now, "full")[0]


def test_a_tied_head_is_frozen_with_the_embedding(engine: Any) -> None:
    run = engine("freeze_lower", model=model_of(tied=True))
    assert {one.place.role for one in run.tune.trained.values() if one.place.block is None} == {"final_norm"}
    run = engine({"freeze_lower": {"embeddings": "train"}}, model=model_of(tied=True))
    assert {one.place.role for one in run.tune.trained.values() if one.place.block is None} == {"final_norm", "embedding"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("frozen", [0, 2, 3])
def test_no_graph_is_built_below_the_first_trained_block(engine: Any, now: Now, frozen: int, architecture: str) -> None:
    model = model_of(architecture, layers=4)
    run = engine({"freeze_lower": {"blocks": frozen}}, model=model)
    seen: list[bool] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, entered, left: seen.append(entered[0].requires_grad))
        for name in run.tune.parts.block_modules
    ]
    gradients(run, [rows_of_eight()], now)
    for handle in handles:
        handle.remove()
    assert seen == [i > frozen for i in range(4)]


def test_a_steps_work_falls_by_the_same_with_every_frozen_block(engine: Any, now: Now) -> None:
    def work(frozen: int) -> int:
        run = engine({"freeze_lower": {"blocks": frozen}}, model=model_of(layers=5))
        with FlopCounterMode(display=False) as counter:
            gradients(run, [rows_of_eight()], now)
        return int(counter.get_total_flops())

    found = [work(frozen) for frozen in range(6)]
    # The first trained block has a norm to train, so its maps need the gradient of their input as all others do.
    falls = {left - right for left, right in pairwise(found)}
    assert len(falls) == 1 and falls.pop() > 0


def test_twelve_equal_maps_cost_two_units_each_but_one() -> None:
    """23, 21, ..., 1 products of matrices in the backward pass: PyTorch's own count, which the frozen prefix relies on."""
    for frozen in (0, 1, 6, 11):
        maps = [torch.nn.Linear(8, 8, bias=False).requires_grad_(i >= frozen) for i in range(12)]
        total = torch.nn.Sequential(*maps)(torch.ones(4, 8)).sum()
        with FlopCounterMode(display=False) as counter:
            total.backward()
        assert counter.get_total_flops() == (2 * (12 - frozen) - 1) * 2 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("count", "share", "wanted"), [(12, 0.5, 6), (30, 0.45, 13), (5, 0.5, 2), (10, 0.7, 7), (4, 1.0, 4), (4, 0.0, 0)]
)
def test_a_share_of_the_blocks_is_rounded_down(count: int, share: float, wanted: int) -> None:
    assert frozen_blocks(count, None, share) == wanted
    assert frozen_blocks(count, 3, share) == 3


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"freeze_lower": {"blocks": 3}}, "3 blocks are to be frozen, and the model has 2"),
        ({"freeze_lower": {"blocks": -1}}, "-1 blocks"),
        ({"freeze_lower": {"share": 1.5}}, "the share is 1.5"),
        ({"layer_decay": {"factor": 0.0}}, "the factor is 0.0"),
        ({"layer_decay": {"factor": 1.1}}, "the factor is 1.1"),
        ({"reinitialized_top": {"blocks": 3}}, "3 blocks are to begin anew, and the model has 2"),
        ({"reinitialized_top": {"blocks": -1}}, "-1 blocks"),
        ({"reinitialized_top": {"deviation": 0.0}}, "the deviation is 0.0"),
    ],
)
def test_options_out_of_range_are_refused(engine: Any, tune: Any, message: str) -> None:
    with pytest.raises(LuthierError, match=message):
        engine(tune, model=model_of())


def rates(engine: Any, **options: Any) -> dict[int | str, set[float]]:
    run = engine({"layer_decay": {"factor": 0.9}}, model=model_of(layers=3, **options))
    found: dict[int | str, set[float]] = {}
    for one in run.tune.trained.values():
        where = one.place.role if one.place.block is None else one.place.block
        found.setdefault(where, set()).add(round(one.rate, 12))
    return found


def test_rates_of_three_blocks_by_hand(engine: Any) -> None:
    blocks: dict[int | str, set[float]] = {0: {0.729}, 1: {0.81}, 2: {0.9}}
    assert rates(engine, tied=False) == {**blocks, "embedding": {0.6561}, "head": {1.0}, "final_norm": {1.0}}
    assert rates(engine, tied=True) == {**blocks, "embedding": {0.6561}, "final_norm": {1.0}}


def test_a_decay_factor_of_one_is_full_fine_tuning_bit_for_bit(engine: Any, now: Now) -> None:
    assert_full(engine, now, {"layer_decay": {"factor": 1.0}})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_number_decays_once(engine: Any, architecture: str) -> None:
    model = model_of(architecture)
    run = engine("layer_decay", model=model)
    assert run.tune.numbers() == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("tune", ["freeze_lower", "layer_decay", "reinitialized_top"])
def test_adamw_holds_two_numbers_for_each_that_trains(engine: Any, now: Now, tune: str) -> None:
    model = model_of("gpt2")
    run = engine(tune, model=model, optimizer="adamw")
    run.step([rows_of_eight()], now)
    held = [one for key, one in run.chain.tensors().items() if not key.endswith("|age")]
    assert sum(one.numel() for one in held) == 2 * run.tune.numbers()
    assert (run.tune.numbers() < sum(one.numel() for one in model.parameters())) == (tune == "freeze_lower")


def test_the_first_step_of_adam_is_each_layers_rate(engine: Any, now: Now) -> None:
    """The update is as large as the rate where the gradient is far above epsilon, half of it where it equals epsilon."""
    run = engine({"layer_decay": {"factor": 0.5}}, model=model_of(layers=3), optimizer={"adamw": {"epsilon": 1e-30}})
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    found = gradients(run, [rows_of_eight()], now)
    run.step([rows_of_eight()], now)
    for name, one in run.tune.trained.items():
        touched = found[name] != 0
        size = (one.master.detach() - before[name])[touched].abs()
        assert torch.allclose(size, torch.full_like(size, 0.1 * one.rate), rtol=1e-9, atol=1e-12), name


def test_adams_first_step_by_hand(engine: Any, now: Now) -> None:
    """theta 1, learning rate 0.1, gradient 1, weight decay 0.1: 0.89; a gradient of epsilon moves by half the rate."""
    for epsilon, decay, wanted in ((1e-30, 0.1, 0.89), (1.0, 0.0, 0.95)):
        run = engine(
            {"layer_decay": {"factor": 1.0}}, model=model_of(), optimizer={"adamw": {"epsilon": epsilon, "weight_decay": decay}}
        )
        one = next(one for one in run.tune.trained.values() if one.decay)
        run.tune.set({one.name: torch.ones_like(one.master)})
        one.gradient = torch.ones_like(one.master)
        run.chain.step(now)
        assert torch.allclose(one.master, torch.full_like(one.master, wanted), atol=1e-12)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if tiny_kind(name) == "causal"])
def test_new_blocks_are_those_the_family_itself_would_begin_with(architecture: str) -> None:
    """Norms and biases equal, matrices of the same deviation: compared with transformers' own initialization, at a deviation that is not
    the family's default."""
    config = copy.deepcopy(tiny(architecture, layers=3, width=128).config)
    setattr(config, "init_std" if hasattr(config, "init_std") else "initializer_range", 0.05)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    parts = map_parts(theirs)
    deviation = parts.initial_deviation
    assert deviation == 0.05
    rng = torch.Generator().manual_seed(0)
    for place in parts.places:
        if place.block is None:
            continue
        wanted = parts.view(theirs, place).detach()
        ours = fresh(wanted, place, parts, deviation, rng)
        assert ours.shape == wanted.shape and ours.dtype == wanted.dtype
        if place.tensor.endswith("bias") or place.role.endswith("norm"):
            assert torch.equal(ours, wanted), str(place)
        else:
            # Five standard errors of each deviation.
            errors = 5 * (1 / ours.numel()) ** 0.5
            assert abs(float(ours.std() / wanted.std()) - 1) < errors, str(place)
            assert abs(float(ours.mean())) < 5 * float(ours.std()) / ours.numel() ** 0.5


def test_the_deviation_of_a_new_matrix_and_of_a_residual_projection() -> None:
    parts = map_parts(tiny("gpt2", layers=8))
    rng = torch.Generator().manual_seed(0)
    values = torch.ones(256, 256)
    plain = fresh(values, Place("h.0.mlp.c_fc", "weight", "mlp_up", 0), parts, 0.02, rng)
    scaled = fresh(values, Place("h.0.mlp.c_proj", "weight", "mlp_down", 0), parts, 0.02, rng)
    assert abs(float(plain.std()) / 0.02 - 1) < 0.02 and abs(float(scaled.std()) / 0.005 - 1) < 0.02


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_only_the_last_blocks_begin_anew(engine: Any, architecture: str, count: int) -> None:
    model = model_of(architecture, layers=3)
    before = values_of(model)
    run = engine({"reinitialized_top": {"blocks": count}}, model=model, optimizer="adamw")
    new = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    wanted = {name for name in before if any(name.startswith(f"{block}.") for block in run.tune.parts.block_modules[3 - count :])}
    assert new == (wanted if count else set())
    assert run.tune.numbers() == sum(one.numel() for one in model.parameters()), "everything trains"


def test_no_new_block_is_full_fine_tuning_bit_for_bit(engine: Any, now: Now) -> None:
    assert_full(engine, now, {"reinitialized_top": {"blocks": 0}})


def test_new_blocks_are_the_seeds_and_the_base_is_kept(engine: Any) -> None:
    def made(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = model_of()
        run = engine({"reinitialized_top": {"deviation": 0.5}}, model=model, seed=seed, keep_base=True)
        values = values_of(model)
        with run.tune.off():
            return values, values_of(model)

    (first, base), (again, _), (other, _) = made(0), made(0), made(1)
    plain = values_of(model_of())
    assert all(torch.equal(first[name], again[name]) and torch.equal(base[name], plain[name]) for name in first)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(first[name], other[name]) and abs(float(first[name].std()) / 0.5 - 1) < 0.1


def test_new_blocks_have_the_deviation_of_the_models_own_configuration(engine: Any) -> None:
    """New matrices were drawn as the family does by default, whatever the configuration of the model itself says."""
    model = model_of(width=128)
    model.config.initializer_range = 0.0416667
    engine("reinitialized_top", model=model)
    new = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert abs(float(new.detach().std()) / 0.0416667 - 1) < 0.05


def test_a_configuration_that_does_not_tell_needs_a_deviation(engine: Any) -> None:
    model = model_of()
    model.config.initializer_range = 0.0
    with pytest.raises(LuthierError, match="does not say with which deviation"):
        engine("reinitialized_top", model=model)
    engine({"reinitialized_top": {"deviation": 0.02}}, model=model_of())
