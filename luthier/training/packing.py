"""Whether a model may run rows without padding: tried on the model itself, since a leak between rows would show nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier import machine
from luthier.kinds import Batch
from luthier.models.attention import NAME
from luthier.models.modes import evaluating
from luthier.tune import Tune
from luthier.tune.forward import hidden

LENGTHS = (7, 4, 5)
TRIED = frozenset({"full_attention", "sliding_attention", "attention"})
"""Kinds of attention, by the configuration's `layer_types`, that are told all they must know of packed rows."""
ALIKE = 2
"""Tokens that the second and the third row begin with, which are run once."""


def obstacle(tune: Tune) -> str:
    """Why rows cannot be packed with this model; nothing where they can.

    The model runs three short rows packed and padded, and packed once more with the first row changed. Two of them begin alike.
    """
    if not tune.parts.causal:
        return "this model is no causal one"
    if getattr(tune.model.config, "_attn_implementation", None) != NAME:
        return "its attention cannot be exchanged"
    try:
        with evaluating(tune.model):
            padded = _states(tune, _rows(tune), pack=False)
            packed = _states(tune, _rows(tune), pack=True)
            beside = _states(tune, _rows(tune, other_first=True), pack=True)
    # Whatever a model's own code stumbles over where it meets rows it was not written for.
    except Exception as error:
        return f"it takes no packed rows ({type(error).__name__})"
    # Rounding in bf16 grows over the blocks; tokens at wrong positions are as far apart as different words.
    close = 0.05 if padded[0].element_size() == 2 else 1e-3
    # Other words choose other experts, whose products then have other shapes, and kernels may round by shape.
    apart = close if tune.parts.select(target_modules=["expert"], tensor=None) else 0.0
    if any(_distance(mine, theirs) > apart for mine, theirs in zip(packed[1:], beside[1:], strict=True)):
        return "a row would see its neighbors"
    if any(_distance(mine, alone) > close for mine, alone in zip(packed, padded, strict=True)):
        return "its numbers would differ from those of padded rows"
    if odd := _untried(tune):
        return f"rows longer than those of the trial may be cut otherwise ({', '.join(odd)})"
    return ""


def _untried(tune: Tune) -> list[str]:
    """Kinds of attention that three short rows do not try, such as that in chunks, which are counted from the beginning of all that is
    run."""
    config = tune.model.config.get_text_config()  # type: ignore[union-attr,operator]
    return sorted(set(getattr(config, "layer_types", None) or ()) - TRIED)


def _rows(tune: Tune, *, other_first: bool = False) -> Batch:
    longest, vocabulary = max(LENGTHS), tune.parts.vocabulary
    ids_BT = torch.arange(1, 1 + len(LENGTHS) * longest).view(len(LENGTHS), longest) % vocabulary
    ids_BT[2, :ALIKE] = ids_BT[1, :ALIKE]
    if other_first:
        ids_BT[0] = (ids_BT[0] + 1) % vocabulary
    attend_BT = torch.arange(longest)[None] < torch.tensor(LENGTHS)[:, None]
    position_BT = torch.arange(longest).expand_as(ids_BT)
    batch = Batch(ids_BT * attend_BT, attend_BT, position_BT, torch.full_like(ids_BT, -100), tuple(map(str, LENGTHS)))
    batch = batch._replace(groups=((0,), (1, 2)))
    return batch.to(next(tune.model.parameters()).device)


def _states(tune: Tune, batch: Batch, *, pack: bool) -> list[Tensor]:
    states = tune.run(lambda: hidden(tune, batch, pack=pack))
    rows_BTD = states.padded(batch.attend_BT)
    return [row_TD[:length] for row_TD, length in zip(rows_BTD, LENGTHS, strict=True)]


def _distance(mine: Tensor, other: Tensor) -> float:
    mine, other = machine.widened(mine), machine.widened(other)
    return float((mine - other).norm() / other.norm().clamp(min=1e-12))
