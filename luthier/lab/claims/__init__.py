"""The claims, one file each: `NAME.py` exports `CLAIM`. The folder is the registry.

Folders of one's own join through `LUTHIER_CLAIMS` (paths separated like PATH); their code runs when a claim is looked up.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from luthier.errors import LuthierError, nearest
from luthier.lab.claim import Claim, check


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
    key = f"luthier_claims.{name}"
    known = sys.modules.get(key)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise LuthierError("this file cannot be read as a claim", where=str(path), mend="it must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        # The next look-up must meet the same mistake, not half a module.
        del sys.modules[key]
        raise
    return module
