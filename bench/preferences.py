"""`python -m bench.preferences`: DPO beside TRL's DPOTrainer (and PEFT for LoRA), on the same pairs, model and number types.

As in `python -m bench` each side trains in a process of its own, and they take steps in turn. Results go to `bench/preferences.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.__main__ import HERE, compare

OWN_ROWS = HERE.parent / "recipes" / "data" / "tastes" / "train.jsonl"
PAIRS = "dpo_en/train.jsonl"
SIZE = {"rows_a_step": 2, "max_length": 512, "micro_batch_tokens": 2048, "too_long": "left"}
SIDES = {
    "peer": "bench.peer_pairs",
    "keys": {"objective": {"dpo": {"beta": 0.1}}},
    # Bounds how far apart the two may count the tokens of a pair; those that are learnt must be the same in number.
    "tokens_apart": 0.02,
}


def pairs(data: Path) -> tuple[str, list[dict[str, Any]]]:
    """Pairs of varied length: public ones where they are, else those of the recipe."""
    file = data / PAIRS if (data / PAIRS).is_file() else OWN_ROWS
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return file.parent.name, [{"id": str(number), **row} for number, row in enumerate(rows)]


def main() -> None:
    """DPO over pairs."""
    parser = argparse.ArgumentParser(prog="python -m bench.preferences", description=__doc__)
    compare(parser, HERE / "preferences.json", pairs, SIZE, SIDES)


if __name__ == "__main__":
    main()
