"""`python -m bench.classify`: classes of short texts beside transformers' Trainer (and PEFT for LoRA), on the same rows, model and steps.

As in `python -m bench` each side trains in a process of its own, and they take steps in turn; then each measures the same test rows.
Results go to `bench/classify.json`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from bench.__main__ import HERE, compare

STEPS, ROWS_A_STEP = 120, 16
MOODS = HERE.parent / "recipes" / "data" / "moods"
SIZE = {"rows_a_step": ROWS_A_STEP, "max_length": 256, "micro_batch_tokens": 2048}


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def texts(data: Path) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Texts to train on and to test with: questions by what they ask for where they are, else those of the recipe."""
    if (data / "trec").is_dir():
        train, test = _read(data / "trec" / "train.jsonl"), _read(data / "trec" / "test.jsonl")
        random.Random(0).shuffle(train)
        coarse = [[{"text": row["text"], "label": row["label"].partition(":")[0]} for row in rows] for rows in (train, test)]
        return "trec", coarse[0][: STEPS * ROWS_A_STEP], coarse[1]
    return MOODS.name, _read(MOODS / "train.jsonl"), _read(MOODS / "held_out.jsonl")


def main() -> None:
    """Classes of texts."""
    parser = argparse.ArgumentParser(prog="python -m bench.classify", description=__doc__)
    sides: dict[str, Any] = {"peer": "bench.peer_classify"}

    def rows_in(data: Path) -> tuple[str, list[dict[str, Any]]]:
        name, train, test = texts(data)
        labels = sorted({row["label"] for row in train})
        steps = min(STEPS, len(train) // ROWS_A_STEP)
        sides.update(labels=labels, test=test, rounds=steps - 1, train={"steps": steps, "learning_rate": 5e-4})
        sides["keys"] = {
            "objective": {"classify": {"labels": labels}},
            "evaluate": {"held_out": {"rows": test, "metric": "accuracy"}},
        }
        return name, [{"id": str(number), **row} for number, row in enumerate(train)]

    compare(parser, HERE / "classify.json", rows_in, SIZE, sides)


if __name__ == "__main__":
    main()
