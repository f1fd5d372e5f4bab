"""What a run will need: peak memory from what is kept, time from the speed of this machine's matrix products."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.logprobs import LOGIT_BYTES
from luthier.models.parts import Parts
from luthier.training.engine import Engine
from luthier.training.feed import Feed

PROCESS_BYTES = 450 * 2**20
"""An interpreter with torch and transformers loaded."""

ACTIVATIONS_PER_TOKEN = 60
"""Numbers kept for backward a token and block, in widths of the model, beside the MLP's inner ones: projections, norms, residuals."""

EFFICIENCY = 0.25
"""Share of the speed of one large matrix product that training reaches, seen on processors."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose, and seconds of training."""

    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    process: int
    seconds: float

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights + self.masters + self.gradients + self.optimizer + self.activations + self.logits + self.process

    def described(self) -> str:
        """The purposes in MiB."""
        names = ("weights", "masters", "gradients", "optimizer", "activations", "logits", "process")
        return ", ".join(f"{name} {getattr(self, name) / 2**20:,.0f}" for name in names)


def estimate(engine: Engine, parts: Parts, rows: Sequence[Any], feed: Feed, dtype: torch.dtype, *, checkpointing: bool) -> Estimate:
    """Estimate peak memory and training time.

    Args:
        engine: what is attached.
        parts: the model's map.
        rows: encoded rows.
        feed: the steps.
        dtype: the type of weights and computation.
        checkpointing: whether activations are recomputed.
    """
    tune = engine.tune
    model = tune.model
    size = torch.empty(0, dtype=dtype).element_size()
    trained = list(tune.trained.values())
    masters = sum(
        one.master.numel() * one.master.element_size()
        for one in trained
        if one.master.data_ptr() != one.leaf.data_ptr() or one.form != "whole"
    )
    gradients = sum(one.numel * max(4, one.master.element_size()) for one in trained)
    optimizer = sum(
        value.numel() * value.element_size()
        for states in engine.chain.state.values()
        for state in states.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    tokens, targets = _largest(feed, rows)
    inner = _inner_width(engine, parts)
    per_token = (ACTIVATIONS_PER_TOKEN * parts.width + 4 * inner) * size * parts.blocks
    if checkpointing:
        per_token = parts.width * size * parts.blocks + per_token // max(parts.blocks, 1)
    logits = min(targets * parts.vocabulary * size * 2, 2 * LOGIT_BYTES)
    return Estimate(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        masters=masters,
        gradients=gradients,
        optimizer=optimizer,
        activations=tokens * per_token,
        logits=logits,
        process=PROCESS_BYTES,
        seconds=_seconds(engine, parts, feed, dtype),
    )


def _largest(feed: Feed, rows: Sequence[Any]) -> tuple[int, int]:
    """Padded tokens and targets of the largest micro-batch of the first epoch."""
    groups = [group for step in feed.epoch(0) for group in step if group]
    sizes = [(len(group) * max(len(rows[i]) for i in group), sum(sum(rows[i].supervised) for i in group)) for group in groups]
    return max((tokens for tokens, _ in sizes), default=0), max((targets for _, targets in sizes), default=0)


def _inner_width(engine: Engine, parts: Parts) -> int:
    places = parts.select(roles=["mlp"], blocks=[0]) if parts.blocks else []
    return max((max(engine.tune.region(place).shape[:2]) for place in places), default=4 * parts.width)


def _seconds(engine: Engine, parts: Parts, feed: Feed, dtype: torch.dtype) -> float:
    model = engine.tune.model
    head = parts.vocabulary * parts.width
    body = sum(p.numel() for p in model.parameters()) - head * (1 if parts.ties else 2)
    trained = sum(one.numel for one in engine.tune.trained.values() if one.form != "factor")
    tokens, targets = feed.tokens()
    multiply_adds = tokens * (2 * body + min(trained, body)) + 3 * targets * head
    return 2 * multiply_adds / (_speed(dtype) * EFFICIENCY)


def _speed(dtype: torch.dtype, size: int = 1024) -> float:
    """Floating point operations a second of a matrix product here."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    left @ right
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        left @ right
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - began)
