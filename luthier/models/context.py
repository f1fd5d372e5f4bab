"""How much a model reads, and which tokens."""

from __future__ import annotations

from typing import Any

from luthier.kinds.parts import Reads

_COUNT_FROM_PADDING = frozenset(
    {"camembert", "data2vec-text", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)
"""Model types whose first position is the one behind their padding token's id, so that the table of positions has room for fewer tokens."""


def reads_of(config: Any) -> Reads:
    """What a model with this configuration can read."""
    return Reads(context_of(config), getattr(config.get_text_config(), "vocab_size", None))


def context_of(config: Any) -> int | None:
    """The most tokens a model with this configuration reads at once; None where it does not say."""
    text: Any = config.get_text_config()
    context: int | None = getattr(text, "max_position_embeddings", None)
    if context is not None and text.model_type in _COUNT_FROM_PADDING:
        # MPNet counts from 1 whatever its configuration says of padding.
        padding = 1 if text.model_type == "mpnet" else text.pad_token_id
        context -= padding + 1
    return context
