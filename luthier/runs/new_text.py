"""The text of a recipe that `luthier new` writes: every key with the reason why it stands there."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from luthier.errors import printable
from luthier.models.packaged import BUILT, PACKAGED
from luthier.recipe import make_recipe
from luthier.recipe.parts import choose_parts
from luthier.recipe.yaml_text import on_one_line, parse
from luthier.rows.limits import TooLong
from luthier.rows.shapes import BadRow
from luthier.runs.fitting import Fit
from luthier.runs.jobs import Asked

WIDTH = 80
_RATES = {"workshop-small": 3e-3, "workshop": 1e-3, "workshop-large": 1e-3}
"""Of the models that come with luthier, which are far smaller than those that techniques' own rates are for."""
_ENOUGH = 20
"""Rows from which on a tenth can be held out."""
_BATCH = {"preferences": 16, "ranked": 16, "reward": 16, "classify": 16, "regress": 16, "names": 16, "feedback": 32, "search": 32}
_SHOWN = {
    "exact_match": "the answer, word for word; `contains` where it may say more",
    "json_match": "the same JSON, in any order of its keys",
    "rouge_l": "the longest common run of words; `judge` has a model grade answers",
    "tool_call": "the right tool with the right arguments",
}


class Facts(NamedTuple):
    """What a recipe is written from."""

    job: str
    title: str
    command: str
    model: str
    place: str
    asked: Asked
    fitted: Fit
    format: str | None
    columns: Mapping[str, str] | None
    rows: int
    lengths: Mapping[str, int]
    too_long: int
    context: int | None
    bad: Sequence[BadRow]
    warnings: Sequence[str]


def recipe_text(facts: Facts) -> str:
    """The recipe, checked.

    Raises:
        LuthierError: it would be refused, which is a mistake of luthier's own.
    """
    parts = [_head(facts), _model(facts), _rows(facts), _objective(facts), _train(facts), _evaluate(facts)]
    text = "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"
    choose_parts(make_recipe(parse(text), where="the recipe that luthier new wrote"))
    return text


def cut_side(job: str) -> TooLong:
    """Which side of a row that is too long matters less: of a conversation, and of a prompt with its answers, the beginning."""
    return "left" if job in ("chat", "tools", "preferences", "ranked", "reward") else "right"


def _head(facts: Facts) -> list[str]:
    title = facts.title[0].upper() + facts.title[1:]
    lengths = ", ".join(f"{name} {count:,}" for name, count in facts.lengths.items())
    lines = [
        *_said(f"{title}. Written by `{facts.command}` after a look at the rows."),
        "#",
        *_said(f"{facts.rows:,} rows; tokens: {lengths}; the model reads {facts.context or 'any number'}."),
        *(line for one in facts.warnings for line in _said(f"Look: {one}.")),
        "#",
        *_said(
            "First `luthier plan` this file: it says steps, memory and time. Then `luthier train` it; the run's folder holds report.html."
        ),
    ]
    return lines


def _model(facts: Facts) -> list[str]:
    lines = [*_said("A hub name, a folder, a GGUF file, a short name or an earlier run."), f"model: {on_one_line(facts.model)}"]
    if "quantize" in facts.fitted.keys:
        lines += [*_said("The weights in four bits, since more will not fit: they stay as they are."), "quantize: nf4"]
    other = "lora: less memory" if facts.fitted.keys["tune"] == "full" else "full: every parameter, with more memory"
    lines += [*_said(f"What trains; {facts.fitted.said}. Or {other}."), f"tune: {facts.fitted.keys['tune']}"]
    return lines


def _rows(facts: Facts) -> list[str]:
    lines = ["rows:", f"  train: {on_one_line(facts.place)}"]
    if facts.columns:
        lines += [
            *_said("By key of a row, the column that holds it. Is that so?", 2),
            f"  columns: {on_one_line(dict(facts.columns))}",
        ]
    if facts.format is not None:
        lines += [*_said("The columns fit several formats.", 2), f"  format: {on_one_line(facts.format)}"]
    if "map" in facts.asked.keys:
        lines += [*_said(f"{facts.asked.why.capitalize()}.", 2), f"  map: {on_one_line(facts.asked.keys['map'])}"]
    if facts.too_long:
        said = f"{facts.too_long:,} rows are longer than the {facts.context:,} tokens that the model reads"
        if facts.job == "documents":
            lines += [*_said(f"{said}: they are split.", 2), f"  blocks: {{tokens: {facts.context}}}"]
        else:
            side = cut_side(facts.job)
            where = "beginning" if side == "left" else "end"
            lines += [*_said(f"{said}: they lose their {where}.", 2), f"  too_long: {side}"]
    if facts.bad:
        first = facts.bad[0]
        said = f"{len(facts.bad)} rows cannot be used and are left out; the first: {first.where}: {first.reason}"
        lines += [*_said(said, 2), "  on_bad_row: skip"]
    if facts.rows >= _ENOUGH:
        # An answer that was liked or not is compared with that of another row, so there must be two.
        amount, what = (max(2, facts.rows // 10), "So many rows are") if facts.job == "feedback" else (0.1, "This share is")
        lines += [*_said(f"{what} held out, and measured as `validation` before and after.", 2), f"  validate: {amount}"]
    return lines


def _objective(facts: Facts) -> list[str]:
    if "objective" not in facts.asked.keys:
        return []
    why = [] if not facts.asked.why or "map" in facts.asked.keys else _said(f"{facts.asked.why[0].upper()}{facts.asked.why[1:]}.")
    return [*why, f"objective: {on_one_line(facts.asked.keys['objective'])}"]


def _train(facts: Facts) -> list[str]:
    epochs = 4 if facts.rows < 1_000 else 2 if facts.rows < 10_000 else 1
    lines = ["train:", *_said("Passes over the rows.", 2), f"  epochs: {epochs}"]
    if facts.job in _BATCH:
        lines += [*_said("Rows of one optimizer step.", 2), f"  batch_rows: {_BATCH[facts.job]}"]
    else:
        lines += [*_said("Most tokens of one optimizer step.", 2), "  batch_tokens: 2048"]
    if facts.model in _RATES and facts.model in (*PACKAGED, *BUILT):
        lines += [*_said("So high for so small a model alone.", 2), f"  learning_rate: {_RATES[facts.model]}"]
    else:
        lines += _said("Without a learning_rate, the technique's own is taken.", 2)
    return lines


def _evaluate(facts: Facts) -> list[str]:
    if facts.rows >= _ENOUGH:
        begin = "Rows of a file of their own are measured as well"
    else:
        begin = "What was learned shows in rows that were not trained on: put some into a file of their own"
    metric = facts.asked.metric
    keys = ", of rows with prompt and answer" if metric in _SHOWN else ""
    meaning = f" ({_SHOWN[metric]}{keys})" if metric in _SHOWN else ""
    text = f"{begin}. A metric for such rows: {metric}{meaning}; `luthier metrics` lists all."
    return [*_said(text), "# evaluate:", f"#   held_out: {{rows: held_out.jsonl, metric: {metric}}}"]


def _said(text: str, indent: int = 0) -> list[str]:
    """A comment; characters that end a line or steer a terminal are spaces in it."""
    start = " " * indent + "# "
    return textwrap.wrap(printable(text), WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)
