"""What a run will need: memory counted on shapes, time from the speed of this machine's matrix products.

Memory is what stands throughout (weights, masters, moments), what one micro-batch puts on top of it, and on a processor the rest of
the process. The micro-batch is run on shapes alone, so whatever a technique adds to the forward pass is counted as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from luthier import machine
from luthier.columns.chunked import LOGIT_BYTES
from luthier.errors import LuthierError
from luthier.kinds import Batch
from luthier.kinds.parts import Parts
from luthier.models.quantized import code_tensors, count
from luthier.planning.amounts import memory, unit_of
from luthier.training.dryrun import Peak, peak_of
from luthier.training.engine import Engine, idle_batch
from luthier.training.feed import Feed
from luthier.training.loop import Clock
from luthier.training.schedule import constant
from luthier.training.trial import size_of
from luthier.tune.packed import pack

PROCESS_BYTES = 450 * 2**20
"""An interpreter with torch and transformers loaded, where the system does not tell."""

ACTIVATIONS_PER_TOKEN = 60
"""Numbers kept for backward a token and block, in widths of the model, where they cannot be counted on shapes."""

EFFICIENCY = 0.25
"""Share of the speed of one large matrix product that training reaches, seen on processors."""

UNFIT = 0.6
"""Share of a micro-batch's memory that the next one cannot use, since its pieces have other sizes (glibc 2.36)."""

KERNEL_BYTES = 5 * 2**19
"""One product's code and its buffers in oneDNN (Xeon with AMX, torch 2.13)."""

KERNELS_A_SIZE = 12
"""Products of different shape in a block of the Llama kind: four forward, and two backward for each."""

SMALL = 64 * 2**20
"""Bytes of activations, roughly, up to which they are not worth the counting: less than processes differ by."""

FEW = "too few to count"

MOST_ROWS = 16
"""Rows of a micro-batch that are counted one by one: attention takes packed rows in turn, in every block and back, and hundreds of them
took minutes."""

PURPOSES = {
    "weights": "weights",
    "masters": "master weights",
    "optimizer": "optimizer state",
    "kept": "copy of the base",
    "gradients": "gradients",
    "activations": "activations",
    "process": "Python process",
}
"""What the fields of an estimate are called."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose at the peak of training, and seconds of training."""

    weights: int
    masters: int
    """fp32 master weights of trained parameters, and what techniques put beside the weights."""
    optimizer: int
    kept: int
    """Values of the base that something compares with."""
    gradients: int
    activations: int
    """All else that a micro-batch needs at the peak: what autograd keeps, and logits."""
    process: int
    """The process without tensors; 0 on a GPU, whose memory holds none of it."""
    seconds: float
    rough: str = ""
    """Why activations could not be counted; empty where they were."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(getattr(self, name) for name in PURPOSES)

    def described(self) -> str:
        """The purposes, in the unit in which the total is told."""
        unit = unit_of(self.total_bytes)
        amounts = ", ".join(f"{said} {memory(getattr(self, name), unit)}" for name, said in PURPOSES.items() if getattr(self, name))
        return f"{amounts}; activations roughly: {self.rough}" if self.rough else amounts


class Largest(NamedTuple):
    """The largest micro-batch of the run's first epoch."""

    batch: Batch
    targets: int
    later: float
    """Size of the largest micro-batch that is not the first of its step, relative to this one; 0: every step is one micro-batch."""
    sizes: int
    """Different sizes of micro-batches."""


def estimate(
    engine: Engine,
    parts: Parts,
    feed: Feed,
    dtype: torch.dtype,
    *,
    checkpointing: bool,
    process: int | None = None,
) -> Estimate:
    """Estimate peak memory and training time.

    Args:
        engine: what is attached.
        parts: the model's map.
        feed: the rows and steps.
        dtype: the type of weights and computation.
        checkpointing: whether activations are recomputed.
        process: bytes of the process without tensors; none: of this process, which holds the engine's.
    """
    stands = standing(engine)
    if process is None:
        process = process_bytes(feed.device, sum(stands.values()))
    largest = find_largest(feed)
    process += _kernels(largest, feed.device, dtype)
    peak, rough = _guess(engine, parts, largest, dtype, checkpointing=checkpointing), FEW
    if peak.activations > SMALL:
        try:
            peak, rough = _count(engine, largest.batch), ""
        # A row that a technique refuses would stop the run.
        except LuthierError:
            raise
        # Whatever a technique does that has no meaning on shapes: the plan then says that it is rough, and why.
        except Exception as error:
            rough = str(error).strip().splitlines()[0][:80] if str(error).strip() else type(error).__name__
    gradients, activations = _together(peak, largest, feed.device)
    return Estimate(
        **stands,
        gradients=gradients,
        activations=max(activations, _stepping(engine)),
        process=process,
        seconds=_seconds(engine, parts, feed, dtype),
        rough=rough,
    )


