"""Rows as a model sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from luthier.errors import LuthierError, Say, nearest, silent
from luthier.models.load import load_tokenizer, source_reads
from luthier.recipe import make_recipe
from luthier.registry.foreign import hint
from luthier.results.start import source_of
from luthier.rows.chat import LossOn
from luthier.rows.columns import Columns
from luthier.rows.limits import check_choice
from luthier.rows.look import Look, look
from luthier.rows.template import choose
from luthier.rows.thinking import Thinking

_OPTIONS = ("max_length", "too_long", "chat_template_options", "thinking", "blocks")
_OF_TEMPLATES = ("chat_template_options", "thinking")


def look_at_rows(
    source: str,
    model: str,
    options: Mapping[str, Any] = {},
    *,
    shape: str | None = None,
    columns: Columns | None = None,
    loss_on: str = "assistant",
    template: str | None = None,
    rows: int = 5,
    out: str = "runs",
    say: Say = silent,
) -> Look:
    """Rows as a model, or a run, which reads as its base does, would see them.

    Args:
        source: the rows.
        model: whose tokenizer and template write them.
        options: `max_length`, `too_long`, `chat_template_options`, `thinking` and `blocks`, as under `rows` in a recipe.
        shape, columns, loss_on, template: the same.
        rows: how many are shown.
        out: where runs are looked for.
        say: hears what is being done.

    Raises:
        LuthierError: a key or a value is not known, or the rows cannot be read.
    """
    for key in options:
        if key not in _OPTIONS:
            fix = hint(key, "rows", _OPTIONS) or nearest(key, _OPTIONS)
            raise LuthierError(f"`{key}` changes nothing of what is shown", where="command line", fix=fix)
    turns = turns_of(loss_on)
    found = source_of(model, out, say)
    tokenizer = load_tokenizer(found)
    thinking = options.get("thinking", "keep")
    check_choice("thinking", thinking, get_args(Thinking))
    choose(tokenizer, template, options.get("chat_template_options") or {}, thinking=thinking)
    limits = {key: value for key, value in options.items() if key not in _OF_TEMPLATES}
    if "blocks" in options:
        limits["blocks"] = make_recipe(
            {"model": model, "rows": {"train": source, "blocks": options["blocks"]}}, where="command line"
        ).rows.blocks
    return look(source, tokenizer, n=rows, shape=shape, columns=columns, loss_on=turns, reads=source_reads(found), **limits)


def turns_of(loss_on: str) -> LossOn:
    """Which turns are labels, checked."""
    if loss_on not in get_args(LossOn):
        raise LuthierError(f"loss on `{loss_on}`", where="--loss-on", fix="use assistant, last or all")
    return cast(LossOn, loss_on)
