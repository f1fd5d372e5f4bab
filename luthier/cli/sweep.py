"""The command that runs a recipe with several values of its keys."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.complete import overrides
from luthier.cli.face import INTERRUPTED, Json, Quiet, RecipeFile, face

Words = Annotated[
    list[str] | None,
    typer.Argument(
        help="Keys of the recipe, several values with commas: `tune=full,lora`; and `seeds=3 learning_rates=3 jobs=1 choose_by=SET`.",
        metavar="KEY=VALUE,VALUE",
        autocompletion=overrides,
    ),
]


def sweep(
    recipe: RecipeFile,
    words: Words = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="The sweep's folder; sweeps/NAME unless given.", show_default=False)
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Hand the runs to Ray instead of processes of this machine.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe with several values of its keys, learning rates chosen alike, over several seeds; ends in one page.

    Finished runs are kept: a sweep that was stopped goes on where it was when it is called again.
    """
    with face(as_json, quiet) as speak:
        from luthier.sweep.page import sweep_summary
        from luthier.sweep.sweep import sweep as run_sweep

        command = shlex.join(
            ["luthier", "sweep", str(recipe), *(words or []), *(["--out", str(folder)] if folder else []), *["--ray"] * ray]
        )
        try:
            found = run_sweep(recipe, words or [], folder=folder, ray=ray, say=speak.say, command=command)
        except KeyboardInterrupt:
            speak.say("stopped; what is finished is kept, and the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
        speak.show(found, lambda: sweep_summary(found))
        if not found["sets"]:
            # Every run failed: the page says why, and a script must not take that for a result.
            raise typer.Exit(2)
