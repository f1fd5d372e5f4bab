"""Commands for training rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from luthier.cli.complete import skill_names
from luthier.cli.face import (
    Json,
    Out,
    face,
    listed,
    out,
)

RowSource = Annotated[str, typer.Argument(help="The rows to choose from: a file, a folder, or `hub:name`.", metavar="SOURCE")]
ScoreOptions = Annotated[list[str] | None, typer.Argument(help="Options of the score, e.g. `epsilon=0.02`.", metavar="KEY=VALUE")]
By = Annotated[str, typer.Option(help="A row score: see `luthier techniques --kind row_score`.")]
Target = Annotated[str | None, typer.Option(help="Rows of the task the choice is for; none of those that will measure it.")]
Embedder = Annotated[str, typer.Option(help="What makes embeddings: a model's name, or `hash`, which needs none.")]
RowColumns = Annotated[
    str | None,
    typer.Option(
        "--columns", help="By key of a row, the column that holds it: `prompt=question,completion=reply`.", metavar="KEY=COLUMN,..."
    ),
]
RowShape = Annotated[str | None, typer.Option("--format", help="The rows' format, where it cannot be recognized.")]
LossOn = Annotated[str, typer.Option(help="Where models read the rows, which turns count: assistant, last or all.")]
AnswersKey = Annotated[str, typer.Option("--column", help="The key of the rows that holds their answers.")]
Seed = Annotated[int, typer.Option(help="Of all draws.")]
StoredRows = Annotated[str, typer.Argument(help="The rows: a file, a folder, or `hub:name`.", metavar="SOURCE")]
StoredModel = Annotated[str, typer.Option(help="A model's name, or a run's folder or name.")]
StoreOptions = Annotated[
    list[str] | None,
    typer.Argument(
        help="Keys under `rows` of the recipe that will train on them: max_length=512 loss_on=last", metavar="KEY=VALUE"
    ),
]
Writer = Annotated[str, typer.Option(help="Whose tokenizer and chat template write the rows; none: the model's own.")]
StoreOut = Annotated[Path | None, typer.Option("--out", help="The folder of the numbers; none: one beside the rows.")]
Precision = Annotated[str, typer.Option(help="Of the weights: auto, bf16, fp32 or fp64. auto: of a run, its own.")]
Replace = Annotated[bool, typer.Option("--replace", help="Write all numbers anew, whatever made those that are there.")]


def rows_look(
    source: Annotated[str, typer.Argument(help="A file of rows, a folder, or `hub:name`.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys under `rows` of the recipe: max_length=512 chat_template_options.date=2026-01-01", metavar="KEY=VALUE"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template to use.")] = "smollm2-135m-instruct",
    shape: Annotated[str | None, typer.Option("--format", help="The rows' format, where it cannot be recognized.")] = None,
    columns: RowColumns = None,
    loss_on: Annotated[str, typer.Option(help="assistant, last or all.")] = "assistant",
    template: Annotated[str | None, typer.Option("--chat-template", help="One of the tokenizer's chat templates, by name.")] = None,
    rows: Annotated[int, typer.Option("--rows", "-n", help="Rows shown.")] = 5,
    as_json: Json = False,
) -> None:
    """Show format, counts, lengths, and some rows as the model sees them, with what is learned in color or in brackets."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.recipe import apply_overrides
        from luthier.rows.columns import parse_columns
        from luthier.rows.look import render
        from luthier.runs.rows import look_at_rows

        looked = look_at_rows(
            source,
            model,
            apply_overrides({}, options or []),
            shape=shape,
            columns=parse_columns(columns),
            loss_on=loss_on,
            template=template,
            rows=rows,
            say=speak.say,
        )
        speak.show(looked.as_json(), lambda: render(looked, marked=out.color_system is None or out.no_color))


