"""Numbers that models gave to a run's rows beforehand: the stores that the recipe names, or that lie beside the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from luthier.errors import LuthierError
from luthier.evaluate.numbers import code_fingerprint
from luthier.kinds import Stored, TokenWeight
from luthier.planning.load import Loaded
from luthier.recipe import RowsRecipe
from luthier.recipe.parts import Chosen
from luthier.registry import values_of
from luthier.rows.encode import EncodedRows
from luthier.rows.numbered import bare, join
from luthier.rows.numbers import MADE_WITH, Numbers, beside, differences, parts_of, written_by


class Numbered(NamedTuple):
    """Rows with the numbers that techniques read."""

    rows: EncodedRows
    said: Sequence[str] = ()
    """Of each store, what it is and whose numbers it holds."""
    fingerprints: Sequence[str] = ()
    """Of the stores."""


def with_numbers(recipe: RowsRecipe, chosen: Chosen, loaded: Loaded, rows: EncodedRows) -> Numbered:
    """Join stores to the rows, as far as techniques read them.

    Args:
        recipe: may name stores.
        chosen: the run's parts.
        loaded: the model before training, and the tokenizer that wrote the rows.
        rows: the encoded rows.

    Raises:
        LuthierError: there is no store for what a technique reads, it was made with something else than the run has, or it does not
            hold all rows as they are; or the recipe names one that nothing reads.
    """
    wanted: dict[str, tuple[str, Stored]] = {}
    for slot, value in values_of(chosen):
        stored = getattr(value, "stored", None)
        if isinstance(stored, Stored) and not _said_by(rows, stored):
            wanted.setdefault(stored.kind, (slot, stored))
    named = [Numbers(Path(path)) for path in recipe.stores()]
    idle = [store for store in named if store.kind not in wanted]
    if idle:
        raise LuthierError(
            f"nothing in the run reads numbers of the kind `{idle[0].kind}`, or the rows have columns of their own for it",
            where=f"rows.numbers: {idle[0].folder}",
            mend="leave it out",
        )
    _refuse_weights(wanted, chosen)
    said, fingerprints = [], []
    for kind, (slot, stored) in wanted.items():
        stores = [store for store in named if store.kind == kind] or _beside(recipe, kind, slot, stored)
        for store in stores:
            _check(store, loaded, of_base=stored.of_base and store not in named)
            of_base = stored.of_base and store.facts["fingerprint"] != loaded.fingerprint
            other = ", which is not the model before training" if of_base else ""
            said.append(f"{kind} by {store.facts['model']} ({store.facts['precision']}){other}, from {store.folder}")
            fingerprints.append(store.fingerprint())
        rows = join(rows, stores)
    return Numbered(rows, said, fingerprints)


def _refuse_weights(wanted: Mapping[str, tuple[str, Stored]], chosen: Chosen) -> None:
    weights = [slot for slot, _ in values_of(chosen, TokenWeight)]
    if "likelihood" in wanted and weights:
        raise LuthierError(
            f"`{weights[0]}` weighs targets, and in the stored likelihoods that `{wanted['likelihood'][0]}` reads all count alike",
            where="token_weight",
            mend="leave one of them out: the model before training is run with the weights",
        )


def _said_by(rows: EncodedRows, stored: Stored) -> bool:
    """Whether rows have columns of their own that say the same; rows that lack them are the technique's to refuse."""
    return bool(stored.unless) and any(name in row.columns for row in bare(rows.rows) for name in stored.unless)


def _beside(recipe: RowsRecipe, kind: str, slot: str, stored: Stored) -> list[Numbers]:
    sources = [one.rows for one in recipe.sources() if isinstance(one.rows, str | Path)]
    places = {str(source): place for source in sources if (place := beside(source, kind)) is not None}
    lacking = [source for source, place in places.items() if not parts_of(place)] if places else ["ROWS"]
    if not lacking:
        return [Numbers(place) for place in places.values()]
    instead = f", or give rows with {' and '.join(f'`{name}`' for name in stored.unless)}" if stored.unless else ""
    raise LuthierError(
        f"`{slot}` reads numbers that a model gave to the rows beforehand, and there are none",
        where=str(places.get(lacking[0], "rows.numbers")),
        mend=f"luthier rows store {kind} {lacking[0]} --model MODEL, or name them: rows.numbers{instead}",
    )


def _check(store: Numbers, loaded: Loaded, *, of_base: bool) -> None:
    """Refuse a store that was made with something else than the run has."""
    here = {**written_by(loaded.tokenizer), "code": code_fingerprint()}
    changed, on_purpose = differences(store.facts, here, MADE_WITH), ""
    if of_base:
        base = {
            "model": loaded.start.name,
            "fingerprint": loaded.fingerprint,
            "precision": str(loaded.dtype).removeprefix("torch."),
        }
        same = store.facts["fingerprint"] == loaded.fingerprint
        on_purpose = "" if same else "; or name this folder under rows.numbers to compare with another model on purpose"
        names = {"model": "the model", "precision": "its precision", "fingerprint": "its numbers"}
        changed += [] if same else differences(store.facts, base, names)
    known = store.facts.get("vocabulary")
    if known is not None and known > loaded.parts.vocabulary:
        changed.append(f"the vocabulary: {known} tokens, now {loaded.parts.vocabulary}")
    if changed:
        raise LuthierError(
            f"the stored numbers are not those of this run: {'; '.join(changed)}",
            where=str(store.folder),
            mend=f"write them again, as this run has it: {store.command}" + on_purpose,
        )
