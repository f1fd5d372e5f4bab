"""f-divergence fine-tuning: conjugates on a grid, the card's numbers by hand, what linear and a model at its base reduce to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from luthier import registry
from luthier.columns.chunked import resolve
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.token_loss._divergences import DIVERGENCES, HELLINGER_END
from luthier.training.services import view_of
from tests.objectives import TUNES, assert_idle, assert_slopes, assert_trains, drawn, total_of, view_on
from tests.toys.helpers import gap, gradients, model_of, plain_loss, rows_of_eight

LABELS, ROWS = [0, 3, 2, 2, 1, 4], [0, 0, 0, 1, 1, 2]
NAMES = list(DIVERGENCES)
NUMBERS = [
    ("chi2", 0.5, -0.4375, 0.75),
    ("chi2_unclipped", 0.5, -0.4375, 0.75),
    ("hellinger", 0.5, -1 / 3, 4 / 9),
    ("linear", 0.5, -0.5, 1.0),
    ("chi2", 3.0, -1.0, 0.0),
    ("chi2_unclipped", 3.0, -0.75, -0.5),
    ("hellinger", 3.0, -0.75, 0.0625),
    # Where Hellinger's goes on in a straight line: 9 + 100 * 0.6.
    ("hellinger", -1.5, 69.0, 100.0),
    *((name, 0.0, 0.0, 1.0) for name in NAMES),
]


@pytest.mark.parametrize(("name", "reward", "loss", "weight"), NUMBERS)
def test_by_hand(name: str, reward: float, loss: float, weight: float) -> None:
    """The loss of a reward, the weight, and the slope, which is minus the weight."""
    leaf = torch.tensor(reward, dtype=torch.float64, requires_grad=True)
    found = DIVERGENCES[name].phi(leaf)
    found.backward()
    assert leaf.grad is not None
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert DIVERGENCES[name].weight(leaf.detach()).item() == pytest.approx(weight, abs=1e-12) == -leaf.grad.item()


@pytest.mark.parametrize("name", ["chi2", "hellinger"])
def test_they_are_the_convex_conjugates(name: str) -> None:
    """phi(r) is the largest -r u - f(u) over u >= 0."""
    u = torch.linspace(0, 60, 600_001, dtype=torch.float64)
    f = (u - 1) ** 2 if name == "chi2" else (u.sqrt() - 1) ** 2
    for reward in (-0.8, -0.5, 0.0, 0.5, 1.7, 3.0):
        largest = (-reward * u - f).max().item()
        assert DIVERGENCES[name].phi(torch.tensor(reward, dtype=torch.float64)).item() == pytest.approx(largest, abs=1e-7)
    assert HELLINGER_END < -0.8


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_linear_has_the_gradient_of_cross_entropy_times_beta(beta: float) -> None:
    """For any reference; of rows it is the gradient of their sums."""
    logits, base = drawn(6, 5), drawn(6, 5, seed=9).detach()
    (plain,) = torch.autograd.grad(total_of("cross_entropy", logits, LABELS, rows=ROWS), logits)
    for name, scale in (("f_divergence", beta), ("f_divergence_rows", beta * 6 / 3)):
        objective = {name: {"divergence": "linear", "beta": beta}}
        (found,) = torch.autograd.grad(total_of(objective, logits, LABELS, rows=ROWS, others={"base": base}), logits)
        assert torch.allclose(found, scale * plain, atol=1e-15)


def test_the_reward_of_a_model_that_is_its_base_is_zero_whatever_it_reads(engine: Any, now: Now) -> None:
    """With masked or noisy inputs the base read the clean rows: targets were rewarded and stopped before anything had moved."""
    for changed in ({"masked_thought": {"mask_probability": 0.4, "warmup": 0.0, "mask_id": 3}}, "neftune"):
        for objective in ("f_divergence", "f_divergence_rows"):
            result = engine(objective=[objective, changed], dtype=torch.float64).step([rows_of_eight()], now)
            assert abs(result.loss) < 1e-6 and result.notes["weight 0 or below"] == 0.0, (objective, changed)


@pytest.mark.parametrize("objective", ["f_divergence", "f_divergence_rows"])
def test_with_dropout_the_base_answers_without_it_as_the_card_says(engine: Any, now: Now, objective: str) -> None:
    run = engine([{"lora": {"dropout": 0.5}}], objective=objective, model=model_of())
    run.tune.set({name: torch.full_like(one.master, 0.1) for name, one in run.tune.trained.items()})
    base = view_of(engine(model=model_of()).tune, rows_of_eight(), resolve(["nll"]), now)["nll"]
    columns = resolve(["nll", "reference_nll"])
    views = [view_of(run.tune, rows_of_eight(), columns, now, trains=trains) for trains in (True, False)]
    assert all(torch.equal(view["reference_nll"], base.detach()) for view in views)
    assert not torch.allclose(views[0]["nll"], views[1]["nll"])
    assert "without dropout" in registry.find(objective).card.departs


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_its_base_learns_as_by_cross_entropy(engine: Any, now: Now, name: str) -> None:
    """At the first step: a wrong reference would show. The model's norms round to fp32 behind another scale."""
    batch, plain = rows_of_eight(), gradients(engine(), [rows_of_eight()], now)
    # 30 targets in 7 rows.
    for objective, scale in (("f_divergence", 0.5), ("f_divergence_rows", 0.5 * 30 / 7)):
        run = engine(objective={objective: {"divergence": name, "beta": 0.5}})
        assert gap(gradients(run, [batch], now), {key: scale * value for key, value in plain.items()}) < 1e-6
        result = run.step([batch], now)
        assert result.loss == 0.0 and result.notes["weight 0 or below"] == 0.0


