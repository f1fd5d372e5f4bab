"""The replications, one file each: `NAME.py` exports `REPLICATION`. The folder is the registry.

The comparisons that test the lab itself stand together in `luthier.lab.calibration`; they are found by name and not listed.

Folders of one's own join through `LUTHIER_REPLICATIONS` (paths separated like PATH); their code runs when a replication is looked up.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from luthier.errors import LuthierError, nearest
from luthier.lab.replication import Replication, check
from luthier.registry import module_at
from luthier.registry.outline import arguments_of

CALIBRATION = "calibration-"
"""What the names of the lab's own tests begin with."""


def names() -> list[str]:
    """All replications. Imports none."""
    return sorted(_files())


class Line(NamedTuple):
    """What lists tell of a replication."""

    title: str
    rows: Sequence[int]
    """The papers' numbers in `luthier/registry/papers.tsv`."""
    minutes: float
    """Rough cost of the first look on two processor cores."""


def line(name: str) -> Line:
    """What lists tell of a replication: read from its file's text where it is written out there, which takes no torch.

    Raises:
        LuthierError: as `find` does, where the file has to be run.
    """
    told = arguments_of(file_of(name), "REPLICATION")
    if told.get("name") == name and all(field in told for field in Line._fields):
        return Line(*(told[field] for field in Line._fields))
    found = find(name)
    return Line(found.title, found.rows, found.minutes)


def find(name: str) -> Replication:
    """Look a replication up. Imports its file alone.

    Raises:
        LuthierError: there is none (with the nearest names), or its file exports no `REPLICATION` of its name, or one that contradicts
            itself.
    """
    path = file_of(name)
    if name.startswith(CALIBRATION):
        comparison: Replication = importlib.import_module("luthier.lab.calibration").COMPARISONS[name]
        check(comparison)
        return comparison
    replication = getattr(_module(name, path), "REPLICATION", None)
    if not isinstance(replication, Replication) or replication.name != name:
        raise LuthierError(
            f"`{path.name}` must export `REPLICATION`, a replication of the name `{name}`", where=str(path), fix="name both alike"
        )
    check(replication)
    return replication


def file_of(name: str) -> Path:
    """A replication's file.

    Raises:
        LuthierError: there is no such replication; the nearest names.
    """
    if name.startswith(CALIBRATION):
        known = importlib.import_module("luthier.lab.calibration").COMPARISONS
        if name not in known:
            raise LuthierError(f"there is no comparison `{name}`", where="luthier replicate", fix=nearest(name, known))
        return Path(__file__).parents[1] / "calibration.py"
    files = _files()
    if name not in files:
        raise LuthierError(
            f"there is no replication `{name}`",
            where="luthier replicate",
            fix=nearest(name, files) or "see `luthier replicate --list`",
        )
    return files[name]


def _files() -> dict[str, Path]:
    own = Path(__file__).parent
    others = [Path(one) for one in os.environ.get("LUTHIER_REPLICATIONS", "").split(os.pathsep) if one]
    files: dict[str, Path] = {}
    for folder in (own, *others):
        for path in folder.glob("*.py"):
            if not path.stem.startswith("_"):
                files.setdefault(path.stem, path)
    return files


def _module(name: str, path: Path) -> ModuleType:
    if path.parent == Path(__file__).parent:
        return importlib.import_module(f"luthier.lab.replications.{name}")
    return module_at(path, f"luthier_replications.{name}", "a replication")
