"""Which technique: what was measured of the first three to try, and all of them by what people want."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from generated.replications import AGAIN, REPLICATIONS, anchor
from generated.tables import cell, code, table
from luthier import registry
from luthier.registry import KINDS

COSTS = Path(__file__).parents[2] / "bench" / "techniques.json"
FIRST = ("lora", "full", "half")
"""What to try first."""
VARIANTS = {"full": "full", "half": "half", "lora, rank 8": "lora"}
"""The variants of replications that stand for one of them."""
REFERENCE = "technique-reference.md"


class Purpose(NamedTuple):
    """What somebody wants, and the techniques for it: those that are named, then all others of these kinds that no purpose names."""

    title: str
    advice: str
    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


PURPOSES = (
    Purpose(
        "Train all of a model, or parts of it in place",
        "Under `tune`. The result is a model of the same size, and a delta. No quantized base.",
        ("full", "half"),
        ("selective",),
    ),
    Purpose(
        "Train a small adapter on frozen weights",
        "Under `tune`. Little optimizer state, small files, a quantized base if you like; low-rank ones leave as PEFT adapters.",
        ("lora",),
        ("weight_delta",),
    ),
    Purpose(
        "Train something beside frozen weights: hidden states, prefixes, prompts",
        "Under `tune`. Very few parameters. Most cannot be merged into the weights.",
        ("ia3", "adapter"),
        ("representation_edit", "prefix", "prompt"),
    ),
    Purpose(
        "Learn from good answers",
        "Under `objective`; [Objectives](objectives.md) says how they go together.",
        ("cross_entropy",),
        ("loss_term", "token_loss"),
    ),
    Purpose(
        "Forget less: stay near the model before training",
        "Under `objective`, beside a loss or instead of one. Rows of what should be retained, mixed in, are the other way.",
        ("kl", "asft", "f_divergence", "f_divergence_rows"),
    ),
    Purpose(
        "Disturb what is read, so that it is learned more robustly",
        "Under `objective`, beside a loss.",
        ("neftune", "noisefit"),
        ("input_map",),
    ),
    Purpose(
        "Decide which tokens and rows count in the loss",
        "Under `token_weight`, with any loss.",
        (),
        ("token_weight",),
    ),
    Purpose(
        "Prefer some answers to others",
        "Under `objective`; [Preferences](preferences.md) says which for what.",
        ("dpo", "kto", "orpo", "simpo"),
        ("pair_loss", "step_loss", "reference"),
    ),
    Purpose(
        "Learn from a teacher",
        "Under `objective`; see [Distillation](distillation.md).",
        ("distill", "distill_stored", "self_distillation", "weak_to_strong"),
    ),
    Purpose(
        "Classify, tag, score, embed",
        "Under `objective`, except `ptec` (`tune`); see [Heads](heads.md).",
        ("classify", "multi_label", "classify_tokens", "regress", "reward_model", "embed", "ptec"),
        ("head",),
    ),
    Purpose(
        "Take a step: optimizers, clipping, memory of gradients",
        "Under `optimizer` and `gradient_estimator`.",
        ("adamw",),
        ("optimizer", "gradient_transform", "gradient_estimator", "callback", "freezing"),
    ),
    Purpose(
        "Make other rows before training",
        "Under `rows: map`.",
        (),
        ("row_map",),
    ),
    Purpose(
        "Choose rows",
        "`luthier rows score` and `luthier rows select`; see [scores of rows](rows.md#scores-of-rows).",
        (),
        ("row_score",),
    ),
    Purpose(
        "Look inside a model",
        "`luthier probe NAME RUN`.",
        (),
        ("probe",),
    ),
)


def by_purpose() -> str:
    """Every technique once, one line each, under what it is for."""
    pieces = []
    for purpose, found in sorted_out(registry.cards(tuple(KINDS))):
        rows = (
            (f"[{code(card.name)}]({REFERENCE}#{card.name})", cell(card.summary), replicated(card.replication)) for card in found
        )
        pieces += [f"### {purpose.title}", purpose.advice, table(("technique", "what it does", "its replication"), rows)]
    return "\n\n".join(pieces)


def sorted_out(cards: Iterable[registry.Card]) -> Iterator[tuple[Purpose, list[registry.Card]]]:
    """The purposes that have techniques, each with them: those it names in its order, the rest of its kinds behind them.

    Raises:
        SystemExit: a technique has no purpose.
    """
    left = {card.name: card for card in cards}
    named = {name for purpose in PURPOSES for name in purpose.names}
    for purpose in PURPOSES:
        of_kind = [name for kind in purpose.kinds for name, card in left.items() if card.kind == kind and name not in named]
        if found := [left[name] for name in (*purpose.names, *of_kind) if name in left]:
            yield purpose, found
    homeless = [name for name, card in left.items() if name not in named and not any(card.kind in one.kinds for one in PURPOSES)]
    if homeless:
        raise SystemExit(f"docs/generated/choose.py: no purpose has {', '.join(homeless)}. Name their kind there.")


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
