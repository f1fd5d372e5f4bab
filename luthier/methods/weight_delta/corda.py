"""CorDA (Yang et al., 2024), section 3: low-rank factors of W along the directions in which its inputs of some context lie."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Place, Services, Tensors, WeightDelta
from luthier.methods.weight_delta._covariance import RESCALES, covariances, damped, oriented, single_rows
from luthier.methods.weight_delta._starts import check_positive, check_rank, once, widened
from luthier.registry import method


@method(
    title="CorDA",
    paper="arXiv:2406.05223",
    row=54,
    departs="computes W x + s (B A - B0 A0) x with the starting factors B0 and A0 kept, where the paper trains beside W - s B0 A0: the "
    "same model, but the base is kept exactly; what trains is how far B and A are from B0 and A0, so weight decay pulls to the start; "
    "rank 8 where the paper's is 128; rows are divided by their largest magnitude, where the "
    "authors' code takes the largest signed number (`rescale`)",
    learning_rate=3e-4,
    replication="corda",
)
def corda(
    *,
    rank: int = 8,
    alpha: float | None = None,
    mode: Literal["instruction_previewed", "knowledge_preserved"] = "instruction_previewed",
    damping: float = 0.01,
    rescale: Literal["magnitude", "maximum", "none"] = "magnitude",
    calibration_rows: int = 256,
    calibration_source: str = "",
    target_modules: tuple[str, ...] = ("linear",),
) -> WeightDelta:
    """Train low-rank factors of each weight that matter most, or least, for a context, which some rows show.

    With C the covariance of a linear map's inputs, W C = U S V^T; B0 A0 is U S (V^T C^-1) cut to R of the components. The delta
    s (B A - B0 A0) is computed from the changes of the factors, s ((B - B0) A + B0 (A - A0)): the difference of the two products would
    lose in bf16 what was learned.

    Args:
        rank: R, the rank of each pair of factors.
        alpha: the factors are scaled by s = alpha / R; None: R, as in the paper. The start is the same for any alpha.
        mode: which components train: the largest, with rows of the new task, or the smallest, with rows of what the model shall not
            forget; then name these as `calibration_source`.
        damping: times the mean of C's diagonal, this is added to the diagonal; 0.01 as in the authors' code. It is doubled until C can
            be inverted.
        rescale: what a row's inputs are divided by before they count; `maximum` is the authors' code, `none` the paper's text.
        calibration_rows: rows that C is taken from, each in a forward pass of its own; 256 as in the paper.
        calibration_source: where these rows come from; empty: from the run's own rows.
        target_modules: where factors train; module types or groups of them.
    """
    check_positive("corda", "rank", rank)
    check_positive("corda", "calibration_rows", calibration_rows)
    for option, value in {"alpha": alpha, "damping": damping}.items():
        if value is not None and value <= 0.0:
            raise LuthierError(f"the {option} is {value}", where=f"corda: {option}", fix="use more than 0")
    scale = 1.0 if alpha is None else alpha / rank

    def all_covariances(services: Services) -> dict[str, Tensor]:
        batches = list(single_rows(services.batches(calibration_rows, calibration_source)))
        return covariances(services, batches, services.parts.select(target_modules=target_modules), RESCALES[rescale])

    known = once(all_covariances)

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        check_rank("corda", rank, place, weight_OI)
        covariance_II = known(services).get(place.module)
        if covariance_II is None or not covariance_II.isfinite().all():
            raise LuthierError(
                "the calibration rows show no finite input here",
                where=f"corda: {place}",
                fix="use other rows, or leave this role out",
            )
        metric_II, inverse_II = damped(covariance_II, damping, where=str(place))
        count = min(weight_OI.shape)
        chosen = slice(rank) if mode == "instruction_previewed" else slice(count - rank, count)
        left_OR, size_R, right_RI = oriented(widened(weight_OI), metric_II, inverse_II).some(chosen)
        root_R = (size_R / scale).sqrt()
        down_RI, up_OR = root_R[:, None] * right_RI, left_OR * root_R
        still = {"down_start": down_RI, "up_start": up_OR}
        return {**still, "down_change": torch.zeros_like(down_RI), "up_change": torch.zeros_like(up_OR)}

    def apply(tensors: Tensors, x: Tensor) -> Tensor:
        # Scaled where it is narrow.
        change = scale * functional.linear(x, tensors["down_change"])
        whole = scale * functional.linear(x, tensors["down_start"]) + change
        return functional.linear(whole, tensors["up_change"]) + functional.linear(change, tensors["up_start"])

    def delta(tensors: Tensors) -> Tensor:
        down_RI, up_OR = factors(tensors)
        return up_OR @ down_RI

    def factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
        down_RI = torch.cat([tensors["down_start"] + tensors["down_change"], tensors["down_change"]])
        return down_RI, scale * torch.cat([tensors["up_change"], tensors["up_start"]], dim=1)

    return WeightDelta(
        start, apply, delta, target_modules=target_modules, factors=factors, frozen=frozenset({"down_start", "up_start"})
    )
