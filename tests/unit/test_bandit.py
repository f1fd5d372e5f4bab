"""The bandit of the lab: its world, and gradients that can be worked out by hand."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.kinds import PairLoss
from luthier.lab import bandit
from luthier.lab.bandit import Seen, Way, best_of_n, compared, over_pairs, pairs, policy_gradient
from luthier.lab.replications import on_policy

TWO = (0.9, 0.1)


def table(*probabilities: float) -> Tensor:
    """Logits of one state."""
    return torch.tensor([probabilities], dtype=torch.float64).log().requires_grad_()


def seen(logits_SA: Tensor, drawn: list[int], rewards: tuple[float, ...], base_SA: Tensor | None = None) -> Seen:
    log_SA = logits_SA.log_softmax(-1)
    old_SA = log_SA.detach()
    reward_A = torch.tensor(rewards, dtype=torch.float64)
    return Seen(log_SA, old_SA, old_SA if base_SA is None else base_SA, torch.tensor([drawn]), reward_A)


def slope(loss: Tensor, logits_SA: Tensor) -> list[float]:
    """How the logits are moved: against the gradient."""
    (found,) = torch.autograd.grad(loss, logits_SA)
    return (-found[0]).tolist()


def test_the_world() -> None:
    """Its mass and what it gets, against the paper's figures, and a sample of the variable itself."""
    mass_A = bandit.reference()
    assert float(mass_A.sum()) == pytest.approx(1.0) and bool((mass_A > 0).all())
    assert float(mass_A[10:31].sum()) == pytest.approx(0.46, abs=0.01) and float(mass_A[60:81].sum()) == pytest.approx(
        0.05, abs=0.006
    )
    got = [bandit.expected_reward(mass_A.log().expand(bandit.STATES, -1), best) for best in (bandit.NEAR, bandit.FAR)]
    assert got == pytest.approx([0.38, 0.04], abs=0.005)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = torch.tanh(-0.7 + 0.4 * torch.tan(math.pi * (uniform - 0.5)))
    drawn_A = torch.bincount(((value + 1) * 50).long().clamp(max=99), minlength=100) / len(value)
    assert float((drawn_A - mass_A).abs().max()) < 3e-3
    assert float(bandit.rewards(70)[80]) == pytest.approx(math.exp(-1)) and bandit.drift(mass_A.log().expand(2, -1)) == 0.0


@pytest.mark.parametrize(
    ("baseline", "least", "wanted"), [(0.0, -9.0, 0.09), (0.1, -9.0, 0.09), (0.1, 0.0, 0.081)], ids=["plain", "baseline", "upwards"]
)
def test_policy_gradients_by_hand(baseline: float, least: float, wanted: float) -> None:
    """Two variants of probabilities .9 and .1 and rewards 0 and 1, a mean over what is drawn; with negative advantages left out it is
    less."""
    logits, moved = table(*TWO), [0.0, 0.0]
    for variant, chance in enumerate(TWO):
        advantage = torch.tensor([[max(least, float(variant == 1) - baseline)]], dtype=torch.float64)
        each = slope(policy_gradient(advantage, seen(logits, [variant], (0.0, 1.0))), logits)
        moved = [one + chance * other for one, other in zip(moved, each, strict=True)]
    assert moved == pytest.approx([-wanted, wanted], abs=1e-12)


def test_a_ratio_that_has_gone_far_is_clipped() -> None:
    """Behind 1.2 a good answer is pulled no further, and below 0.8 a bad one is pushed no further; back they are."""
    logits = table(0.5, 0.5)
    for ratio, advantage, moves in ((1.3, 1.0, False), (1.1, 1.0, True), (1.3, -1.0, True), (0.7, -1.0, False), (0.7, 1.0, True)):
        start = seen(logits, [0], (1.0, 0.0))
        now = start._replace(old_SA=start.old_SA - math.log(ratio))
        moved = slope(policy_gradient(torch.tensor([[advantage]], dtype=torch.float64), now), logits)
        assert (abs(moved[0]) > 0.1) == moves and moved[0] * advantage >= 0


def test_the_best_alone_is_pulled_up() -> None:
    """Equal rewards: the first is the best, and data of the policy's own leave it where it is on average; other data do not."""
    logits = table(*TWO)
    for data, wanted in ((TWO, [0.0, 0.0]), ((0.5, 0.5), [-0.4, 0.4])):
        moved = [0.0, 0.0]
        for variant, chance in enumerate(data):
            each = slope(best_of_n(seen(logits, [variant], (1.0, 1.0))), logits)
            moved = [one + chance * other for one, other in zip(moved, each, strict=True)]
        assert moved == pytest.approx(wanted, abs=1e-12)
    assert slope(best_of_n(seen(logits, [0, 1, 0], (0.0, 1.0))), logits) == pytest.approx([-0.9, 0.9])


