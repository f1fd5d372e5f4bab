"""How much a model reads, and which tokens."""

from __future__ import annotations

from typing import Any

from luthier.kinds.parts import Reads


def reads_of(config: Any) -> Reads:
    """What a model with this configuration can read."""
    return Reads(context_of(config), getattr(config.get_text_config(), "vocab_size", None))


def context_of(config: Any) -> int | None:
    """The most tokens a model with this configuration reads at once; None where it does not say."""
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context
