"""Faults of losses, gradients and schedules that fine-tuning tools shipped, each as a check."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Batch, Now
from luthier.training.loop import Clock, Plans, Progress, train
from luthier.training.schedule import SCHEDULES, factor, find_schedule
from luthier.tune.trained import write
from tests.conftest import make_batch, split
from tests.toys.helpers import gap, gradients, model_of, plain_gradients, rows_of_eight, toys  # noqa: F401

TUNES = ["full", "half", "some_rows", "some_cols", "some_entries", "lora", "growing", "scale_shift", "bottleneck"]


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (1, 1, 1, 1, 1, 1, 1, 1), (3, 1, 4), (7, 1)])
def test_fault_1_accumulation_equals_one_batch_in_fp32(engine: Any, now: Now, sizes: tuple[int, ...]) -> None:
    """Fault 1: with unequal numbers of targets a mean of means is wrong; the sum over the step's targets is right."""
    model, batch = model_of().float(), rows_of_eight()
    expected = plain_gradients(model, batch)
    run = engine("full", model=model, dtype=torch.float32)
    found = {name.removeprefix("full/"): g for name, g in gradients(run, split(batch, sizes), now).items()}
    assert gap(found, expected) < 1e-5
    # The usual mistake: the mean of the micro-batches' means.
    pieces = [plain_gradients(model, one) for one in split(batch, sizes) if one.supervised]
    wrong = {name: sum(piece[name] for piece in pieces) / len(pieces) for name in expected}
    assert gap(wrong, expected) > 1e-2  # type: ignore[arg-type]


def test_fault_1_the_last_partial_step_is_divided_by_its_own_targets(engine: Any, now: Now) -> None:
    """Fault 1: a step of fewer micro-batches than the others is no smaller."""
    model, batch = model_of(), make_batch([(6, 5)])
    found = gradients(engine("full", model=copy.deepcopy(model)), [batch], now)
    assert gap({n.removeprefix("full/"): g for n, g in found.items()}, plain_gradients(model, batch)) < 1e-10


def test_fault_3_the_logged_loss_is_the_mean_over_tokens(engine: Any, now: Now) -> None:
    """Fault 3: the loss of a step is the mean over its targets, recomputed by plain PyTorch, not over batches."""
    model, batch = model_of(), rows_of_eight()
    with torch.no_grad():
        logits = model(batch.token_ids_BT).logits[:, :-1].flatten(0, 1)
    label = batch.label_BT[:, 1:].flatten()
    each = functional.cross_entropy(logits, label, reduction="none")[label >= 0]
    run = engine("full", model=model, objective=["cross_entropy", {"pull_to_start": {"weight": 3.0}}], token_weight="dft")
    result = run.step(split(batch, (3, 5)), now)
    assert result.nll == pytest.approx(float(each.mean()), abs=1e-12)
    assert result.loss == pytest.approx(float(((-each).exp() * each).mean()), abs=1e-12)
    assert result.kept == pytest.approx(float((-each).exp().mean()), abs=1e-12)
    assert (result.supervised, result.tokens, result.rows) == (30, 61, 8)
    # The penalty is 0 at the start, and stays out of the reported cross-entropy later.
    later = run.step([batch], now._replace(step=1))
    assert later.parts["pull_to_start"] > 0 and later.loss == pytest.approx(sum(later.parts.values()))


@pytest.mark.parametrize("objective", ["cross_entropy", ["cross_entropy", "pull_to_start"], ["likely_less", "extra_head"]], ids=str)
@pytest.mark.parametrize("source", ["backprop", "per_layer", "zeroth_order"])
def test_fault_4_a_step_without_targets_is_no_step(engine: Any, now: Now, objective: Any, source: str) -> None:
    """Fault 4: an all-masked batch gives no NaN and moves nothing, neither weights nor moments nor ages."""
    run = engine(
        "full", model=model_of(), objective=objective, optimizer={"adamw": {"weight_decay": 0.1}}, gradient_estimator=source
    )
    run.step([rows_of_eight()], now)
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    state = copy.deepcopy(run.chain.tensors())
    result = run.step([make_batch([(5, 0), (4, 0)])], now._replace(step=1))
    assert result.skipped and result.loss == 0.0 and result.supervised == 0 and result.tokens == 9
    assert all(torch.equal(one.master, before[name]) for name, one in run.tune.trained.items())
    assert all(torch.equal(value, state[path]) for path, value in run.chain.tensors().items())


@pytest.mark.parametrize("source", ["backprop", "per_layer"])
def test_fault_4_a_loss_that_is_not_finite_stops_before_the_step(engine: Any, now: Now, source: str) -> None:
    """Fault 4: overflow is an error that names the rows; nothing was moved and no gradient is left over."""
    model = model_of()
    run = engine({"full": {"target_modules": ["mlp_down"]}}, model=model, optimizer="adamw", gradient_estimator=source)
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    with torch.no_grad():
        model.lm_head.weight[7] = float("inf")
    with pytest.raises(LuthierError, match="not a finite number") as caught:
        run.step(split(rows_of_eight(), (5, 3)), now)
    assert "row0" in str(caught.value)
    assert all(torch.equal(one.master, before[name]) and one.gradient is None for name, one in run.tune.trained.items())


