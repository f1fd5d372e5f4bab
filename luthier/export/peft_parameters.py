"""How PEFT's LoRA holds what is added to parameters of modules that are no linear maps: `target_parameters`.

Factors of a stack of E matrices are two matrices: lora_A [E R, I] has those of one expert behind those of another, lora_B [O, R E] has
the experts' columns in turn. Where several parameters of one module are meant, PEFT wraps the module once for each, in its own order:
the last of them stands outermost.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kinds import Place
from luthier.kinds.parts import Parts
from luthier.models.experts import is_linear, stores_inputs_first

INNER = ".base_layer"


def is_wrapped(model: nn.Module, place: Place) -> bool:
    """Whether PEFT reaches a place as a parameter, and not as a linear map."""
    return not is_linear(model.get_submodule(place.module))


def nested(model: nn.Module, place: Place, tensors: Collection[str]) -> str:
    """What stands between a module's name and its factors, where the module's `tensors` are wrapped."""
    order = [name for name, _ in model.get_submodule(place.module).named_parameters(recurse=False) if name in tensors]
    return INNER * (len(order) - 1 - order.index(place.tensor))


def place_of(model: nn.Module, parts: Parts, name: str, targets: Sequence[str]) -> Place | None:
    """The parameter whose factors go by a name; None where no `target_parameters` are at that module."""
    module = name.replace(INNER, "")
    depth = (len(name) - len(module)) // len(INNER)
    here = [place for place in parts.places if place.module == module and _meant(place.parameter, targets)]
    order = [tensor for tensor, _ in model.get_submodule(module).named_parameters(recurse=False)] if here else []
    here.sort(key=lambda place: order.index(place.tensor))
    return here[len(here) - 1 - depth] if depth < len(here) else None


def _meant(parameter: str, targets: Sequence[str]) -> bool:
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def flat(model: nn.Module, place: Place, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as PEFT stores them: lora_A and lora_B. Those of a single matrix stay as they are."""
    if down.ndim == 2:
        return down, up
    if _turned(model, place):
        down, up = up.mT, down.mT
    return down.reshape(-1, down.shape[-1]), up.permute(1, 2, 0).reshape(up.shape[1], -1)


def stacked(model: nn.Module, place: Place, lora_a: Tensor, lora_b: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
    """Factors down [E, R, I] and up [E, O, R] of what PEFT stores; those of a single matrix stay as they are.

    Raises:
        LuthierError: they do not divide into the experts of the model.
    """
    shape = model.get_parameter(place.parameter).shape
    if len(shape) == 2:
        return lora_a, lora_b
    experts = shape[0]
    if len(lora_a) % experts or lora_b.shape[1] != len(lora_a):
        raise LuthierError(
            f"factors of shape {tuple(lora_b.shape)} and {tuple(lora_a.shape)} are not those of {experts} experts",
            where=f"{folder}: {place.parameter}",
            fix="load the adapter's base",
        )
    down, up = lora_a.reshape(experts, -1, lora_a.shape[1]), lora_b.reshape(len(lora_b), -1, experts).permute(2, 0, 1)
    return (up.mT, down.mT) if _turned(model, place) else (down, up)


def _turned(model: nn.Module, place: Place) -> bool:
    """Whether PEFT takes inputs for outputs, since the module does not say that it stores [E, in, out]."""
    module = model.get_submodule(place.module)
    return stores_inputs_first(module) and getattr(module, "is_transposed", False) is not True
