"""What a run holds out of its training rows, to measure how it does on rows that it does not learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from luthier.errors import LuthierError
from luthier.evaluate.metrics import METRICS
from luthier.evaluate.planned import BY_HEAD
from luthier.evaluate.sets import EvalSet, default_metric, fits
from luthier.kinds import Head, RowMap, Services
from luthier.kinds.parts import Reads
from luthier.planning.load import Loaded
from luthier.recipe import VALIDATION, RowsRecipe
from luthier.rows.blocks import Splitter
from luthier.rows.encode import Purpose, encode_each
from luthier.rows.held_out import KEY, held_out
from luthier.rows.limits import Limits
from luthier.rows.read import Rows, read_as
from luthier.rows.shapes import BadRow, Row, bad_rows_error
from luthier.rows.sources import Sources, Streamed, apart

LOOKS = 10
"""How often a run measures what it holds out where its recipe does not say."""


class HeldOut(NamedTuple):
    """Rows that are measured and not learned."""

    rows: Sequence[Row]
    """As they were read."""
    mapped: Sequence[Row]
    """After the run's row maps; without these the same."""
    said: str
    """How many there are, in words."""


def hold_out(recipe: RowsRecipe, seed: int, sources: Sources, splitter: Splitter | None = None) -> tuple[Sources, HeldOut | None]:
    """Take rows out of the sources, or read them.

    Args:
        recipe: what it says about rows.
        seed: the run's.
        sources: the training rows.
        splitter: what cut these into blocks, if anything did, and does so with rows of their own.

    Returns:
        What is left to train on, and what is held out, if anything is.

    Raises:
        LuthierError: there are too few rows, they lack the column, or rows of their own cannot be read.
    """
    if recipe.validate is None:
        return sources, None
    if not isinstance(recipe.validate, int | float):
        own = read_as(recipe.validate, None, recipe.columns, purpose="evaluate", shape=recipe.format)
        rows = list(own) if splitter is None else list(splitter.rows(own))
        return sources, HeldOut(rows, rows, f"{len(rows):,} rows of {own.name}")
    split, taken = held_out(sources, recipe.validate, seed, recipe.validate_by)
    names = [one.name for one in sources]
    if recipe.streaming:
        # Rows that are in memory have ids of their own already. Equal ones are all on one side, so their numbers are the same.
        taken = [list(one.rows) for one in apart(Rows(*one) for one in zip(names, map(tuple, taken), strict=True))]
    rows = [row for some in taken for row in some]
    shares = ", ".join(f"{len(some):,} of {name}" for some, name in zip(taken, names, strict=True))
    together = f", those of one `{recipe.validate_by}` together" if recipe.validate_by else ""
    said = f"{len(rows):,} rows{f' ({shares})' if len(names) > 1 else ''}{together}"
    left: list[Any] = [
        replace(one, without=split)
        if isinstance(one, Streamed)
        else replace(one, rows=tuple(row for row in one if not split.takes(row)))
        for one in sources
    ]
    return left, HeldOut(rows, rows, said)


def through(value: RowMap, held: HeldOut, services: Services) -> HeldOut:
    """What one of the run's row maps makes of the rows, as of those that are learned.

    Raises:
        LuthierError: it can make nothing of them.
    """
    try:
        return held._replace(mapped=value.map(list(held.mapped), services))
    except LuthierError as problem:
        what = f"of the rows that are held out: {problem.what}"
        raise LuthierError(what, where=f"{KEY}, {problem.where}", fix="hold out more rows, or name rows of their own") from problem


def usable(held: HeldOut, recipe: RowsRecipe, loaded: Loaded, purpose: Purpose) -> HeldOut:
    """Without the rows that training would drop, too; those it would stop at are refused.

    Raises:
        LuthierError: a row cannot be used and the recipe does not skip such rows, or none is left.
    """
    found, bad = encode_each(
        held.mapped,
        loaded.tokenizer,
        purpose=purpose,
        loss_on=recipe.loss_on,
        max_length=recipe.max_length,
        too_long=recipe.too_long,
        reads=loaded.reads,
    )
    if bad and recipe.on_bad_row == "stop":
        raise bad_rows_error(bad, len(held.mapped))
    lost: Sequence[BadRow] = (*bad, *found.dropped)
    if not found.rows:
        raise bad_rows_error(lost, len(held.mapped))
    ids = {row.id for row in found.rows}
    said = f"{held.said}, of which {len(lost):,} cannot be used: {lost[0].where}: {lost[0].reason}" if lost else held.said
    return held._replace(mapped=[row for row in held.mapped if row.id in ids], said=said)


def held_out_set(held: HeldOut, recipe: RowsRecipe, reads: Reads, head: Head | None) -> EvalSet:
    """What is held out as an evaluation set: measured by its loss where rows have one, with the labels that training would learn.

    Raises:
        LuthierError: no metric fits the rows.
    """
    longest = Limits(recipe.max_length, recipe.too_long, reads).longest
    encoding = {"loss_on": recipe.loss_on, "max_length": longest, "too_long": recipe.too_long}
    shape, metric = BY_HEAD.get(head.means, ("", "")) if head is not None else ("", "")
    for rows in (held.mapped, held.rows):
        if rows and rows[0].shape == shape:
            return EvalSet(VALIDATION, rows, metric, encoding=encoding)
        for name in ("loss", default_metric(rows)):
            if head is None and all(fits(row, METRICS[name]) for row in rows):
                return EvalSet(VALIDATION, rows, name, encoding=encoding)
    raise LuthierError(
        f"no metric measures rows that are `{held.mapped[0].shape}` here",
        where=f"{KEY}: {held.mapped[0].where}",
        fix="leave it out, and name rows with answers under `evaluate`",
    )
