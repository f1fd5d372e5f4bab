"""A bandit in which everything about a policy can be computed: what a loss learns from answers of whom (Tajwar et al., 2024).

An answer is one of 100 bins, a policy a table of logits. The reference's mass lies where few answers of one task are good, and most of
another's. Losses over pairs are luthier's own. Shapes: S states, each a bandit by itself, N answers drawn in each, A bins, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from luthier import draws, registry
from luthier.kinds import Batch, PairLoss, Pairs, Side, View

BINS, STATES, DRAWN = 100, 20, 10
STEPS, REFRESH = 1000, 10
"""Of a policy, and between two draws of its answers where these are fresh."""
NEAR, FAR = 20, 70
"""The best bin of a task: among what the reference says, and where it hardly ever goes."""
WIDTH = 10.0
CLIP = 0.2
"""Of the likelihood ratio, for answers that are learned from several times; PPO's."""


class Seen(NamedTuple):
    """What a loss sees of one step."""

    log_SA: Tensor
    """Log-probabilities under the policy; the gradient flows through them."""
    old_SA: Tensor
    """Under the policy that drew the answers."""
    base_SA: Tensor
    """Under the reference."""
    drawn_SN: Tensor
    reward_A: Tensor


Loss = Callable[[Seen], Tensor | None]
"""A mean; None where the answers teach nothing, such as where all are the same."""


class Way(NamedTuple):
    """How a policy learns."""

    loss: Loss
    fresh: bool
    """Answers are drawn again from the policy every few steps, instead of once from the reference."""


@cache
def reference() -> Tensor:
    """The probability of each bin, [A]: tanh of a Cauchy variable of location -0.7 and scale 0.4, in bins of equal width on [-1, 1]."""
    edge = torch.linspace(-1.0, 1.0, BINS + 1, dtype=torch.float64)
    below = 0.5 + ((edge.atanh() + 0.7) / 0.4).atan() / math.pi
    return below.diff()


def rewards(best: int) -> Tensor:
    """The reward of each bin, [A]: 1 in the best one, less to either side."""
    bin_A = torch.arange(BINS, dtype=torch.float64)
    return (-(((bin_A - best) / WIDTH) ** 2)).exp()


def best_of_n(seen: Seen) -> Tensor:
    """Cross-entropy on the best of a state's answers: it pulls up, and pushes nothing down but by what has to sum to one."""
    best_S1 = seen.drawn_SN.gather(1, seen.reward_A[seen.drawn_SN].argmax(-1, keepdim=True))
    return -seen.log_SA.gather(1, best_S1).mean()


def policy_gradient(advantage_SN: Tensor, seen: Seen) -> Tensor:
    """The clipped surrogate, whose gradient is REINFORCE's while the policy is the one that drew the answers."""
    ratio_SN = (seen.log_SA - seen.old_SA).gather(1, seen.drawn_SN).exp()
    return -torch.minimum(ratio_SN * advantage_SN, ratio_SN.clamp(1.0 - CLIP, 1.0 + CLIP) * advantage_SN).mean()


def reinforce(seen: Seen) -> Tensor:
    """Policy gradient against the mean reward of a state's answers."""
    reward_SN = seen.reward_A[seen.drawn_SN]
    return policy_gradient(reward_SN - reward_SN.mean(-1, keepdim=True), seen)


def reinforce_upwards(seen: Seen) -> Tensor:
    """The same with advantages below 0 left out."""
    reward_SN = seen.reward_A[seen.drawn_SN]
    return policy_gradient((reward_SN - reward_SN.mean(-1, keepdim=True)).clamp(min=0.0), seen)


_NO_TOKENS = torch.zeros(0, 1, dtype=torch.int64)
_NO_ROWS = View(
    Batch(_NO_TOKENS, _NO_TOKENS > 0, _NO_TOKENS, _NO_TOKENS, ()),
    {},
    label_N=_NO_TOKENS[:, 0],
    row_N=_NO_TOKENS[:, 0],
    position_N=_NO_TOKENS[:, 0],
)
"""What a loss that reads anything but likelihoods would look at."""


def over_pairs(name: str, **options: float | bool) -> Loss:
    """One of luthier's losses over pairs, on all pairs of a state's answers of which one is better."""
    (value,) = registry.make({name: options}, ("pair_loss",)).values
    assert isinstance(value, PairLoss)

    def loss(seen: Seen) -> Tensor | None:
        state_P, better_P, worse_P = pairs(seen)
        if not len(state_P):
            return None
        return value.loss(compared(seen, state_P, better_P, worse_P)).mean()

    return loss


def pairs(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """The state, the better bin and the worse bin of each pair of answers to one state; pairs of equal rewards are left out."""
    reward_SN = seen.reward_A[seen.drawn_SN]
    state_P, better_P, worse_P = (reward_SN[:, :, None] > reward_SN[:, None, :]).nonzero(as_tuple=True)
    return state_P, seen.drawn_SN[state_P, better_P], seen.drawn_SN[state_P, worse_P]


def compared(seen: Seen, state_P: Tensor, better_P: Tensor, worse_P: Tensor) -> Pairs:
    """Pairs as losses over them see them: an answer is one token."""
    one_P = torch.ones_like(state_P)
    chosen, rejected = (Side.of(seen.log_SA[state_P, bin_P], seen.base_SA[state_P, bin_P], one_P) for bin_P in (better_P, worse_P))
    return Pairs(chosen, rejected, _NO_ROWS, state_P, state_P, chosen.gained_P - rejected.gained_P)


def learn(way: Way, best: int, rate: float, seed: int) -> Tensor:
    """The policies that a way of learning comes to, as log-probabilities [S, A].

    Args:
        way: the loss, and who draws its answers.
        best: the best bin.
        rate: Adam's learning rate.
        seed: of the draws.
    """
    base_SA = reference().log().expand(STATES, BINS)
    logits_SA = base_SA.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits_SA], lr=rate)
    rng = draws.generator(seed, "bandit")
    old_SA, reward_A = base_SA, rewards(best)
    for step in range(STEPS):
        if step == 0 or (way.fresh and step % REFRESH == 0):
            old_SA = logits_SA.detach().log_softmax(-1)
            drawn_SN = torch.multinomial(old_SA.exp(), DRAWN, replacement=True, generator=rng)
        loss = way.loss(Seen(logits_SA.log_softmax(-1), old_SA, base_SA, drawn_SN, reward_A))
        if loss is None:
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits_SA.detach().log_softmax(-1)


def expected_reward(log_SA: Tensor, best: int) -> float:
    """What policies get, exactly, a mean over states."""
    return float((log_SA.exp() * rewards(best)).sum(-1).mean())


def drift(log_SA: Tensor) -> float:
    """KL(policy || reference) in nats, a mean over states."""
    return float((log_SA.exp() * (log_SA - reference().log())).sum(-1).mean())
