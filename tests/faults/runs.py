"""Short whole runs on a tiny model, and all that one leaves: what the tests of lost work share."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROWS = [
    {"prompt": f"What is the color of the {thing}?", "completion": f"The {thing} is {color}."}
    for thing, color in {"door": "red", "gate": "blue", "tower": "green", "mill": "white", "barn": "black", "well": "pink"}.items()
]


def recipe(out: Path, *, train: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """Six rows, four a step, a checkpoint after every step."""
    steps = {"steps": 6, "batch_rows": 4, "precision": "fp32", "learning_rate": 1e-3, "save_every": 1}
    return {"model": "tiny:llama", "rows": {"train": ROWS}, "out": str(out), **keys, "train": {**steps, **(train or {})}}


def facts_of(folder: Path) -> dict[str, Any]:
    """What a run's file says."""
    facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return facts


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The log of the steps, but for the time they took."""
    lines = (folder / "steps.jsonl").read_text().splitlines() if (folder / "steps.jsonl").is_file() else []
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def half_done(folder: Path) -> list[str]:
    """Files and folders that were being written."""
    return [path.name for path in (*folder.glob(".*"), *(folder / "checkpoints").glob(".*"))]


def checkpoints(folder: Path) -> list[str]:
    """The names of a run's checkpoints, the oldest first."""
    return sorted((path.name for path in (folder / "checkpoints").glob("step-*")), key=lambda name: int(name[5:]))


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, but for the time it took."""
    facts = facts_of(folder)
    assert facts["status"] == "finished" and (folder / "report.html").is_file()
    return {
        "delta": (folder / "delta.safetensors").read_bytes(),
        "weights": facts["weights_sha256"],
        "metrics": {name: (one["before"], one["after"]) for name, one in facts["metrics"].items()},
        "steps": steps_of(folder),
        "half done": half_done(folder),
        "checkpoints": checkpoints(folder),
    }


@contextmanager
def full_disk(most_bytes: int = 0) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system refuses to write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
