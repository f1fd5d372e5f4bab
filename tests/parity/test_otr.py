"""One-Token Rollout: the closed form by hand, what it is beside DFT, and candidates that converge to it."""

from __future__ import annotations

from math import log, sqrt
from typing import Any

import pytest
import torch

from luthier import draws, registry
from luthier.columns import chunked
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.token_loss._rollout import STREAM
from tests.conftest import make_batch, split
from tests.objectives import TUNES, assert_idle, assert_trains, differences, drawn, gradient_of, loss_of, total_of, view_on
from tests.toys.helpers import gap, gradients, logits_of, model_of, rows_of_eight

LABELS = [0, 3, 6, 2, 2, 5, 1]


def expected(**options: Any) -> dict[str, Any]:
    return {"otr_expected": options}


@pytest.mark.parametrize(
    ("logits", "temperature", "loss", "slope"),
    [
        ([0.0, 0.0], 1.0, 0.55 * log(2) - 0.1 * log(2), 0.275),
        ([1.0, 0.0], 2.0, 0.14541, 0.19501),
        ([1.0, 0.0], 1.0, 0.19369, 0.21627),
    ],
)
def test_two_words_by_hand(logits: list[float], temperature: float, loss: float, slope: float) -> None:
    """Tempered log-probabilities would give 0.25832 and 0.12925 in the second."""
    objective = expected(beta=-0.1, temperature=temperature)
    assert loss_of(objective, [logits], [0]) == pytest.approx(loss, abs=1e-5)
    assert gradient_of(objective, [logits], [0])[0] == pytest.approx([-slope, slope], abs=1e-5)


@pytest.mark.parametrize("beta", [0.0, -0.1, 0.4])
def test_at_temperature_one_the_gradient_is_dfts_times_one_minus_beta(beta: float) -> None:
    logits = drawn(7, 9).tolist()
    dft = torch.tensor(gradient_of("cross_entropy", logits, LABELS, weight="dft"), dtype=torch.float64)
    found = torch.tensor(gradient_of(expected(beta=beta, temperature=1.0), logits, LABELS), dtype=torch.float64)
    assert torch.allclose(found, (1 - beta) * dft, rtol=1e-12, atol=1e-15)


def test_the_same_reward_for_all_teaches_nothing_but_what_temperature_adds() -> None:
    leaf = drawn(7, 9)
    logits = leaf.detach()
    zero = torch.tensor(gradient_of(expected(beta=1.0, temperature=1.0), logits.tolist(), LABELS))
    assert float(zero.abs().max()) < 1e-15
    found = torch.tensor(gradient_of(expected(beta=1.0, temperature=2.0), logits.tolist(), LABELS), dtype=torch.float64)
    assert torch.allclose(found, -((logits / 2).softmax(-1) - logits.softmax(-1)) / 7, atol=1e-15)
    assert float(found.abs().max()) > 0.01


@pytest.mark.parametrize("temperature", [1.3, 0.4])
def test_the_closed_form_of_the_gradient(temperature: float) -> None:
    """-(1 - beta) q(y) (e_y - p) - beta (q - p), with the policy held fixed."""
    logits = drawn(7, 9).detach()
    policy, own = (logits / temperature).softmax(-1), logits.softmax(-1)
    one_hot = torch.nn.functional.one_hot(torch.tensor(LABELS), 9).double()
    hit = (policy * one_hot).sum(-1, keepdim=True)
    wanted = (-1.1 * hit * (one_hot - own) + 0.1 * (policy - own)) / 7
    found = torch.tensor(gradient_of(expected(temperature=temperature), logits.tolist(), LABELS), dtype=torch.float64)
    assert torch.allclose(found, wanted, atol=1e-15)
    reward = -0.1 * policy + 1.1 * hit * one_hot
    assert torch.allclose(found, differences(lambda one: -(reward * one.log_softmax(-1)).sum(-1).mean(), logits), atol=1e-10)


