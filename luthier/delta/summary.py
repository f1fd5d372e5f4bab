"""How much a delta changed, by block and role: what `run.json` and the report show."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from luthier import machine
from luthier.delta.delta import Delta, places_of
from luthier.delta.sources import live
from luthier.kinds.parts import Parts
from luthier.models.quantized import quantized


def summary(delta: Delta, parts: Parts, base: nn.Module) -> dict[str, Any]:
    """Sizes of a delta against its base.

    Args:
        delta: what changed.
        parts: the map of the model.
        base: the model before; its norms are what `relative` refers to.

    Returns:
        `norm` and `relative` of the whole, `changed_share` (parameters whose change is not zero), and `by_place`: one
        entry a block and role, in the model's order, with `block`, `role`, `norm`, `base_norm`, `relative`, `numbers`
        and `changed`. `relative` is None where the base's norm is zero.

    Raises:
        LuthierError: the delta changes a parameter that the map does not know.
    """
    weights = live(base)
    held = {f"{module}.weight": linear for module, linear in quantized(base).items()}
    names = list(dict.fromkeys(place.parameter for place in parts.places))
    names += [name for name in delta if name not in names]
    sums: dict[tuple[int | None, str], Tensor] = {}
    for name in names:
        change = delta.spread(name) if name in delta.changes else None
        for place in places_of(name, parts):
            # One weight at a time is there in full.
            values = held[name].dequantized()[place.start : place.stop] if name in held else parts.outputs(place, weights[name])
            # Squared change, squared base, numbers, changed numbers: summed over the places of a role in a block.
            found = torch.tensor([0.0, _squares(values), values.numel(), 0.0], dtype=torch.float64)
            if change is not None:
                part = parts.outputs(place, change)
                found[0], found[3] = _squares(part), int(part.count_nonzero())
            key = (place.block, place.role)
            sums[key] = sums[key] + found if key in sums else found
    total = _facts(sum(sums.values(), torch.zeros(4, dtype=torch.float64)))
    return {
        "norm": total["norm"],
        "relative": total["relative"],
        "changed_share": total["changed"] / total["parameters"],
        "by_place": [{"block": block, "module_type": role, **_facts(found)} for (block, role), found in sums.items()],
    }


def _squares(values: Tensor) -> float:
    return machine.norm(values) ** 2


def _facts(sums: Tensor) -> dict[str, Any]:
    change, base, numbers, changed = sums.tolist()
    return {
        "norm": math.sqrt(change),
        "base_norm": math.sqrt(base),
        "relative": math.sqrt(change / base) if base else None,
        "parameters": int(numbers),
        "changed": int(changed),
    }
