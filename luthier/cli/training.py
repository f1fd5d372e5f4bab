"""Commands that run recipes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from luthier.cli.complete import run_names
from luthier.cli.face import (
    INTERRUPTED,
    Benchmark,
    Face,
    Items,
    Json,
    Overrides,
    Quiet,
    RecipeFile,
    Skills,
    err,
    face,
)
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.recipe import Recipe


def train(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="Continue this run, by name or folder; ends in the same weights.", autocompletion=run_names)
    ] = None,
    benchmark: Benchmark = False,
    skills: Skills = "",
    count: Items = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model, measure it before and after, and write a report.

    Interrupt once (Ctrl-C) to finish the step, save and stop (exit code 130); `luthier train --resume RUN` goes on. A second
    interrupt stops at once.
    """
    with face(as_json, quiet) as speak:
        from luthier.recipe import read_recipe

        words = list(overrides or [])
        if resume is not None and recipe is not None and "=" in str(recipe) and not recipe.is_file():
            # Without a recipe, the first key to set stands where a recipe would.
            recipe, words = None, [str(recipe), *words]
        if recipe is None:
            if resume is None:
                raise LuthierError("a recipe is missing", where="luthier train", fix="give a recipe, or --resume RUN")
            from luthier.results.folder import read_run
            from luthier.runs.resume import recipe_file

            recipe = recipe_file(read_run(resume))
        # A mistake in a recipe is told before torch is loaded.
        read = _measuring_benchmark(read_recipe(recipe, words), benchmark, skills, count)
        _run(read, resume, _command(recipe, words, benchmark, skills, count), speak)


def quickstart(overrides: Overrides = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Teach a small chat model sixty invented facts, and see what it learned and what it kept.

    The recipe comes with luthier; the model, of 135 million parameters, is fetched once. `luthier quickstart model=workshop-small`
    needs no network, and shows how a run goes on a toy model that knows no English.
    """
    with face(as_json, quiet) as speak:
        from luthier.cli.belonging import recipes_folder
        from luthier.recipe import read_recipe

        folder = recipes_folder()
        recipe = Path("quickstart.yaml") if folder is None else folder / "quickstart.yaml"
        read = read_recipe(recipe, overrides or [])
        speak.say(f"training by {recipe}")
        _run(read, None, shlex.join(["luthier", "quickstart", *(overrides or [])]), speak)


def _run(recipe: Recipe, resume: str | None, command: str, speak: Face) -> None:
    """Train, show what came of it, and end as an interrupted command does where it was."""
    from luthier.cli.progress import shown
    from luthier.report.terminal import summary
    from luthier.runs.train import train as run_training

    with shown(err, quiet=speak.quiet) as bar:
        run = run_training(recipe, resume=resume, say=bar.say, tell=bar.step, command=command)
    speak.show(run.as_json(), lambda: summary(run.facts))
    if run.facts["status"] == "stopped":
        raise typer.Exit(INTERRUPTED)


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take two steps, thrown away, and tell their memory and time.")
    ] = False,
    benchmark: Benchmark = False,
    skills: Skills = "",
    count: Items = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a run in order, with what trains, steps, memory and time. Trains nothing that is kept."""
    with face(as_json, quiet) as speak:
        from luthier.recipe import read_recipe

        read = _measuring_benchmark(read_recipe(recipe, overrides or []), benchmark, skills, count)

        from luthier.planning.plan import LABEL, make_plan, measure_plan

        made = make_plan(read, speak.say)
        facts, lines = made.as_json(), made.lines()
        if measure:
            measured = measure_plan(made)
            facts["measured"] = measured.as_json()
            lines.append(f"{'measured':<{LABEL}} {measured.described()}")

        def render() -> Table:
            table = Table.grid(padding=(0, 2))
            for line in lines:
                key, text = line[:LABEL].rstrip(), line[LABEL:].strip()
                table.add_row(f"[bold]{escape(key)}[/bold]", escape(text))
            return table

        speak.show(facts, render)


def _measuring_benchmark(recipe: Recipe, benchmark: bool, skills: str, count: int | None) -> Recipe:
    if not benchmark:
        if skills or count is not None:
            raise LuthierError("--skills and --count are of the synthetic benchmark", where="command line", fix="add --benchmark")
        return recipe
    from luthier.lab.benchmark_sets import COUNT, named, with_world

    return with_world(recipe, skills=named(skills), count=count or COUNT)


def _command(recipe: Path, overrides: list[str] | None, benchmark: bool, skills: str, count: int | None) -> str:
    measured = ["--benchmark"] * benchmark + ["--skills", skills] * bool(skills) + ["--count", str(count)] * (count is not None)
    return shlex.join(["luthier", "train", str(recipe), *(overrides or []), *measured])
