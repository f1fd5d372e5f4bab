"""How much a model reads."""

from __future__ import annotations

from typing import Any


def context_of(config: Any) -> int | None:
    """The most tokens a model with this configuration reads at once; None where it does not say."""
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context
