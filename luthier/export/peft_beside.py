"""What stands beside the weights, in PEFT's forms: prompts, prefixes and factors of channels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import LuthierError
from luthier.export.peft_adapter import PREFIX, Adapter
from luthier.export.peft_prefix import prefix_adapter
from luthier.models.quantized import QuantizedLinear
from luthier.tune import Tune
from luthier.tune.merge import refuse_unmergeable
from luthier.tune.sites import Edit

WEIGHTS_ALONE = "export the weights without what stands beside them: --as model --weights-only"


def writer_of(tune: Tune) -> Callable[[Tune], Adapter] | None:
    """What turns the technique beside the weights into an adapter; None where there are only deltas of weights, or nothing.

    Raises:
        LuthierError: PEFT has no form for the technique, or it was trained together with another.
    """
    beside = [own.slot for site in tune.sites.values() for own, _ in site.prompts]
    beside += [own.slot for own, _ in tune.prefixes]
    beside += [edit.slot for edit in _edits(tune)]
    if not beside:
        return None
    # What an objective trained for itself is not part of the model.
    owners = [own.slot for own in tune.owns if not any(one.form == "free" for one in own.trained.values())]
    slots = dict.fromkeys([*beside, *owners, *(one.slot for one in tune.trained.values() if one.form != "free")])
    if len(slots) > 1:
        raise LuthierError(
            f"{' and '.join(f'`{slot}`' for slot in slots)} were trained together, and an adapter of PEFT holds one technique",
            where="export_peft",
            fix=WEIGHTS_ALONE,
        )
    # A technique used twice is numbered.
    writer = WRITERS.get(re.sub(r"\.\d+$", "", beside[0]))
    if writer is None:
        raise LuthierError(f"PEFT has no form for `{beside[0]}`", where="export_peft", fix=_instead(tune))
    return writer


def _instead(tune: Tune) -> str:
    """How what stands beside the weights can leave at all."""
    try:
        refuse_unmergeable(tune)
    except LuthierError:
        return f"use the run itself in luthier, or {WEIGHTS_ALONE}"
    return "export the model, which holds it in its weights: --as model"


def _edits(tune: Tune) -> list[Edit]:
    return [edit for site in tune.sites.values() for edit in site.edits if edit.stands]


def prompt_adapter(tune: Tune) -> Adapter:
    """The embeddings that stand before every row, as PROMPT_TUNING."""
    ((own, prompt),) = [one for site in tune.sites.values() for one in site.prompts]
    width = tune.model.get_parameter(f"{tune.parts.embedding}.weight").shape[1]
    tensors = own.masters()
    like = next(values for values in tensors.values() if values.is_floating_point())
    ids_1P = -1 - torch.arange(tune.prompt_length, device=like.device)[None]
    prompt_PD = prompt.apply(tensors, ids_1P, like.new_zeros(1, tune.prompt_length, width))[0]
    config = {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "num_virtual_tokens": tune.prompt_length,
        "num_transformer_submodules": 1,
        "num_layers": tune.parts.blocks,
        "num_attention_heads": tune.parts.heads,
        "token_dim": width,
    }
    return Adapter(config, {"prompt_embeddings": prompt_PD}, {"tokens": tune.prompt_length})


def scales_adapter(tune: Tune) -> Adapter:
    """The factors of channels, as IA3: those of inputs are its `feedforward_modules`.

    Of a fused projection, channels that are not scaled have the factor 1.

    Raises:
        LuthierError: something else than a linear map is scaled, or one at both ends.
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for edit in _edits(tune):
        place = edit.place
        assert place is not None
        if not isinstance(tune.model.get_submodule(place.module), nn.Linear | Conv1D | QuantizedLinear) or not place.tensor:
            raise LuthierError("PEFT scales linear maps only", where=str(place), fix=_instead(tune))
        width_out, width_in = tune.region(place._replace(start=None, stop=None)).shape
        scale = edit.masters()["scale"]
        scales, width = (outputs, width_out) if edit.value.of == "output" else (inputs, width_in)
        whole = scales.setdefault(place.module, scale.new_ones(width))
        whole[place.start : place.stop] *= 1.0 + scale
    twice = next((module for module in outputs if module in inputs), None)
    if twice is not None:
        raise LuthierError("PEFT scales what a module reads or what it returns, not both", where=twice, fix=_instead(tune))
    modules = [*outputs, *inputs]
    config = {
        "peft_type": "IA3",
        "target_modules": modules,
        "feedforward_modules": list(inputs),
        "fan_in_fan_out": any(module in tune.parts.transposed for module in modules),
    }
    shaped = {**{name: one[:, None] for name, one in outputs.items()}, **{name: one[None] for name, one in inputs.items()}}
    tensors = {f"{PREFIX}{name}.ia3_l": values for name, values in shaped.items()}
    return Adapter(config, tensors, {"modules": len(modules)})


WRITERS: Mapping[str, Callable[[Tune], Adapter]] = {
    "cpt": prompt_adapter,
    "ia3": scales_adapter,
    "prefix_tuning": prefix_adapter,
    "prompt_tuning": prompt_adapter,
    "promot": prompt_adapter,
}
"""By technique. What is not here does more than PEFT's forms can hold."""