def standing(engine: Engine) -> dict[str, int]:
    """Bytes that stand throughout a run, by purpose."""
    trained = engine.tune.trained.values()
    return {
        "weights": held(weight for model in _models(engine) for weight in (*model.parameters(), *code_tensors(model))),
        "masters": held(one.master for one in trained if not one.is_live),
        "optimizer": held(v for states in engine.chain.state.values() for state in states.values() for v in state.values()),
        "kept": held([*engine.tune.altered.values(), *(one.start for one in trained)]),
    }


def _models(engine: Engine) -> list[nn.Module]:
    """The run's own model, and those of others that have weights of their own."""
    return [engine.tune.model, *(one.model for one in engine.tune.others.values() if one.beneath is None)]


def waiting(engine: Engine) -> int:
    """Bytes of all gradients of a step; the widest of them where each is freed as it arrives."""
    sizes = [one.numel * max(4, one.master.element_size()) for one in engine.tune.trained.values()]
    return sum(sizes) if "all" in engine.source.gives else max(sizes)


def held(values: Iterable[Any]) -> int:
    """Bytes of tensors, shared ones once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in values if isinstance(t, Tensor)}.values())


def process_bytes(device: torch.device, tensors: int) -> int:
    """Bytes of this process beside so many of tensors; 0 where the peak is a GPU's."""
    if device.type == "cuda":
        return 0
    resident = machine.resident_bytes()
    return max(0, resident - tensors) if resident else PROCESS_BYTES


def find_largest(feed: Feed) -> Largest:
    """The largest micro-batch among the steps that the run takes of its first epoch."""
    targets = feed.rows.sizes.targets
    steps = [[group for group in groups if group] for groups in feed.epoch(0)[: feed.total()]]
    sizes = [
        (size_of(feed, group), sum(targets[i] for i in group), step, place)
        for step, groups in enumerate(steps)
        for place, group in enumerate(groups)
    ]
    if not sizes:
        return Largest(idle_batch(), 0, 0.0, 0)
    most, labelled, step, place = max(sizes)
    later = max((size for size, _, _, place in sizes if place), default=0)
    return Largest(feed.at(step)[1][place], labelled, later / most, len({size for size, _, _, _ in sizes}))


