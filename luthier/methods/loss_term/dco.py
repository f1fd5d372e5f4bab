"""Direct Coverage Optimization (Chen et al., 2025): train for the chance that one of N samples is the target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from luthier.kinds import LossTerm, Tensors, View
from luthier.methods.loss_term._coverage import check_samples, coverage_factor
from luthier.registry import method


@method(
    title="Direct Coverage Optimization",
    paper="arXiv:2502.07154",
    row=193,
    reduces_to="samples 1: each row's summed cross-entropy",
    departs="the factor in a form that is exact for every probability, where the authors' code has a series for small ones; a row's "
    "losses are summed, which is the gradient of coverage, where their training takes the mean over its tokens (`reduction: mean`), "
    "and to that their learning rate of 2e-5 belongs",
    replication="dco",
)
def dco(*, samples: int = 256, reduction: Literal["sum", "mean"] = "sum") -> LossTerm:
    """Stop learning a row once `samples` answers are likely to hold it, so that confidence does not cost coverage.

    Each row's cross-entropy is multiplied by `F(N, p)`, with p the probability of the whole row, held fixed: the gradient is that of
    `-log(1 - (1 - p)^N)`. F falls from 1 to 0 where p is about 1 / N. The loss is a mean over rows; the log has the mean of F over
    labels. It suits answers without reasoning before them: the probability of a long text is always near 0, and F then 1; see
    `answer_coverage`.

    Args:
        samples: N, as many as will be drawn when the model is used; the paper has 1 to 4,096, and 256 lies amid them.
        reduction: `sum` over a row's labels, which is the exact gradient and grows with the row, or their `mean`, with which the
            authors' code trains. Labels whose token weight is 0 do not count in the mean.

    Raises:
        LuthierError: `samples` is out of range.
    """
    check_samples("dco", samples)

    def total(view: View, own: Tensors) -> Tensor:
        factor_B = coverage_factor(view.sum_rows_wide(view["nll"]), samples)
        view.note("coverage factor", factor_B[view.row_N])
        loss_B = view.sum_rows(view["nll"] * view.weight_N)
        kept_B = view.sum_rows((view.weight_N != 0).to(loss_B.dtype)).clamp(min=1.0)
        divisor_B = {"sum": torch.ones_like(kept_B), "mean": kept_B}[reduction]
        return (factor_B.to(loss_B.dtype) * loss_B / divisor_B).sum()

    return LossTerm(total, unit="row")
