"""What the shell offers after a tab: runs, techniques, keys of a recipe and what goes there, skills. Only skills load torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer


def _beginning(known: Iterable[str], incomplete: str) -> list[str]:
    return [one for one in known if one.startswith(incomplete)]


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The runs in the folder that the command looks into."""
    folder = Path(ctx.params.get("folder") or "runs")
    return _beginning(sorted(path.parent.name for path in folder.glob("*/run.json")), incomplete)


def technique_names(incomplete: str) -> list[str]:
    """All techniques."""
    from luthier import registry

    return _beginning(sorted(name for kind in registry.KINDS for name in registry.names(kind)), incomplete)


def key_names(incomplete: str) -> list[str]:
    """The keys of a recipe."""
    from luthier.recipe import reference

    return _beginning((key for key, _, _ in reference()), incomplete)


def overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Words of the form `KEY=VALUE`: keys, options of techniques (`tune.lora.rank=`), and techniques behind their key."""
    typed = list(ctx.params.get("overrides") or ())
    if len(typed) > 1 and typed[-1] == "=":
        # Bash takes `tune=lo` for three words, and wants the last alone.
        return _beginning(_under(typed[-2]), incomplete)
    if incomplete == "=" and typed:
        return _under(typed[-1])
    key, sign, value = incomplete.partition("=")
    if sign:
        return [f"{key}={one}" for one in _beginning(_under(key), value)]
    return [f"{one}=" for one in [*key_names(incomplete), *_options(incomplete)]]


def _under(key: str) -> list[str]:
    """What a key of techniques takes."""
    from luthier import registry

    if key not in registry.KEYS:
        return []
    return sorted({registry.NOTHING, *(name for kind in registry.kinds_under(key) for name in registry.names(kind))})


def _options(incomplete: str) -> list[str]:
    """Options of the techniques of a key, where one of them is begun: `tune.lora.rank`."""
    from luthier import registry

    found = []
    for key in registry.KEYS:
        if incomplete.startswith(f"{key}."):
            for _, name, told in registry.outlines(registry.kinds_under(key)):
                found += [f"{key}.{name}.{option}" for option in (told.options if told else ())]
    return _beginning(found, incomplete)


def skill_names(incomplete: str) -> list[str]:
    """Skills of the synthetic benchmark, several with commas between."""
    from luthier.lab.benchmark import SKILLS

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{one}" for one in _beginning(SKILLS, last)]
