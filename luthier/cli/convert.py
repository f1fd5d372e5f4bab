"""The command that takes over a recipe of another tool."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.face import Json, Quiet, face
from luthier.errors import LuthierError


def convert(
    config: Annotated[Path, typer.Argument(help="A YAML or JSON file of Axolotl, LLaMA-Factory or TRL.", metavar="CONFIG")],
    tool: Annotated[
        str | None,
        typer.Option("--from", help="axolotl, llama-factory, trl, or trl-dpo and the like; recognized by the file's keys."),
    ] = None,
    devices: Annotated[int, typer.Option(help="How many devices it ran on: a step counts the rows of all.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the recipe to this file instead of printing it.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a configuration of another tool into a recipe.

    Comments in the recipe say what differs, line by line; what could not be carried over is listed at its end and on standard error.
    Nothing is read but the file and, of LLaMA-Factory, its dataset_info.json.
    """
    with face(as_json, quiet) as speak:
        from luthier.convert import convert as converted

        made = converted(config, tool, devices)
        speak.say(f"taken as a file of {made.tool}")
        for key, value, why in made.left:
            speak.say(f"not carried over: {key}: {value} ({why})")
        if out is not None:
            try:
                with out.open("x", encoding="utf-8") as file:
                    file.write(made.text)
            except FileExistsError:
                fix = "name a new file, or remove it first"
                raise LuthierError("this file exists already", where=str(out), fix=fix) from None
            except OSError as problem:
                raise LuthierError(
                    f"the file cannot be written: {problem}", where=str(out), fix="name a file that can be"
                ) from None
            speak.say(f"written to {out}; next: luthier plan {out}")
        if out is None or as_json:
            if as_json:
                speak.show(made.as_json(), str)
            else:
                # As it stands: a terminal's width must not break its lines.
                sys.stdout.write(made.text)
