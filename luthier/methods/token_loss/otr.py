"""One-Token Rollout (Ming et al., 2025): each label is an episode of one token, and a policy gradient is taken on candidates."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Chunk, Column, TokenLoss, View
from luthier.methods.token_loss._rollout import candidates_of, check_temperature
from luthier.registry import method


@method(
    title="One-Token Rollout",
    paper="arXiv:2509.26313",
    row=0,
    reduces_to="many candidates: otr_expected; at temperature 1 also DFT's gradient times 1 - beta",
    departs="no code of the authors was found: `beta` and `temperature` are what is told of the paper",
    replication="otr",
)
def otr(*, beta: float = -0.1, temperature: float = 1.3, candidates: int = 256) -> TokenLoss:
    """Reward tokens that the model itself proposes: 1 for the label, `beta` for any other.

    The candidates are drawn anew in every step, by row and position. A label that the model hardly ever proposes is not learned: the
    log has the share of candidates that hit it. With a negative `beta` the loss can be negative and has no lower bound; judge a run
    by the plain cross-entropy beside it.

    Args:
        beta: the reward of a candidate that is not the label; 1 would leave no signal.
        temperature: divides the logits that candidates are drawn from; the log-probabilities that are learned stay untempered.
        candidates: how many are drawn for each label; 256 in the paper.

    Raises:
        LuthierError: `temperature` or `candidates` is out of range.
    """
    check_temperature("otr", temperature)
    if candidates < 1:
        raise LuthierError(f"`candidates` is {candidates}", where="otr: candidates", fix="use 1 or more, e.g. 256")
    loss, hits = columns(beta, temperature, candidates)

    def mean_reward(view: View) -> Tensor:
        view.note("hit rate", view[hits.name])
        return view[loss.name]

    return TokenLoss(mean_reward, (loss, hits))


@cache
def columns(beta: float, temperature: float, candidates: int) -> tuple[Column, Column]:
    """The loss of each label, and the share of its candidates that hit it; the same columns wherever the options are the same."""

    def hit(chunk: Chunk) -> Tensor:
        return (candidates_of(chunk, temperature, candidates) == chunk.label_C[:, None]).to(chunk.logits_CV.dtype)

    def loss(chunk: Chunk) -> Tensor:
        reward_CK = beta + (1.0 - beta) * hit(chunk)
        return -(reward_CK * chunk.log_probabilities.gather(1, candidates_of(chunk, temperature, candidates))).mean(1)

    name = f"otr: beta {beta}, temperature {temperature}, {candidates} candidates"
    return Column(name, loss), Column(f"{name}, hits", lambda chunk: hit(chunk).mean(1), gradient=False)
