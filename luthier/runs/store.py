"""Having a model give numbers to rows, once, for runs that would otherwise run it in every step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

import luthier
from luthier import disk
from luthier.errors import LuthierError, Say, nearest, silent
from luthier.evaluate.numbers import code_fingerprint, entries_of
from luthier.models.context import reads_of
from luthier.models.fingerprint import fingerprint
from luthier.models.load import load_tokenizer
from luthier.models.parts import map_parts
from luthier.recipe import RowsRecipe, make_recipe
from luthier.registry.foreign import hint
from luthier.results.folder import read_run
from luthier.results.opened import open_model
from luthier.results.start import BESIDE, find_start, is_run, load_start, recipe_of, source_of
from luthier.rows.chat import Form, form_of
from luthier.rows.chunks import Records, cut
from luthier.rows.encode import Encoded, encode_each
from luthier.rows.gather import splitter_for
from luthier.rows.numbers import (
    MADE_BY,
    MADE_WITH,
    OPTIONS,
    Numbers,
    beside,
    command_of,
    differences,
    parts_of,
    write_part,
    written_by,
)
from luthier.rows.read import name_of, stream
from luthier.rows.shapes import bad_rows_error
from luthier.rows.template import choose_for
from luthier.training.precision import pick, pick_device
from luthier.tune import Tune

_BYTES = 64 * 2**20
"""Of numbers that are in memory together."""


class Counts(NamedTuple):
    """What became of the rows of a source."""

    new: int = 0
    kept: int = 0
    """Their numbers were there already."""
    dropped: int = 0
    """They have no target."""
    skipped: int = 0
    """They could not be used."""

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(*(one + two for one, two in zip(self, other, strict=True)))


def store_numbers(
    kind: str,
    source: str,
    model: str,
    options: Mapping[str, Any] = {},
    *,
    top_k: int = 0,
    tokenizer: str = "",
    folder: Path | None = None,
    out: str = "runs",
    precision: str = "auto",
    replace: bool = False,
    say: Say = silent,
) -> dict[str, Any]:
    """Write what a model says of rows into a store: of those alone that it does not hold yet as they are.

    Args:
        kind: `likelihood`, of the targets of each answer; or `teacher`, the largest probabilities at each target.
        source: the rows.
        model: a model's name, or a run's folder or name.
        options: the keys of `OPTIONS`, as the recipe that will read the numbers has them.
        top_k: of `teacher`, how many probabilities; where the vocabulary has fewer, all of it, and what is returned says so.
        tokenizer: the model whose tokenizer and chat template write the rows; none: the model itself.
        folder: where the store lies; none: beside the rows.
        out: where runs are looked for.
        precision: of the weights, as in a recipe; `auto`: of a run, its own.
        replace: write all numbers anew.
        say: hears what is being done.

    Returns:
        What was done, as plain values.

    Raises:
        LuthierError: the rows, the model or an option cannot be used; or the store holds numbers that were made otherwise.
    """
    if kind == "teacher" and top_k < 1:
        raise LuthierError(f"{top_k} probabilities a target", where="--top-k", fix="use 1 or more")
    recipe = _rows_recipe(source, model, options)
    place = folder or beside(source, kind)
    if place is None:
        raise LuthierError(
            "these rows lie in no file or folder, so nothing lies beside them",
            where=source,
            fix="say where the numbers shall lie: --out FOLDER, and name it in the recipe: rows.stored",
        )
    tune, form = _opened(model, tokenizer, recipe, out, precision, say)
    # Models of one family pad their vocabularies to different sizes: ids beyond the tokenizer's own mean nothing to the others.
    vocabulary = min(len(form.tokenizer), tune.parts.vocabulary)
    asked, top_k = top_k, min(top_k, vocabulary)
    facts = {
        **written_by(form.tokenizer),
        "kind": kind,
        "code": code_fingerprint(),
        "model": model,
        "fingerprint": _identity(tune, model, out),
        "precision": str(next(tune.model.parameters()).dtype).removeprefix("torch."),
        "top_k": top_k if kind == "teacher" else None,
        "vocabulary": vocabulary if kind == "teacher" else None,
        "luthier": luthier.__version__,
        "command": command_of(kind, source, model, options, top_k=top_k, tokenizer=tokenizer, folder=folder, precision=precision),
    }
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / ".lock", timeout=0):
            if replace:
                for part in parts_of(place):
                    disk.remove(part)
            disk.sweep(place)
            say(f"{model}: what it says of {name_of(source)}, into {place}")
            counts = _filled(place, facts, recipe, tune, form, say)
    except Timeout:
        raise LuthierError(
            "another process is writing these numbers", where=str(place), fix="wait for it, or name another folder: --out FOLDER"
        ) from None
    held = sum(part.stat().st_size for part in parts_of(place))
    fewer = {"top_k": f"{top_k}, all tokens that there are, of {asked} that were asked for"} if top_k < asked else {}
    return {
        "numbers": kind,
        "model": model,
        "precision": facts["precision"],
        **fewer,
        **counts._asdict(),
        "bytes": held,
        "out": str(place),
    }


def _rows_recipe(source: str, model: str, options: Mapping[str, Any]) -> RowsRecipe:
    for key in options:
        if key not in OPTIONS:
            fix = hint(key, "rows", OPTIONS) or nearest(key, OPTIONS)
            raise LuthierError(f"`{key}` changes nothing of what is written", where="command line", fix=fix)
    return make_recipe({"model": model, "rows": {"train": source, **options}}, where="command line").rows


def _opened(model: str, tokenizer: str, recipe: RowsRecipe, out: str, precision: str, say: Say) -> tuple[Tune, Form]:
    """The model, and how rows are written for it."""
    open_it = _opened_run if precision != "auto" and is_run(model, out) else open_model
    tune, own = open_it(model, out=out, say=say, precision=precision)
    if not tune.parts.head or not tune.parts.causal:
        raise LuthierError(
            f"{tune.parts.architecture} does not predict next tokens here",
            where=f"--model {model}",
            fix="use a causal language model (AutoModelForCausalLM)",
        )
    writer: PreTrainedTokenizerBase = own
    if tokenizer:
        writer = load_tokenizer(source_of(tokenizer, out, say))
        if writer.get_vocab() != own.get_vocab():
            raise LuthierError(
                f"`{model}` and `{tokenizer}` have different vocabularies, so what one says of the other's tokens means nothing",
                where="--tokenizer",
                fix="use a model of the same family",
            )
    # A run's tokenizer writes as in the run where nothing else is asked for.
    if (
        tokenizer
        or not is_run(model, out)
        or recipe.chat_template is not None
        or recipe.chat_template_options
        or recipe.thinking != "keep"
    ):
        choose_for(writer, recipe)
    return tune, form_of(writer)


def _opened_run(name: str, *, out: str, say: Say, precision: str) -> tuple[Tune, PreTrainedTokenizerBase]:
    """A run's tuned model in some precision: in another than its own, its weights as a run has them that starts from it."""
    run = read_run(name, out)
    recipe = recipe_of(run)
    device = pick_device("auto")
    dtype = pick(precision, device)[0]
    own = pick(recipe.train.precision, device)[0]
    if dtype == own:
        return open_model(name, out=out, say=say)
    if (run.folder / BESIDE).is_file() or recipe.quantize != "none":
        raise LuthierError(
            f"this run brings its own precision, {str(own).removeprefix('torch.')}: what it learnt stands beside its weights",
            where=f"--precision {precision}",
            fix="leave it out",
        )
    start = find_start(name, out, say=say)
    model = load_start(start, dtype).to(device)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(start.source)
    choose_for(tokenizer, recipe.rows)
    return Tune(model, map_parts(model)), tokenizer


