"""Numbers that models gave to a run's rows beforehand: the stores that the recipe names, or that lie beside the rows."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from luthier.errors import LuthierError
from luthier.evaluate.numbers import code_fingerprint
from luthier.kinds import RowMap, Stored, TokenWeight
from luthier.planning.load import Loaded
from luthier.recipe import RowsRecipe
from luthier.recipe.parts import Chosen
from luthier.recipe.schema import plain
from luthier.registry import values_of
from luthier.rows.encode import Encoded, EncodedRows
from luthier.rows.numbered import bare, join
from luthier.rows.numbers import MADE_WITH, OPTIONS, Numbers, beside, command_of, differences, parts_of, written_by
from luthier.rows.saved import place_of
from luthier.training.precision import TYPES


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
            where=f"rows.stored: {idle[0].folder}",
            fix="leave it out",
        )
    _refuse_weights(wanted, chosen)
    maps = [slot for slot, _ in values_of(chosen, RowMap)]
    said, fingerprints = [], []
    for kind, (slot, stored) in wanted.items():
        stores = [store for store in named if store.kind == kind] or _beside(recipe, kind, slot, stored, maps)
        own = stored.of_base and stores[0] not in named
        for store in stores:
            _check(store, stores, recipe, loaded, of_base=own)
            of_base = stored.of_base and store.facts["fingerprint"] != loaded.fingerprint
            other = ", which is not the model before training" if of_base else ""
            said.append(f"{kind} by {store.facts['model']} ({store.facts['precision']}){other}, from {store.folder}")
            fingerprints.append(store.fingerprint())
        rows = join(rows, stores, partial(_fix, slot, maps, partial(_command, stores[0], stores, recipe, loaded, of_base=own)))
    return Numbered(rows, said, fingerprints)


def _refuse_weights(wanted: Mapping[str, tuple[str, Stored]], chosen: Chosen) -> None:
    weights = [slot for slot, _ in values_of(chosen, TokenWeight)]
    if "likelihood" in wanted and weights:
        raise LuthierError(
            f"`{weights[0]}` weighs labels, and in the stored likelihoods that `{wanted['likelihood'][0]}` reads all count alike",
            where="token_weight",
            fix="leave one of them out: the model before training is run with the weights",
        )


def _fix(slot: str, maps: Sequence[str], command: Callable[[Sequence[Encoded]], str], rows: Sequence[Encoded]) -> str:
    """What helps where a store lacks rows: it holds those of the file, of which row maps make others."""
    again = f"store them as this run has them, which keeps what is still right: {command(rows)}"
    if not maps:
        return again
    return (
        f"the store has the rows of the file, of which `{maps[0]}` makes others: leave `{slot}` out, and the model is run on them as they "
        f"are then. If it is the file that has changed, {again}"
    )


def _said_by(rows: EncodedRows, stored: Stored) -> bool:
    """Whether rows have columns of their own that say the same; rows that lack them are the technique's to refuse."""
    return bool(stored.unless) and any(name in row.columns for row in bare(rows.rows) for name in stored.unless)


def _beside(recipe: RowsRecipe, kind: str, slot: str, stored: Stored, maps: Sequence[str]) -> list[Numbers]:
    sources = [one.rows for one in recipe.sources() if isinstance(one.rows, str | Path)]
    places = {str(source): place for source in sources if (place := beside(source, kind)) is not None}
    lacking = [source for source, place in places.items() if not parts_of(place)] if places else ["ROWS"]
    if not lacking:
        return [Numbers(place) for place in places.values()]
    instead = f", or give rows with {' and '.join(f'`{name}`' for name in stored.unless)}" if stored.unless else ""
    instead += f"; where `{maps[0]}` makes other rows than those of the file, leave `{slot}` out instead" if maps else ""
    raise LuthierError(
        f"`{slot}` reads numbers that a model gave to the rows beforehand, and there are none",
        where=str(places.get(lacking[0], "rows.stored")),
        fix=f"luthier rows store {kind} {lacking[0]} --model MODEL, or name them: rows.stored{instead}",
    )


