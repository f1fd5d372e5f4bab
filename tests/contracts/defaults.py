"""What people get who name a technique and nothing else, pinned: `python -m tests.contracts.defaults` writes it anew."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from luthier import registry
from luthier.registry import KINDS

PINNED = Path(__file__).with_name("defaults.json")
REQUIRED = "(required)"


def defaults() -> dict[str, dict[str, Any]]:
    """Of every technique the defaults of its options and what its card says of the start, by kind and name."""
    found = {}
    for kind in KINDS:
        for name in registry.names(kind):
            technique = registry.find(name, (kind,))
            parameters = inspect.signature(technique.factory).parameters.values()
            options = {one.name: REQUIRED if one.default is inspect.Parameter.empty else one.default for one in parameters}
            card = technique.card
            facts = {"learning_rate": card.learning_rate, "step0": card.step0, "merges": card.merges}
            found[f"{kind}/{name}"] = {"options": options, **facts}
    # As they are read back: lists for tuples.
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def changes(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """Every difference in words: its name, what was pinned and what stands now."""
    said = []
    for key in sorted({*before, *now}):
        name = f"{where}{key}"
        if key not in now:
            said.append(f"{name}: {json.dumps(before[key])} is gone")
        elif key not in before:
            said.append(f"{name}: {json.dumps(now[key])} is new")
        elif isinstance(before[key], dict) and isinstance(now[key], dict):
            said += changes(before[key], now[key], f"{name} ")
        elif before[key] != now[key]:
            said.append(f"{name}: {json.dumps(before[key])} became {json.dumps(now[key])}")
    return said


def write() -> None:
    """Pin what stands now."""
    PINNED.write_text(json.dumps(defaults(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
    print(f"wrote {len(defaults())} techniques to {PINNED}")
