"""Whether luthier computes what a model itself does: tried on the model, since a difference would show nowhere else."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from luthier import machine
from luthier.errors import LuthierError
from luthier.kinds.parts import Parts
from luthier.models.head import head_of
from luthier.models.modes import evaluating

TOKENS = 6
CLOSE = 1e-4
CLOSE_16 = 0.05
"""Rounding in 16 bits grows over the blocks; attention without its sinks, or a head without its factor, is further off."""


def own_logits(model: nn.Module, vocabulary: int) -> Tensor:
    """What the model itself answers to a few tokens, [T, V], without dropout and gradients."""
    with evaluating(model):
        logits: Tensor = _run(model, _ids(model, vocabulary)).logits
    return logits[0]


def check_forward(model: nn.Module, parts: Parts, expected_TV: Tensor) -> None:
    """Compare what luthier runs, the body with its own attention and then the head, with what the model answered by itself.

    Args:
        model: a causal model; luthier's attention may stand in it by now.
        parts: its map.
        expected_TV: what `own_logits` gave before.

    Raises:
        LuthierError: the answers differ by more than rounding.
    """
    found_TV = None
    # Where more stands between body and head than luthier knows, shapes may not even fit.
    with evaluating(model), suppress(RuntimeError):
        states_TD = _run(model.get_submodule(parts.backbone), _ids(model, parts.vocabulary)).last_hidden_state[0]
        found_TV = head_of(model, parts)(states_TD)
    if found_TV is None or not alike(found_TV, expected_TV):
        raise LuthierError(
            f"luthier would compute other numbers than {type(model).__name__} itself",
            where=parts.architecture,
            fix="use another model: this one does more between its blocks, its attention and its head than luthier knows",
        )


def _run(module: nn.Module, ids_BT: Tensor) -> Any:
    keeps = "use_cache" in inspect.signature(module.forward).parameters
    return module(input_ids=ids_BT, **({"use_cache": False} if keeps else {}))


def alike(mine_TV: Tensor, other_TV: Tensor) -> bool:
    """Whether two computations of the same states differ by no more than rounding at most of the tokens.

    At some of them rounding may choose other experts.
    """
    close = CLOSE_16 if mine_TV.element_size() == 2 else CLOSE
    mine_TV, other_TV = machine.widened(mine_TV), machine.widened(other_TV)
    apart_T = (mine_TV - other_TV).norm(dim=-1) / other_TV.norm(dim=-1).clamp(min=1e-12)
    return float(apart_T.median()) <= close


def _ids(model: nn.Module, vocabulary: int) -> Tensor:
    device = next(model.parameters()).device
    return (1 + torch.arange(TOKENS, device=device))[None] % vocabulary