def test_pairs_of_answers_and_dpo_at_its_start() -> None:
    """ln 2, and a pull of beta / 2 on either side of a pair; of two answers drawn by .9 and .1 a mean of .009. Ties are no pair."""
    logits, loss = table(*TWO), over_pairs("dpo", beta=0.1)
    found = loss(seen(logits, [0, 1], (0.0, 1.0)))
    assert found is not None and found.item() == pytest.approx(math.log(2.0))
    assert slope(found, logits) == pytest.approx([-0.05, 0.05])
    moved = 0.0
    for drawn in product((0, 1), repeat=2):
        each = loss(seen(logits, list(drawn), (0.0, 1.0)))
        moved += 0.0 if each is None else TWO[drawn[0]] * TWO[drawn[1]] * slope(each, logits)[1]
    assert moved == pytest.approx(0.009)
    assert loss(seen(logits, [0, 1], (1.0, 1.0))) is None and loss(seen(logits, [0, 0], (0.0, 1.0))) is None
    state_P, better_P, worse_P = pairs(seen(table(0.2, 0.3, 0.5), [2, 0, 1, 0], (0.0, 5.0, 1.0)))
    assert sorted(zip(better_P.tolist(), worse_P.tolist(), strict=True)) == [(1, 0), (1, 0), (1, 2), (2, 0), (2, 0)]
    assert state_P.tolist() == [0] * 5


def test_ipo_goes_to_its_margin() -> None:
    """(gained more - 10) squared at a beta of 0.05."""
    loss = over_pairs("ipo", beta=0.05)(seen(table(0.5, 0.5), [0, 1], (0.0, 1.0), base_SA=torch.tensor([[-2.0, -5.0]]).double()))
    assert loss is not None and loss.item() == pytest.approx((3.0 - 10.0) ** 2)


def test_the_best_policy_under_a_penalty_stays() -> None:
    """reference x exp(reward / beta), by hand; where the better answer wins by the logistic chance, dpo pulls it nowhere."""
    base, reward, beta = (0.7, 0.2, 0.1), (0.0, 1.0, 0.5), 0.5
    weight = [one * math.exp(other / beta) for one, other in zip(base, reward, strict=True)]
    best = [one / sum(weight) for one in weight]
    assert best == pytest.approx([0.286, 0.603, 0.111], abs=1e-3)
    base_SA = torch.tensor([base], dtype=torch.float64).log()
    (value,) = registry.make({"dpo": {"beta": beta}}, ("pair_loss",)).values
    assert isinstance(value, PairLoss)
    for logits, stays in ((table(*best), True), (table(*base), False)):
        moved = [0.0] * 3
        for one, other in product(range(3), repeat=2):
            if one != other:
                chance = 1 / (1 + math.exp(reward[other] - reward[one]))
                place_P = [torch.tensor([place]) for place in (0, one, other)]
                now = seen(logits, [one, other], reward, base_SA)
                each = slope(value.loss(compared(now, *place_P)).sum(), logits)
                moved = [a + chance * b for a, b in zip(moved, each, strict=True)]
        assert (max(map(abs, moved)) < 1e-12) == stays


def test_learning_repeats_and_fresh_answers_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandit, "STEPS", 25)
    drawn: list[Tensor] = []

    def loss(now: Seen) -> Tensor:
        drawn.append(now.drawn_SN)
        return best_of_n(now)

    first = bandit.learn(Way(loss, fresh=True), bandit.FAR, 0.1, 3)
    assert len({id(one) for one in drawn}) == 3 and not torch.equal(drawn[0], drawn[10])
    assert torch.equal(first, bandit.learn(Way(best_of_n, fresh=True), bandit.FAR, 0.1, 3))
    drawn.clear()
    other = bandit.learn(Way(loss, fresh=False), bandit.FAR, 0.1, 3)
    assert len({id(one) for one in drawn}) == 1 and bandit.drift(other) > 0.1
    assert not torch.equal(first, bandit.learn(Way(best_of_n, fresh=True), bandit.FAR, 0.1, 4))


def test_variants_have_their_ways() -> None:
    assert [variant.name for variant in on_policy.REPLICATION.variants] == list(on_policy.WAYS)
    assert [name for name, way in on_policy.WAYS.items() if way.fresh] == list(on_policy.WAYS)[3:]
