"""Looking at the model on a few rows before it trains: what its linear maps read, what its blocks give, and what full gradients would
be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.columns.targets import find_targets
from luthier.errors import LuthierError
from luthier.kinds import Batch, Place
from luthier.models.modes import quiet
from luthier.models.quantized import QuantizedLinear, holder, quantized
from luthier.tune import Tune
from luthier.tune.forward import hidden


def inputs(tune: Tune, batches: Sequence[Batch], places: Sequence[Place], take: Callable[[Place, Tensor], None]) -> None:
    """Run the model on batches and hand over what each linear map reads: `take(place, x_NI)`, without padding.

    Raises:
        LuthierError: the model is spread over several processes.
    """
    _refuse_spread(tune)
    read: dict[str, list[Place]] = {}
    for place in places:
        read.setdefault(place.module, []).append(place)
    attend_BT: Tensor

    def hook(name: str) -> Callable[..., None]:
        def look(module: Any, arguments: tuple[Any, ...]) -> None:
            # Some models flatten batches (OPT), and a prompt stands before the rows.
            x_BTI = arguments[0].reshape(len(attend_BT), -1, arguments[0].shape[-1])[:, -attend_BT.shape[1] :]
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


def block_outputs(tune: Tune, batches: Sequence[Batch], take: Callable[[int, Tensor, Tensor], None]) -> None:
    """Run the model on batches and hand over what each block gives: `take(block, hidden_BTD, own_BT)`.

    Raises:
        LuthierError: the model is spread over several processes, or its blocks cannot be reached.
    """
    _refuse_spread(tune)
    with quiet(tune.model), torch.no_grad():
        for batch in batches:
            own_BT = batch.own_tokens()

            def look(block: int, hidden_BTD: Tensor, own_BT: Tensor = own_BT) -> Tensor:
                take(block, hidden_BTD, own_BT)
                return hidden_BTD

            hidden(tune, batch, blocks=look)


def gradients(
    tune: Tune,
    batches: Sequence[Batch],
    places: Sequence[Place],
    moved: Mapping[Place, Tensor],
    nll: Callable[[Tensor, Tensor], Tensor],
) -> dict[Place, Tensor]:
    """Dense gradients of the mean cross-entropy over the batches' labels; nothing of the run notices.

    Args:
        tune: the model, with what is attached to it.
        batches: rows with labels.
        places: of which gradients are wanted.
        moved: changes of weights to look from, by place, added to the numbers that optimizers hold. The model runs in fp32 or wider
            meanwhile, unless it is quantized: a step that is rounded away would not be looked from. Afterwards the weights are as
            before, bit for bit.
        nll: negative log-likelihood of labels [N] under the head, for hidden states [N, D].

    Raises:
        LuthierError: the rows have no target, or the model is spread.
    """
    _refuse_spread(tune)
    targets = sum(batch.supervised for batch in batches)
    if not targets:
        raise LuthierError("the rows for calibration have no labels", fix="use rows with answers")
    names = list(dict.fromkeys(place.parameter for place in places))
    sums: dict[str, Tensor] = {}
    with _beside(tune, {*names, *(place.parameter for place in moved)}) as beside, _moved(tune, moved, beside):
        values = [beside[name] if name in beside else tune.model.get_parameter(name) for name in names]
        with _wanting(values), quiet(tune.model):
            for batch in batches:
                where = find_targets(batch)
                states_ND = hidden(tune, batch).at(where.row_N, where.source_N)
                loss = nll(states_ND, where.label_N).sum() / targets
                # Not `backward`: gradients of the run's own numbers must not arrive there.
                found = torch.autograd.grad(loss, values, allow_unused=True)
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                        sums[name] = sums[name] + wide if name in sums else wide
    return {place: _of_place(tune, place, sums.get(place.parameter)) for place in places}


@contextmanager
def _wanting(values: Sequence[Tensor]) -> Iterator[None]:
    """Let autograd follow some tensors."""
    trains = [one.requires_grad for one in values]
    try:
        for one in values:
            one.requires_grad_(True)
        yield
    finally:
        for one, before in zip(values, trains, strict=True):
            one.requires_grad_(before)


@contextmanager
def _beside(tune: Tune, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """A change of zero beside each quantized weight among the parameters, stored as the weight would be.

    It has the gradient that the weight would have, and takes the changes that the weight cannot.
    """
    held = {name: found for name in names if (found := holder(tune.model, name)) is not None}
    like = next(tune.model.parameters())
    changes = {name: torch.zeros(one.shape, dtype=like.dtype, device=like.device) for name, one in held.items()}
    # The change is of the weight: whatever edits the output comes after it.
    handles = [held[name].register_forward_hook(_adding(change), prepend=True) for name, change in changes.items()]
    try:
        yield changes
    finally:
        for handle in handles:
            handle.remove()


def _adding(change: Tensor) -> Callable[[QuantizedLinear, tuple[Tensor, ...], Tensor], Tensor]:
    def add(module: QuantizedLinear, arguments: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y + functional.linear(arguments[0], change.t() if module.transposed else change)

    return add


def _of_place(tune: Tune, place: Place, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise LuthierError("no gradient reaches this place", where=str(place), fix="leave this role out")
    return tune.parts.outputs(place, gradient)


@contextmanager
def _moved(tune: Tune, moved: Mapping[Place, Tensor], beside: Mapping[str, Tensor]) -> Iterator[None]:
    if not moved:
        yield
        return
    own = {place.parameter for place in moved if place.parameter not in beside}
    narrow = bool(quantized(tune.model))
    new = {}
    for name, parameter in tune.model.named_parameters():
        if name in own or (parameter.dtype != torch.promote_types(parameter.dtype, torch.float32) and not narrow):
            values = parameter.clone() if narrow else tune.widened(name)
            new[parameter] = nn.Parameter(values, requires_grad=False)
    with _exchanged(tune.model, new):
        for place, change in moved.items():
            values = tune.parts.outputs(place, beside[place.parameter]) if place.parameter in beside else tune.region(place)
            values.copy_(values.to(torch.promote_types(values.dtype, change.dtype)) + change)
        yield


@contextmanager
def _exchanged(model: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Let other parameters stand for some of the model's, wherever these are used."""
    before = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter in new
    ]
    try:
        for module, name, parameter in before:
            setattr(module, name, new[parameter])
        yield
    finally:
        for module, name, parameter in before:
            setattr(module, name, parameter)


def _refuse_spread(tune: Tune) -> None:
    if tune.root is not None:
        raise LuthierError(
            "calibration needs whole weights, and this model is spread over processes",
            where="train.sharding",
            fix="use train.sharding: none",
        )