def test_candidates_by_plain_loops() -> None:
    """The loss and its gradient from candidates found word by word; the hit rate is noted."""
    logits, options = drawn(7, 9).detach(), {"beta": -0.3, "temperature": 1.7, "candidates": 5}
    uniform = draws.uniforms(torch.arange(7), 5, STREAM)
    counts, hits = torch.zeros(7, 9, dtype=torch.float64), 0
    for i, label in enumerate(LABELS):
        chances = (logits[i] / 1.7).softmax(-1).tolist()
        for level in uniform[i].tolist():
            word = 0
            while level >= chances[word]:
                level -= chances[word]
                word += 1
            hits += word == label
            counts[i, word] += 1.0 if word == label else -0.3
    leaf = logits.clone().requires_grad_(True)
    loss = -(counts * leaf.log_softmax(-1)).sum() / 5 / 7
    assert loss_of({"otr": options}, logits.tolist(), LABELS) == pytest.approx(loss.item(), abs=1e-14)
    found = torch.tensor(gradient_of({"otr": options}, logits.tolist(), LABELS), dtype=torch.float64)
    assert torch.allclose(found, torch.autograd.grad(loss, leaf)[0], atol=1e-15)
    (value,) = registry.part("otr", **options).values
    view = view_on(logits, LABELS, value.columns)
    value.loss(view)
    assert hits > 0 and float(view.notes["hit rate"].sum()) == pytest.approx(hits / 5, abs=1e-14)


@pytest.mark.parametrize(("beta", "temperature"), [(-0.1, 1.3), (-0.1, 1.0), (0.5, 2.0)])
def test_the_mean_over_candidates_converges_to_the_closed_form(beta: float, temperature: float) -> None:
    """Loss, gradient and hit rate: within four standard errors over 4,000 targets of the same distribution."""
    row, label, count = drawn(1, 6, seed=4), 2, 4000
    options = {"beta": beta, "temperature": temperature}
    (value,) = registry.part("otr", candidates=4, **options).values
    leaf = row.detach().expand(count, 6).clone().requires_grad_(True)
    view = view_on(leaf, [label] * count, value.columns)
    loss = value.loss(view)
    (slopes,) = torch.autograd.grad(loss.sum(), leaf)
    wanted = torch.tensor([loss_of(expected(**options), row.tolist(), [label])], dtype=torch.float64)
    slope = torch.tensor(gradient_of(expected(**options), row.tolist(), [label]), dtype=torch.float64)[0]
    hit = (row.detach() / temperature).softmax(-1)[0, label][None]
    for found, mean in ((loss[:, None].detach(), wanted), (slopes, slope), (view.notes["hit rate"][:, None], hit)):
        assert bool(((found.mean(0) - mean).abs() < 4 * found.std(0) / sqrt(count)).all())
        assert bool((found.std(0) > 0).all())


def test_a_word_that_cannot_be_drawn_never_is() -> None:
    """Also at both ends of the vocabulary, and where fp32 has nothing left of it."""
    logits = torch.tensor([[-1e4, 0.0, -1e4, 0.0, -1e4]]).expand(2000, 5)
    (value,) = registry.part("otr", beta=0.0, candidates=8).values
    for label, rate in ((0, 0.0), (1, 0.5), (2, 0.0), (3, 0.5), (4, 0.0)):
        view = view_on(logits, [label] * 2000, value.columns)
        loss = value.loss(view)
        assert loss.isfinite().all() and abs(float(view.notes["hit rate"].mean()) - rate) <= (0.02 if rate else 0.0)


def test_one_candidate_is_one_of_the_two_rewards() -> None:
    """The target's loss at 1, or another word's at beta."""
    logits = drawn(7, 9).detach()
    (value,) = registry.part("otr", beta=-0.3, candidates=1).values
    found = value.loss(view_on(logits, LABELS, value.columns))
    reward = 1.3 * torch.nn.functional.one_hot(torch.tensor(LABELS), 9).double() - 0.3
    assert (found[:, None] + reward * logits.log_softmax(-1)).abs().amin(-1).max() < 1e-14


