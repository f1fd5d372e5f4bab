"""LoRA-SB (Ponkshe et al., 2024), section 3: bases and core from the first step that full fine-tuning would take; only the core trains."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, Services, Tensors, WeightDelta
from luthier.methods.weight_delta._frozen_basis import frozen_basis
from luthier.methods.weight_delta._starts import check_positive, check_rank, once, singular, widened
from luthier.registry import method


@method(
    title="LoRA-SB",
    paper="arXiv:2411.19557",
    row=66,
    reduces_to="first_learning_rate 0: the first step starts at the base exactly",
    departs="the first step has the run's own learning rate of step 0, where the authors' code divides by a number of small batches; "
    "the gradient is that of the mean over all calibration labels, where theirs is a sum of means over batches of three rows, and of "
    "plain cross-entropy without dropout, whatever the run minimizes; an exact "
    "singular value decomposition, since the sign's spectrum is too flat for a randomized one",
    step0="on purpose not the base",
    learning_rate=1e-3,
    replication="lora_sb",
)
def lora_sb(
    *,
    rank: int = 16,
    first_learning_rate: float | None = None,
    calibration_rows: int = 50,
    calibration_source: str = "",
    target_modules: tuple[str, ...] = ("linear",),
) -> WeightDelta:
    """Train the R x R matrix between two frozen bases that span the first update of full fine-tuning.

    Adam's first step is -eta sign(G). Its best approximation of rank R, U S V^T, gives the bases U and V^T, which are orthonormal, and
    the core diag(S). So the model starts where that step leads, the core's gradient is the projection U^T G V of the weight's, and
    no scale is left to choose.

    Args:
        rank: R; the paper uses 8 to 24 for encoders and 32 to 96 for language models.
        first_learning_rate: eta; it scales the core's start alone. None: the learning rate of the run's first step.
        calibration_rows: rows that G is taken from; 50, about one in a thousand of the paper's.
        calibration_source: where these rows come from; empty: from the run's own rows.
        target_modules: where deltas are added; module types or groups of them.
    """
    check_positive("lora_sb", "rank", rank)
    check_positive("lora_sb", "calibration_rows", calibration_rows)
    if first_learning_rate is not None and first_learning_rate < 0.0:
        raise LuthierError(f"the first rate is {first_learning_rate}", where="lora_sb: first_learning_rate", fix="use 0 or more")

    def all_gradients(services: Services) -> dict[Place, Tensor]:
        batches = services.batches(calibration_rows, calibration_source)
        return services.gradients(batches, services.parts.select(target_modules=target_modules))

    gradients = once(all_gradients)

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        check_rank("lora_sb", rank, place, weight_OI)
        gradient_OI = gradients(services).get(place)
        if gradient_OI is None or not gradient_OI.any():
            raise LuthierError(
                "no gradient of the calibration rows reaches this weight",
                where=f"lora_sb: {place}",
                fix="use more calibration_rows, or leave this role out",
            )
        rate = services.now.learning_rate if first_learning_rate is None else first_learning_rate
        return first_step(gradient_OI, rate, rank)

    return frozen_basis(start, target_modules)


def first_step(gradient_OI: Tensor, rate: float, rank: int) -> Tensors:
    """The best approximation of `-rate * sign(gradient_OI)` of rank R: `up` [O, R], the diagonal `core` [R, R] and `down` [R, I]."""
    # The rate comes in behind the decomposition: at 0 the bases would be arbitrary.
    up_OR, size_R, down_RI = singular(-widened(gradient_OI).sign()).some(slice(rank))
    return {"down": down_RI, "core": torch.diag(rate * size_R), "up": up_OR}
