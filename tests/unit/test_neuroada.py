"""NeuroAda against the paper's rule: which connections of each neuron train, and that nothing else moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.selective._entries import largest
from tests.conftest import CALIBRATION, calibration, make_batch, split
from tests.toys.helpers import gradients, logits_of, model_of, plain_gradients, rows_of_eight
from tests.unit.selective_oracles import dense_of, live, selected, untouched

WEIGHT = torch.tensor([[3.0, -5.0, 1.0, 2.0], [0.1, 0.4, -0.3, 0.2], [10.0, 9.0, 8.0, 7.0]])


def neuroada(**options: Any) -> dict[str, Any]:
    return {"neuroada": {"connections": 3, **options}}


def index_of(weight_OI: Tensor, gradient_OI: Tensor | None = None, seed: int = 0, **options: Any) -> list[int]:
    found = selected(neuroada(**options), weight_OI, gradient_OI, seed)
    assert found.form == "flat" and found.index is not None and found.decay == "start"
    return list(found.index.tolist())


def test_every_neuron_gets_its_own_largest_connections() -> None:
    assert index_of(WEIGHT, connections=2) == [0, 1, 5, 6, 8, 9]
    # Over the whole weight the second neuron would get nothing.
    assert largest(WEIGHT.abs(), 6).tolist() == [0, 1, 8, 9, 10, 11]
    assert index_of(WEIGHT[:1], connections=2) == [0, 1]


def test_the_other_rankings_by_hand() -> None:
    assert index_of(WEIGHT, connections=1, by="smallest") == [2, 4, 11]
    slopes = torch.tensor([[0.0, 1.0, 0.0, -2.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, -3.0, 2.0]])
    assert index_of(WEIGHT, slopes, connections=1, by="gradient") == [3, 4, 10]


def test_random_connections_are_drawn_by_the_seed_alike_everywhere() -> None:
    weight = torch.zeros(4000, 4)
    drawn = torch.tensor(index_of(weight, connections=2, by="random"))
    assert drawn.tolist() == index_of(weight, connections=2, by="random")
    assert drawn.tolist() != index_of(weight, connections=2, by="random", seed=1)
    assert torch.equal(torch.bincount(drawn // 4), torch.full((4000,), 2))
    # Five standard errors of a fair coin for each column.
    assert bool(((torch.bincount(drawn % 4) - 2000).abs() < 5 * 32).all())


def test_ties_go_to_the_first_and_more_connections_than_there_are_take_all() -> None:
    assert index_of(torch.ones(2, 5), connections=2) == [0, 1, 5, 6]
    assert index_of(WEIGHT, connections=100) == list(range(12))


def test_bypasses_that_are_added_and_gathered_are_the_same_mathematics() -> None:
    """The paper's forward pass, the sparse form of it, and training in place give one output and one gradient."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=rng, dtype=torch.float64)
    x = torch.randn(7, 5, generator=rng, dtype=torch.float64)
    target = torch.randn(7, 6, generator=rng, dtype=torch.float64)
    index = torch.tensor(index_of(weight, connections=2))
    change = 0.1 * torch.randn(12, generator=rng, dtype=torch.float64)

    def scattered(bypass: Tensor) -> Tensor:
        return functional.linear(x, weight + torch.zeros(30, dtype=torch.float64).index_put((index,), bypass).reshape(6, 5))

    def gathered(bypass: Tensor) -> Tensor:
        terms = x[:, index % 5] * bypass
        return x @ weight.t() + torch.zeros(7, 6, dtype=torch.float64).index_add(1, index // 5, terms)

    found = []
    for forward in (scattered, gathered):
        bypass = change.clone().requires_grad_(True)
        y = forward(bypass)
        (gradient,) = torch.autograd.grad((y * target).sum(), bypass)
        found.append((y.detach(), gradient))
    in_place = (target.t() @ x).flatten()[index]
    assert all(float((left - right).abs().max()) < 1e-12 for left, right in zip(*found, strict=True))
    assert float((found[0][1] - in_place).abs().max()) < 1e-12


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_each_row_changes_in_exactly_its_connections(engine: Any, now: Now, architecture: str) -> None:
    model, batch = model_of(architecture).float(), rows_of_eight()
    base, wanted = live(model), logits_of(copy.deepcopy(model), batch)
    run = engine(neuroada(), model=model, optimizer="adamw", dtype=torch.float32)
    assert torch.equal(logits_of(model, batch), wanted)
    places = run.tune.parts.select(target_modules=("linear",))
    assert {one.place for one in run.tune.trained.values()} == set(places)
    assert run.tune.numbers() == 3 * sum(run.tune.region(place).shape[0] for place in places)
    for i in range(3):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))
    assert untouched(run, base)
    for one in run.tune.trained.values():
        changed = (run.tune.region(one.place) != dense_of(run, one, base)).sum(1)
        assert torch.equal(changed, torch.full_like(changed, 3))
    assert sum(value.numel() for key, value in run.chain.tensors().items() if "age" not in key) == 2 * run.tune.numbers()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_are_those_of_full_fine_tuning_at_the_connections(engine: Any, now: Now, architecture: str) -> None:
    model, batch = model_of(architecture), rows_of_eight()
    wanted = plain_gradients(model, batch)
    run = engine(neuroada(), model=model)
    found = gradients(run, split(batch, (5, 3)), now)
    for name, one in run.tune.trained.items():
        assert float((found[name] - dense_of(run, one, wanted).flatten()[one.index]).abs().max()) < 1e-12


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_gradient_ranking_uses_the_mean_loss_of_the_calibration_rows(engine: Any, architecture: str) -> None:
    model = model_of(architecture)
    wanted = plain_gradients(model, make_batch(CALIBRATION, first=100))
    run = engine(neuroada(by="gradient"), model=model)
    for one in run.tune.trained.values():
        size_OI = dense_of(run, one, wanted).abs()
        columns = size_OI.argsort(dim=1, descending=True, stable=True)[:, :3]
        # Gradients that are zero but for rounding have no order: compare their sizes, not their places.
        ranked = size_OI.flatten()[one.index].reshape(-1, 3).sort(1).values
        assert float((ranked - size_OI.gather(1, columns).sort(1).values).abs().max()) < 1e-12


