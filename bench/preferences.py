"""`python -m bench.preferences`: DPO beside TRL's DPOTrainer (and PEFT for LoRA), on the same pairs, model and number types.

As in `python -m bench` each side trains in a process of its own, and they take steps in turn. Results go to `bench/preferences.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.__main__ import HERE, measure
from luthier import machine

OWN_ROWS = HERE.parent / "recipes" / "data" / "tastes" / "train.jsonl"
PAIRS = "dpo_en/train.jsonl"
SIZE = {"rows_a_step": 2, "max_tokens": 512, "micro_batch_tokens": 2048, "too_long": "left"}


def pairs(data: Path) -> tuple[str, list[dict[str, Any]]]:
    """Pairs of varied length: public ones where they are, else those of the recipe."""
    file = data / PAIRS if (data / PAIRS).is_file() else OWN_ROWS
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return file.parent.name, [{"id": str(number), **row} for number, row in enumerate(rows)]


def main() -> None:
    """Measure every setting and write the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.preferences", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of steps that count, a setting")
    parser.add_argument("--tune", nargs="+", default=["lora", "full"])
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of data sets")
    parser.add_argument("--out", type=Path, default=HERE / "preferences.json")
    chosen = parser.parse_args()
    name, rows = pairs(chosen.data)
    results = []
    for tune in chosen.tune:
        for precision in chosen.precision:
            setting = {"tune": tune, "precision": precision, "model": chosen.model, **SIZE}
            keys = {"peer": "bench.peer_pairs", "keys": {"objective": {"dpo": {"beta": 0.1}}}}
            with tempfile.TemporaryDirectory() as folder:
                found = measure({**setting, **keys, "rows": rows}, chosen.rounds, Path(folder))
            results.append({**setting, "rows": name, **found})
            ours, peer = found["luthier"], found["peer"]
            print(
                f"{tune} {precision}: luthier {ours['tokens_per_second']:,.0f} tokens/s, {ours['peak_bytes'] / 2**30:.2f} GiB; "
                f"peer {peer['tokens_per_second']:,.0f}, {peer['peak_bytes'] / 2**30:.2f} GiB; ratio {found['ratio']:.2f} "
                f"({found['ratio_spread'][0]:.2f} to {found['ratio_spread'][1]:.2f})",
                flush=True,
            )
    facts = {
        "versions": {**machine.versions(), **{package: version(package) for package in ("trl", "peft")}},
        "machine": machine.describe(torch.device("cpu"), torch.float32),
        "results": results,
    }
    chosen.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"written to {chosen.out}")


if __name__ == "__main__":
    main()
