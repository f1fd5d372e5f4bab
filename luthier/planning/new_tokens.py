"""What a plan says of the tokens that a run adds."""

from __future__ import annotations

from dataclasses import replace

from luthier.kinds.parts import Parts
from luthier.models.load import source_reads
from luthier.results.start import Start
from luthier.tune.attach import NEW_TOKENS
from luthier.tune.attached import Attached

_SHOWN = 5


def described(start: Start, parts: Parts, tune: Attached) -> list[str]:
    """Which tokens are added, for how many of them rows are, how these begin, and where they train; nothing where none is."""
    tokens, ids = start.own_tokens, parts.added
    if not tokens:
        return []
    earlier = replace(start.source, add_tokens=start.source.add_tokens[: -len(tokens)])
    had = source_reads(earlier).vocabulary or 0
    new = sum(number >= had for number in ids)
    named = ", ".join(f"`{token}` (id {number})" for token, number in zip(tokens[:_SHOWN], ids, strict=False))
    more = f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else ""
    there = f", {len(ids) - new} of the rows that pad the matrices are used" if new < len(ids) else ""
    mine = [one for one in tune.trained.values() if one.slot == NEW_TOKENS and one.place is not None]
    where = " and ".join(str(one.place) for one in mine)
    trains = (
        f"{sum(one.numel for one in mine):,} parameters in these rows train: {where}"
        if mine
        else "they train with the whole tensors"
    )
    return [
        f"{len(tokens)} new: {named}{more}",
        f"{new} rows are added{there}; each begins at the mean of the rows that its text was read with before",
        trains,
    ]
