"""Memory counted on shapes: which tensors count, for how long, and that nothing of the run notices."""

from __future__ import annotations

from typing import Any

import torch

from luthier.kinds import LossTerm, Now, StepLoss, Tensors, View
from luthier.training.dryrun import Peak, ShapesOnly, peak_of
from tests.conftest import make_batch, split
from tests.toys.helpers import model_of


def test_bytes_are_counted_while_they_live() -> None:
    """Ten numbers in fp32, twenty in bf16 beside them, then the first alone; a view of them is no copy."""
    before = torch.ones(10)
    with ShapesOnly() as shapes:
        assert (shapes.live, shapes.waiting, shapes.peak) == (0, 0, Peak(0, 0, 0))
        some = before[:2]
        assert shapes.live == 0 and shapes.peak == Peak(0, 0, 0), "what was there before does not count"
        held = before + 1.0
        assert some.shape == (2,) and shapes.live == 40 and shapes.peak == Peak(40, 40, 0)
        view = held[2:]
        assert shapes.live == 40 and view.shape == (8,)
        more = torch.zeros(20, dtype=torch.bfloat16)
        assert shapes.live == 80 and shapes.peak == Peak(80, 80, 0)
        del more
        assert shapes.live == 40 and shapes.peak == Peak(80, 80, 0)
        shapes.waiting = 24
        parts = torch.cat([held, held, before]).split(10)
        assert shapes.live == 160 and len(parts) == 3 and shapes.peak == Peak(160, 136, 24)
        del held, view
        assert shapes.live == 120
    assert before.sum() == 10.0


def test_whole_numbers_are_computed_and_others_are_read_as_0() -> None:
    with ShapesOnly():
        places = torch.arange(4)
        assert (places + 1)[1].item() == 2 and (places > 1).tolist() == [False, False, True, True]
        assert float(torch.ones(3).sum()) == 0.0 and torch.ones(3, dtype=torch.long).sum().item() == 3
        assert torch.arange(0.0, 4.0).shape == (4,)


def test_a_micro_batch_is_run_on_shapes_as_it_would_be(engine: Any, now: Now) -> None:
    """Which is the first of the step is told to losses that count once; nothing of the run is changed."""
    seen: list[tuple[str, ...]] = []

    def total(view: View, own: Tensors) -> torch.Tensor:
        seen.append(view.batch.row_ids)
        return own["number"].sum()

    once = LossTerm(total, unit="step", start=lambda services: {"number": torch.ones(2, dtype=torch.float64)})
    run = engine(model=model_of(layers=1), objective=["cross_entropy", once])
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    batches = split(make_batch([(4, 2), (3, 1), (5, 2)]), (1, 1, 1))
    peak = peak_of(run, batches, now)
    assert seen == [("row0",)]
    assert peak.gradients == sum(one.master.nbytes for one in run.tune.trained.values())
    assert peak.gradients < peak.total and peak.activations < peak.total
    assert not run.tune.only_shapes and all(one.gradient is None for one in run.tune.trained.values())
    assert all(torch.equal(one.master, before[name]) for name, one in run.tune.trained.items())


def test_a_loss_of_the_whole_step_is_counted_without_its_first_pass(engine: Any, now: Now) -> None:
    squares = StepLoss(lambda view, own: view.log_likelihoods(), lambda table: (table.value**2).sum())
    run = engine(model=model_of(layers=1), objective=squares)
    batches = [make_batch([(4, 2), (3, 1)])]
    assert peak_of(run, batches, now).activations > 0
    assert run.step(batches, now).loss > 0.0 and not run.tune.only_shapes
