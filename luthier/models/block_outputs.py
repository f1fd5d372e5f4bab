"""What blocks give, handed to the forward pass that asks for it.

Who asks travels as an argument of the pass, like attention's context: state on modules would be read by the recomputation of another
pass under gradient checkpointing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from luthier.kinds.parts import Parts
from luthier.models.attention import Context


def open_blocks(model: nn.Module, parts: Parts) -> list[Any]:
    """Let forward passes change what blocks give (`Context.blocks`). Returns the handles that undo it."""
    return [
        model.get_submodule(name).register_forward_hook(_hook(number), with_kwargs=True)
        for number, name in enumerate(parts.block_modules)
    ]


def _hook(number: int) -> Any:
    def after(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        change = options.get("luthier", Context()).blocks
        if change is None:
            return None
        return (change(number, output[0]), *output[1:]) if isinstance(output, tuple) else change(number, output)

    # Every pass brings another function: compiled blocks would be compiled anew for each.
    return torch.compiler.disable(after)
