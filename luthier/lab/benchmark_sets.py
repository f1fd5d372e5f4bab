"""The synthetic benchmark's rows for recipes: as evaluation sets of a run, and as files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from luthier import disk
from luthier.errors import LuthierError
from luthier.evaluate.sets import EvalSet
from luthier.lab import benchmark
from luthier.lab.skill import Split
from luthier.models.wheel import cache_folder
from luthier.recipe import EvaluationSet, Recipe
from luthier.report.radar import BENCHMARK
from luthier.rows.read import read

COUNT = 50
"""Items of a skill in a run's evaluation sets."""


def named(skills: str) -> list[str] | None:
    """Skills written with commas between; None, which stands for all, where nothing is written.

    Raises:
        LuthierError: there is no such skill, with the nearest name, or one is written twice.
    """
    names = [one.strip() for one in skills.split(",")] if skills else []
    for name in names:
        benchmark.find(name)
        if names.count(name) > 1:
            raise LuthierError(f"the skill `{name}` is written twice", where="--skills", fix="write it once")
    return names or None


def sets_of(skills: Sequence[str] | None = None, **choice: Any) -> list[EvalSet]:
    """Sets of the synthetic benchmark that can be measured; `choice` is what `luthier.lab.benchmark.sets` takes."""
    return [
        EvalSet(name, list(read(one["rows"], name=name)), one["metric"], one["role"], one["max_new_tokens"])
        for name, one in benchmark.sets(skills, **choice).items()
    ]


def with_world(recipe: Recipe, *, skills: Sequence[str] | None = None, count: int = COUNT) -> Recipe:
    """A recipe that also measures skills of the synthetic benchmark before and after, as sets that training should leave alone.

    The rows are written to `benchmark/` of luthier's cache folder and named by the recipe, which so stays a file that can be run and
    resumed by itself. They are the same for every recipe, so that runs compare. Where the files were removed, calling this again
    with the same arguments writes them again.

    Args:
        recipe: any recipe; sets of its own with the same names are replaced.
        skills: names of skills; None for all.
        count: items of each skill; one that has fewer gives all.

    Returns:
        The recipe with sets named `benchmark/SKILL`.

    Raises:
        LuthierError: there is no such skill, or the files cannot be written.
    """
    sets = benchmark.sets(skills, count=count, role="retention")
    added = {
        BENCHMARK + name: EvaluationSet(**{**one, "rows": str(stored(name, one["rows"])), "columns": {}})
        for name, one in sets.items()
    }
    return recipe.model_copy(update={"evaluate": {**recipe.evaluate, **added}})


def write_rows(skill: str, path: Path, *, split: str, count: int, seed: int = 0, difficulty: int = 1) -> dict[str, Any]:
    """Write rows of a skill as JSON lines.

    Args:
        skill: its name.
        path: the file, which must not exist.
        split: `train`, `validation` or `held_out`.
        count: rows.
        seed: of the draws.
        difficulty: 1 is the easiest.

    Returns:
        What was written: `file`, `skill`, `split`, `rows`, `seed`, `difficulty`.

    Raises:
        LuthierError: there is no such skill or split, it has not so many rows, or the file exists or cannot be written.
    """
    rows = benchmark.rows(skill, cast(Split, split), count, seed=seed, difficulty=difficulty)
    if path.exists():
        raise LuthierError("this exists already", where=str(path), fix="name another, or remove it")
    _write(path, _lines(rows))
    return {"file": str(path), "skill": skill, "split": split, "rows": len(rows), "seed": seed, "difficulty": difficulty}


def stored(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The file that holds rows, named by what it holds."""
    lines = _lines(rows)
    path = cache_folder() / "world" / f"{name}-{len(rows)}-{hashlib.sha256(lines).hexdigest()[:12]}.jsonl"
    if not path.is_file() or path.read_bytes() != lines:
        _write(path, lines)
    return path


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _write(path: Path, lines: bytes) -> None:
    with disk.written(path) as place:
        place.write_bytes(lines)
