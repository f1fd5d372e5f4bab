"""The command line: a thin face over the library. `--json` prints one JSON document on standard output and nothing else there."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from luthier import __version__
from luthier.cli.away import serve
from luthier.cli.convert import convert
from luthier.cli.face import out
from luthier.cli.knowledge import keys, metrics, papers, replicate, techniques
from luthier.cli.new import new
from luthier.cli.results import chat, compare, evaluate, export, probe, runs
from luthier.cli.rows import (
    rows_answers,
    rows_benchmark,
    rows_best_of,
    rows_look,
    rows_score,
    rows_select,
    store_likelihood,
    store_teacher,
)
from luthier.cli.sweep import sweep
from luthier.cli.training import plan, quickstart, train

app = typer.Typer(
    name="luthier",
    help="Fine-tune language models, and see what each fine-tune changed.\n\n"
    "Start with a recipe: `luthier plan recipe.yaml` shows what would happen, `luthier train recipe.yaml` does it, and the run's "
    "folder holds report.html. Any key can be set on the command line: `luthier train recipe.yaml tune=lora train.epochs=2`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
rows_app = typer.Typer(help="Look at training rows before using them.", no_args_is_help=True)
app.add_typer(rows_app, name="rows")
store_app = typer.Typer(help="Have a model give numbers to rows once, for many runs.", no_args_is_help=True)
rows_app.add_typer(store_app, name="store")

COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "new": new,
    "train": train,
    "plan": plan,
    "convert": convert,
    "sweep": sweep,
    "eval": evaluate,
    "chat": chat,
    "runs": runs,
    "compare": compare,
    "probe": probe,
    "export": export,
    "serve": serve,
    "replicate": replicate,
    "keys": keys,
    "techniques": techniques,
    "metrics": metrics,
    "papers": papers,
}
ROWS_COMMANDS: dict[str, Callable[..., None]] = {
    "look": rows_look,
    "score": rows_score,
    "select": rows_select,
    "answers": rows_answers,
    "best-of": rows_best_of,
    "benchmark": rows_benchmark,
}
STORE_COMMANDS: dict[str, Callable[..., None]] = {"likelihood": store_likelihood, "teacher": store_teacher}
for _name, _command in COMMANDS.items():
    app.command(name=_name)(_command)
for _name, _command in ROWS_COMMANDS.items():
    rows_app.command(name=_name)(_command)
for _name, _command in STORE_COMMANDS.items():
    store_app.command(name=_name)(_command)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"luthier {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def luthier(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What every command takes."""


def main() -> None:
    """Entry point of the command `luthier`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
