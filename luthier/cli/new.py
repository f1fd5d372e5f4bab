"""The command that writes a recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from luthier.cli.face import Json, face


def new(
    job: Annotated[
        str | None, typer.Argument(help="What to train for; see --list. None: guessed from the rows.", metavar="JOB")
    ] = None,
    data: Annotated[
        str | None, typer.Argument(help="Rows: a file, a folder, or `hub:name`. None: a few to begin with.", metavar="DATA")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The recipe to write, which must not exist; none: JOB.yaml.")] = None,
    model: Annotated[str | None, typer.Option(help="The model to train; none: a known one that fits into memory.")] = None,
    list_jobs: Annotated[bool, typer.Option("--list", help="List the jobs.")] = False,
    as_json: Json = False,
) -> None:
    """Write a recipe for a job, after a look at your rows and this machine."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.runs.new import jobs_as_rows, new

        if list_jobs:
            rows = jobs_as_rows()
            speak.show(rows, lambda: _table([(one["job"], f"{one['for']}\n[dim]{one['rows']}[/dim]") for one in rows]))
            return
        written = new(job, data, out=out, model=model, say=speak.say)
        speak.show(written.as_json(), lambda: _table([(word, escape(said)) for word, said in written.lines()]))


def _table(lines: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for word, said in lines:
        table.add_row(f"[bold]{word}[/bold]", said)
    return table
