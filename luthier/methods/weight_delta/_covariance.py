"""The directions in which a linear map's inputs lie on some rows, and a weight's components in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Batch, Place, Services
from luthier.methods.weight_delta._starts import Singular, singular, widened

SMALLEST = 1e-12
"""Inputs are never divided by less."""

RESCALES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "magnitude": lambda x_NI: x_NI.abs().max(),
    "maximum": lambda x_NI: x_NI.max().abs(),
    "none": lambda x_NI: x_NI.new_ones(()),
}
"""What the inputs of one row are divided by."""


def single_rows(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Every row as a batch of its own, so that what is divided by a row's largest input does not depend on its neighbors."""
    for batch in batches:
        for i, row_id in enumerate(batch.row_ids):
            one = slice(i, i + 1)
            yield Batch(
                batch.token_ids_BT[one],
                batch.attend_BT[one],
                batch.position_BT[one],
                batch.label_BT[one],
                (row_id,),
                {name: column[one] for name, column in batch.columns.items()},
            )


def covariances(
    services: Services, batches: Sequence[Batch], places: Sequence[Place], size: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The mean over batches of `x_NI.T @ x_NI`, the inputs divided by `size(x_NI)`; by module, in fp32 or wider, not centered.
    Modules that saw no input are missing."""
    # Parts of a fused projection read the same.
    first = {place.module: place for place in reversed(places)}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(first, 0)

    def take(place: Place, x_NI: Tensor) -> None:
        if len(x_NI) == 0:
            return
        x_NI = widened(x_NI)
        x_NI = x_NI / size(x_NI).clamp(min=SMALLEST)
        square_II = x_NI.T @ x_NI
        sums[place.module] = sums[place.module] + square_II if place.module in sums else square_II
        counts[place.module] += 1

    services.inputs(batches, list(first.values()), take)
    return {module: total_II / counts[module] for module, total_II in sums.items()}


def damped(covariance_II: Tensor, damping: float, *, where: str = "") -> tuple[Tensor, Tensor]:
    """A covariance with `damping` times the mean of its diagonal added to the diagonal, and the inverse of that.

    The damping is doubled, 29 times at most, until the inverse is right to 0.05 in the Frobenius norm of their product's distance from
    the identity.

    Raises:
        LuthierError: even a large damping does not help, as with inputs that are all zero.
    """
    identity_II = torch.eye(len(covariance_II), dtype=covariance_II.dtype, device=covariance_II.device)
    mean = covariance_II.diagonal().mean()
    for doubled in range(30):
        metric_II = covariance_II + damping * 2.0**doubled * mean * identity_II
        inverse_II, failed = torch.linalg.inv_ex(metric_II)
        if not failed and float((metric_II @ inverse_II - identity_II).norm()) < 0.05:
            return metric_II, inverse_II
    raise LuthierError(
        "the covariance of the inputs cannot be inverted", where=f"corda: {where}", fix="use more calibration_rows, or other ones"
    )


def oriented(weight_OI: Tensor, metric_II: Tensor, inverse_II: Tensor) -> Singular:
    """The components of a weight in the order of their weight for a context: those of `weight @ metric`, with the metric undone on the
    side of the input. They sum to the weight; the right vectors are not orthonormal."""
    left_OK, size_K, right_KI = singular(weight_OI @ metric_II)
    return Singular(left_OK, size_K, right_KI @ inverse_II)
