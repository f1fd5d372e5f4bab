"""Random draws that can be made again: by name, or by the token they are for.

Nothing here keeps a state, so a resumed run, another split into micro-batches and another number of processes draw the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import zip_longest
from math import isnan, pi

import torch
from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError

_MASK = (1 << 63) - 1


def seed_of(*names: object) -> int:
    """A 63-bit seed from names and numbers, equal on every platform."""
    text = "\x1f".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") & _MASK


def seeds_of(names: Iterable[str], device: torch.device | str = "cpu") -> Tensor:
    """A seed for each name, such as a row's id, in int64."""
    return torch.tensor([seed_of(name) for name in names], dtype=torch.int64, device=device)


def names_of(texts: Sequence[str], number_B: Tensor | None = None) -> list[str]:
    """A name for each row from a column that has texts, numbers or both; 3.0 reads 3, and a row that has neither is empty."""
    numbers = [
        "" if isnan(number) else str(number).removesuffix(".0") for number in ([] if number_B is None else number_B.tolist())
    ]
    return [text or number for text, number in zip_longest(texts, numbers, fillvalue="")]


def seeds_of_numbers(number_N: Tensor) -> Tensor:
    """Seeds of the names of numbers, which may repeat."""
    number_U, place_N = number_N.unique(return_inverse=True)
    return seeds_of(names_of((), number_U))[place_N]


def generator(*names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by names and numbers."""
    return torch.Generator(device=device).manual_seed(seed_of(*names))


def _mix(key: Tensor) -> Tensor:
    # torch shifts int64 arithmetically: the sign must be masked off after each shift, or the mean of the draws is off.
    for multiplier, shift in ((-0x61C8864680B583EB, 30), (-0x40A7B892E31B1A47, 27), (-0x6B2FB644ECCEEE15, 31)):
        key = key * multiplier
        key = key ^ ((key >> shift) & ((1 << (64 - shift)) - 1))
    return key


def keys(seed: int, step: int, row_N: Tensor, position_N: Tensor) -> Tensor:
    """One integer for each token, from the seed, the step, its row's number and its position."""
    start = torch.tensor(seed_of(seed, step), dtype=torch.int64, device=row_N.device)
    return _mix(_mix(start ^ row_N) ^ position_N)


def uniform(key_N: Tensor, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) in the device's widest type, one a key; another stream gives independent ones."""
    return _unit(_mix(key_N ^ torch.tensor(seed_of("stream", stream), dtype=torch.int64, device=key_N.device)))


def uniforms(key_N: Tensor, count: int, stream: int = 0) -> Tensor:
    """Several uniform numbers in [0, 1) a key, [N, count]; fewer are the first of more, another stream gives independent ones."""
    start = torch.tensor(seed_of("streams", stream), dtype=torch.int64, device=key_N.device)
    return _unit(_mix(_mix(key_N ^ start)[:, None] ^ torch.arange(count, device=key_N.device)))


def _unit(mixed: Tensor) -> Tensor:
    bits = 53 if machine.has_fp64(mixed.device) else 24
    # As many as the type holds: never rounded up to 1.
    return machine.widest((mixed >> (64 - bits)) & ((1 << bits) - 1)) / float(1 << bits)


def features(key_N: Tensor, width: int) -> Tensor:
    """A key for each of `width` numbers of a token, [..., width], from the token's."""
    return _mix(key_N)[..., None] ^ torch.arange(width, device=key_N.device)


@contextmanager
def drawing(key_N: Tensor | None, name: str, *, told: bool = True) -> Iterator[None]:
    """Inside the block `dropout` draws by these keys, one for each token of the pass; without keys nothing is dropped.

    Args:
        key_N: in the order of the tokens in what the model runs.
        name: of who draws: another name drops other numbers.
        told: who draws said that it would; else `dropout` refuses, since tokens may stand for several rows.
    """
    token = _DRAWING.set(None if key_N is None else (key_N, name, told))
    try:
        yield
    finally:
        _DRAWING.reset(token)


_DRAWING: ContextVar[tuple[Tensor, str, bool] | None] = ContextVar("drawing", default=None)


def dropout(x: Tensor, share: float, stream: int = 0) -> Tensor:
    """Drop numbers of every token while the run trains, and scale the others up by 1 / (1 - share).

    What is dropped follows from the seed, the step, the row and the position: not from the split into micro-batches, the number of
    processes or what was drawn before. Outside of training passes nothing is dropped, whether or not gradients are wanted.

    Args:
        x: one vector for each token of the pass, [..., width].
        share: the probability of dropping a number, 0 to below 1.
        stream: another one drops other numbers.

    Raises:
        LuthierError: `x` does not hold the tokens of the pass, as in an expert; or the technique does not tell that it draws.
    """
    found = _DRAWING.get()
    if not share or found is None:
        return x
    key_N, name, told = found
    if not told:
        raise LuthierError(
            "dropout is drawn for each row, and this technique does not tell that it draws",
            where=name,
            fix="set `draws` in the technique's WeightDelta or RepresentationEdit",
        )
    width = x.shape[-1]
    if x.numel() != len(key_N) * width:
        raise LuthierError(
            f"dropout knows no tokens here: {x.numel() // width} vectors stand for the {len(key_N)} tokens of the rows",
            where=name,
            fix="use a dropout of 0, or leave experts out",
        )
    start_N = _mix(key_N ^ torch.tensor(seed_of("dropout", name, stream), dtype=torch.int64, device=key_N.device)).int()
    # 32 bits a number are enough here, and four times as quick as 64.
    mixed_NI = start_N[:, None] + torch.arange(width, dtype=torch.int32, device=key_N.device) * -0x61C88647
    for shift, multiplier in ((16, 0x7FEB352D), (15, -0x7B935975), (16, 1)):
        mixed_NI = (mixed_NI ^ ((mixed_NI >> shift) & ((1 << (32 - shift)) - 1))) * multiplier
    keep_NI = mixed_NI >= round(share * (1 << 32)) - (1 << 31)
    return x * keep_NI.view(x.shape) * (1.0 / (1.0 - share))


def normal(key_N: Tensor, stream: int = 0) -> Tensor:
    """Standard normal numbers in the device's widest type, one a key; another stream gives independent ones."""
    # One minus what is below one has a logarithm.
    radius = (-2.0 * (1.0 - uniform(key_N, seed_of("radius", stream))).log()).sqrt()
    return radius * (2.0 * pi * uniform(key_N, seed_of("angle", stream))).cos()
