"""What it costs to train a tensor, and which tensors are worth it: the cost model and the exact selection of GreenTrainer.

Costs are multiply-adds. Training a tensor pays for its own gradient, and for passing the gradient through all tensors from the output
down to it (Huang et al., 2024, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from luthier.errors import LuthierError
from luthier.kinds import Batch, Place, Services
from luthier.methods.selective._knapsack import select

RESOLUTION = 1000
"""T_q: whole units in which the cost of a full backward pass is counted, as in the paper."""

BEFORE = ("embedding", "position_embedding", "other_norm")
"""What stands before the blocks, among all that stands outside them."""
IN_BLOCK = (
    *("attention_norm", "attention_query", "attention_key", "attention_value", "attention_query_key_value"),
    *("query_norm", "key_norm", "attention_output"),
    *("mlp_norm", "mlp_gate", "mlp_gate_up", "mlp_up", "mlp_down", "other_norm", "other"),
)
AFTER = ("other", "final_norm", "head")


class Cost(NamedTuple):
    """Multiply-adds of one tensor in one step."""

    forward: float
    through: float
    """t_dy: to pass the gradient on to what stands before it."""
    own: float
    """t_dw: to form its own gradient."""


class Load(NamedTuple):
    """What a step reads."""

    tokens: int
    pairs: int
    """Pairs of tokens of the same row: what attention is computed for."""
    targets: int
    """Positions at which the head is computed."""


def load_of(batches: Sequence[Batch]) -> Load:
    """The load of some batches, without padding."""
    lengths = [batch.attend_BT.sum(-1) for batch in batches]
    return Load(
        sum(int(one.sum()) for one in lengths),
        sum(int(one.square().sum()) for one in lengths),
        sum(batch.supervised for batch in batches),
    )


def costs(services: Services, load: Load) -> dict[Place, Cost]:
    """The cost of every tensor of the model, in the order of the forward pass.

    Raises:
        LuthierError: the model is a mixture of experts, where the rows decide what is computed.
    """
    parts = services.parts
    expert = next((place for place in parts.places if place.role in ("expert", "router")), None)
    if expert is not None:
        raise LuthierError(
            "`greentrainer` does not know what a mixture of experts costs", where=str(expert), fix="use a model without experts"
        )
    known = {*BEFORE, *IN_BLOCK, *AFTER}
    unknown = next((place for place in parts.places if place.role not in (*known, "other_modality")), None)
    if unknown is not None:
        raise LuthierError(
            f"`greentrainer` does not know what `{unknown.role}` costs",
            where=str(unknown),
            fix="use a model whose blocks are attention and an MLP",
        )
    modules = {module: number for number, module in enumerate(dict.fromkeys(place.module for place in parts.places))}
    found = {
        place: _cost(services, place, load)
        for place in sorted(parts.select(tensor=None), key=lambda p: (*_position(p), modules[p.module], p.tensor.endswith("bias")))
    }
    if parts.head in parts.ties:
        # A tied head is no tensor of its own, but the gradient passes through it first.
        last = next(reversed(found))
        head = load.targets * parts.vocabulary * parts.width
        found[last] = found[last]._replace(forward=found[last].forward + head, through=found[last].through + head)
    return found


def _position(place: Place) -> tuple[float, int]:
    if place.block is not None:
        return place.block, IN_BLOCK.index(place.role)
    return (-1, BEFORE.index(place.role)) if place.role in BEFORE else (math.inf, AFTER.index(place.role))


def _cost(services: Services, place: Place, load: Load) -> Cost:
    parts, size = services.parts, services.shape(place).numel()
    if place.role == "embedding":
        head = load.targets * size if parts.head in parts.ties else 0
        return Cost(0, 0, head + size)
    if place.role == "position_embedding":
        return Cost(0, 0, load.tokens * parts.width)
    if place.tensor.endswith("bias"):
        return Cost(0, 0, 0 if "norm" in place.role else load.tokens * size)
    each = (load.targets if place.role == "head" else load.tokens) * size
    # The maps between queries, keys and values have no tensor: they are counted with the values.
    heads = parts.heads_of(place.block)
    attention = load.pairs * heads.query * heads.width if place.role in ("attention_value", "attention_query_key_value") else 0
    return Cost(each + 2 * attention, each + 4 * attention, each)


def spent(found: Sequence[Cost], trains: Sequence[bool]) -> float:
    """The backward cost of training some tensors, as a share of training all, in the order of the forward pass."""
    everything = sum(one.through + one.own for one in found)
    first = list(trains).index(True) if any(trains) else len(found)
    own = sum(one.own for one, wanted in zip(found, trains, strict=True) if wanted)
    return (own + sum(one.through for one in found[first:])) / everything


def worth_training(found: Sequence[Cost], value: Sequence[float], target: float) -> list[bool]:
    """The tensors of the largest total value whose step costs no more than a share of full fine-tuning's; none where none fits.

    Args:
        found: costs, in the order of the forward pass.
        value: importance; what is not above 0 never trains.
        target: rho, the share of forward and backward pass together.

    Raises:
        LuthierError: the forward pass alone costs as much.
    """
    everything = sum(one.through + one.own for one in found)
    forward = sum(one.forward for one in found) / everything
    room = target * (1 + forward) - forward
    if room <= 0:
        raise LuthierError(
            f"the forward pass alone is {forward / (1 + forward):.2f} of full fine-tuning's cost",
            where="greentrainer: target",
            fix=f"use a target above that, instead of {target}",
        )
    through, own = ([int(RESOLUTION * getattr(one, name) / everything) for one in reversed(found)] for name in ("through", "own"))
    trains = select(through, own, list(reversed(value)), int(room * (sum(through) + sum(own))))
    return trains[::-1]
