"""`python -m bench.preferred`: what a real model learns from a few real preferences, and what it keeps.

DPO on pairs and KTO on single answers with a verdict, LoRA on both; before and after, the share of held-out pairs whose chosen answer is
likelier, ordinary questions that the model answered rightly, and plain prose. Results go to `bench/preferred.json`, beside those of
objectives that are not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import luthier
from bench.__main__ import HERE
from bench.preferences import PAIRS
from bench.preferences import pairs as read_pairs
from luthier import machine

HELD_OUT, LONGEST = 80, 3000
"""Pairs that are measured, of so many characters at most, so that none of them is cut."""
KEPT = HERE.parent / "recipes" / "data" / "hollowmere"
MODEL = "smollm2-135m-instruct"


def _length(pair: dict[str, Any]) -> int:
    return sum(len(turn["value"]) for turn in (*pair["conversations"], pair["chosen"], pair["rejected"]))


def split(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs to learn from and to measure, drawn with seed 0."""
    if not (data / PAIRS).is_file():
        raise SystemExit(f"there is no {data / PAIRS}: --data names the folder of data sets")
    _, pairs = read_pairs(data)
    random.Random(0).shuffle(pairs)
    held = [pair for pair in pairs if _length(pair) <= LONGEST][:HELD_OUT]
    return [pair for pair in pairs if pair not in held], held


def main() -> None:
    """Two runs."""
    parser = argparse.ArgumentParser(prog="python -m bench.preferred", description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of data sets")
    parser.add_argument("--out", type=Path, default=HERE / "preferred.json")
    parser.add_argument("--objective", nargs="+", default=["dpo", "kto"])
    chosen = parser.parse_args()
    pairs, held = split(chosen.data)
    rows = {
        "dpo": {"train": pairs, "max_length": 512},
        "kto": {"train": str(chosen.data / "kto_en" / "train.jsonl"), "max_length": 384},
    }
    held_already = json.loads(chosen.out.read_text(encoding="utf-8"))["results"] if chosen.out.exists() else []
    results = [one for one in held_already if one["objective"] not in chosen.objective]
    for name in chosen.objective:
        recipe = {
            "model": MODEL,
            "tune": "lora",
            "rows": {**rows[name], "too_long": "right", "on_bad_row": "skip"},
            "objective": name,
            "repeat_baseline": False,
            "train": {"epochs": 1, "batch_rows": 8, "learning_rate": 2e-4, "warmup": 0.1},
            "evaluate": {
                "held_out": {"rows": held, "metric": "preference_accuracy", "role": "target"},
                "ordinary": {"rows": str(KEPT / "ordinary.jsonl"), "metric": "contains", "role": "retention", "max_new_tokens": 32},
                "prose": {"rows": str(KEPT / "prose.jsonl"), "metric": "perplexity", "role": "retention"},
            },
        }
        with tempfile.TemporaryDirectory() as folder:
            facts = luthier.train({**recipe, "out": folder}, say=print).facts
        fields = ("before", "before_interval", "after", "after_interval", "difference", "difference_interval", "n", "retained")
        results.append(
            {
                "objective": name,
                "rows": facts["rows"]["rows"],
                "left_out": len(facts["rows"]["dropped"]),
                "steps": facts["steps"],
                "metrics": {one: {field: entry.get(field) for field in fields} for one, entry in facts["metrics"].items()},
                "notes": [facts["history"][place].get("notes", {}) for place in (0, -1)],
            }
        )
        told = {
            "model": MODEL,
            "versions": machine.versions(),
            "machine": facts["machine"],
            "results": results,
        }
        chosen.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(results[-1]["metrics"], indent=1))


if __name__ == "__main__":
    main()