def test_the_gradient_ranking_may_look_at_one_row(engine: Any) -> None:
    asked: list[tuple[int, str]] = []
    looks = lambda rows, source: asked.append((rows, source)) or calibration(rows, source)  # noqa: E731
    engine(neuroada(by="gradient", calibration_rows=1, calibration_source="other"), model=model_of(layers=1), calibration=looks)
    assert set(asked) == {(1, "other")}


def test_all_connections_are_full_fine_tuning(engine: Any, now: Now) -> None:
    found = []
    for tune in (neuroada(connections=1000), {"full": {"target_modules": ["linear"]}}):
        model = model_of()
        run = engine(tune, model=model, optimizer="adamw")
        for i in range(5):
            run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))
        found.append(live(model))
    assert max(float((value - found[1][name]).abs().max()) for name, value in found[0].items()) < 1e-12


def test_weight_decay_pulls_towards_the_base(engine: Any, now: Now) -> None:
    model = model_of()
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data.fill_(3.0)
    run = engine(neuroada(target_modules=["mlp_up"]), model=model, optimizer={"adamw": {"weight_decay": 0.1}})
    one = run.tune.trained["neuroada/model.layers.0.mlp.up_proj.weight"]
    run.tune.set({one.name: torch.full_like(one.master.detach(), 3.5)})
    one.gradient = torch.zeros_like(one.master.detach())
    run.chain.step(now._replace(learning_rate=0.1), only=one)
    # Towards zero it would be 3.465.
    assert float((one.master.detach() - 3.495).abs().max()) < 1e-12


def test_what_bf16_weights_show_of_small_changes(engine: Any) -> None:
    """A change of 0.005 is lost in a weight of 3 and is 0.0039 in one of 0.5; the masters hold it either way."""
    for value, shown in ((3.0, 0.0), (0.5, 0.00390625)):
        model = model_of()
        model.get_parameter("model.layers.0.mlp.up_proj.weight").data.fill_(value)
        run = engine(neuroada(target_modules=["mlp_up"]), model=model, dtype=torch.bfloat16)
        one = run.tune.trained["neuroada/model.layers.0.mlp.up_proj.weight"]
        run.tune.set({one.name: one.master.detach() + 0.005})
        assert float((one.master.detach() - value - 0.005).abs().max()) < 1e-6
        assert bool((run.tune.region(one.place).flatten()[one.index].float() - value == shown).all())


def test_a_tied_embedding_changes_the_head_too(engine: Any, now: Now) -> None:
    model, batch = model_of(tied=True), rows_of_eight()
    wanted = plain_gradients(model, batch)["model.embed_tokens.weight"]
    run = engine(neuroada(target_modules=["embedding"]), model=model)
    (one,) = run.tune.trained.values()
    found = gradients(run, [batch], now)[one.name]
    assert float((found - wanted.flatten()[one.index]).abs().max()) < 1e-12
    assert one.numel == 3 * model.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("option", ["connections", "calibration_rows"])
def test_numbers_below_one_are_refused(option: str) -> None:
    with pytest.raises(LuthierError, match="there are 0") as error:
        registry.make({"neuroada": {option: 0}}, ("selective",))
    assert error.value.where == f"neuroada: {option}"
