"""Linear maps whose frozen weights are held in 8 or 4 bits; what trains stands beside them.

A weight is dequantized where it is multiplied, in forward and again in backward, so that one weight at a time is there in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from luthier.errors import LuthierError, nearest

if TYPE_CHECKING:
    from luthier.kinds.parts import Parts

BLOCK = 64
"""Numbers that share a scale in nf4, as in the paper."""

NORMAL_FLOATS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NF4: quantiles of the normal distribution, with an exact zero, scaled to reach from -1 to 1 (QLoRA, arXiv:2305.14314, appendix E)."""

_LARGEST = 127


class Scheme(NamedTuple):
    """How numbers become codes and back."""

    name: str
    bits: int
    """Of a code."""
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    """A weight [O, I] to codes and scales."""
    decode: Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
    """Codes and scales to the weight of shape [O, I], in the type of the scales."""


def _encode_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    scale_O = weight_OI.abs().amax(dim=1) / _LARGEST
    # A row of zeros has codes of zero, whatever it is divided by.
    step_O = torch.where(scale_O > 0, scale_O, 1.0)
    return (weight_OI / step_O[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale_O


def _decode_int8(codes_OI: Tensor, scale_O: Tensor, shape: tuple[int, int]) -> Tensor:
    return codes_OI.to(scale_O.dtype) * scale_O[:, None]


def _encode_nf4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    flat = weight_OI.reshape(-1)
    blocks = functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    levels = torch.tensor(NORMAL_FLOATS, dtype=blocks.dtype, device=blocks.device)
    shares = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    # The nearest level is found between the midpoints of neighbors.
    level = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).reshape(-1, 2)
    return (level[:, 0] << 4) | level[:, 1], scales


def _decode_nf4(codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    levels = torch.tensor(NORMAL_FLOATS, dtype=scales.dtype, device=scales.device)
    # Both numbers of a byte are looked up at once, as one complex number: indices of single codes would take four times the memory.
    pairs = torch.complex(levels.repeat_interleave(len(levels)), levels.repeat(len(levels)))
    blocks = torch.view_as_real(pairs.index_select(0, codes.to(torch.int32))).reshape(-1, BLOCK)
    return blocks.mul_(scales[:, None]).reshape(-1)[: shape[0] * shape[1]].reshape(shape)


SCHEMES = {
    scheme.name: scheme for scheme in (Scheme("int8", 8, _encode_int8, _decode_int8), Scheme("nf4", 4, _encode_nf4, _decode_nf4))
}
"""int8: one scale an output row, its largest number / 127. nf4: one scale for 64 numbers in a row of the flattened [O, I], their
largest, two codes a byte, the first in the high bits."""


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, keeping codes for backward instead of the weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scales: Tensor, bias_O: Tensor | None, scheme: str, shape: tuple[int, int]) -> Tensor:
        return functional.linear(x, SCHEMES[scheme].decode(codes, scales, shape).to(x.dtype), bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, codes, scales, _, ctx.scheme, ctx.shape = inputs
        ctx.save_for_backward(codes, scales)
        ctx.save_for_forward(codes, scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        _, _, _, to_bias, _, _ = ctx.needs_input_grad
        to_x = gradient @ _weight(ctx, gradient.dtype)
        return to_x, None, None, gradient.reshape(-1, gradient.shape[-1]).sum(0) if to_bias else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, _, _, bias_O, _, _ = tangents
        y: Tensor = x @ _weight(ctx, x.dtype).t()
        return y if bias_O is None else y + bias_O


def _weight(ctx: Any, dtype: torch.dtype) -> Tensor:
    codes, scales = ctx.saved_tensors
    return SCHEMES[ctx.scheme].decode(codes, scales, ctx.shape).to(dtype)


class QuantizedLinear(nn.Module):
    """A frozen linear map y = x @ weight.T + bias whose weight is held in few bits.

    Args:
        dense: what it stands for; its bias is shared.
        scheme: a name of `SCHEMES`.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, dense: nn.Linear | Conv1D, scheme: str) -> None:
        super().__init__()
        self.transposed = isinstance(dense, Conv1D)
        """The dense weight is stored [I, O]."""
        weight: Tensor = dense.weight.detach()
        weight_OI = weight.t() if self.transposed else weight
        self.scheme = SCHEMES[scheme]
        self.out_features, self.in_features = weight_OI.shape
        codes, scales = self.scheme.encode(weight_OI.to(torch.promote_types(weight.dtype, torch.float32)))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", dense.bias)
        self.train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        """The product in the type of `x`."""
        y: Tensor = _Product.apply(x, self.codes, self.scales, self.bias, self.scheme.name, self._shape)  # type: ignore[no-untyped-call]
        return y

    def dequantized(self) -> Tensor:
        """A copy of the weight [O, I], fp32 or wider."""
        return self.scheme.decode(self.codes, self.scales, self._shape)

    def expanded(self, dtype: torch.dtype) -> nn.Module:
        """The same map with a dense weight of this type, of the class it had before."""
        with torch.device("meta"):
            dense: Any = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=False)
            )
        weight_OI = self.dequantized().to(dtype)
        dense.weight = nn.Parameter(weight_OI.t().contiguous() if self.transposed else weight_OI, requires_grad=False)
        dense.bias = self.bias
        made: nn.Module = dense.train(self.training)
        return made

    @property
    def shape(self) -> torch.Size:
        """Of the dense weight as its class stores it."""
        stored = self._shape[::-1] if self.transposed else self._shape
        return torch.Size(stored)

    @property
    def numbers(self) -> int:
        """How many numbers the weight has."""
        return self.out_features * self.in_features

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.name}"

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # Scales must not lose digits where a model is cast: the numbers of a base do not depend on the type it computes in.
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.codes.device)
        return self


def quantize(model: nn.Module, parts: Parts, scheme: str) -> None:
    """Hold the linear maps inside a model's blocks in few bits, in place, one after the other.

    Routers, tied weights, and modules that are no plain linear maps stay as they are.

    Args:
        model: loaded, with nothing attached.
        parts: its map; it still holds afterwards.
        scheme: `none`, or a name of `SCHEMES`.

    Raises:
        LuthierError: there is no such scheme, or no linear map in the blocks.
    """
    if scheme == "none":
        return
    if scheme not in SCHEMES:
        raise LuthierError(f"there is no quantization `{scheme}`", where="quantize", fix=nearest(scheme, ["none", *SCHEMES]))
    tied = {*parts.ties, *parts.ties.values()}
    places = [
        p for p in parts.places if p.block is not None and p.tensor == "weight" and p.role != "router" and p.module not in tied
    ]
    modules = {name: model.get_submodule(name) for name in dict.fromkeys(place.module for place in places)}
    linear = {name: module for name, module in modules.items() if type(module) in (nn.Linear, Conv1D)}
    if not linear:
        raise LuthierError(
            "no block of this model has a plain linear map to quantize", where=parts.architecture, fix="use quantize: none"
        )
    del modules
    for name in list(linear):
        # What is replaced is freed at once.
        put(model, {name: QuantizedLinear(linear.pop(name), scheme)})  # type: ignore[arg-type]


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized linear maps of a model, by module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def expand(model: nn.Module, dtype: torch.dtype) -> dict[str, QuantizedLinear]:
    """Replace every quantized linear map by a dense one of the same numbers; `put` with what is returned undoes it."""
    found = quantized(model)
    try:
        for name, module in found.items():
            put(model, {name: module.expanded(dtype)})
    except BaseException:
        # Memory may run out in the middle.
        put(model, found)
        raise
    return found


def put(model: nn.Module, modules: dict[str, Any]) -> None:
    """Set submodules by dotted name."""
    for name, module in modules.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, module)


def holder(model: nn.Module, parameter: str) -> QuantizedLinear | None:
    """The quantized linear map whose weight goes by this parameter name; None where the parameter is a dense one."""
    name, _, tensor = parameter.rpartition(".")
    module = model.get_submodule(name)
    return module if isinstance(module, QuantizedLinear) and tensor == "weight" else None


def shape_of(model: nn.Module, parameter: str) -> torch.Size:
    """The shape of a parameter, or of a quantized weight as it would be stored dense."""
    held = holder(model, parameter)
    return model.get_parameter(parameter).shape if held is None else held.shape


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter | QuantizedLinear]]:
    """Every parameter by every name, in the order of the modules; a quantized linear map stands for its weight."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear):
            yield f"{prefix}.weight", module
        yield from module.named_parameters(prefix, recurse=False, remove_duplicate=False)


def count(model: nn.Module) -> int:
    """How many numbers a model has, tied ones once and quantized ones by number, not by byte."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    return dense + sum(module.numbers for module in quantized(model).values())


def described(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """What is quantized in words: a line, or none. `dtype` is the type the model computes in."""
    held = list(quantized(model).values())
    if not held:
        return []
    numbers = sum(module.numbers for module in held)
    took = sum(tensor.nbytes for tensor in code_tensors(model))
    scheme = held[0].scheme
    return [
        f"{numbers:,} numbers of the blocks in {scheme.bits} bits ({scheme.name}), with scales {took / 2**20:,.1f} MiB "
        f"instead of {numbers * dtype.itemsize / 2**20:,.1f}; they are frozen"
    ]


def code_tensors(model: nn.Module) -> list[Tensor]:
    """Codes and scales of all quantized weights."""
    return [tensor for module in quantized(model).values() for tensor in (module.codes, module.scales)]


def refuse_change(model: nn.Module, parameters: Iterable[str], does: str, fix: str) -> None:
    """Refuse what would change a quantized weight.

    Args:
        model: with or without quantized weights.
        parameters: names of what would change.
        does: who would do what, e.g. "`half` trains the model's own weights".
        fix: what to do instead.

    Raises:
        LuthierError: one of the parameters is quantized.
    """
    for name in parameters:
        held = holder(model, name)
        if held is not None:
            raise LuthierError(f"{does}, and this one is frozen in {held.scheme.bits} bits", where=name, fix=fix)
