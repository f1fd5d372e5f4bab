"""SVFit (Sun et al., 2024), section 3: the largest singular values of W train, between singular vectors that stand still."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from luthier.kinds import Place, Services, Tensors, WeightDelta
from luthier.methods.weight_delta._starts import check_positive, check_rank, singular
from luthier.registry import method


@method(
    title="SVFit",
    paper="arXiv:2409.05926",
    row=147,
    departs="trains sigma - S beside the weight, where the paper trains sigma inside a weight without its largest part: the same model, "
    "but the base is kept exactly; and adapts every linear map of a block, where the paper adapts query and value",
    learning_rate=1e-2,
)
def svfit(*, rank: int | None = None, target_modules: tuple[str, ...] = ("linear",)) -> WeightDelta:
    """Train the R largest singular values of each weight, which costs R parameters a linear map.

    The delta is U diag(change) V^T, with U and V the singular vectors that belong to the R largest singular values S, and
    change = sigma - S zero at the start. A singular value may become negative, as in the paper. Being a vector, the change has no weight
    decay: pulling sigma to zero would take the base's weight away.

    Args:
        rank: R; None: all of them, as in the paper for models 768 wide.
        target_modules: where singular values train; module types or groups of them.
    """
    if rank is not None:
        check_positive("svfit", "rank", rank)

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        if rank is not None:
            check_rank("svfit", rank, place, weight_OI)
        left_OR, size_R, right_RI = singular(weight_OI).some(slice(rank))
        return {"right": right_RI, "change": size_R.new_zeros(len(size_R)), "left": left_OR}

    return WeightDelta(start, _apply, _delta, target_modules=target_modules, factors=_factors, frozen=frozenset({"left", "right"}))


def _apply(tensors: Tensors, x: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, tensors["right"]) * tensors["change"], tensors["left"])


def _delta(tensors: Tensors) -> Tensor:
    down_RI, up_OR = _factors(tensors)
    return up_OR @ down_RI


def _factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    return tensors["right"], tensors["left"] * tensors["change"]
