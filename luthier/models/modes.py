"""Running a model to look at it: without dropout, and with nothing of the run noticing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients and without dropout."""
    with quiet(model), torch.no_grad():
        yield


def drops(model: nn.Module) -> bool:
    """Whether a model has dropout of its own."""
    modules = list(model.modules())
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
    # Attention keeps the probability as a number, where it keeps no layer: the product drops by itself.
    kept = [getattr(module, "attention_dropout", None) for module in modules]
    return layers or any(one > 0 for one in kept if isinstance(one, int | float))
