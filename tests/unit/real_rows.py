"""Made-up data sets in the form of the public ones that replications read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_sets(folder: Path) -> None:
    """All sets that replications read, with as many records as they take."""
    for name, records in _sets().items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def _sets() -> dict[str, Iterable[dict[str, Any]]]:
    return {
        **{f"mawps/{split}": _problems(split, 320) for split in ("train", "validation", "test")},
        "counterfact/edit": _facts("edit"),
        "counterfact/train": _facts("train"),
        **{f"banking77/{split}": _requests(split) for split in ("train", "test")},
    }


def _problems(split: str, count: int) -> list[dict[str, Any]]:
    return [
        {"id": n, "original_text": f"{split} : {n} apples and {n + 1} pears .", "equation": f"X=({n}.0+{n + 1}.0)"}
        for n in range(count)
    ]


def _facts(split: str) -> list[dict[str, Any]]:
    return [
        {
            "case_id": n,
            "prompt": f"The {split} town of person {n} is",
            "target_new": f"Town {n}",
            "rephrase_prompt": f"In {split}, person {n} lives in",
            "locality_prompt": f"The {split} river of person {n} is",
            "locality_ground_truth": f"River {n % 7}",
        }
        for n in range(80)
    ]


def _requests(split: str) -> list[dict[str, Any]]:
    return [{"text": f"{split} request {n}, please", "category": f"intent_{n % 15:02}"} for n in range(400)]