def _check(store: Numbers, stores: Sequence[Numbers], recipe: RowsRecipe, loaded: Loaded, *, of_base: bool) -> None:
    """Refuse a store that was made with something else than the run has."""
    here = {**written_by(loaded.tokenizer), "code": code_fingerprint()}
    changed, on_purpose = differences(store.facts, here, MADE_WITH), ""
    if of_base and store.facts["fingerprint"] != loaded.fingerprint:
        base = {"model": loaded.start.name, "fingerprint": loaded.fingerprint, "precision": _dtype(loaded)}
        names = {"model": "the model", "precision": "its precision", "fingerprint": "its numbers"}
        changed += differences(store.facts, base, names)
        # The same model in another precision is no other model, though its numbers are others.
        if store.facts["model"] not in (loaded.start.name, _model(loaded)) or store.facts["precision"] == base["precision"]:
            on_purpose = "; or name this folder under rows.stored to compare with another model on purpose"
    known = store.facts.get("vocabulary")
    if known is not None and known > loaded.parts.vocabulary:
        changed.append(f"the vocabulary: {known} tokens, now {loaded.parts.vocabulary}")
    if changed:
        command = _command(store, stores, recipe, loaded, of_base=of_base, replace=True)
        raise LuthierError(
            f"the stored numbers are not those of this run: {'; '.join(changed)}",
            where=str(store.folder),
            fix=f"write them again, as this run has it: {command}{on_purpose}",
        )


def _command(
    store: Numbers,
    stores: Sequence[Numbers],
    recipe: RowsRecipe,
    loaded: Loaded,
    rows: Sequence[Encoded] = (),
    *,
    of_base: bool,
    replace: bool = False,
) -> str:
    """What writes a store as the run needs it.

    Args:
        store: of it the kind, the place and how many probabilities are kept; and the model where it need not be the run's.
        stores: all of this kind that the run reads.
        recipe: says which rows, and how they are written.
        loaded: the run's model.
        rows: some that lack numbers; none: all do.
        of_base: the numbers are those of the model before training.
        replace: what is there is written anew.
    """
    facts = store.facts
    before = shlex.split(facts["command"])
    model, precision, writer = _model(loaded), _dtype(loaded), ""
    if not of_base:
        model, precision = facts["model"], facts["precision"]
        here = written_by(loaded.tokenizer)
        same = all(facts.get(name) == here[name] for name in ("tokenizer", "template"))
        writer = "" if same and "--tokenizer" not in before else loaded.start.source.name
    written = [
        command_of(
            store.kind,
            source,
            model,
            _options(recipe, source),
            top_k=facts.get("top_k"),
            tokenizer=writer,
            folder=None if beside(source, store.kind) == place else place,
            precision=next((name for name, one in TYPES.items() if str(one) == f"torch.{precision}"), "auto"),
        )
        for source, place in _places(store, stores, recipe, rows)
    ]
    # What is written anew is removed once, before the first rows.
    return " && ".join([f"{written[0]} --replace", *written[1:]] if replace else written)


def _places(store: Numbers, stores: Sequence[Numbers], recipe: RowsRecipe, rows: Sequence[Encoded]) -> Sequence[tuple[str, Path]]:
    """Sources of the run whose numbers belong into a store, each with its folder; those of some rows where there are such."""
    sources = [str(one.rows) for one in recipe.sources() if isinstance(one.rows, str | Path)]
    own = {one.folder: source for source in sources for one in stores if beside(source, store.kind) == one.folder}
    if rows:
        sources = [one for one in sources if any(row.where.startswith(str(place_of(one))) for row in rows)] or sources
        return [(source, next((at for at, one in own.items() if one == source), store.folder)) for source in sources]
    if store.folder in own:
        return [(own[store.folder], store.folder)]
    wrote = shlex.split(store.facts["command"])[4]
    return [(one, store.folder) for one in ([wrote] if len(stores) > 1 and wrote in sources else sources or [wrote])]


def _options(recipe: RowsRecipe, source: str) -> dict[str, Any]:
    """How the run reads and writes the rows of a source, as far as it says so."""
    fields = type(recipe).model_fields
    own = next((one.columns for one in recipe.sources() if str(one.rows) == source), None)
    found = {name: plain(getattr(recipe, name)) for name in OPTIONS} | {"columns": own or None}
    return {name: value for name, value in found.items() if value != fields[name].get_default(call_default_factory=True)}


def _model(loaded: Loaded) -> str:
    """The run's model, as a command names it: a run by its folder where that is not among those that commands look through."""
    folder = loaded.start.runs[-1].folder if loaded.start.runs else None
    return str(folder) if folder is not None and folder.parent != Path("runs") else loaded.start.name


def _dtype(loaded: Loaded) -> str:
    return str(loaded.dtype).removeprefix("torch.")
