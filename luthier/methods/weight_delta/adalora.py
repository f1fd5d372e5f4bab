"""AdaLoRA (Zhang et al., 2023), section 3: deltas P diag(lambda) Q, whose singular values are pruned over all weights by importance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Callback, Freezing, LossTerm, Now, Place, Services, State, Tensors, View, WeightDelta
from luthier.methods.weight_delta._sensitivity import excess, look, prune, triplets
from luthier.methods.weight_delta._starts import check_positive
from luthier.registry import method


@method(
    title="AdaLoRA",
    paper="arXiv:2303.10512",
    row=218,
    reduces_to="target_rank = initial_rank: nothing is pruned",
    departs="the penalty is a mean of Frobenius norms as in both public codes, where the paper writes their squares; exactly as many "
    "triplets stay as the budget says, where the codes drop more on a tie; warm-up and final phase are shares of the run; one more "
    "pruning when the run ends",
    learning_rate=5e-3,
    replication="adalora",
)
def adalora(
    *,
    initial_rank: int = 12,
    target_rank: int = 8,
    alpha: float = 16.0,
    orthogonality: float = 0.1,
    warmup: float = 0.1,
    final: float = 0.5,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    target_modules: tuple[str, ...] = ("linear",),
) -> tuple[WeightDelta, LossTerm, Callback, Freezing]:
    """Start with more singular triplets than asked for, and prune those of least importance, wherever they are.

    P and Q start random, lambda at zero. After each step the sensitivity |number * gradient| of every number is smoothed, and so is
    its uncertainty, how far it is from its mean; their product is its importance. A triplet's is that of its singular value and the
    means over its two vectors. What is pruned is set to zero; it may come back in the next step, until the final phase.

    Args:
        initial_rank: triplets of each weight at the start; 12, the paper's 1.5 times the target.
        target_rank: triplets in the end, on average over the weights.
        alpha: deltas are scaled by alpha / (initial_rank + 1e-5), also when triplets are gone; the authors' scripts use 16 or 32.
        orthogonality: gamma, the weight of the mean over all P and Q of |P^T P - I| and |Q Q^T - I|; 0.1 as in the paper.
        warmup: share of the run before the first pruning, t_i; the authors' scripts use 0.09 to 0.15.
        final: share of the run at its end in which the choice is fixed, t_f; the authors' scripts use 0.46 to 0.58.
        every: steps from one pruning to the next; the authors' scripts use 1 to 100.
        beta1: how much of the smoothed sensitivity stays at each step; 0.85 as in the paper.
        beta2: how much of the smoothed uncertainty stays at each step; 0.85 as in the paper.
        target_modules: where deltas are added; module types or groups of them.
    """
    check_positive("adalora", "target_rank", target_rank)
    check_positive("adalora", "every", every)
    if orthogonality < 0.0:
        raise LuthierError(f"the orthogonality is {orthogonality}", where="adalora: orthogonality", fix="use 0 or more")
    _refuse_impossible(initial_rank, target_rank, warmup, final, {"beta1": beta1, "beta2": beta2})
    # The divisor of both public codes.
    scale = alpha / (initial_rank + 1e-5)

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        width_out, width_in = weight_OI.shape
        rng = services.rng(f"adalora {place}")
        return {
            "right": 0.02 * torch.randn(initial_rank, width_in, generator=rng),
            "values": torch.zeros(initial_rank, 1),
            "left": 0.02 * torch.randn(width_out, initial_rank, generator=rng),
        }

    def apply(tensors: Tensors, x: Tensor) -> Tensor:
        # Scaled where it is narrow.
        return functional.linear(functional.linear(x, tensors["right"] * tensors["values"]) * scale, tensors["left"])

    def delta(tensors: Tensors) -> Tensor:
        return scale * tensors["left"] @ (tensors["right"] * tensors["values"])

    def factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
        stays_R = tensors["values"][:, 0] != 0
        return (tensors["right"] * tensors["values"])[stays_R], scale * tensors["left"][:, stays_R]

    def penalty(view: View, own: Tensors) -> Tensor:
        assert view.services is not None
        vectors = [one for mine in triplets(view.services).values() for one in (mine["right"].value, mine["left"].value.T)]
        return torch.stack([far_from_orthonormal(vector_RI) for vector_RI in vectors]).mean()

    def after_step(state: State, services: Services) -> None:
        first, last = _phases(services.now, warmup, final)
        step, mine = services.now.step, triplets(services)
        # Compared with what was done, not with the clock: a step without rows is not heard of here.
        due = step // every != state.get("pruned", 0)
        if step < last:
            for one in (one for tensors in mine.values() for one in tensors.values()):
                look(state, one, beta1, beta2)
        state["pruned"] = step // every
        if step >= last or due:
            most, least = initial_rank * len(mine), target_rank * len(mine)
            prune(state, services, int((most - least) * excess(step, first, last) + least))

    def after_stage(state: State, services: Services) -> None:
        prune(state, services, target_rank * len(triplets(services)))

    return (
        WeightDelta(start, apply, delta, target_modules=target_modules, factors=factors, stacks=False),
        LossTerm(penalty, unit="step", weight=orthogonality, penalty=True),
        Callback(after_step, after_stage, needs=frozenset({"gradients"})),
        Freezing(ends=(1.0 - final,), settles=True),
    )


def far_from_orthonormal(vector_RI: Tensor) -> Tensor:
    """How far R vectors are from orthonormal: the Frobenius norm of `Q Q^T - I`, not squared."""
    gram_RR = vector_RI @ vector_RI.T
    norm: Tensor = torch.linalg.matrix_norm(gram_RR - torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device))
    return norm


def _phases(now: Now, warmup: float, final: float) -> tuple[int, int]:
    """The last step before pruning begins, and the one at which the final phase does."""
    # One step at least is looked at: without any importance there is nothing to choose by. The final phase has one at least, too.
    return round(warmup * now.steps), max(1, min(now.steps - 1, round((1.0 - final) * now.steps)))


def _refuse_impossible(initial_rank: int, target_rank: int, warmup: float, final: float, betas: Mapping[str, float]) -> None:
    if initial_rank < target_rank:
        raise LuthierError(
            f"the initial rank is {initial_rank}, below the target rank of {target_rank}",
            where="adalora: initial_rank",
            fix=f"use at least {target_rank}, e.g. {target_rank * 3 // 2}",
        )
    if warmup < 0.0 or final < 0.0 or warmup + final > 1.0:
        raise LuthierError(
            f"a warm-up of {warmup:g} and a final phase of {final:g} are no shares of one run",
            where="adalora: warmup, final",
            fix="use shares from 0 to 1 that sum to at most 1",
        )
    for name, value in betas.items():
        if not 0.0 < value < 1.0:
            raise LuthierError(f"{name} is {value}", where=f"adalora: {name}", fix="use more than 0 and less than 1")
