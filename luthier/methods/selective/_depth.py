"""How deep in a model a tensor works: what techniques that treat layers by their depth share."""

from __future__ import annotations

from luthier.kinds import Place
from luthier.kinds.parts import Parts


def depth(place: Place, parts: Parts) -> int:
    """0 for embeddings with their norm and projection, 1 to L for the blocks, L + 1 for what follows them.

    A head that is tied to the embedding is the embedding, at depth 0.
    """
    if place.block is not None:
        return place.block + 1
    of_embeddings = "embed" in place.module or place.module.endswith("project_in")
    is_before = place.role in ("embedding", "position_embedding") or (place.role in ("other_norm", "other") and of_embeddings)
    return 0 if is_before else parts.blocks + 1
