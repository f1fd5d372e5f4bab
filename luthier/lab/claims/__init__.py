"""The claims, one file each: `NAME.py` exports `CLAIM`. The folder is the registry.

The comparisons that test the lab itself stand together in `luthier.lab.calibration`; they are found by name and not listed.

Folders of one's own join through `LUTHIER_CLAIMS` (paths separated like PATH); their code runs when a claim is looked up.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

from luthier.errors import LuthierError, nearest
from luthier.lab.claim import Claim, check
from luthier.registry import module_at

CALIBRATION = "calibration-"
"""What the names of the lab's own tests begin with."""


def names() -> list[str]:
    """All claims. Imports none."""
    return sorted(_files())


def find(name: str) -> Claim:
    """Look a claim up. Imports its file alone.

    Raises:
        LuthierError: there is none (with the nearest names), or its file exports no `CLAIM` of its name, or one that contradicts
            itself.
    """
    path = file_of(name)
    if name.startswith(CALIBRATION):
        comparison: Claim = importlib.import_module("luthier.lab.calibration").COMPARISONS[name]
        check(comparison)
        return comparison
    claim = getattr(_module(name, path), "CLAIM", None)
    if not isinstance(claim, Claim) or claim.name != name:
        raise LuthierError(
            f"`{path.name}` must export `CLAIM`, a claim of the name `{name}`", where=str(path), mend="name both alike"
        )
    check(claim)
    return claim


def file_of(name: str) -> Path:
    """A claim's file.

    Raises:
        LuthierError: there is no such claim; the nearest names.
    """
    if name.startswith(CALIBRATION):
        known = importlib.import_module("luthier.lab.calibration").COMPARISONS
        if name not in known:
            raise LuthierError(f"there is no comparison `{name}`", where="luthier lab", mend=nearest(name, known))
        return Path(__file__).parents[1] / "calibration.py"
    files = _files()
    if name not in files:
        raise LuthierError(
            f"there is no claim `{name}`", where="luthier lab", mend=nearest(name, files) or "see `luthier lab --list`"
        )
    return files[name]


def _files() -> dict[str, Path]:
    own = Path(__file__).parent
    others = [Path(one) for one in os.environ.get("LUTHIER_CLAIMS", "").split(os.pathsep) if one]
    files: dict[str, Path] = {}
    for folder in (own, *others):
        for path in folder.glob("*.py"):
            if not path.stem.startswith("_"):
                files.setdefault(path.stem, path)
    return files


def _module(name: str, path: Path) -> ModuleType:
    if path.parent == Path(__file__).parent:
        return importlib.import_module(f"luthier.lab.claims.{name}")
    return module_at(path, f"luthier_claims.{name}", "a claim")
