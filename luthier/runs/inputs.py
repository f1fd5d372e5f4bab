"""What a run depends on beside its recipe: rows, base, tokenizer and the user's own techniques, each with a fingerprint. A run that is
resumed must find them as they were, or its second half would be another run's."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path

from luthier import disk, registry
from luthier.errors import LuthierError, Say
from luthier.planning.plan import Plan
from luthier.recipe.paths import SOURCES
from luthier.results.folder import Run
from luthier.rows import fingerprint
from luthier.rows.cache import tokenizer_fingerprint
from luthier.rows.ids import canonical
from luthier.rows.read import read_as

PACKAGE = Path(__file__).resolve().parents[1]
DIGITS = 16
"""Hexadecimal digits of a fingerprint that are kept: people compare them by eye."""


def inputs_of(plan: Plan) -> dict[str, str]:
    """What a run reads, by the recipe's key, in words that are equal for equal content."""
    rows = plan.rows
    counted = f"{len(rows.rows):,} rows, {rows.tokens:,} tokens, {rows.supervised_tokens:,} of them labels"
    shares = plan.feed.shares()
    mixed = f", in shares {_short(canonical(shares))}" if shares else ""
    return {
        "model": plan.fingerprint[:DIGITS],
        "the tokenizer": tokenizer_fingerprint(plan.tokenizer)[:DIGITS],
        "the chat template": _short(canonical(plan.tokenizer.chat_template)),
        "train.precision": f"{str(plan.dtype).removeprefix('torch.')} on {plan.device.type}",
        "rows.train": f"{counted} ({fingerprint.of_encoded(rows.rows)[:DIGITS]}){mixed}",
        **({"rows.stored": ", ".join(one[:DIGITS] for one in plan.numbered.fingerprints)} if plan.numbered.fingerprints else {}),
        **{f"evaluate.{one.name}.rows": f"{len(one.used):,} rows ({fingerprint.of_rows(one.used)[:DIGITS]})" for one in plan.sets},
        **{f"models.{name}": _short(identity) for name, identity in (plan.others.identities if plan.others else {}).items()},
        **_named_rows(plan),
        **_own_techniques(plan),
        **{
            f"evaluate.{one.name}.metric: the code of {one.chosen.name}": one.chosen.code[:DIGITS]
            for one in plan.sets
            if one.chosen.code
        },
    }


def check_inputs(now: Mapping[str, str], run: Run, say: Say) -> None:
    """Refuse to go on with a run whose rows, base, tokenizer or techniques are no longer what they were.

    Args:
        now: what it reads now.
        run: as it was left.
        say: hears it where the run does not tell what it was begun with.

    Raises:
        LuthierError: something differs; the error names all of it, before and now.
    """
    before: Mapping[str, str] = run.facts.get("inputs") or {}
    if not before:
        say("this run does not tell which rows and which base it was begun with: that they are the same is taken on trust")
        return
    changed = [f"{key}: {before.get(key, 'not there')}, now {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        raise LuthierError(
            "what this run reads has changed since it began: " + "; ".join(changed),
            where=str(run.folder),
            fix=f"bring it back as it was, or begin a new run: luthier train {run.folder / 'recipe.yaml'}",
        )


def _named_rows(plan: Plan) -> dict[str, str]:
    """Rows that techniques calibrate or validate on."""
    found = {}
    for key, _, part in registry.slots_of(plan.chosen):
        for option in SOURCES:
            if part.options.get(option):
                rows = list(read_as(part.options[option], None, plan.recipe.rows.columns))
                found[f"{key}.{part.name}.{option}"] = f"{len(rows):,} rows ({fingerprint.of_rows(rows)[:DIGITS]})"
    return found


def _own_techniques(plan: Plan) -> dict[str, str]:
    """Files of techniques that did not come with luthier."""
    found = {}
    for key, _, part in registry.slots_of(plan.chosen):
        # Values given in Python bear the name of their kind, and stand in no file.
        if part.kind in registry.KINDS and part.name in registry.names(part.kind):
            path = Path(inspect.getfile(registry.find(part.name, (part.kind,)).factory)).resolve()
            if not path.is_relative_to(PACKAGE):
                found[f"{key}: the file of {part.name}"] = disk.sha256(path)[:DIGITS]
    return found


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]
