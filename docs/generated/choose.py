"""Which technique: what was measured of the first three to try, and all of them by what people want."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from generated.replications import AGAIN, REPLICATIONS, anchor
from generated.tables import cell, code, table
from luthier import registry
from luthier.registry import KINDS
from luthier.registry.purposes import sorted_out

COSTS = Path(__file__).parents[2] / "bench" / "techniques.json"
FIRST = ("lora", "full", "half")
"""What to try first."""
VARIANTS = {"full": "full", "half": "half", "lora, rank 8": "lora"}
"""The variants of replications that stand for one of them."""
REFERENCE = "technique-reference.md"


def by_purpose() -> str:
    """Every technique once, one line each, under what it is for."""
    pieces = []
    for purpose, found in sorted_out(registry.cards(tuple(KINDS))):
        rows = (
            (f"[{code(card.name)}]({REFERENCE}#{card.name})", cell(card.summary), replicated(card.replication)) for card in found
        )
        pieces += [f"### {purpose.title}", purpose.advice, table(("technique", "what it does", "its replication"), rows)]
    return "\n\n".join(pieces)


def replicated(name: str) -> str:
    """The verdict on a technique's paper, with a link to the numbers; empty where none was run."""
    from luthier.lab.verdicts import entry, results_in

    result = results_in(REPLICATIONS).get(name)
    if result is None:
        return ""
    ruled = entry(result)["under_rule"]
    return f"[{result['verdict'] if ruled else 'before the rule'}](replications.md#{anchor(name) if ruled else AGAIN})"


def choices() -> str:
    """The first three beside each other: what their steps cost, and what replications saw of learning and forgetting."""
    facts = json.loads(COSTS.read_text(encoding="utf-8"))
    costs = {one["name"]: one for one in facts["results"]}
    rows = [
        ["parameters that train", *(share(costs[name], costs["full"]) for name in FIRST)],
        ["memory above the model", *(f"{above(costs[name]):,.0f} MiB" for name in FIRST)],
        ["time a step, beside `full`", *(f"{1 / costs[name]['speed_over_full']:.2f}" for name in FIRST)],
        ["memory and time, embeddings frozen", "", *(with_frozen(costs[f"{name}, embeddings frozen"]) for name in FIRST[1:])],
        *([f"learned, retained ([{stem}](replications.md#{anchor(stem)}))", *learned(stem)] for stem in ("half", "lora")),
    ]
    setting = facts["setting"]
    said = (
        f"Costs: {setting['model']}, {setting['precision']}, {setting['rows_a_step']} rows of {setting['max_length']} tokens a step, on a "
        "processor ([every technique](speed.md#every-technique)). Learned, retained: means over seeds of replications on the toy model "
        "`workshop-small`, each at the learning rate that learned most."
    )
    return f"{table(('', *map(code, FIRST)), rows)}\n\n{said}"


def share(one: dict[str, Any], full: dict[str, Any]) -> str:
    """How many parameters train, and what share of all that is."""
    return f"{one['trained_parameters'] / 1e6:,.1f} million ({100 * one['trained_parameters'] / full['trained_parameters']:.1f} %)"


def above(one: dict[str, Any]) -> float:
    """The peak less libraries and model, in MiB: gradients, optimizer state, activations."""
    return float(one["peak_bytes"] - one["imported_bytes"] - one["model_bytes"]) / 2**20


def with_frozen(one: dict[str, Any]) -> str:
    """Memory and time of a technique that leaves the embeddings alone."""
    return f"{above(one):,.0f} MiB, {1 / one['speed_over_full']:.2f}"


def learned(stem: str) -> list[str]:
    """What each of the first three learned and retained in a replication: its first two measures, means over seeds."""
    result = json.loads((REPLICATIONS / f"{stem}.json").read_text(encoding="utf-8"))
    found = {
        VARIANTS.get(variant["name"], ""): "{:.0f} %, {:.0f} %".format(
            *(100 * mean(variant["numbers"][name]) for name in result["measures"][:2])
        )
        for variant in result["variants"]
    }
    return [found.get(name, "") for name in FIRST]
