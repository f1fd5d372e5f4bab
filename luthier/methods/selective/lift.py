"""LIFT (Liu et al., 2025): train the entries that are largest in a low-rank approximation of each weight, selected anew now and then."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, Refresh, Select, Selective, Services, State
from luthier.kinds.parts import Parts
from luthier.methods.selective._entries import continued, largest, matrix
from luthier.registry import method


@method(
    title="LIFT",
    paper="arXiv:2506.00772",
    row=23,
    reduces_to="a rank that covers the weight: its entries of largest magnitude; a lora_rank that covers it: full fine-tuning of "
    "the linear maps",
    departs="entries that join later are bias-corrected by their own age, where the authors' code has one step counter for all",
    merges="is in place",
    learning_rate=1e-4,
    replication="lift",
)
def lift(
    *,
    rank: int = 64,
    lora_rank: int = 128,
    every: int = 400,
    svd: Literal["exact", "randomized"] = "exact",
    target_modules: tuple[str, ...] = ("linear",),
) -> Selective:
    """Train the principal entries of each weight; those that leave the selection keep what they learned.

    The paper steps with AdamW at beta2 0.95 and epsilon 1e-6. Moments of entries that stay are kept, those of others start at zero.
    In a model held in bf16, entries that leave keep what bf16 can hold of what they learned.

    Args:
        rank: r, the rank of the approximation W_r that ranks the entries by |W_r|; the paper uses 32 for models of 1B, 64 for 3B
            and 128 for 8B.
        lora_rank: as many entries train as a LoRA of this rank has parameters, (O + I) * rank, or all; 128 as in the paper, about 5%
            of the weights of a 7B model.
        every: steps from one selection to the next; 400 as in the paper's mathematics runs.
        svd: how W_r is found: exactly, or by a randomized range finder (arXiv:0909.4061), which is faster for large weights and
            selects nearly the same.
        target_modules: module types or groups of them of linear maps.
    """
    for name, value in {"rank": rank, "lora_rank": lora_rank, "every": every}.items():
        if value < 1:
            raise LuthierError(f"{name} is {value}", where=f"lift: {name}", fix="use at least 1")

    def principal(place: Place, services: Services) -> Tensor:
        weight_OI = matrix(place, services)
        rng = services.rng(f"lift {place} {services.now.step}")
        found_OI = low_rank(weight_OI, rank) if svd == "exact" else randomized_low_rank(weight_OI, rank, rng)
        return largest(found_OI.abs(), min(sum(weight_OI.shape) * lora_rank, weight_OI.numel()))

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {place: Select("flat", principal(place, services)) for place in parts.select(target_modules=target_modules)}

    def refresh(state: State, services: Services) -> dict[Place, Refresh]:
        taken = services.now.step + 1
        changed: dict[Place, Refresh] = {}
        # After the last step nobody would train a new selection.
        if taken % every or taken >= services.now.steps:
            return changed
        for one in services.trained():
            if one.slot == services.slot and one.place is not None and one.index is not None:
                index = principal(one.place, services)
                changed[one.place] = Refresh(index, continued(one.index, index))
        return changed

    return Selective(choose, refresh=refresh, leave="keep")


def low_rank(weight_OI: Tensor, rank: int) -> Tensor:
    """The closest matrix of a rank: the leading `rank` terms of the singular value decomposition."""
    left_OR, size_R, right_RI = torch.linalg.svd(weight_OI, full_matrices=False)
    found_OI: Tensor = (left_OR[:, :rank] * size_R[:rank]) @ right_RI[:rank]
    return found_OI


def randomized_low_rank(weight_OI: Tensor, rank: int, rng: torch.Generator, rounds: int = 8) -> Tensor:
    """Nearly the closest matrix of a rank: that within the range that 2 * rank random inputs span after some power iterations.

    Singular values of trained weights fall slowly: after 2 iterations half of the selected entries can be others, after 8 a tenth.
    """
    width_in = weight_OI.shape[1]
    probes = min(2 * rank, *weight_OI.shape)
    basis_IP = torch.randn(width_in, probes, generator=rng, dtype=weight_OI.dtype).to(weight_OI.device)
    basis_OP: Tensor = torch.linalg.qr(weight_OI @ basis_IP).Q
    for _ in range(rounds):
        # Orthogonal again after each product: powers of the weight alone would lose the smaller directions to rounding.
        basis_OP = torch.linalg.qr(weight_OI @ torch.linalg.qr(weight_OI.t() @ basis_OP).Q).Q
    return basis_OP @ low_rank(basis_OP.t() @ weight_OI, rank)
