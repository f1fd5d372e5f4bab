"""What trained prompts have in common: embeddings at virtual ids, and a start from the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Services

COMMON = 5000
"""How many ids stand for the most common tokens: vocabularies list tokens in the order in which they were merged."""


def stand_before(prompt_PD: Tensor, token_ids_BT: Tensor, embeds_BTD: Tensor) -> Tensor:
    """The embeddings of a batch, with row p of a prompt where the id is -1 - p."""
    row_BT = (-1 - token_ids_BT).clamp(min=0)
    return torch.where((token_ids_BT < 0)[..., None], functional.embedding(row_BT, prompt_PD), embeds_BTD)


def drawn_from(table_VD: Tensor, length: int, services: Services) -> Tensor:
    """A prompt [P, D] of copies of common tokens' embeddings, drawn evenly from the first ids (Lester et al., 2021, section 3.2)."""
    rows_P = torch.randint(min(COMMON, len(table_VD)), (length,), generator=services.rng("prompt"))
    return table_VD[rows_P.to(table_VD.device)].clone()


def check_length(length: int, technique: str) -> None:
    """Refuse a prompt without tokens."""
    if length < 1:
        raise LuthierError(f"the prompt has {length} tokens", where=f"{technique}: length", fix="use at least 1")
