"""From hidden states to logits, as the model itself does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kinds.parts import Parts


def finish(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the model does to the head's output: scaling (Cohere, Granite, Falcon-H1) and soft-capping (Gemma 2)."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    multiply = float(getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0)
    divide = float(getattr(config, "logits_scaling", None) or 1.0)
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")]
    cap = next((float(one) for one in caps if one), None)

    def apply(logits: Tensor) -> Tensor:
        if multiply != 1.0 or divide != 1.0:
            logits = logits * (multiply / divide)
        return torch.tanh(logits / cap) * cap if cap else logits

    return apply


def head_of(model: nn.Module, parts: Parts) -> Callable[[Tensor], Tensor]:
    """The head with all that stands on it: hidden states [N, D] to logits [N, V].

    Raises:
        LuthierError: the model has no language-model head.
    """
    if not parts.head or not parts.causal:
        raise LuthierError(
            f"{parts.architecture} does not predict next tokens here",
            fix="use a causal language model (AutoModelForCausalLM)",
        )
    # Called as a module, so that a delta, an edit or a tap on the head is in effect.
    module: Any = model.get_submodule(parts.head)
    after = finish(model)
    # Some bodies add up in fp32 whatever the type of their weights (Mamba).
    return lambda hidden_ND: after(module(hidden_ND.to(module.weight.dtype)))
