"""Techniques of one's own that are shaped like none of ours: without a gradient, without a dimension, one for all places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import luthier
from luthier.errors import LuthierError
from luthier.kinds import Freezing, LossTerm, Now, Services, Tensors, View
from luthier.registry import Part
from luthier.training.dryrun import peak_of
from tests.toys.helpers import gap, gradients, logits_of, model_of, rows_of_eight, toys  # noqa: F401

ROWS = [{"prompt": f"name {i}", "completion": f"number {i}"} for i in range(6)]


def part(*values: Any, kind: str = "loss_term") -> Part:
    return Part(name="own", kind=kind, options={}, values=values)


def warmth() -> Part:
    """The loss at a temperature that is learnt: one number without a dimension."""

    def start(services: Services) -> Tensors:
        return {"warmth": torch.zeros(())}

    def total(view: View, own: Tensors) -> Tensor:
        return (view["nll"] * own["warmth"].exp()).sum()

    return part(LossTerm(total, start=start))


def test_an_objective_without_a_gradient_is_refused_at_its_first_step(engine: Any, now: Now) -> None:
    """An objective that cannot be differentiated trained nothing, and the run was called finished."""
    flat = part(LossTerm(lambda view, own: view["nll"].detach().sum()))
    run = engine("lora", objective=[flat], model=model_of(layers=1))
    with pytest.raises(LuthierError, match="the loss depends on nothing that trains") as error:
        run.step([rows_of_eight()], now)
    assert error.value.fix
    # Beside one that can be, it only adds to what is shown.
    assert run_beside(engine, flat).step([rows_of_eight()], now).loss > 0
    # Where all stands still, nobody waits for a gradient.
    still = part(Freezing(lambda trained, state, now: True, everywhere=True), kind="freezing")
    engine("lora", freeze=[still], model=model_of(layers=1)).step([rows_of_eight()], now)


def run_beside(engine: Any, flat: Part) -> Any:
    return engine("lora", objective=["cross_entropy", flat], model=model_of(layers=1))


def test_a_source_that_needs_no_gradient_learns_from_such_an_objective(engine: Any, now: Now) -> None:
    flat = part(LossTerm(lambda view, own: view["nll"].detach().sum()))
    for source in ("zeroth_order", "slope"):
        run = engine("lora", objective=[flat], gradient_estimator=source, model=model_of(layers=1))
        before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
        run.step([rows_of_eight()], now)
        assert any(not torch.equal(one.master, before[name]) for name, one in run.tune.trained.items())


def test_a_trained_number_without_a_dimension_is_trained_and_told(tmp_path: Path) -> None:
    """A run that trained a number without a dimension broke off behind its last step."""
    run = luthier.train(
        model="tiny:llama", rows={"train": ROWS}, tune="lora", objective=warmth(), out=str(tmp_path), train={"epochs": 1.0}
    )
    assert run.facts["status"] == "finished" and len(run.facts["weights_sha256"]) == 64
    other = luthier.train(
        model="tiny:llama",
        rows={"train": ROWS},
        tune="lora",
        objective=warmth(),
        out=str(tmp_path),
        train={"epochs": 1.0},
        seed=1,
    )
    assert other.facts["weights_sha256"] != run.facts["weights_sha256"]


@pytest.mark.parametrize("tune", ["full", "half", "spiel", "reinitialized_top"])
def test_estimating_memory_in_the_midst_of_a_run_leaves_its_weights_alone(engine: Any, now: Now, tune: str) -> None:
    """A look at shapes put them into the place of the weights where a pass of the base was among them."""
    run = engine(tune, objective="kl", model=model_of(layers=2), keep_base=True)
    run.step([rows_of_eight()], now)
    run.tune.snapshot("early")
    run.step([rows_of_eight(seed=1)], now._replace(step=1))
    batch = rows_of_eight(seed=2)
    wanted, slopes = logits_of(run.tune.model, batch), gradients(run, [batch], now)
    with run.tune.at("base"):
        base = logits_of(run.tune.model, batch)
    try:
        peak_of(run, [batch], now)
    finally:
        assert not any(one.is_meta for one in run.tune.model.parameters()), "shapes stand where weights stood"
    assert torch.equal(logits_of(run.tune.model, batch), wanted)
    assert gap(gradients(run, [batch], now), slopes) == 0.0
    with run.tune.at("base"):
        assert torch.equal(logits_of(run.tune.model, batch), base)


def test_what_all_edits_share_trains_once_and_is_opened_again(engine: Any, now: Now, tmp_path: Path) -> None:
    run = engine("one_vector", model=model_of(layers=3), optimizer="sgd")
    run.step([rows_of_eight()], now)
    names = [name for name in run.tune.trained if name.endswith("vector")]
    assert names == ["one_vector.vector"] and sum(name.endswith(".much") for name in run.tune.trained) == 3
    before = run.tune.trained["one_vector.vector"].master.detach().clone()
    run.step([rows_of_eight(seed=1)], now._replace(step=1))
    assert not torch.equal(run.tune.trained["one_vector.vector"].master, before)
