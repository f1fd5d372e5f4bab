"""The page of replications: what came of them, by question, and how the lab itself was tested."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generated.tables import cell, code, paper, table, target

REPLICATIONS = Path(__file__).parents[1] / "replications"
AGAIN = "not-run-again"
"""Where replications from before the rule are listed."""


def replications() -> str:
    """Replications that ran under the lab's rule: an overview by question, then each with its numbers; and those that did not, by name."""
    from luthier.lab.verdicts import entry, results_in

    results = results_in(REPLICATIONS)
    if not results:
        return "No results are stored."
    ruled = {stem: one for stem, one in results.items() if entry(one)["under_rule"]}
    before = {stem: one for stem, one in results.items() if stem not in ruled}
    pieces = ["## What came of them"] if ruled else []
    for question in dict.fromkeys(one["question"] for one in ruled.values()):
        rows = (
            (
                f"[{code(stem)}](#{anchor(stem)})",
                ", ".join(paper(f"arXiv:{number}") for number in one["papers"]),
                f"**{one['verdict']}**{cell(rest(one))}",
                cell(one["says"]),
            )
            for stem, one in ruled.items()
            if one["question"] == question
        )
        pieces += [f"### {question}", table(("replication", "paper", "at this scale", "what the paper claims, in our words"), rows)]
    if before:
        rows = (
            (
                f"[{code(stem)}]({REPLICATIONS.name}/{stem}.json)",
                ", ".join(paper(f"arXiv:{number}") for number in one["papers"]),
                cell(one["says"]),
            )
            for stem, one in before.items()
        )
        words = (
            "These were measured before there was the rule, at three seeds and with all expectations judged together. Their results can "
            "be read; they say nothing here, and stand in no figure."
        )
        pieces += [
            target(AGAIN),
            "## Not run again under the rule",
            words,
            table(("replication", "paper", "what the paper claims"), rows),
        ]
    return "\n\n".join([*pieces, *(replication(stem, one) for stem, one in ruled.items())])


def rest(result: Mapping[str, Any]) -> str:
    """What follows a verdict: the size of the effect."""
    from luthier.lab.verdicts import in_words

    return in_words(result).removeprefix(f"{result['verdict']} at this scale")


def replication_effects() -> str:
    """The figure of all replications that ran under the rule."""
    picture = REPLICATIONS / "effects.svg"
    if not picture.exists():
        return "No replication has been run under the rule yet."
    return f"![Every replication's main effect and its interval]({REPLICATIONS.name}/{picture.name})"


def calibration() -> str:
    """How the lab does at comparisons whose outcome nobody doubts."""
    facts = tested()
    if facts is None:
        return "**Can such small experiments tell? Not measured yet.**"
    (supported, effects), (called, nulls), (later, further) = (facts["counts"][kind] for kind in ("effects", "nulls", "further"))
    return (
        f"**Can such small experiments tell? They support {supported} of {effects} effects that nobody doubts, and call {called} of "
        f"{nulls} nulls, in which a variant meets itself.** Of {further} further effects, run once when the rule was "
        f"fixed, they support {later}."
    )


def comparisons() -> str:
    """Every comparison of the lab's test of itself."""
    from luthier.lab.verdicts import difference

    facts = tested() or {}
    rows = (
        (
            kind,
            cell(one["title"]),
            cell(one["says"]),
            f"{difference(one)} {cell(one['unit'])}",
            str(one["seeds"]),
            cell(one["verdict"] if kind != "nulls" else "called a difference" if one["found"] else "no difference called"),
        )
        for kind in ("effects", "nulls", "further")
        for one in facts.get(kind, ())
    )
    return table(("", "comparison", "what", "difference (interval)", "seeds", "verdict"), rows) if facts else "Not measured yet."


def tested() -> dict[str, Any] | None:
    """The lab's test of itself, where it was run."""
    path = REPLICATIONS / "calibration.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def replication(stem: str, one: Mapping[str, Any]) -> str:
    """One replication's section."""
    from luthier.lab.results import expected, looked, spread
    from luthier.lab.verdicts import difference, number

    variants, seeds = one["variants"], len(one["seeds"])
    main, *beside = one["expectations"]
    values = ((cell(name), *(spread(variant["numbers"][name]) for variant in variants)) for name in one["measures"])
    pairs = (
        (
            cell(pair["says"] or expected(pair)),
            cell(expected(pair)) if pair["says"] else "",
            difference(pair),
            pair["verdict"],
            cell(pair["note"]),
        )
        for pair in beside
    )
    rates = (
        (
            cell(variant["name"]),
            cell(variant["meaning"]),
            "as the recipes say" if variant["rate"] is None else code(f"{variant['rate']:g}"),
            ", ".join(f"{tried['rate']:g}: {number(tried['score'])}" for tried in variant["tried"]),
            cell(variant["rate_note"]),
        )
        for variant in variants
    )
    picture = REPLICATIONS / f"{stem}.svg"
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    pieces = [
        target(anchor(stem)),
        f"## `{stem}`: {cell(one['title'])}",
        cell(one["says"]),
        f"**{one['verdict'].capitalize()}** at this scale{cell(rest(one))}, on `{one['model']['name']}`. What was asked: "
        + cell(f"{main['says'] or expected(main)} ({expected(main)}); {looked(one['rule'])}.")
        + "".join(f" Note: {cell(note)}." for note in (*one["short"], main["note"]) if note),
        table(("also expected", "that is", "difference (interval)", "verdict", ""), pairs) if beside else "",
        f"Mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}:",
        table(("measure", *(cell(variant["name"]) for variant in variants)), values),
        f"![The measures of every variant and seed]({REPLICATIONS.name}/{picture.name})" if picture.exists() else "",
        "Learning rates, chosen alike for all variants with a seed and rows of their own:",
        table(("variant", "what it is", "learning rate", "tried: score", ""), rates),
        f"**How this differs from the paper.** {cell(one['notes'])}" if one["notes"] else "",
        cell(f"{one['runs']} runs, {one['seconds'] / 60:.0f} minutes of training. {one['machine']}. {versions}."),
    ]
    return "\n\n".join(piece for piece in pieces if piece)


def anchor(stem: str) -> str:
    """Where a replication's section is linked to."""
    return "replication-" + re.sub(r"[^a-z0-9]+", "-", stem.lower())


def replication_rule() -> str:
    """The rule of verdicts, as it stands in the code."""
    from luthier.lab import verdict

    return (inspect.getdoc(verdict) or "").partition("\n\n")[2]


def tested_by(name: str) -> str:
    """A replication's name, with a link, and what came of it where it was run."""
    from luthier.lab.verdicts import entry, results_in

    result = results_in(REPLICATIONS).get(name)
    if result is None:
        return code(name)
    told = entry(result)
    return f"[{code(name)}](replications.md#{anchor(name) if told['under_rule'] else AGAIN}): {cell(told['words'])}"
