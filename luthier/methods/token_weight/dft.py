"""Dynamic Fine-Tuning (Wu et al., 2025), equation 9: the loss of each label times its own probability."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import TokenWeight, View
from luthier.registry import method


@method(
    title="Dynamic Fine-Tuning",
    paper="arXiv:2508.05629",
    reduces_to="power 0: plain cross-entropy",
    departs="the power is an option; the paper has 1",
    replication="dft",
)
def dft(*, power: float = 1.0) -> TokenWeight:
    """Let each label count as much as the model believes in it, which makes the gradient that of the probability itself.

    What the model thinks impossible is hardly learned: it suits skills, not new facts. The loss that is minimized is small by
    construction (at most 1/e for each label), so judge a run by the plain cross-entropy beside it.

    Args:
        power: of the probability p that weighs a label; 1 in the paper, 0 gives plain cross-entropy.
    """

    def weigh(view: View) -> Tensor:
        return (-power * view["nll"]).exp()

    return TokenWeight(weigh, ("nll",))
