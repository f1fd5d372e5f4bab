"""Intruder dimensions (Shuttleworth, Andreas, Torralba and Sharma, 2024), algorithm 1, and the repair of scaling them."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier import machine
from luthier.delta.weights import effective_rank, summed
from luthier.errors import LuthierError
from luthier.kinds import Comparison, Drawing, Finding, Line, Place, Probe
from luthier.kinds.parts import expand_roles
from luthier.registry import method

STEPS = 20
"""Steps of the curve over epsilon, from 0 to 1."""


class Spectrum(NamedTuple):
    """The K largest singular values of a tuned matrix, descending, with their directions."""

    value_K: Tensor
    similarity_K: Tensor
    """The largest |cosine| with any left singular vector of the base. In fp64, as thresholds are."""
    left_OK: Tensor
    right_KI: Tensor


@method(
    title="Intruder dimensions",
    paper="arXiv:2410.21228",
    row=24,
    departs="compares |cosine| with epsilon as the authors' script does; the pseudo-code leaves out the absolute value",
    replication="lora",
)
def intruder_dimensions(
    *, k: int = 10, epsilon: float = 0.5, target_modules: tuple[str, ...] = ("linear",), blocks: tuple[int, ...] = ()
) -> Probe:
    """Count the new directions that tuning put among each weight's strongest, unlike every direction of the base.

    A left (output side) singular vector of the tuned weight is an intruder when it belongs to one of the k largest singular
    values and its cosine with every left singular vector of the base is below epsilon. Where singular values nearly coincide, as
    far down a spectrum, vectors turn freely among themselves and may count falsely: keep k small. Fused projections are
    compared part by part. Embedding and head are compared only where `target_modules` names them, as stored, [V, D]; tied ones once, as
    the embedding.

    Args:
        k: how many of the largest singular values count; the paper's 10.
        epsilon: the cosine below which a direction is new; the paper's 0.5.
        target_modules: which weights are compared; module types or groups of them.
        blocks: which blocks, from 0; empty for everything.
    """
    _check(k, epsilon)
    wanted = expand_roles(target_modules)

    def look(comparison: Comparison) -> Finding:
        places = comparison.parts.select(wanted, blocks or None)
        found: dict[Place, Spectrum] = {}
        ranks: dict[Place, float] = {}
        left_out = []
        for place in comparison.changed:
            change = comparison.change(place)
            if change.ndim == 2 and place in places:
                found[place] = spectrum(comparison.base(place), comparison.tuned(place), k)
                ranks[place] = effective_rank(change)
            else:
                left_out.append(place.role)
        return _finding(found, ranks, k, epsilon, left_out)

    return Probe(look)


def spectrum(base_OI: Tensor, tuned_OI: Tensor, k: int) -> Spectrum:
    """The k largest singular values of the tuned weight, compared with all left singular vectors of the base; fp32 or wider."""
    wide = torch.promote_types(tuned_OI.dtype, torch.float32)
    known_OR = torch.linalg.svd(base_OI.to(wide), full_matrices=False).U
    left_OR, value_R, right_RI = torch.linalg.svd(tuned_OI.to(wide), full_matrices=False)
    left_OK = left_OR[:, :k]
    return Spectrum(value_R[:k], machine.widest((known_OR.T @ left_OK).abs().amax(0)), left_OK, right_RI[:k])


def repaired(base_OI: Tensor, tuned_OI: Tensor, strength: float, *, k: int = 10, epsilon: float = 0.5) -> Tensor:
    """The tuned weight with its intruders scaled: W1 + (strength - 1) sum_j s_j u_j v_j' over the intruders j; fp32 or wider.

    Args:
        base_OI: W0.
        tuned_OI: W1.
        strength: 1 leaves the weight as it is, 0 takes the intruders out, between shrinks them, above 1 amplifies.
        k: as for the probe.
        epsilon: as for the probe.

    Raises:
        LuthierError: k or epsilon is out of range.
    """
    _check(k, epsilon)
    top = spectrum(base_OI, tuned_OI, k)
    new_K = top.similarity_K < epsilon
    left_OK, right_KI = top.left_OK[:, new_K], top.right_KI[new_K]
    return tuned_OI.to(left_OK.dtype) + (strength - 1.0) * (left_OK * top.value_K[new_K]) @ right_KI


def _check(k: int, epsilon: float) -> None:
    if k < 1:
        raise LuthierError(f"k is {k}", where="intruder_dimensions: k", fix="use at least 1")
    if not 0.0 < epsilon <= 1.0:
        raise LuthierError(f"epsilon is {epsilon}", where="intruder_dimensions: epsilon", fix="use more than 0 and at most 1")


def _finding(found: dict[Place, Spectrum], ranks: dict[Place, float], k: int, epsilon: float, left_out: list[str]) -> Finding:
    similarity = torch.cat([one.similarity_K.cpu() for one in found.values()]) if found else torch.zeros(0)
    intruders = [row for place, one in found.items() for row in _intruders(place, one, epsilon)]
    rows = [_row(place, one, ranks[place], epsilon) for place, one in found.items()]
    hit = sum(row["intruders"] > 0 for row in rows)
    roles = summed(rows, "role", "intruders")
    sentence = "No changed matrix was compared: nothing is known of intruder dimensions."
    if rows:
        counted = f"{len(intruders) or 'No'} intruder dimension{'' if len(intruders) == 1 else 's'}"
        among = f"{hit} of {len(rows)}" if hit else f"{len(rows)}"
        sentence = f"{counted} in {among} changed matri{'x' if len(rows) == 1 else 'ces'} (k = {k}, epsilon = {epsilon:g})."
    numbers = {"intruders": len(intruders), "matrices": len(rows), "matrices_with_intruders": hit}
    if rows:
        numbers |= {"intruders_per_matrix": len(intruders) / len(rows), "effective_rank": sum(ranks.values()) / len(rows)}
    thresholds = [step / STEPS for step in range(STEPS + 1)]
    curve = [(threshold, float((similarity < threshold).sum())) for threshold in thresholds]
    left = ", ".join(f"{count} {role}" for role, count in Counter(left_out).items())
    return Finding(
        sentence,
        numbers,
        rows,
        {"by role": roles, "by block": summed(rows, "block", "intruders"), "intruders": intruders},
        Drawing(f"Intruder dimensions by threshold, k = {k}", "epsilon", "intruder dimensions", [Line("all matrices", curve)]),
        [f"changed but not compared: {left}"] if left else [],
    )


def _row(place: Place, one: Spectrum, rank: float, epsilon: float) -> dict[str, Any]:
    count, lowest = int((one.similarity_K < epsilon).sum()), float(one.similarity_K.min())
    found = {"intruders": count, "lowest_similarity": lowest, "effective_rank": rank}
    return {"role": place.role, "block": place.block, **found, "matrix": str(place)}


def _intruders(place: Place, one: Spectrum, epsilon: float) -> list[dict[str, Any]]:
    """Every intruder: its position among the singular values, from 0, and its own value."""
    pairs = enumerate(zip(one.value_K.tolist(), one.similarity_K.tolist(), strict=True))
    named = [{"matrix": str(place), "position": j, "singular_value": value, "similarity": c} for j, (value, c) in pairs]
    return [row for row in named if row["similarity"] < epsilon]