def test_tokens_with_the_reward_two_are_learnt_no_more() -> None:
    """Chi-squared: exactly zero there, and below zero only where nothing clips it."""
    base = drawn(6, 5, seed=9).detach()
    reward_N = torch.tensor([2.0, 2.0, 2.0, 2.5, 1.0, 2.0], dtype=torch.float64)
    label_N, each = torch.tensor(LABELS), torch.arange(6)
    # Logits whose label is e^r times as likely as in the base, the others' proportions kept.
    p_NV = base.softmax(-1) * 0.05
    p_NV[each, label_N] = 0.002
    other_NV = p_NV / p_NV.sum(-1, keepdim=True)
    p_N = other_NV[each, label_N] * reward_N.exp()
    assert bool((p_N < 1).all())
    rest_NV = other_NV.clone()
    rest_NV[each, label_N] = 0.0
    logits = rest_NV / rest_NV.sum(-1, keepdim=True) * (1 - p_N)[:, None]
    logits[each, label_N] = p_N
    leaf = logits.log().requires_grad_(True)

    def slopes(name: str) -> torch.Tensor:
        objective = {"f_divergence": {"divergence": name}}
        return torch.autograd.grad(total_of(objective, leaf, LABELS, others={"base": other_NV.log()}), leaf)[0]

    (plain,) = torch.autograd.grad(total_of("cross_entropy", leaf, LABELS), leaf)
    assert torch.allclose(slopes("chi2"), plain * torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.0])[:, None], atol=1e-14)
    assert torch.allclose(slopes("chi2_unclipped"), plain * torch.tensor([0.0, 0.0, 0.0, -0.25, 0.5, 0.0])[:, None], atol=1e-14)
    (value,) = registry.part("f_divergence", divergence="chi2").values
    view = view_on(leaf, LABELS, value.columns, others={"base": other_NV.log() - 1e-9 * torch.eye(5)[label_N]})
    value.loss(view)
    assert view.notes["weight 0 or below"].tolist() == [1, 1, 1, 1, 0, 1]


def test_rows_have_one_reward() -> None:
    """The weight of the row's reward multiplies the gradient of its sum; token weights count in both."""
    logits, base = drawn(6, 5), drawn(6, 5, seed=9).detach()
    weight_N = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1.0], dtype=torch.float64)
    each, label_N, row_N = torch.arange(6), torch.tensor(LABELS), torch.tensor(ROWS)
    log_N = logits.log_softmax(-1)[each, label_N]
    gained_N = (weight_N * (log_N - base.log_softmax(-1)[each, label_N])).detach()
    for name, beta in (("chi2", 0.4), ("chi2_unclipped", 0.4), ("hellinger", 0.1)):
        (term,) = registry.part("f_divergence_rows", divergence=name, beta=beta).values
        view = view_on(logits, LABELS, term.columns, rows=ROWS, others={"base": base}).for_technique({}, weight_N)
        reward_B = beta * torch.stack([gained_N[row_N == row].sum() for row in range(3)])
        weight_B = {
            "chi2": (1 - reward_B / 2).clamp(min=0),
            "chi2_unclipped": 1 - reward_B / 2,
            "hellinger": (1 + reward_B) ** -2,
        }[name]
        wanted = torch.autograd.grad(-(beta * weight_B[row_N] * weight_N * log_N).sum(), logits, retain_graph=True)[0]
        assert torch.allclose(torch.autograd.grad(term.total(view, {}), logits)[0], wanted, atol=1e-14)
        assert view.notes["weight 0 or below"].tolist() == (weight_B <= 0)[row_N].double().tolist()


@pytest.mark.parametrize("objective", ["f_divergence", "f_divergence_rows"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_finite_differences(objective: str, name: str) -> None:
    spec = {objective: {"divergence": name, "beta": 0.2}}
    assert_slopes(spec, LABELS, rows=ROWS, others={"base": drawn(6, 5, seed=9).detach()})


def test_the_reference_gets_no_gradient_and_is_the_untouched_model(engine: Any, now: Now) -> None:
    logits, base = drawn(6, 5), drawn(6, 5, seed=9)
    total = total_of("f_divergence", logits, LABELS, others={"base": base})
    found = torch.autograd.grad(total, (logits, base), allow_unused=True)
    assert found[0] is not None and found[1] is None
    model, batch = model_of(), rows_of_eight()
    untouched = copy.deepcopy(model)
    for tune in ("lora", "half"):
        run = engine(tune, objective="f_divergence", model=copy.deepcopy(model))
        for step in range(2):
            run.step([batch], now._replace(step=step))
        view = view_of(run.tune, batch, resolve(["nll", "reference_nll"]), now)
        assert view["reference_nll"].mean().item() == pytest.approx(plain_loss(untouched, batch).item(), abs=1e-12)
        assert (view["nll"] - view["reference_nll"]).abs().max().item() > 1e-4


@pytest.mark.parametrize("objective", ["f_divergence", "f_divergence_rows"])
def test_what_is_no_target_adds_nothing(engine: Any, now: Now, objective: str) -> None:
    assert_idle(engine, now, objective)


@pytest.mark.parametrize("tune", TUNES, ids=str)
@pytest.mark.parametrize("objective", ["f_divergence", "f_divergence_rows"])
def test_it_goes_with_every_kind_of_tune(engine: Any, now: Now, objective: str, tune: Any) -> None:
    assert_trains(engine, now, tune, objective)


@pytest.mark.parametrize("name", ["f_divergence", "f_divergence_rows"])
def test_options_out_of_range(name: str) -> None:
    with pytest.raises(LuthierError, match=r"`beta` is 0\.0") as caught:
        registry.part(name, beta=0.0)
    assert caught.value.where == f"{name}: beta"