def test_fault_4_a_gradient_that_is_not_finite_stops_before_the_step(engine: Any, now: Now) -> None:
    """Fault 4: a finite loss with an infinite gradient is caught as well, by the tensor's name."""
    run = engine("lora", model=model_of(), optimizer="adamw")
    one = next(iter(run.tune.trained.values()))
    one.leaf.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(LuthierError, match=r"the gradient of lora/model\.layers\.0"):
        run.step([rows_of_eight()], now)
    assert all(other.gradient is None for other in run.tune.trained.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("tune", ["full", "half", "lora"])
def test_fault_5_checkpointing_changes_no_gradient(engine: Any, now: Now, tune: str, architecture: str) -> None:
    """Fault 5: gradient checkpointing on and off, with dropout, gap 0."""
    found = []
    for checkpointing in (False, True):
        model = model_of(architecture)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = engine({"lora": {"dropout": 0.2}} if tune == "lora" else tune, model=model)
        model.train()
        torch.manual_seed(0)
        found.append(gradients(run, split(rows_of_eight(), (5, 3)), now))
    assert gap(found[1], found[0]) == 0.0


def test_fault_7_a_label_at_the_last_position_is_predicted_from_the_one_before(engine: Any, now: Now) -> None:
    """Fault 7: the causal shift is done once, and the loss equals that of the plain model."""
    model = model_of()
    batch = make_batch([(6, 1)])
    with torch.no_grad():
        logits = model(batch.token_ids_BT).logits
    expected = -logits[0, -2].log_softmax(-1)[batch.label_BT[0, -1]]
    assert engine("full", model=model).step([batch], now).nll == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tune", TUNES)
def test_fault_19_what_trains_moves_and_what_is_frozen_keeps_every_bit(engine: Any, now: Now, tune: str, architecture: str) -> None:
    """Fault 19: every trained tensor has a gradient by step 2; every frozen number keeps its bits, decay or not."""
    model = model_of(architecture)
    base = {name: one.detach().clone() for name, one in model.named_parameters()}
    run = engine(tune, model=model, optimizer=["clip", {"adamw": {"weight_decay": 0.5}}])
    ever: dict[str, torch.Tensor] = {name: torch.zeros_like(one, dtype=torch.bool) for name, one in base.items()}
    for i in range(4):
        for one in run.tune.trained.values():
            if one.form not in ("factor", "free"):
                mark = ever[one.place.parameter]
                rows = mark.t() if one.place.module in run.tune.parts.transposed and mark.ndim == 2 else mark
                rows = rows[one.place.start : one.place.stop]
                write(rows, one.form, one.index, torch.ones((), dtype=torch.bool))
        if i == 1:
            found = gradients(run, split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i))
            quiet = [name for name, g in found.items() if not g.any() and "dense" not in name]
            assert found.keys() >= run.tune.trained.keys() and not quiet
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))
    for name, one in model.named_parameters():
        assert torch.equal(one.detach()[~ever[name]], base[name][~ever[name]]), name
    assert all(one.grad is None for one in model.parameters())


def test_fault_29_the_rates_are_the_planned_ones() -> None:
    """Fault 29: warm-up reaches 1 exactly at its last step; rates at 0, 25, 50 and 100 % are what the formulas say."""
    cosine = find_schedule("cosine")
    rates = [factor(cosine, step, 110, 10) for step in range(110)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)] and rates[9] == 1.0 and rates[10] == 1.0
    assert max(rates) == 1.0 and all(a >= b for a, b in pairwise(rates[9:]))
    planned = {10: 1.0, 35: 0.5 * (1 + math.cos(math.pi / 4)), 60: 0.5, 85: 0.5 * (1 - math.cos(math.pi / 4))}
    assert all(rates[step] == pytest.approx(value, abs=1e-12) for step, value in planned.items())
    assert 0 < rates[-1] < 1e-3 and factor(cosine, 110, 110, 10) == pytest.approx(0.0, abs=1e-15)
    stable = [factor(find_schedule("warmup_stable_decay"), step, 100, 0) for step in (0, 79, 80, 90, 100)]
    assert stable == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])
    assert [factor(find_schedule("linear"), step, 8, 0) for step in (0, 2, 4, 8)] == pytest.approx([1.0, 0.75, 0.5, 0.0])
    assert all(factor(schedule, 0, 4, 0) == 1.0 for schedule in SCHEDULES.values())
    assert [factor(find_schedule("constant"), step, 3, 3) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    with pytest.raises(LuthierError, match="did you mean `cosine`"):
        find_schedule("cosin")


@dataclass
class FixedFeed:
    """Two micro-batches a step, and a step without targets."""

    steps: int

    def at(self, step: int) -> tuple[float, list[Batch]]:
        batch = make_batch([(4, 0)]) if step == 2 else rows_of_eight(seed=step)
        return step / self.steps, split(batch, (1,) if step == 2 else (5, 3))


def test_fault_29_rates_over_real_steps_count_optimizer_steps(engine: Any, now: Now) -> None:
    """Fault 29: the rate advances once an optimizer step, not a micro-batch, and reaches the optimizer."""
    seen: list[Now] = []
    run = engine("some_rows", model=model_of())
    plain = run.chain.step

    def watched(when: Now, only: Any = None) -> None:
        seen.append(when)
        plain(when, only)

    run.chain.step = watched
    clock = Clock(steps=8, learning_rate=0.02, schedule=find_schedule("linear"), warmup=2, seed=0)
    progress = train(run, FixedFeed(8), clock, Plans(), Progress())  # type: ignore[arg-type]
    rates = [0.01, 0.02, 0.02, 0.02 * 5 / 6, 0.02 * 4 / 6, 0.02 * 3 / 6, 0.02 * 2 / 6, 0.02 / 6]
    assert [line["learning_rate"] for line in progress.history] == pytest.approx(rates)
    assert [when.learning_rate for when in seen] == pytest.approx([r for i, r in enumerate(rates) if i != 2])
    assert progress.empty_steps == 1 and progress.history[2]["loss"] is None and progress.step == 8
