"""A mistake, and whether tests catch it: package and tests are copied, the working tree is never touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """One mistake."""

    what: str
    file: str
    """Under `luthier/`."""
    old: str
    new: str
    tests: tuple[str, ...]
    """Files, or tests in them, under `tests/` that should catch it."""


def places(fault: Fault, root: Path = ROOT) -> int:
    """How many places there are for it: it needs one."""
    return (root / "luthier" / fault.file).read_text(encoding="utf-8").count(fault.old)


def planted(faults: Iterable[Fault], root: Path, folder: Path) -> None:
    """Copy package and tests, and put faults into the copy."""
    for name in ("luthier", "tests"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", folder)
    for fault in faults:
        if places(fault, folder) != 1:
            raise SystemExit(f"{fault.file} has {places(fault, folder)} places for: {fault.what}")
        file = folder / "luthier" / fault.file
        file.write_text(file.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")


def caught(faults: Iterable[Fault], root: Path, tests: Sequence[str]) -> str:
    """What failed first, and how; empty where nothing did."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        planted(faults, root, folder)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 2):
        raise SystemExit(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "SUBFAILED", "ERROR"))]
    return (failed or ["something failed"])[0] if done.returncode else ""
