"""The design space of adapters (He et al., 2022, table 1): a small network that changes what a sub-layer of the model returns.

h + s * (f(z W_down + b) W_up + b'), where h is what the sub-layer returns before the residual and z is h (serial) or x, what enters
the sub-layer (parallel). Blocks with one norm for attention and MLP (GPT-J, Phi) give both the same x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from luthier import draws
from luthier.errors import LuthierError
from luthier.kinds import Place, RepresentationEdit, Services, Tensors

FormName = Literal["bottleneck", "linear"]
Insertion = Literal["serial", "parallel"]
Sublayer = Literal["attention", "mlp", "both"]
Init = Literal["lora", "bert"]

Either = TypeVar("Either")


def _entering(entering: Either, returned: Either) -> Either:
    return entering


def _returned(entering: Either, returned: Either) -> Either:
    return returned


def _same(hidden: Tensor) -> Tensor:
    return hidden


FORMS: Mapping[FormName, Callable[[Tensor], Tensor]] = {"bottleneck": functional.relu, "linear": _same}
"""The functional form f: an adapter's ReLU, or LoRA's identity."""

ROLES: Mapping[Sublayer, tuple[str, ...]] = {
    "attention": ("attention_layer",),
    "mlp": ("mlp_layer",),
    "both": ("attention_layer", "mlp_layer"),
}


class Matrices(NamedTuple):
    """The two maps of an adapter."""

    down_RD: Tensor
    up_DR: Tensor


def _like_lora(width: int, width_in: int, width_out: int, rng: torch.Generator) -> Matrices:
    """Kaiming's uniform draw with a = sqrt(5), and zero: nothing is added before the first step."""
    bound = 1.0 / math.sqrt(width_in)
    return Matrices(torch.empty(width, width_in).uniform_(-bound, bound, generator=rng), torch.zeros(width_out, width))


def _like_bert(width: int, width_in: int, width_out: int, rng: torch.Generator) -> Matrices:
    """Normal with a standard deviation of 0.02, both: not the base at the first step."""
    return Matrices(0.02 * torch.randn(width, width_in, generator=rng), 0.02 * torch.randn(width_out, width, generator=rng))


INITS: Mapping[Init, Callable[[int, int, int, torch.Generator], Matrices]] = {"lora": _like_lora, "bert": _like_bert}


def bottleneck(
    *,
    target_modules: tuple[str, ...],
    insertion: Insertion,
    width: int,
    scale: float = 1.0,
    form: FormName = "bottleneck",
    init: Init = "lora",
    dropout: float = 0.0,
) -> RepresentationEdit:
    """An adapter of `width` (the paper's r) at some modules; trains 2 d r + r + d numbers at each.

    Raises:
        LuthierError: a width below 1, a scale of 0, or a dropout that is no probability below 1.
    """
    if width < 1:
        raise LuthierError(f"the width is {width}", where="adapter: width", fix="use at least 1")
    if scale == 0.0:
        raise LuthierError("the scale is 0, so nothing would train", where="adapter: scale", fix="use 1 or more, e.g. 4")
    if not 0.0 <= dropout < 1.0:
        raise LuthierError(f"the dropout is {dropout}", where="adapter: dropout", fix="use 0 to below 1")
    read = _returned if insertion == "serial" else _entering
    activate, draw = FORMS[form], INITS[init]

    def start(place: Place, width_in: int, width_out: int, services: Services) -> Tensors:
        matrices = draw(width, read(width_in, width_out), width_out, services.rng(f"adapter {place}"))
        biases = {"down_bias": torch.zeros(width), "up_bias": torch.zeros(width_out)}
        return {"down": matrices.down_RD, "up": matrices.up_DR, **biases}

    def apply(tensors: Tensors, x: Tensor, y: Tensor) -> Tensor:
        inner = activate(functional.linear(read(x, y), tensors["down"], tensors["down_bias"]))
        return y + scale * functional.linear(draws.dropout(inner, dropout), tensors["up"], tensors["up_bias"])

    return RepresentationEdit(start, apply, target_modules, draws=dropout > 0.0)