def _identity(tune: Tune, model: str, out: str) -> str:
    """A model's fingerprint; of a run with prompts and the like beside its weights, theirs is part of it."""
    inside = fingerprint(tune.model)
    path = read_run(model, out).folder / BESIDE if is_run(model, out) else None
    if path is None or not path.is_file():
        return inside
    return hashlib.sha256(f"{inside} {disk.sha256(path)}".encode()).hexdigest()


def _filled(folder: Path, facts: Mapping[str, Any], recipe: RowsRecipe, tune: Tune, form: Form, say: Say) -> Counts:
    """Give numbers to all rows that have none in the store."""
    held = _held(folder, facts)
    number = 1 + max((int(part.stem.removeprefix("part-")) for part in parts_of(folder)), default=-1)
    counts, wide = Counts(), 8 * (facts["top_k"] or 1)
    splitter = splitter_for(recipe, form, reads_of(tune.model.config))
    records = stream(recipe.train, shape=recipe.format, columns=recipe.columns)
    for chunk in cut(records if splitter is None else splitter.rows(records)):
        rows, here = _encoded(chunk, recipe, tune, form, counts)
        places = held.find([row.id for row in rows]) if held is not None else [-1] * len(rows)
        wanted = [
            row
            for row, place in zip(rows, places, strict=True)
            if held is None or place < 0 or int(held.encoded_R[place]) != row.digest
        ]
        if wanted:
            made = partial(entries_of, tune, kind=facts["kind"], top_k=facts["top_k"] or 0, vocabulary=facts["vocabulary"])
            entries = (one for some in _pieces(wanted, wide) for one in made(some))
            write_part(folder, number, entries, facts)
            number += 1
        counts = counts.plus(here._replace(new=len(wanted), kept=len(rows) - len(wanted)))
        say(f"{counts.new + counts.kept:,} rows have numbers")
    if not counts.new + counts.kept:
        raise LuthierError(
            "there is no row with anything to learn", where=str(recipe.train), fix="check that this is the right file"
        )
    return counts


def _held(folder: Path, facts: Mapping[str, Any]) -> Numbers | None:
    """The store as it is, if there is one."""
    if not parts_of(folder):
        return None
    held = Numbers(folder)
    changed = differences(held.facts, facts, {"kind": "what they are", **MADE_WITH, **MADE_BY})
    if changed:
        raise LuthierError(
            f"the numbers here were made otherwise: {'; '.join(changed)}",
            where=str(folder),
            fix="write them anew with --replace, or others elsewhere with --out FOLDER",
        )
    return held


def _encoded(chunk: Records, recipe: RowsRecipe, tune: Tune, form: Form, before: Counts) -> tuple[Sequence[Encoded], Counts]:
    """The rows of a chunk as a run would train on them, and how many are none."""
    found, bad = encode_each(
        chunk.rows,
        form.tokenizer,
        loss_on=recipe.loss_on,
        max_length=recipe.max_length,
        too_long=recipe.too_long,
        form=form,
        reads=reads_of(tune.model.config),
    )
    bad = [*chunk.skipped, *bad]
    if bad and recipe.on_bad_row == "stop":
        raise bad_rows_error(bad, sum(before) + len(chunk.rows) + len(chunk.skipped))
    return found.rows, Counts(dropped=len(found.dropped), skipped=len(bad))


def _pieces(rows: Sequence[Encoded], wide: int) -> Iterator[list[Encoded]]:
    """Rows in order, so many together that what each of their labels gets, in bytes, stays small."""
    piece: list[Encoded] = []
    size = 0
    for row in rows:
        more = wide * sum(sum(one.supervised) for one in row.group)
        if piece and size + more > _BYTES:
            yield piece
            piece, size = [], 0
        piece.append(row)
        size += more
    if piece:
        yield piece
