"""Looking at the model on a few rows before it trains: what its linear maps read, and what full gradients would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier import logprobs
from luthier.errors import LuthierError
from luthier.kinds import Batch, Place
from luthier.training.forward import hidden
from luthier.tune import Tune


def inputs(tune: Tune, batches: Sequence[Batch], places: Sequence[Place], take: Callable[[Place, Tensor], None]) -> None:
    """Run the model on batches and hand over what each linear map reads: `take(place, x_NI)`, without padding.

    Raises:
        LuthierError: the model is spread over several processes.
    """
    _refuse_spread(tune)
    read: dict[str, list[Place]] = {}
    for place in places:
        read.setdefault(place.module, []).append(place)
    attend_BT = torch.ones(0, 0, dtype=torch.bool)

    def hook(name: str) -> Callable[..., None]:
        def look(module: Any, arguments: tuple[Any, ...]) -> None:
            # A prompt stands before the rows.
            x_BTI = arguments[0][:, -attend_BT.shape[1] :]
            for place in read[name]:
                take(place, x_BTI[attend_BT])

        return look

    handles = [tune.model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in read]
    try:
        with quiet(tune.model), torch.no_grad():
            for batch in batches:
                attend_BT = batch.attend_BT
                hidden(tune, batch)
    finally:
        for handle in handles:
            handle.remove()


def gradients(
    tune: Tune,
    batches: Sequence[Batch],
    places: Sequence[Place],
    moved: Mapping[Place, Tensor],
    nll: Callable[[Tensor, Tensor], Tensor],
) -> dict[Place, Tensor]:
    """Dense gradients of the mean cross-entropy over the batches' targets; nothing of the run notices.

    Args:
        tune: the model, with what is attached to it.
        batches: rows with targets.
        places: of which gradients are wanted.
        moved: changes of weights to look from, by place; afterwards the weights are as before, bit for bit.
        nll: negative log-likelihood of labels [N] under the head, for hidden states [N, D].

    Raises:
        LuthierError: the rows have no target, the model is spread, or its weights are quantized.
    """
    _refuse_spread(tune)
    targets = sum(batch.supervised for batch in batches)
    if not targets:
        raise LuthierError("the rows for calibration have no targets", mend="use rows with answers")
    names = list(dict.fromkeys(place.parameter for place in places))
    values = {name: tune.model.get_parameter(name) for name in names}
    fixed = next((name for name, one in values.items() if not one.is_floating_point()), None)
    if fixed is not None:
        raise LuthierError("quantized weights have no gradient", where=fixed, mend="load the model without quantization")
    trains = {name: one.requires_grad for name, one in values.items()}
    sums: dict[str, Tensor] = {}
    try:
        for one in values.values():
            one.requires_grad_(True)
        with quiet(tune.model), _moved(tune, moved):
            for batch in batches:
                where = logprobs.targets(batch)
                states_ND = hidden(tune, batch).at(where.row_N, where.source_N)
                loss = nll(states_ND, where.label_N).sum() / targets
                # Not `backward`: gradients of the run's own numbers must not arrive there.
                found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                        sums[name] = sums[name] + wide if name in sums else wide
    finally:
        for name, one in values.items():
            one.requires_grad_(trains[name])
    return {place: _of_place(tune, place, sums.get(place.parameter)) for place in places}


def _of_place(tune: Tune, place: Place, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise LuthierError("no gradient reaches this place", where=str(place), mend="leave this role out")
    turned = gradient.t() if place.module in tune.parts.transposed and gradient.ndim == 2 else gradient
    return turned[place.start : place.stop]


@contextmanager
def _moved(tune: Tune, moved: Mapping[Place, Tensor]) -> Iterator[None]:
    before = {place: tune.region(place).clone() for place in moved}
    try:
        for place, change in moved.items():
            values = tune.region(place)
            values.copy_(values.to(torch.promote_types(values.dtype, change.dtype)) + change)
        yield
    finally:
        for place, values in before.items():
            tune.region(place).copy_(values)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _refuse_spread(tune: Tune) -> None:
    if tune.root is not None:
        raise LuthierError(
            "calibration needs whole weights, and this model is spread over processes",
            where="train.sharding",
            mend="use train.sharding: none",
        )
