"""Reading what a run trains on: sources, row maps, encoding, and the shares of a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from luthier.errors import LuthierError, Say
from luthier.kinds import Head, Now, RowMap
from luthier.planning.held_out import HeldOut, hold_out, through, usable
from luthier.planning.load import Loaded
from luthier.planning.numbers import Numbered, with_numbers
from luthier.recipe import RowsRecipe
from luthier.recipe.parts import Chosen
from luthier.registry import slots_of, values_of
from luthier.rows.annotate import annotations_of
from luthier.rows.chat import form_of
from luthier.rows.encode import EncodedRows, Purpose
from luthier.rows.files import LeftOut
from luthier.rows.gather import encode_rows, mixture_of, splitter_for
from luthier.rows.mixture import Mixture
from luthier.rows.shapes import BadRow
from luthier.rows.sources import Joined, Sources, files_of, in_blocks
from luthier.training.services import RunServices
from luthier.tune import Tune


class TrainingRows(NamedTuple):
    """The rows of a run."""

    sources: list[str]
    """Where they come from."""
    raw: Iterable[Any]
    """As read and mapped; when streaming they are read again each time."""
    encoded: EncodedRows
    mixture: Mixture | None
    skipped: Sequence[BadRow]
    cache: Sequence[str]
    """When streaming, whether each source's encoded rows were in the cache."""
    mapped: Sequence[str]
    """What was made of what was read, by the recipe and by row maps."""
    files: Sequence[str]
    """What was read."""
    left_out: Sequence[LeftOut]
    """What stands beside it and was not."""
    numbered: Numbered
    """What models gave to the rows beforehand."""
    held: HeldOut | None = None
    """What is measured and not learned."""


def check_maps(recipe: RowsRecipe, chosen: Chosen) -> None:
    """Refuse to map rows that are streamed.

    Raises:
        LuthierError: there is a row map, under whatever key.
    """
    for slot, _ in _maps(chosen) if recipe.streaming else ():
        raise LuthierError(
            f"the row map `{slot}` needs all rows in memory",
            where="rows.streaming",
            fix="leave out streaming, or map the rows beforehand",
        )


def read(recipe: RowsRecipe, seed: int, sources: Sources, chosen: Chosen, loaded: Loaded, say: Say) -> TrainingRows:
    """Map and encode the rows that were read.

    Args:
        recipe: what it says about rows.
        seed: the run's.
        sources: the rows as read.
        chosen: the run's parts, whose row maps and annotations are used whatever key they stand under.
        loaded: the model that will read them.
        say: hears what is being done.

    Raises:
        LuthierError: a row cannot be encoded, or nothing is left of them.
    """
    splitter = splitter_for(recipe, form_of(loaded.tokenizer), loaded.reads)
    sources, told = (sources, []) if splitter is None else in_blocks(sources, splitter)
    sources, held = hold_out(recipe, seed, sources, splitter)
    raw: Iterable[Any] = Joined(sources)
    mapped = [*columns_told(recipe), *told]
    for slot, value in _maps(chosen):
        before, services = list(raw), RunServices(Tune(loaded.model, loaded.parts), slot, Now(seed=seed))
        raw = after = value.map(before, services)
        held = through(value, held, services) if held is not None else None
        mapped += [f"{slot}: {value.told(before, after)}"] if value.told is not None else []
    annotations = annotations_of(value for _, value in values_of(chosen))
    purpose: Purpose = "read" if any(isinstance(value, Head) for _, value in values_of(chosen)) else "train"
    rows, places, skipped, cache = encode_rows(recipe, sources, raw, loaded.tokenizer, loaded.reads, say, annotations, purpose)
    held = usable(held, recipe, loaded, purpose) if held is not None else None
    mapped += [f"held out: {held.said}"] if held is not None else []
    mixture = mixture_of(recipe, seed, sources, rows, places)
    numbered = with_numbers(recipe, chosen, loaded, rows)
    names = [one.name for one in sources]
    return TrainingRows(names, raw, numbered.rows, mixture, skipped, cache, mapped, *files_of(sources), numbered, held)


def columns_told(recipe: RowsRecipe) -> list[str]:
    """What columns stand for, source by source where they differ."""
    said = [", ".join(f"{key} = {column}" for key, column in (one.columns or {}).items()) for one in recipe.sources()]
    if len(set(said)) == 1:
        return [f"columns: {said[0]}"] if said[0] else []
    names = [
        str(one.rows) if isinstance(one.rows, str | Path) else f"source {n}" for n, one in enumerate(recipe.sources(), start=1)
    ]
    return [f"columns of {name}: {text or 'their own names'}" for name, text in zip(names, said, strict=True)]


def _maps(chosen: Chosen) -> list[tuple[str, RowMap]]:
    """Row maps by slot: first those that the recipe names as such, then those that techniques bring."""
    own_first = sorted(slots_of(chosen), key=lambda one: one[0] != "rows.map")
    return [(slot, value) for _, slot, part in own_first for value in part.values if isinstance(value, RowMap)]
