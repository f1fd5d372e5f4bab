"""Run folders: where a run's results lie, never overwritten, and how they are read again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError, nearest

FILE = "run.json"


@dataclass
class Run:
    """A finished or stopped run: its folder and everything that was measured.

    `facts` is what `run.json` holds; the attributes read it.
    """

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    model: Any = None
    """The tuned model, when the run was made in this process."""
    tokenizer: Any = None
    tune: Any = None

    @property
    def metrics(self) -> dict[str, Any]:
        """Before and after, by evaluation set."""
        return dict(self.facts.get("metrics", {}))

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    def as_json(self) -> dict[str, Any]:
        """What scripts get: all facts but the long ones."""
        long = ("history", "plan", "recipe_text", "delta")
        facts = {key: value for key, value in self.facts.items() if key not in long}
        facts["metrics"] = {
            name: {key: value for key, value in one.items() if key != "items"} for name, one in self.metrics.items()
        }
        return facts


def new_folder(out: str | Path, name: str) -> Path:
    """Make `out/name-1`, or the next free number."""
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name.rpartition("-")[2]) for path in root.glob(f"{name}-*") if path.name.rpartition("-")[2].isdigit()]
    number = max(numbers, default=0)
    while True:
        number += 1
        folder = root / f"{name}-{number}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    beside.replace(path)


def read_run(path: str | Path, out: str | Path = "runs") -> Run:
    """A run from its folder, or from its name under `out`.

    Raises:
        LuthierError: there is no such run, or its file is damaged.
    """
    for folder in (Path(path), Path(out) / path):
        if (folder / FILE).is_file():
            try:
                return Run(folder, json.loads((folder / FILE).read_text(encoding="utf-8")))
            except ValueError as error:
                raise LuthierError(f"this run cannot be read: {error}", where=str(folder / FILE)) from None
    known = [run.folder.name for run in list_runs(out)]
    raise LuthierError(f"there is no run `{path}`", where=str(out), mend=nearest(str(path), known) or "see `luthier runs`")


def list_runs(out: str | Path = "runs") -> list[Run]:
    """All runs under a folder, the oldest first."""
    found = []
    for path in sorted(Path(out).glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime):
        try:
            found.append(Run(path.parent, json.loads(path.read_text(encoding="utf-8"))))
        except ValueError:
            found.append(Run(path.parent, {"name": path.parent.name, "status": "damaged"}))
    return found
