"""What a plan says of a mixture of experts."""

from __future__ import annotations

from torch import nn

from luthier.kinds.parts import Parts
from luthier.models.experts import mixture_of
from luthier.models.quantized import count
from luthier.planning.amounts import memory
from luthier.tune import Tune


def active(model: nn.Module, parts: Parts) -> list[str]:
    """How many parameters a token passes through: a line, or none for a model without experts."""
    mixture = mixture_of(model, parts)
    return [] if mixture is None else [mixture.described(count(model))]


def trained(tune: Tune) -> list[str]:
    """Whether experts train, and what deltas on them need."""
    experts = {place.module for place in tune.parts.select("expert", tensor=None)}
    if not experts:
        return []
    if not any(one.place is not None and one.place.role == "expert" for one in tune.trained.values()):
        return ["experts do not train: no technique has `expert` among its target_modules"]
    room = tune.room_for_experts
    return [f"experts are multiplied with the deltas in their matrices: {memory(room)} for one block at a time"] if room else []
