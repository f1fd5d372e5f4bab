"""NEFTune (Jain et al., 2023), algorithm 1: uniform noise on the embeddings that the model reads while it learns."""

from __future__ import annotations

from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError
from luthier.kinds import Batch, InputMap, Reading
from luthier.registry import method


@method(
    title="NEFTune",
    paper="arXiv:2310.05914",
    reduces_to="alpha 0: the same run without it",
    departs="L is the row's own length, where common implementations take that of the padded batch; virtual tokens get no noise",
)
def neftune(*, alpha: float = 5.0) -> InputMap:
    """Add uniform noise to the embeddings in training, so that the model clings less to the wording of its rows.

    Each number of an embedding gets alpha / sqrt(L D) times a draw from (-1, 1), with L the row's tokens and D the width, so that the
    noise of a whole row is about alpha / sqrt(3) long. Evaluation reads embeddings without noise. The paper finds longer
    answers.

    Args:
        alpha: how strong the noise is; the paper tries 5, 10 and 15.

    Raises:
        LuthierError: alpha is below 0.
    """
    if not 0.0 <= alpha < float("inf"):
        raise LuthierError(f"`alpha` is {alpha}", where="neftune: alpha", fix="use 0 or more; the paper has 5, 10 and 15")

    def embed(embeds_BTD: Tensor, batch: Batch, reading: Reading) -> Tensor:
        width = embeds_BTD.shape[-1]
        length_B = batch.own_tokens().sum(1).clamp(min=1)
        size_B11 = alpha / machine.widest(length_B * width).sqrt()[:, None, None]
        noise_BTD = (2.0 * reading.uniform_BTD(0, width) - 1.0) * size_B11
        return embeds_BTD + noise_BTD.to(embeds_BTD.dtype)

    return InputMap(embed=embed)