def _count(engine: Engine, batch: Batch) -> Peak:
    """Bytes of a micro-batch, counted on its shapes; of one with very many rows, on the line through two parts of it."""
    if engine.tune.root is not None:
        raise RuntimeError("the model is spread over several processes")

    def counted(part: Batch) -> Peak:
        return peak_of(engine, [part], Clock(1, 0.0, constant, 0, 0).at(0, 0.0))

    groups, rows = _whole_groups(batch), len(batch.row_ids)
    counts = [max(least, number * len(groups) // max(1, rows)) for least, number in ((1, MOST_ROWS // 2), (2, MOST_ROWS))]
    if rows <= MOST_ROWS or len(groups) <= counts[-1]:
        return counted(batch)
    few, more = (batch.take(_spread(groups, count)) for count in counts)
    return _on_the_line(counted(few), counted(more), *(_size(engine, one) for one in (few, more, batch)))


def _on_the_line(few: Peak, more: Peak, size_few: int, size_more: int, size: int) -> Peak:
    """What many rows take, from what few and more of them take: what grows grows with every token, and the rest stands."""
    beyond = (size - size_more) / (size_more - size_few) if size_more > size_few else size / size_more - 1
    return Peak(*(most + round(max(0, most - least) * beyond) for least, most in zip(few, more, strict=True)))


def _whole_groups(batch: Batch) -> list[tuple[int, ...]]:
    """Places of rows that belong together, and of each that stands alone; the longest row's first."""
    lengths = batch.attend_BT.sum(-1).tolist()
    grouped = {place for group in batch.groups for place in group}
    groups = [*batch.groups, *((place,) for place in range(len(lengths)) if place not in grouped)]
    return sorted(groups, key=lambda group: -max(lengths[place] for place in group))


def _spread(groups: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """Places of the first group's rows, whose attention may outweigh all others, and of those of more groups of all lengths."""
    chosen = [groups[k * len(groups) // count] for k in range(count)]
    return torch.tensor([place for group in chosen for place in group])


def _size(engine: Engine, batch: Batch) -> int:
    """Tokens that are run, padding among them where rows are not packed."""
    if not engine.tune.packs:
        return batch.token_ids_BT.numel()
    return int(pack(batch.token_ids_BT, batch.attend_BT, batch.groups if engine.shares_beginnings else ()).run_BT.sum())


def _guess(engine: Engine, parts: Parts, largest: Largest, dtype: torch.dtype, *, checkpointing: bool) -> Peak:
    """Without shapes: what is usual, for models whose experts are chosen by numbers."""
    size = torch.empty(0, dtype=dtype).element_size()
    per_token = (ACTIVATIONS_PER_TOKEN * parts.width + 4 * _inner_width(engine, parts)) * size * parts.blocks
    if checkpointing:
        per_token = parts.width * size * parts.blocks + per_token // max(parts.blocks, 1)
    logits = min(largest.targets * parts.vocabulary * size * 2, 2 * LOGIT_BYTES)
    gradients = waiting(engine)
    activations = _size(engine, largest.batch) * per_token + logits + engine.tune.room_for_experts
    return Peak(max(activations, gradients), activations, gradients)


def _together(peak: Peak, largest: Largest, device: torch.device) -> tuple[int, int]:
    """Gradients and all else that are alive at the same time, over the micro-batches of a step."""
    if device.type != "cuda":
        # What backward frees seldom fits a gradient or the next micro-batch, and the C library keeps it: the process grows by both.
        within = round(peak.activations * (1 + UNFIT * largest.later))
        across = round(peak.activations * (1 + UNFIT)) - peak.gradients
        return peak.gradients, max(within, across)
    most = max(peak.total, peak.gradients + round(largest.later * peak.activations))
    return peak.gradients, most - peak.gradients


def _kernels(largest: Largest, device: torch.device, dtype: torch.dtype) -> int:
    """What oneDNN, which multiplies bf16 on processors, keeps for every size of micro-batch it has met."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return 0
    return KERNEL_BYTES * min(KERNELS_A_SIZE * largest.sizes, 2 * machine.KERNELS)


def _stepping(engine: Engine) -> int:
    """What the step of one tensor needs where no fp32 master exists: fp32 values before and after, and the bits that round them."""
    narrow = [one.numel for one in engine.tune.trained.values() if one.master.element_size() < 4]
    return 4 * 4 * max(narrow, default=0)


def _inner_width(engine: Engine, parts: Parts) -> int:
    places = parts.select(target_modules=["mlp"], blocks=[0]) if parts.blocks else []
    return max((max(engine.tune.region(place).shape[:2]) for place in places), default=4 * parts.width)


def _seconds(engine: Engine, parts: Parts, feed: Feed, dtype: torch.dtype) -> float:
    model = engine.tune.model
    head = parts.vocabulary * parts.width
    body = count(model) - head * (1 if parts.ties else 2)
    trained = sum(one.numel for one in engine.tune.trained.values() if one.form != "factor")
    tokens, targets = feed.tokens()
    sizes = feed.rows.sizes
    run = tokens * sum(feed.run(sizes)) // max(1, sum(sizes.tokens))
    multiply_adds = run * (2 * body + min(trained, body)) + 3 * targets * head
    return 2 * multiply_adds / (_speed(dtype) * EFFICIENCY)


@cache
def _speed(dtype: torch.dtype, size: int = 1024) -> float:
    """Floating point operations a second of a matrix product here."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    left @ right
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        left @ right
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - began)
