"""One-Token Rollout (Ming et al., 2025) in closed form: the expectation over its candidates, which the softmax already holds."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from luthier.kinds import Chunk, Column, TokenLoss, View
from luthier.methods.token_loss._rollout import check_temperature, policy
from luthier.registry import method


@method(
    title="One-Token Rollout, expected",
    paper="arXiv:2509.26313",
    row=0,
    reduces_to="temperature 1 and beta 0: DFT's gradient",
    departs="the paper draws candidates; this is their expectation, without the noise",
    replication="otr",
)
def otr_expected(*, beta: float = -0.1, temperature: float = 1.3) -> TokenLoss:
    """Reward the label with 1 and all other tokens with `beta`, each by its chance of being proposed.

    With q the model's distribution at `temperature`, held fixed, the loss is
    `-((1 - beta) q(label) log p(label) + beta sum_a q(a) log p(a))`. At temperature 1 its gradient is DFT's times `1 - beta`; above
    1 a negative `beta` also sharpens the distribution. The loss can be negative.

    Args:
        beta: the reward of a token that is not the label; -0.1 as in `otr`.
        temperature: divides the logits behind q alone; 1.3 as in `otr`.

    Raises:
        LuthierError: `temperature` is out of range.
    """
    check_temperature("otr_expected", temperature)
    loss, hits = columns(beta, temperature)

    def mean_reward(view: View) -> Tensor:
        view.note("hit rate", view[hits.name])
        return view[loss.name]

    return TokenLoss(mean_reward, (loss, hits))


@cache
def columns(beta: float, temperature: float) -> tuple[Column, Column]:
    """The loss of each label, and its chance of being proposed; the same columns wherever the options are the same."""

    name = f"otr expected: beta {beta}, temperature {temperature}"

    def rewarded(chunk: Chunk) -> Tensor:
        """Each token's chance of being proposed, times its reward; the label's is 1."""
        label_C1 = chunk.label_C[:, None]

        def make() -> Tensor:
            chance_CV = policy(chunk, temperature)
            hit_C1 = chance_CV.gather(1, label_C1)
            return chance_CV.mul_(beta).scatter_(1, label_C1, hit_C1)

        return chunk.once(name, make)

    def loss(chunk: Chunk) -> Tensor:
        return -(rewarded(chunk) * chunk.log_probabilities).sum(1)

    def hits(chunk: Chunk) -> Tensor:
        return rewarded(chunk).gather(1, chunk.label_C[:, None])[:, 0]

    return Column(name, loss), Column(f"{name}, hits", hits, gradient=False)
