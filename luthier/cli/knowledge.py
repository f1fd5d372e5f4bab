"""Commands that tell what there is, and replications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from luthier.cli.complete import key_names, technique_names
from luthier.cli.face import (
    INTERRUPTED,
    Json,
    Quiet,
    face,
    out,
)
from luthier.errors import LuthierError, nearest


def techniques(
    name: Annotated[
        str | None, typer.Argument(help="Show one technique whole, with its options.", autocompletion=technique_names)
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind.")] = None,
    search: Annotated[str, typer.Option(help="Only those that speak of all these words.", metavar="WORDS")] = "",
    like: Annotated[
        str, typer.Option(help="Those most like this one, the nearest first.", metavar="NAME", autocompletion=technique_names)
    ] = "",
    as_json: Json = False,
) -> None:
    """List the techniques by what they are for, or show one with its options."""
    with face(as_json) as speak:
        from luthier.registry import catalogue, listing

        if name is not None:
            from luthier.cli.belonging import claim

            facts, text = catalogue.one_technique(name, claim)
            speak.show(facts, lambda: text)
            return
        found = listing.lines(kind)
        if like:
            found = listing.like(found, like)
        if search:
            found = listing.search(found, search)
        if as_json:
            cards = {card["name"]: card for card in catalogue.as_rows(kind)}
            speak.show([cards[line.name] for line in found], str)
            return
        whole = not (kind or like or search)
        speak.show(None, lambda: catalogue.table(found, out.width, start=whole, ordered=bool(like)))


def keys(
    name: Annotated[
        str | None, typer.Argument(help="Only this key, or those that begin so: `train`.", autocompletion=key_names)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the keys of a recipe with their defaults and meanings."""
    with face(as_json) as speak:
        from luthier.recipe import reference

        listed = reference()
        found = [line for line in listed if name is None or line[0] == name or line[0].startswith(name)]
        if not found:
            fix = nearest(str(name), [key for key, _, _ in listed]) or "see `luthier keys`"
            raise LuthierError(f"no key of a recipe begins with `{name}`", where="luthier keys", fix=fix)
        facts = [dict(zip(("key", "default", "meaning"), line, strict=True)) for line in found]
        speak.show(facts, lambda: key_table(facts))


def key_table(found: Sequence[Mapping[str, str]]) -> Table:
    """Keys in three columns: only meanings take more lines where room is short."""
    made = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("key", "default", "meaning"):
        made.add_column(column, no_wrap=column == "key", overflow="fold")
    for one in found:
        made.add_row(*(escape(one[column]) for column in ("key", "default", "meaning")))
    return made


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
    done: Annotated[bool, typer.Option("--done", help="Only papers that have a technique or a replication.")] = False,
    as_json: Json = False,
) -> None:
    """List the 270 papers, with the techniques, replications and recipes that belong to each."""
    with face(as_json) as speak:
        from luthier.cli.belonging import recipes_by_technique, replications_by_paper
        from luthier.registry.catalogue import paper_rows, paper_table

        rows = paper_rows(area, done, replications_by_paper(), recipes_by_technique())
        speak.show(rows, lambda: paper_table(rows, out.width))


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
        if listed and not (name or every or calibrate or forget):
            from luthier.lab import listing

            lines = listing.listed(folder)
            speak.show(lines, lambda: listing.table(lines))
            return
        from luthier.lab.command import Asked, answer

        asked = Asked(name, seeds, model, every, listed, calibrate, forget, budget, jobs, device, folder)
        try:
            found = answer(asked, speak.say)
        except KeyboardInterrupt:
            speak.say("stopped; what is finished is kept, and the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
        speak.show(found.facts, found.render)
