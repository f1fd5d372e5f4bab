"""Random tokens and random rows: how many are kept, that chance alone decides, and that neither the split nor the order does."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch

from luthier import registry
from luthier.columns import chunked
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, TokenWeight
from luthier.methods.token_weight.random_tokens import DRAW
from luthier.models.parts import map_parts
from luthier.training.services import view_of
from luthier.tune import Tune
from tests.conftest import make_batch, split
from tests.steps import TUNES, assert_trains
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight

CONTROLS = ("random_tokens", "random_step_rows")
STEPS = 400


def kept_tokens(share: float, batch: Batch, steps: int) -> torch.Tensor:
    """Weights of all targets in several steps, [steps, N]."""
    value = registry.part("random_tokens", share=share).values[0]
    assert isinstance(value, TokenWeight) and value.weigh is not None
    model = model_of(layers=1)
    tune = Tune(model, map_parts(model))
    columns = chunked.resolve(["nll", DRAW])
    with torch.no_grad():
        views = [view_of(tune, batch, columns, Now(step=step, seed=3)) for step in range(steps)]
    return torch.stack([value.weigh(view) for view in views])


def kept_rows(engine: Any, now: Now, share: float, batches: list[Batch]) -> set[str]:
    """The rows that are run in one step."""
    looked = engine(token_weight={"random_step_rows": {"share": share}})._look(batches, now)
    return {row for batch in looked.batches for row in batch.row_ids}


def test_each_row_keeps_its_share_rounded_up_and_every_target_as_often() -> None:
    batch = make_batch([(14, 10), (7, 3), (5, 1), (6, 0)])
    kept_SN = kept_tokens(0.6, batch, STEPS)
    rows = [10, 3, 1]
    for part, count, keeps in zip(kept_SN.split(rows, dim=1), rows, (6, 2, 1), strict=True):
        assert (part.sum(-1) == keeps).all()
        expected = keeps / count
        error = (expected * (1 - expected) / STEPS) ** 0.5
        assert bool(((part.mean(0) - expected).abs() <= 4 * error).all())


def test_a_product_that_rounding_lifts_above_a_whole_number_keeps_no_more() -> None:
    """55 of 100 at 0.55."""
    assert kept_tokens(0.55, make_batch([(110, 100)]), 1).sum() == 55


@pytest.mark.parametrize(("share", "keeps"), [(0.001, 1), (0.5, 4), (0.65, 5), (1.0, 7)])
def test_a_step_keeps_its_share_of_rows_and_at_least_one(engine: Any, now: Now, share: float, keeps: int) -> None:
    """Of eight rows, seven have targets; the one without any is not run."""
    assert len(kept_rows(engine, now, share, split(rows_of_eight(), (3, 5)))) == keeps


def test_every_row_is_as_likely(engine: Any, now: Now) -> None:
    run = engine(token_weight={"random_step_rows": {"share": 0.5}})
    batch = rows_of_eight()
    times = dict.fromkeys(batch.row_ids, 0)
    for step in range(STEPS):
        for one in run._look([batch], now._replace(step=step)).batches:
            for row in one.row_ids:
                times[row] += 1
    expected = 4 / 7
    error = (expected * (1 - expected) / STEPS) ** 0.5
    found = sorted(count / STEPS for count in times.values())
    assert found[0] == 0.0 and all(abs(one - expected) <= 4 * error for one in found[1:])


@pytest.mark.parametrize("name", CONTROLS)
def test_units_are_what_is_kept(engine: Any, now: Now, name: str) -> None:
    """The loss is a mean over kept targets: with a head that knows nothing it is what cross-entropy is."""
    model = model_of()
    model.lm_head.weight.data.zero_()
    found = engine(model=model, token_weight={name: {"share": 0.4}}).step([rows_of_eight()], now)
    assert found.loss == pytest.approx(log(model.config.vocab_size), rel=1e-6) and 0.2 < found.weights.weighted_share < 0.7


@pytest.mark.parametrize("name", CONTROLS)
def test_reduces_to_cross_entropy_with_all(engine: Any, now: Now, name: str) -> None:
    batch = rows_of_eight()
    plain, every, some = (
        gradients(engine(model=model_of(), token_weight=weight), [batch], now)
        for weight in (None, {name: {"share": 1.0}}, {name: {"share": 0.5}})
    )
    assert gap(every, plain) < 1e-12 and gap(some, plain) > 1e-3


@pytest.mark.parametrize("name", CONTROLS)
def test_draws_are_new_in_each_step_and_with_each_seed(engine: Any, now: Now, name: str) -> None:
    run = engine(model=model_of(), token_weight={name: {"share": 0.5}})
    clocks = (now, now._replace(step=now.step + 1), now._replace(seed=now.seed + 1))
    one, *others = (gradients(run, [rows_of_eight()], clock) for clock in clocks)
    assert all(gap(other, one) > 1e-3 for other in others)
    assert gap(gradients(run, split(rows_of_eight(), (2, 5, 1)), now), one) < 1e-10


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("tune", TUNES)
def test_it_trains_with_everything(engine: Any, now: Now, tune: Any, name: str) -> None:
    assert_trains(engine, now, tune=tune, token_weight=name)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_shares_out_of_range(name: str, share: float) -> None:
    with pytest.raises(LuthierError, match="use more than 0 and at most 1"):
        registry.part(name, share=share)
