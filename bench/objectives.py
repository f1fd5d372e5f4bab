"""`python -m bench.objectives`: what every objective, token weight and input map adds to a step of plain supervised fine-tuning.

Plain fine-tuning stays in a process of its own throughout and takes a step in turn with every technique, on rows in which every token
is a target, so that whatever is done to distributions costs its most. Results go to `bench/objectives.json`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.techniques import LENGTH, arguments, common_setting, player, rows_of_one_length
from bench.turns import Player
from luthier import machine, registry
from luthier.registry import kinds_under

HERE = Path(__file__).parent
STEP_TOKENS = 1024
KINDS = ("token_weight", *kinds_under("objective"))
OPTIONS: dict[str, dict[str, Any]] = {"caft": {"heads_first": 0.0, "train_heads": True}}
"""Of techniques whose first steps are not like the others, or that cannot run at their defaults."""
PROMISED = ("dft", "otr", "otr_expected", "asft", "kl")
"""What luthier promises the cost of: more steps are counted."""
COLUMNS = {"task": "prose", "aligned_log_likelihood": -3.0, "right_share": 0.05}
"""What some techniques read from rows."""


def keys_of(kind: str, name: str) -> dict[str, Any]:
    """A recipe's keys for one technique."""
    spec = {name: OPTIONS.get(name, {})}
    return {"token_weight" if kind == "token_weight" else "objective": spec}


def main() -> None:
    """Measure every technique and write the results."""
    more = "twice as many where a cost is promised"
    chosen = arguments("python -m bench.objectives", __doc__, rounds=3, more=more, out=HERE / "objectives.json")
    names = [(kind, name) for kind in KINDS for name in registry.names(kind) if name != "cross_entropy"]
    names = [(kind, name) for kind, name in names if not chosen.only or name in chosen.only]
    each = (STEP_TOKENS // LENGTH) * (2 * chosen.rounds + 2)
    rows = [{**row, **COLUMNS} for row in rows_of_one_length(each * (len(names) + 2))]
    common = {**common_setting(chosen, STEP_TOKENS, rows), "tune": "full"}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        plain = player("bench.ours", common, Path(folder), "full")
        plain.step()
        validation = Path(folder) / "validation.jsonl"
        validation.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]), encoding="utf-8")
        OPTIONS["convergence_balance"] = {"validation_source": str(validation)}
        for kind, name in names:
            setting = {**common, "rows": rows[:each], "keys": keys_of(kind, name)}
            results.append({"name": name, "kind": kind, **measured(setting, Path(folder) / name, plain, chosen.rounds)})
            print(line(results[-1]), flush=True)
        plain.end()
    written = {
        "versions": machine.versions(),
        "machine": machine.describe(torch.device("cpu"), torch.float32),
        "setting": {**{key: value for key, value in common.items() if key != "rows"}, "rounds": chosen.rounds},
        "results": results,
    }
    chosen.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"written to {chosen.out}")


def measured(setting: dict[str, Any], folder: Path, plain: Player, rounds: int) -> dict[str, Any]:
    """A technique's steps, each beside one of plain fine-tuning, after one that does not count; why it cannot run otherwise."""
    folder.mkdir()
    try:
        other = player("bench.ours", setting, folder, "run")
    except RuntimeError as error:
        return {"error": str(error).strip().splitlines()[-1][:200]}
    try:
        other.step()
        pairs = [(other.step(), plain.step()) for _ in range(rounds * (2 if folder.name in PROMISED else 1))]
    finally:
        other.end()
    extra = [one["seconds"] / two["seconds"] - 1 for one, two in pairs]
    return {
        "pairs": len(pairs),
        "extra_time": sum(one["seconds"] for one, _ in pairs) / sum(two["seconds"] for _, two in pairs) - 1,
        "extra_time_median": statistics.median(extra),
        "extra_time_range": [min(extra), max(extra)],
        "extra_processor_time": sum(o["processor_seconds"] for o, _ in pairs) / sum(t["processor_seconds"] for _, t in pairs) - 1,
        "extra_bytes": max(one["peak_bytes"] for one, _ in pairs) - max(two["peak_bytes"] for _, two in pairs),
        "plain_seconds": statistics.median(two["seconds"] for _, two in pairs),
    }


def line(one: dict[str, Any]) -> str:
    """For people who wait."""
    if "error" in one:
        return f"{one['name']}: {one['error']}"
    low, high = one["extra_time_range"]
    return (
        f"{one['name']}: {100 * one['extra_time_median']:+.1f} % time a step ({100 * low:+.1f} to {100 * high:+.1f}), "
        f"{one['extra_bytes'] / 2**20:+,.0f} MiB"
    )


if __name__ == "__main__":
    main()
