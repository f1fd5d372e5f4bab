"""A toy prompt: trained embeddings before every row (Lester et al., 2021, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import Prompt, Services, Tensors
from luthier.registry import method


@method(title="Plain prompt", step0="on purpose not the base", merges="never", learning_rate=1e-1)
def plain_prompt(*, length: int = 4) -> Prompt:
    """Train embeddings that stand before every row; they start as embeddings of random tokens.

    Args:
        length: P, how many.
    """

    def start(table_VD: Tensor, services: Services) -> Tensors:
        rows_P = torch.randint(len(table_VD), (length,), generator=services.rng("prompt"))
        return {"prompt_PD": table_VD[rows_P.to(table_VD.device)].clone()}

    def apply(tensors: Tensors, token_ids_BT: Tensor, embeds_BTD: Tensor) -> Tensor:
        virtual_BT = (-1 - token_ids_BT).clamp(min=0)
        return torch.where((token_ids_BT < 0)[..., None], tensors["prompt_PD"][virtual_BT], embeds_BTD)

    return Prompt(start, apply, length)
