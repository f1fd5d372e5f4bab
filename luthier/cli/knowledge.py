"""Commands that tell what there is, and replications."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.face import (
    INTERRUPTED,
    Json,
    Quiet,
    face,
)


def techniques(
    kind: Annotated[str | None, typer.Option(help="Only this kind.")] = None,
    name: Annotated[str | None, typer.Argument(help="Show one technique whole, with its options.")] = None,
    as_json: Json = False,
) -> None:
    """List every technique with its card, or show one."""
    with face(as_json) as speak:
        from luthier.registry.catalogue import as_rows, one_technique, table

        if name is not None:
            facts, text = one_technique(name)
            speak.show(facts, lambda: text)
            return
        rows = as_rows(kind)
        speak.show(rows, lambda: table(rows))


def metrics(
    name: Annotated[str | None, typer.Argument(help="Show one metric whole, with its options and an example.")] = None,
    as_json: Json = False,
) -> None:
    """List what evaluation sets can be measured by, or show one metric."""
    with face(as_json) as speak:
        from luthier.evaluate.catalogue import as_rows, one_metric, table

        if name is not None:
            facts, shown = one_metric(name)
            speak.show(facts, lambda: shown)
            return
        rows = as_rows()
        speak.show(rows, lambda: table(rows))


def papers(
    area: Annotated[str | None, typer.Option(help="Only areas that contain this word.")] = None,
    done: Annotated[bool, typer.Option("--done", help="Only papers that have a technique.")] = False,
    as_json: Json = False,
) -> None:
    """List the 270 papers and what stands for each."""
    with face(as_json) as speak:
        from luthier.registry.catalogue import paper_rows, paper_table

        rows = paper_rows(area, done)
        speak.show(rows, lambda: paper_table(rows))


def replicate(
    name: Annotated[str | None, typer.Argument(help="A replication to run.")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Repetitions of every variant and one look at them, instead of the rule.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Instead of the replication's own.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the replications, with their verdicts.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Run all replications, the quickest first.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Test the rule itself: known effects, and variants against themselves.")
    ] = False,
    budget: Annotated[str | None, typer.Option(help="With --all: begin none that would take longer, e.g. 60m.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at the same time; one for each processor core.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    folder: Annotated[Path, typer.Option("--out", help="The folder that holds the results.")] = Path("replications"),
    forget: Annotated[bool, typer.Option("--forget", help="Remove the runs that were kept.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a paper's claim again as a small experiment, with a verdict over several seeds.

    Finished runs are kept: a replication that was stopped goes on where it was when it is called again.
    """
    with face(as_json, quiet) as speak:
        from luthier.lab.command import Asked, answer

        asked = Asked(name, seeds, model, every, listed, calibrate, forget, budget, jobs, device, folder)
        try:
            found = answer(asked, speak.say)
        except KeyboardInterrupt:
            speak.say("stopped; what is finished is kept, and the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
        speak.show(found.facts, found.render)
