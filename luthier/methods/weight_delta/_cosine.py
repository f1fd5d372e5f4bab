"""A cosine transform, sparse spectra whose entries stand at locations between 0 and 1, and the gradients of both.

In tensor names K counts the entries of one spectrum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HIGHEST = 0.999
"""Locations are clamped to 0 to this, as in the authors' code; from 502 rows or columns on it leaves the last ones out of reach."""
GRAIN = 1 << 24
"""Locations begin at whole multiples of one part in this many: fp32 holds them exactly, and whole numbers are never cast."""


def cosine_basis(size: int, like: Tensor) -> Tensor:
    """The orthonormal cosine transform (DCT-II), [size, size]: C[k, n] = c_k cos(pi (2n + 1) k / 2 size)."""
    step = torch.arange(size, device=like.device)
    # Whole turns are taken off as whole numbers: in fp32 the angles of large matrices would be off.
    angle_SS = (2 * step + 1) * step[:, None] % (4 * size)
    basis: Tensor = torch.cos(angle_SS.to(like.dtype) * (torch.pi / (2 * size))) * (2 / size) ** 0.5
    basis[0] = (1 / size) ** 0.5
    return basis


def inverse_transform(spectrum_OI: Tensor) -> Tensor:
    """C' S D, the matrix of a spectrum. Its gradient's transform, C G D', is the spectrum's gradient."""
    values_OI: Tensor = _InverseTransform.apply(spectrum_OI)  # type: ignore[no-untyped-call]
    return values_OI


class _InverseTransform(torch.autograd.Function):
    """The bases are made again in the backward pass: kept, they would take more memory than the change itself."""

    @staticmethod
    def forward(ctx: Any, spectrum_OI: Tensor) -> Tensor:
        rows_OO, columns_II = (cosine_basis(size, spectrum_OI) for size in spectrum_OI.shape)
        return rows_OO.T @ spectrum_OI @ columns_II

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient_OI,) = gradients
        rows_OO, columns_II = (cosine_basis(size, gradient_OI) for size in gradient_OI.shape)
        return rows_OO @ gradient_OI @ columns_II.T


def located(begin_K: Tensor, moved_K: Tensor) -> Tensor:
    """u, normalized rows or columns: where they began, in parts of `GRAIN`, and how far they moved, in fp32 or wider."""
    return begin_K.to(moved_K.dtype) / GRAIN + moved_K


def cells(location_K: Tensor, size: int) -> Tensor:
    """The rows or columns at which locations from 0 to 1 stand: rounded, half to even."""
    at_K: Tensor = location_K.clamp(0.0, HIGHEST) * (size - 1)
    return at_K.round().long()


def scatter(coefficient_K: Tensor, row_K: Tensor, column_K: Tensor, height: int, width: int) -> Tensor:
    """S, [height, width]: zero but for the coefficients at their locations, where those that meet add up.

    The gradient of a coefficient is exact; that of a location is the central difference of the loss, see `location_gradients`.
    """
    spectrum: Tensor = _Scatter.apply(coefficient_K, row_K, column_K, height, width)  # type: ignore[no-untyped-call]
    return spectrum


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficient_K: Tensor, row_K: Tensor, column_K: Tensor, height: int, width: int) -> Tensor:
        ctx.save_for_backward(coefficient_K, row_K, column_K)
        spectrum_OI = coefficient_K.new_zeros(height, width)
        return spectrum_OI.index_put_((cells(row_K, height), cells(column_K, width)), coefficient_K, accumulate=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_OI,) = gradients
        coefficient_K, row_K, column_K = ctx.saved_tensors
        height, width = gradient_OI.shape
        wants_coefficients, wants_rows, wants_columns = ctx.needs_input_grad[:3]
        of_coefficients = gradient_OI[cells(row_K, height), cells(column_K, width)] if wants_coefficients else None
        if not (wants_rows or wants_columns):
            return of_coefficients, None, None, None, None
        return of_coefficients, *location_gradients(gradient_OI, coefficient_K, row_K, column_K), None, None


def location_gradients(gradient_OI: Tensor, coefficient_K: Tensor, row_K: Tensor, column_K: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of normalized rows and columns: half the loss's difference between the two neighbors, for each cell.

    Args:
        gradient_OI: Z, the gradient of the spectrum; a neighbor outside it is the cell itself.
        coefficient_K: a.
        row_K: normalized rows; outside 0 to 0.999 their gradient is 0.
        column_K: normalized columns, likewise.
    """
    height, width = gradient_OI.shape
    cell_row_K, cell_column_K = cells(row_K, height), cells(column_K, width)
    below_K, above_K = (cell_row_K + 1).clamp(max=height - 1), (cell_row_K - 1).clamp(min=0)
    right_K, left_K = (cell_column_K + 1).clamp(max=width - 1), (cell_column_K - 1).clamp(min=0)
    by_row_K = gradient_OI[below_K, cell_column_K] - gradient_OI[above_K, cell_column_K]
    by_column_K = gradient_OI[cell_row_K, right_K] - gradient_OI[cell_row_K, left_K]

    def chained(difference_K: Tensor, location_K: Tensor, size: int) -> Tensor:
        moves_K = (location_K >= 0.0) & (location_K <= HIGHEST)
        return (size - 1) * 0.5 * coefficient_K * difference_K * moves_K

    return chained(by_row_K, row_K, height), chained(by_column_K, column_K, width)


def bounded(gradient_K: Tensor, size: int) -> Tensor:
    """Gradients of locations among `size` rows or columns, each at most 1 a cell: of the whole step, not of the passes it is made of."""
    return gradient_K.clamp(1 - size, size - 1)
