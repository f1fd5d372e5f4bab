"""How commands speak, to people or to scripts, and the options many of them share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from luthier.cli import complete
from luthier.errors import LuthierError

INTERRUPTED = 130
"""The exit code of a run that was stopped on request and can be resumed: what shells report of Ctrl-C."""

out = Console(emoji=False)
err = Console(stderr=True, emoji=False)
RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Keys of the recipe to set, e.g. `tune=lora train.epochs=2`.", metavar="KEY=VALUE", autocompletion=complete.overrides
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Out = Annotated[str, typer.Option(help="The folder that holds the run folders.")]
Benchmark = Annotated[bool, typer.Option("--benchmark", help="Also measure the synthetic benchmark's skills, as retention sets.")]
Skills = Annotated[
    str, typer.Option(help="With --benchmark: only these skills, with commas between.", autocompletion=complete.skill_names)
]
Dtype = Annotated[str, typer.Option(help="Of what is written: fp32, bf16, fp16, or auto for what was trained.")]
WeightsOnly = Annotated[
    bool, typer.Option("--weights-only", help="Of a run, the tuned weights without prompts, prefixes and edits beside them.")
]
Items = Annotated[int | None, typer.Option("--count", help="With --benchmark: items of each skill; 50 in a run, else 100.", min=1)]


def is_first() -> bool:
    """Whether this process speaks: of those that a launcher started, one."""
    return os.environ.get("RANK", "0") == "0"


class Face:
    """How a command speaks: to people, or to scripts."""

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet or not is_first()

    def say(self, text: str) -> None:
        """What is being done, on standard error."""
        if not self.quiet:
            err.print(f"[dim]{escape(text)}[/dim]", highlight=False)

    def show(self, facts: Any, render: Callable[[], Any]) -> None:
        """The result: JSON for scripts, else what `render` makes."""
        if not is_first():
            return
        if self.as_json:
            sys.stdout.write(document(facts))
        else:
            out.print(render())


def document(facts: Any) -> str:
    """Facts as one line of JSON."""
    text = json.dumps(facts, ensure_ascii=False, default=str)
    # Half a character, which UTF-8 cannot hold, is escaped the same way in JSON and in Python.
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


@contextmanager
def face(as_json: bool, quiet: bool = False) -> Iterator[Face]:
    """A command's face; mistakes of the user end as one clear message and exit code 2."""
    speaker = Face(as_json, quiet or as_json)
    try:
        yield speaker
    except LuthierError as error:
        if not is_first():
            sys.stderr.write(f"process {os.environ['RANK']}: {error.what}\n")
        elif as_json:
            sys.stdout.write(document(error.as_json()))
        else:
            text = escape(error.what)
            text += f"\n[dim]where[/dim]  {escape(error.where)}" if error.where else ""
            text += f"\n[dim]fix[/dim]    {escape(error.fix)}" if error.fix else ""
            err.print(Panel(text, title="error", title_align="left", border_style="red"))
        raise typer.Exit(2) from None


def listed(facts: Mapping[str, Any]) -> str:
    """Facts, one a line."""
    return "\n".join(f"{key:<24}{escape(str(value))}" for key, value in facts.items())
