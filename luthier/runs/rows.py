"""Rows as a model sees them."""

from __future__ import annotations

from typing import cast, get_args

from luthier.errors import LuthierError, Say, silent
from luthier.models.load import load_tokenizer, source_reads
from luthier.results.opened import source_of
from luthier.rows.chat import LossOn
from luthier.rows.look import Look, look
from luthier.rows.template import choose


def look_at_rows(
    source: str,
    model: str,
    *,
    shape: str | None = None,
    loss_on: str = "assistant",
    template: str | None = None,
    rows: int = 5,
    out: str = "runs",
    say: Say = silent,
) -> Look:
    """Rows as a model, or a run, which reads as its base does, would see them; the other arguments are those under `rows` in a recipe."""
    turns = turns_of(loss_on)
    found = source_of(model, out, say)
    tokenizer = load_tokenizer(found)
    choose(tokenizer, template)
    return look(source, tokenizer, n=rows, shape=shape, loss_on=turns, reads=source_reads(found))


def turns_of(loss_on: str) -> LossOn:
    """Which turns are targets, checked."""
    if loss_on not in get_args(LossOn):
        raise LuthierError(f"loss on `{loss_on}`", where="--loss-on", mend="use assistant, last or all")
    return cast(LossOn, loss_on)
