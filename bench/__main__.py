"""`python -m bench`: luthier beside TRL's SFTTrainer (and PEFT for LoRA), on the same rows, model and number types.

Each side trains in a process of its own, and they take steps in turn, so that a machine whose speed drifts slows both alike; what counts
is the ratio. Results go to `bench/results.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.turns import Player
from luthier import machine
from luthier.rows.read import read

HERE = Path(__file__).parent
OWN_ROWS = HERE.parent / "recipes" / "data" / "hollowmere" / "train.jsonl"
DOLLY = "dolly_subset/train.jsonl"
SIZE = {"rows_a_step": 4, "max_length": 512, "micro_batch_tokens": 1024}


def chat_rows(data: Path) -> tuple[str, list[dict[str, Any]]]:
    """Rows of a prompt and an answer in a conversation, of varied length: Dolly's where they are, else the quickstart's."""
    file = data / DOLLY
    if not file.is_file():
        return OWN_ROWS.name, [{"id": row.id, **row.fields} for row in read(OWN_ROWS)]
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        one = json.loads(line)
        asked = "\n\n".join(part for part in (one["instruction"], one["context"]) if part)
        rows.append(
            {
                "id": f"dolly-{number}",
                "prompt": [{"role": "user", "content": asked}],
                "completion": [{"role": "assistant", "content": one["response"]}],
            }
        )
    return DOLLY.partition("/")[0], rows


def measure(setting: dict[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Steps of both in turn, after one that does not count: speeds over all of them, their ratio, that of single pairs, peak memory."""
    file = folder / "setting.json"
    file.write_text(json.dumps({**setting, "encoded": str(folder / "encoded.json")}))
    ours = Player("bench.ours", file, folder / "ours.log")
    peer = Player(setting.get("peer", "bench.peer"), file, folder / "peer.log")
    try:
        pairs = [(ours.step(), peer.step()) for _ in range(rounds + 1)]
    finally:
        ours.end()
        peer.end()
    for mine, theirs in pairs:
        apart = abs(mine["tokens"] - theirs["tokens"])
        if mine["supervised"] != theirs["supervised"] or apart > setting.get("tokens_apart", 0.0) * mine["tokens"]:
            raise RuntimeError(f"the two sides trained on different tokens: {mine} and {theirs}")
    counted = pairs[1:]
    ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in counted]
    ours_speed, peer_speed = _speeds([mine for mine, _ in counted]), _speeds([theirs for _, theirs in counted])
    return {
        "luthier": ours_speed,
        "peer": peer_speed,
        "ratio": ours_speed["tokens_per_second"] / peer_speed["tokens_per_second"],
        "ratio_spread": [min(ratios), max(ratios)],
        "ratio_median": statistics.median(ratios),
        "processor_ratio": sum(t["processor_seconds"] for _, t in counted) / sum(m["processor_seconds"] for m, _ in counted),
        "memory_ratio": counted[-1][1]["peak_bytes"] / counted[-1][0]["peak_bytes"],
        "rounds": rounds,
        **({"ended": {"luthier": ours.ended, "peer": peer.ended}} if ours.ended else {}),
    }


def _speeds(steps: list[dict[str, Any]]) -> dict[str, float]:
    seconds = sum(step["seconds"] for step in steps)
    return {
        "tokens_per_second": sum(step["tokens"] for step in steps) / seconds,
        "supervised_tokens_per_second": sum(step["supervised"] for step in steps) / seconds,
        "peak_bytes": max(step["peak_bytes"] for step in steps),
    }


def compare(
    parser: argparse.ArgumentParser,
    out: Path,
    rows_in: Callable[[Path], tuple[str, list[dict[str, Any]]]],
    size: dict[str, Any],
    sides: dict[str, Any] | None = None,
) -> None:
    """Measure every setting that the command line names on the rows found in its data folder, print a line for each and write them all.

    `size` is written beside the results; `sides` (which peer, which keys of a run, all of its steps as `rounds`) is not.
    """
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of steps that count, a setting")
    parser.add_argument("--tune", nargs="+", default=["lora", "full"])
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of data sets")
    parser.add_argument("--out", type=Path, default=out)
    chosen = parser.parse_args()
    name, rows = rows_in(chosen.data)
    results = []
    for tune in chosen.tune:
        for precision in chosen.precision:
            setting = {"tune": tune, "precision": precision, "model": chosen.model, **size}
            with tempfile.TemporaryDirectory() as folder:
                found = measure(
                    {**setting, **(sides or {}), "rows": rows}, (sides or {}).get("rounds", chosen.rounds), Path(folder)
                )
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


def main() -> None:
    """Supervised fine-tuning of conversations."""
    compare(argparse.ArgumentParser(prog="python -m bench", description=__doc__), HERE / "results.json", chat_rows, SIZE)


if __name__ == "__main__":
    main()