def test_a_draw_takes_the_word_that_begins_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 the first word that has a chance, a half the second of two that are equal."""
    monkeypatch.setattr(draws, "uniforms", lambda key_N, count, stream: torch.tensor([[0.0, 0.5]]).double())
    for label, rate in ((0, 0.0), (1, 0.5), (2, 0.5)):
        assert hit_rate([-1e4, 0.0, 0.0], label, candidates=2) == rate
    # In fp32 25 times a 25th is less than 1: the last draw still takes the last word that has a chance.
    assert (torch.zeros(25).softmax(0).double().sum() - 1.0) < -1e-8
    monkeypatch.setattr(draws, "uniforms", lambda key_N, count, stream: torch.tensor([[1.0 - 2.0**-53]], dtype=torch.float64))
    for label, rate in ((24, 1.0), (25, 0.0)):
        assert hit_rate([0.0] * 25 + [-1e4], label, candidates=1) == rate


def hit_rate(logits: list[float], label: int, **options: Any) -> float:
    (value,) = registry.part("otr", **options).values
    view = view_on(torch.tensor([logits]), [label], value.columns)
    value.loss(view)
    return float(view.notes["hit rate"])


def test_logits_that_are_no_numbers_are_a_loss_that_is_none() -> None:
    """And not a token beyond the vocabulary: the run says what happened."""
    (value,) = registry.part("otr", candidates=3).values
    assert value.loss(view_on(torch.full((1, 5), torch.nan), [1], value.columns)).isnan().all()


def test_candidates_are_drawn_anew_and_do_not_depend_on_the_split(engine: Any, now: Now) -> None:
    run, batch = engine(objective="otr", model=model_of()), rows_of_eight()
    whole = gradients(run, [batch], now)
    assert gap(gradients(run, [batch], now), whole) == 0.0
    assert gap(gradients(run, split(batch, (3, 1, 4)), now), whole) < 1e-12
    for other in (now._replace(step=1), now._replace(seed=1)):
        assert gap(gradients(run, [batch], other), whole) > 0.01


def test_chunks_change_nothing() -> None:
    """Logits that are made again in backward, some positions at a time."""
    (value,) = registry.part("otr").values
    label_N, key_N = torch.randint(0, 11, (150,), generator=torch.Generator().manual_seed(0)), torch.arange(150)
    found = []
    for limit in (10**9, 8 * 11 * 40):
        leaf, weight = drawn(150, 6), drawn(11, 6, seed=1)
        made = chunked.compute(
            leaf, label_N, lambda h, w=weight: h @ w.T, value.columns, key_N=key_N, vocabulary=11, limit_bytes=limit
        )
        column = made[value.columns[0].name]
        found.append((column, *torch.autograd.grad(column.sum(), (leaf, weight))))
    assert all(torch.allclose(one, two, atol=1e-13) for one, two in zip(*found, strict=True))


def test_two_rollouts_stand_side_by_side() -> None:
    """Equal options share a column; different ones have columns of their own."""
    both = [expected(), expected(beta=-0.1, temperature=1.3), expected(beta=0.0)]
    both += ["otr", {"otr": {"beta": -0.1, "temperature": 1.3, "candidates": 256}}, {"otr": {"candidates": 8}}]
    logits = drawn(7, 9)
    apart = [total_of(one, logits, LABELS).item() for one in both]
    assert len(set(apart)) == 4
    assert total_of(both, logits, LABELS).item() == pytest.approx(sum(apart), abs=1e-12)


@pytest.mark.parametrize("objective", ["otr", "otr_expected"])
def test_the_hit_rate_is_logged(engine: Any, now: Now, objective: str) -> None:
    model, batch = model_of(), make_batch([(9, 8), (9, 6)])
    label_BT = batch.label_BT[:, 1:]
    policy_BTV = (logits_of(model, batch)[:, :-1] / 1.3).softmax(-1)
    chance_N = policy_BTV.gather(-1, label_BT.clamp(min=0)[..., None])[..., 0][label_BT >= 0]
    logged = engine(objective=objective, model=model).step([batch], now).notes["hit rate"]
    error = float((chance_N * (1 - chance_N)).sum() / 256) ** 0.5 / 14 if objective == "otr" else 1e-12
    assert len(chance_N) == 14 and abs(logged - float(chance_N.mean())) < 4 * error


@pytest.mark.parametrize("objective", ["otr", "otr_expected"])
def test_what_is_no_target_adds_nothing(engine: Any, now: Now, objective: str) -> None:
    assert_idle(engine, now, objective)


@pytest.mark.parametrize("tune", TUNES, ids=str)
@pytest.mark.parametrize("objective", ["otr", "otr_expected"])
def test_it_goes_with_every_kind_of_tune(engine: Any, now: Now, objective: str, tune: Any) -> None:
    assert_trains(engine, now, tune, objective)


@pytest.mark.parametrize(
    ("name", "options"),
    [("otr", {"temperature": 0.0}), ("otr_expected", {"temperature": -1.0}), ("otr", {"candidates": 0})],
)
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(LuthierError, match=f"`{next(iter(options))}` is") as caught:
        registry.part(name, **options)
    assert caught.value.where == f"{name}: {next(iter(options))}"