def rows_benchmark(
    skill: Annotated[str, typer.Argument(help="A skill of the synthetic benchmark.", autocompletion=skill_names)],
    target: Annotated[Path, typer.Option("--out", help="The JSONL file to write; it must not exist.")],
    count: Annotated[int, typer.Option("--count", "-n", help="Rows.", min=1)] = 100,
    split: Annotated[str, typer.Option(help="train: prompts with completions; validation, held_out: with answers.")] = "train",
    seed: Annotated[int, typer.Option(help="Other rows of the same benchmark.", min=0)] = 0,
    difficulty: Annotated[int, typer.Option(help="1 is the easiest.", min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Write rows of a skill of the synthetic benchmark, for recipes to use."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.lab.benchmark_sets import write_rows

        facts = write_rows(skill, target, split=split, count=count, seed=seed, difficulty=difficulty)
        speak.show(facts, lambda: escape(f"{facts['rows']} rows of {skill}, {split}: {target}"))


def rows_score(
    source: RowSource,
    by: By,
    out: Annotated[Path, typer.Option(help="The file to write, one `{id, score}` a line; it must not exist.")],
    options: ScoreOptions = None,
    column: Annotated[
        str | None, typer.Option(help="Write the rows themselves instead, unchanged, with the score under this key.")
    ] = None,
    target: Target = None,
    embedder: Embedder = "minilm-l6",
    loss_on: LossOn = "assistant",
    shape: RowShape = None,
    columns: RowColumns = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Give every row a number: the higher, the sooner it should be chosen. Written in the order of the rows."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.recipe import apply_overrides
        from luthier.rows.columns import parse_columns
        from luthier.rows.select import score_rows
        from luthier.runs.measure import likelihood_of_rows

        scored = score_rows(
            source,
            {by: apply_overrides({}, options or [])},
            target=target,
            embedder=embedder,
            likely=partial(likelihood_of_rows, loss_on=loss_on, say=speak.say),
            shape=shape,
            columns=parse_columns(columns),
            seed=seed,
            column=column,
            out=out,
            say=speak.say,
        )
        facts = {**scored.facts, "out": str(out)}
        speak.show(facts, lambda: listed(facts))


def rows_select(
    source: RowSource,
    by: By,
    out: Annotated[Path, typer.Option(help="The file to write, one row a line, the best first; it must not exist.")],
    options: ScoreOptions = None,
    count: Annotated[int | None, typer.Option(help="How many rows.")] = None,
    share: Annotated[float | None, typer.Option(help="Which share of the rows instead, above 0 and at most 1.")] = None,
    target: Target = None,
    embedder: Embedder = "minilm-l6",
    loss_on: LossOn = "assistant",
    shape: RowShape = None,
    columns: RowColumns = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write the rows with the highest scores, unchanged and the best first. Rows that are equal are taken once."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.recipe import apply_overrides
        from luthier.rows.columns import parse_columns
        from luthier.rows.select import select_rows
        from luthier.runs.measure import likelihood_of_rows

        spec = {by: apply_overrides({}, options or [])}
        chosen = select_rows(
            source,
            spec,
            count=count,
            share=share,
            target=target,
            embedder=embedder,
            likely=partial(likelihood_of_rows, loss_on=loss_on, say=speak.say),
            shape=shape,
            columns=parse_columns(columns),
            seed=seed,
            out=out,
            say=speak.say,
        )
        facts = {**chosen.facts, "out": str(out)}
        speak.show(facts, lambda: listed(facts))


def rows_answers(
    source: Annotated[str, typer.Argument(help="Rows with a prompt: a file, a folder, or `hub:name`.", metavar="SOURCE")],
    model: Annotated[str, typer.Option(help="Who answers: a model's name or folder, or a run.")],
    out: Annotated[Path, typer.Option(help="The file to write, each row with its answers; it must not exist.")],
    count: Annotated[int, typer.Option("--count", "-n", help="Answers of each row.", min=1)] = 16,
    temperature: Annotated[float, typer.Option(help="Divides the logits before tokens are drawn.", min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw among the most likely tokens of together this probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 128,
    column: AnswersKey = "answers",
    shape: RowShape = None,
    columns: RowColumns = None,
    seed: Seed = 0,
    folder: Out = "runs",
    as_json: Json = False,
) -> None:
    """Let a model answer each row several times, and write the rows with their answers. A call that was stopped goes on where it was."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.rows.columns import parse_columns
        from luthier.runs.answers import write_answers

        facts = write_answers(
            source,
            model,
            out,
            count=count,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            shape=shape,
            columns=parse_columns(columns),
            column=column,
            folder=folder,
            say=speak.say,
        )
        speak.show(facts, lambda: listed(facts))


def rows_best_of(
    source: Annotated[str, typer.Argument(help="Rows with answers, as `luthier rows answers` writes them.", metavar="SOURCE")],
    reward: Annotated[
        list[str],
        typer.Option(help="A run that trained a reward model, again for more members; or a key with a number for each answer."),
    ],
    gold: Annotated[
        str | None, typer.Option(help="What answers are worth: a metric such as exact_match, another run, or a key of numbers.")
    ] = None,
    combine: Annotated[
        str | None, typer.Option(help="How members become one: mean, median, min or mean_minus_deviation; none: mean.")
    ] = None,
    deviations: Annotated[
        float | None, typer.Option(help="With mean_minus_deviation: how many deviations are subtracted; none: 1.")
    ] = None,
    standardize: Annotated[
        bool, typer.Option("--standardize", help="Give each member a mean of 0 and a deviation of 1 first, over all answers here.")
    ] = False,
    column: AnswersKey = "answers",
    shape: RowShape = None,
    columns: RowColumns = None,
    folder: Out = "runs",
    as_json: Json = False,
) -> None:
    """Pick the best of n answers by a reward, for growing n, and see whether what is picked gets better or only seems to."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.report.terminal import best_of
        from luthier.rows.columns import parse_columns
        from luthier.runs.answers import best_of_answers
        from luthier.training.readout import combination

        found = best_of_answers(
            source,
            reward,
            gold=gold,
            how=combination(combine, deviations, "--combine"),
            standardize=standardize,
            shape=shape,
            columns=parse_columns(columns),
            column=column,
            folder=folder,
            say=speak.say,
        )
        speak.show(found.as_json(), lambda: best_of(found))


def store_likelihood(
    source: StoredRows,
    model: StoredModel,
    options: StoreOptions = None,
    tokenizer: Writer = "",
    folder: StoreOut = None,
    columns: RowColumns = None,
    precision: Precision = "auto",
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Have a model say how likely it finds each row's answers, for `objective: [dpo, stored_reference]` and the like."""
    _store("likelihood", source, model, options, columns, tokenizer, folder, precision, replace, as_json)


def store_teacher(
    source: StoredRows,
    model: StoredModel,
    options: StoreOptions = None,
    top_k: Annotated[int, typer.Option(help="How many of a target's probabilities, the largest first.")] = 64,
    tokenizer: Writer = "",
    folder: StoreOut = None,
    columns: RowColumns = None,
    precision: Precision = "auto",
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Have a model say what it expects at each target: its largest probabilities, whose they are, and how much is left."""
    _store("teacher", source, model, options, columns, tokenizer, folder, precision, replace, as_json, top_k=top_k)


def _store(
    kind: str,
    source: str,
    model: str,
    options: list[str] | None,
    columns: str | None,
    tokenizer: str,
    folder: Path | None,
    precision: str,
    replace: bool,
    as_json: bool,
    top_k: int = 0,
) -> None:
    with face(as_json, quiet=as_json) as speak:
        from luthier.recipe import apply_overrides
        from luthier.rows.columns import parse_columns
        from luthier.runs.store import store_numbers

        named = parse_columns(columns)

        facts = store_numbers(
            kind,
            source,
            model,
            {**apply_overrides({}, options or []), **({"columns": named} if named else {})},
            tokenizer=tokenizer,
            folder=folder,
            precision=precision,
            replace=replace,
            say=speak.say,
            top_k=top_k,
        )
        speak.show(facts, lambda: listed(facts))
