"""ProMoT: first the prompt moves and nothing else, then everything but the prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.delta import Delta
from luthier.errors import LuthierError
from luthier.kinds import Batch, Freezing, Now
from luthier.methods.prompt.promot import promot
from luthier.tune.forward import hidden
from tests.conftest import split
from tests.contracts.fixtures import engine_of
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight

STEPS = 4
DECAYING = [{"adamw": {"weight_decay": 0.1}}]
BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def clock(step: int) -> Now:
    return Now(step=step, steps=STEPS, learning_rate=0.01)


def rows(step: int) -> list[Batch]:
    return split(rows_of_eight(seed=step), (5, 3))


def masters(run: Any) -> dict[str, Tensor]:
    return {name: one.master.detach().clone() for name, one in run.tune.trained.items()}


def live(run: Any) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in run.tune.model.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def make(engine: Any, partner: Any = "full", architecture: str = "llama", **options: Any) -> Any:
    tune = [{"promot": {"length": 3, **options}}, *([partner] if partner else [])]
    return engine(tune, model=model_of(architecture), optimizer=DECAYING)


def prompt(run: Any) -> Tensor:
    found: Tensor = run.tune.trained["promot.promot_PD"].master.detach()
    return found


@BOTH
@pytest.mark.parametrize("partner", ["full", "lora", "half"])
def test_the_prompt_moves_first_and_alone_then_stands_still(engine: Any, partner: str, architecture: str) -> None:
    run = make(engine, partner, architecture)
    start = masters(run)
    for step in range(STEPS):
        before, weights = masters(run), live(run)
        run.step(rows(step), clock(step))
        changed, inside = moved(before, masters(run)), moved(weights, live(run))
        if step < 2:
            assert changed == {"promot.promot_PD"} and not inside
        else:
            assert changed and "promot.promot_PD" not in changed and bool(inside) == (partner != "lora")
    # LoRA's first factor waits for the second; GPT-2's key biases hardly have a gradient.
    assert len(moved(start, masters(run))) >= 0.9 * len(start)


def test_the_model_begins_anew_where_the_prompt_stops(engine: Any) -> None:
    """What trains in the second phase has the moments of that phase alone."""
    run = make(engine)
    for step in range(STEPS):
        run.step(rows(step), clock(step))
    late = make(engine)
    late.tune.set({"promot.promot_PD": prompt(run)})
    for step in (2, 3):
        late.step(rows(step), clock(step))
    assert not moved(masters(run), masters(late))


def loss_of(run: Any, batches: list[Batch]) -> float:
    """The loss as the model stands, outside of a step."""
    views = [run.services("promot", clock(2)).forward(batch, ["nll"]) for batch in batches]
    return float(sum(view["nll"].sum() for view in views)) / sum(batch.supervised for batch in batches)


def test_the_second_phase_starts_where_the_first_ended(engine: Any) -> None:
    run, batches = make(engine), rows(0)
    first = run.step(batches, clock(0)).loss
    run.step(batches, clock(1))
    ended = loss_of(run, batches)
    assert run.step(batches, clock(2)).loss == pytest.approx(ended, rel=1e-12) and ended < first
    plain = engine("full", model=model_of(), optimizer=DECAYING).step(batches, clock(2)).loss
    assert abs(plain - ended) > 1e-4


def test_the_models_gradient_comes_from_behind_the_prompt(engine: Any) -> None:
    run, plain = make(engine), engine("full", model=model_of(), optimizer=DECAYING)
    for step in range(2):
        run.step(rows(step), clock(step))
    run.tune.freeze(clock(2))
    found = gradients(run, rows(2), clock(2))
    assert "promot.promot_PD" not in found
    assert gap(found, gradients(plain, rows(2), clock(2))) > 1e-3


def test_virtual_tokens_are_no_targets(engine: Any) -> None:
    result, plain = (one.step(rows(0), clock(0)) for one in (make(engine), engine("full", model=model_of())))
    assert result.supervised == plain.supervised == 30 and result.tokens == plain.tokens


def test_without_the_prompt_an_untouched_model_is_the_base(engine: Any) -> None:
    run = make(engine, None)
    base = model_of()
    run.step(rows(0), clock(0))
    batch = rows_of_eight()
    with torch.no_grad(), run.tune.off():
        assert torch.equal(hidden(run.tune, batch).values, base.model(batch.token_ids_BT, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("partner", ["full", "lora"])
def test_the_delta_alone_is_the_tuned_model_without_the_prompt(engine: Any, partner: str) -> None:
    """For other tasks the prompt is left away: what was learnt behind it is a change of the weights like any other."""
    run = engine([{"promot": {"length": 3}}, partner], model=model_of(), optimizer=DECAYING, keep_base=True)
    for step in range(STEPS):
        run.step(rows(step), clock(step))
    ids_BT = rows_of_eight().token_ids_BT
    base = model_of()
    with torch.no_grad():
        before = base(ids_BT).logits
        Delta.of(run.tune).apply(base)
        # Without virtual ids no prompt stands before a row.
        without = run.tune.model(ids_BT).logits
        assert torch.allclose(base(ids_BT).logits, without, rtol=1e-9, atol=1e-9)
        assert float((without - before).abs().max()) > 1e-3


def test_a_share_of_one_is_prompt_tuning(engine: Any) -> None:
    run = make(engine, share=1.0, prompt_learning_rate=0.1)
    plain = engine({"prompt_tuning": {"length": 3}}, model=model_of(), optimizer=DECAYING)
    plain.tune.set({"prompt_tuning.prompt_PD": prompt(run)})
    weights = live(run)
    for step in range(STEPS):
        assert run.step(rows(step), clock(step)).loss == plain.step(rows(step), clock(step)).loss
    assert torch.equal(prompt(run), plain.tune.trained["prompt_tuning.prompt_PD"].master)
    assert not moved(weights, live(run))


def test_the_schedule_restarts() -> None:
    _, freezing = promot(share=0.25)
    assert isinstance(freezing, Freezing) and freezing.ends == (0.25,) and freezing.restart
    assert freezing.alone == {0}


@pytest.mark.parametrize("rate", [1e-3, 2e-5])
def test_the_prompt_has_a_learning_rate_of_its_own(rate: float) -> None:
    """The prompt's rate was a multiple of the run's, which is that of the most careful partner: 0.002 beside one of 2e-5, 0.1 alone."""
    now = Now(steps=STEPS, learning_rate=0.25 * rate, factor=0.25)
    run = engine_of(tune=["promot", "full"], optimizer=[registry.make({"adamw": {"epsilon": 1e-30}}, ("optimizer",))], now=now)
    before = prompt(run).clone()
    run.step(rows(0), now)
    moved_PD = (prompt(run) - before).abs()
    # The first step of Adam is the learning rate, here at a quarter of the schedule.
    assert torch.allclose(moved_PD, torch.full_like(moved_PD, 0.25 * 0.1), rtol=1e-6)
    for one in run.tune.trained.values():
        assert now.learning_rate * one.rate == pytest.approx(0.025 if one.slot == "promot" else 0.25 * rate)


def test_a_prompt_is_a_copy_of_embeddings(engine: Any) -> None:
    run = make(engine)
    before = prompt(run).clone()
    table = copy.deepcopy(run.tune.model.get_input_embeddings().weight.detach())
    for step in (2, 3):
        run.step(rows(step), clock(step))
    assert not torch.equal(run.tune.model.get_input_embeddings().weight, table) and torch.equal(prompt(run), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 0}, "the prompt has 0 tokens"),
        ({"share": 0.0}, "the share is 0"),
        ({"share": 1.5}, "the share is 1.5"),
        ({"prompt_learning_rate": 0.0}, "the prompt's learning rate is 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(LuthierError, match=says):
        promot(**options)
