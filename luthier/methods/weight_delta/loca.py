"""LoCA (Du et al., 2025): W = W0 + alpha C' S D, a few coefficients S of a cosine transform whose locations are learned too.

In tensor names K counts the coefficients of one weight, the paper's B.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from luthier import draws
from luthier.errors import LuthierError
from luthier.kinds import Freezing, GradientTransform, Now, Place, Services, State, Tensors, TrainedLike, WeightDelta
from luthier.methods.weight_delta._cosine import GRAIN, bounded, inverse_transform, located, scatter
from luthier.registry import method


@method(
    title="LoCA",
    paper="arXiv:2502.06820",
    row=119,
    reduces_to="search 0: fixed random locations",
    departs="turns are counted in optimizer steps, where the authors' code counts forward passes; each part of a fused projection has "
    "coefficients of its own",
    learning_rate=5e-3,
)
def loca(
    *,
    coefficients: int = 1000,
    alpha: float = 1.0,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] = ("attention_query", "attention_value"),
    search: float = 0.1,
    coefficient_steps: int = 10,
    location_steps: int = 20,
    location_learning_rate_factor: float = 0.02,
) -> tuple[WeightDelta, GradientTransform, Freezing]:
    """Train a few coefficients of each weight's cosine transform, and in the first part of the run where they stand.

    Coefficients and locations take turns; a location moves along the difference of the loss between its two neighbors, which counts as 1
    at most, over the whole step. After the search, locations stand still. One coefficient counts for three trained numbers while its
    location is learned, one afterwards.
    With the paper's turns, a run of up to 100 steps ends its search before the first turn of locations.

    Args:
        coefficients: B, how many coefficients each weight has; those that meet in one cell add up. The paper's 1000.
        alpha: scales the change; the paper's 1.
        dropout: probability of dropping an input feature of the change while training.
        target_modules: where changes are added; the paper's query and value.
        search: share of the run in which locations are learned; the paper's tenth.
        coefficient_steps: B_a, steps of coefficients at the start of every cycle of the search; the paper's 10.
        location_steps: B_l, steps of locations after them; the paper's 20.
        location_learning_rate_factor: multiplies the learning rate for locations; 0.02 makes the authors' 1e-4 of their 5e-3. A location is
            a number from 0 to 1 over all rows or columns.
    """
    _check(coefficients, dropout, search, coefficient_steps, location_steps)
    # Facts of the model: nothing to save.
    shapes: dict[Place | None, tuple[int, ...]] = {}

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        begin_2K = torch.randint(GRAIN, (2, coefficients), generator=services.rng(f"loca {place}"))
        shapes[place] = tuple(weight_OI.shape)
        trained = {name: torch.zeros(coefficients) for name in ("coefficients", "rows", "columns")}
        return {**trained, "begin": begin_2K, "shape": torch.tensor(weight_OI.shape)}

    def delta(tensors: Tensors) -> Tensor:
        height, width = tensors["shape"].tolist()
        begin_row_K, begin_column_K = tensors["begin"]
        row_K, column_K = located(begin_row_K, tensors["rows"]), located(begin_column_K, tensors["columns"])
        return alpha * inverse_transform(scatter(tensors["coefficients"], row_K, column_K, height, width))

    def apply(tensors: Tensors, x: Tensor) -> Tensor:
        return functional.linear(draws.dropout(x, dropout), delta(tensors).to(x.dtype))

    def frozen(trained: TrainedLike, state: State, now: Now) -> bool:
        searching = now.phase((search,)) == 0
        turn_of_locations = searching and now.step % (coefficient_steps + location_steps) >= coefficient_steps
        return turn_of_locations == trained.name.endswith(".coefficients")

    def bound(gradient_K: Tensor, state: State, trained: TrainedLike, now: Now) -> Tensor:
        return bounded(gradient_K, shapes[trained.place][int(trained.name.endswith(".columns"))])

    def is_location(trained: TrainedLike) -> bool:
        return not trained.name.endswith(".coefficients")

    weight_delta = WeightDelta(
        start,
        apply,
        delta,
        target_modules=target_modules,
        rates={"rows": location_learning_rate_factor, "columns": location_learning_rate_factor},
        frozen=frozenset({"begin", "shape"}),
        # In bf16 a location would be off by cells.
        wide=frozenset({"coefficients", "rows", "columns"}),
        draws=dropout > 0.0,
    )
    return weight_delta, GradientTransform(lambda trained: {}, bound, takes=is_location), Freezing(frozen, ends=(search,))


def _check(coefficients: int, dropout: float, search: float, coefficient_steps: int, location_steps: int) -> None:
    for name, value in {
        "coefficients": coefficients,
        "coefficient_steps": coefficient_steps,
        "location_steps": location_steps,
    }.items():
        if value < 1:
            raise LuthierError(f"{name} is {value}", where=f"loca: {name}", fix="use at least 1")
    if not 0.0 <= dropout < 1.0:
        raise LuthierError(f"the dropout is {dropout}", where="loca: dropout", fix="use 0 to below 1")
    if not 0.0 <= search <= 1.0:
        raise LuthierError(f"the search is {search}", where="loca: search", fix="use 0 to 1, a share of the run")
