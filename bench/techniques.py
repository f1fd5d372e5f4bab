"""`python -m bench.techniques`: what every tuning technique costs, beside full fine-tuning and beside TRL with PEFT's LoRA, in one run.

Full fine-tuning stays in a process of its own throughout and takes a step in turn with every technique, so that each row of the table
is a ratio of steps that were taken side by side. Results go to `bench/techniques.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.turns import Player
from luthier import machine, registry
from luthier.registry import kinds_under
from luthier.rows.read import read

HERE = Path(__file__).parent
PROSE = HERE.parent / "recipes" / "data" / "hollowmere" / "prose.jsonl"
LENGTH, STEP_TOKENS = 256, 2048
OPTIONS: dict[str, dict[str, Any]] = {
    # At their defaults for 7B, these would train most of a model this small.
    "lift": {"rank": 32, "lora_rank": 8},
    "corda": {"calibration_rows": 8},
    "lora_sb": {"calibration_rows": 8},
    "dept": {"length": 40, "rank": 30, "positions": 128},
    "cpt": {"examples": 1},
    "loca": {"search": 0.0},
    "lofit": {"selection": 0.5},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "half, embeddings frozen": {"half": {"embeddings": "freeze"}},
    "full, embeddings frozen": {"full": {"target_modules": ["linear", "norm"]}},
}
"""The embeddings are a fifth of a model this small, and their gradient is the head's as well."""
ALREADY = ("full", "lora")
PROMISED = ("half", "half, embeddings frozen", "s2ft", "lora", "TRL with PEFT's LoRA")
"""What luthier promises a speed of: more steps are counted."""


def rows_of_one_length(count: int) -> list[dict[str, Any]]:
    """Running text, long enough to be cut to the bench's length."""
    texts = [row.fields["text"] for row in read(PROSE) if "text" in row.fields]
    whole = " ".join(texts)
    words = whole.split()
    return [{"id": f"text-{i}", "text": " ".join(words[i * 40 % len(words) :] + words)[:4000]} for i in range(count)]


def arguments(prog: str, about: str | None, *, rounds: int, more: str, out: Path) -> argparse.Namespace:
    """The command line of a bench of many techniques."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"steps that count, a technique; {more}")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--only", nargs="*", default=[], help="these techniques alone")
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args()


def common_setting(chosen: argparse.Namespace, step_tokens: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What all sides of a bench share."""
    return {
        "model": chosen.model,
        "precision": chosen.precision,
        "rows_a_step": step_tokens // LENGTH,
        "max_length": LENGTH,
        "micro_batch_tokens": step_tokens,
        "rows": rows,
    }


def main() -> None:
    """Measure every technique and write the results."""
    more = "three times as many where a speed is promised"
    chosen = arguments("python -m bench.techniques", __doc__, rounds=1, more=more, out=HERE / "techniques.json")
    names = [name for kind in kinds_under("tune") for name in registry.names(kind) if name not in ALREADY]
    names = [name for name in ("lora", *names, *VARIANTS) if not chosen.only or name in chosen.only]
    common = common_setting(chosen, STEP_TOKENS, rows_of_one_length(8 * (chosen.rounds + 2) * (len(names) + 2)))
    with tempfile.TemporaryDirectory() as folder:
        full = player("bench.ours", {**common, "tune": "full"}, Path(folder), "full")
        mine = full.step()
        results = [{"name": "full", **facts(full.loaded, [mine], [mine])}]
        print(line(results[0]), flush=True)
        for name in names:
            tune = VARIANTS.get(name, {name: OPTIONS.get(name, {})})
            results += measured(name, tune, "bench.ours", common, Path(folder), full, chosen.rounds)
            print(line(results[-1]), flush=True)
            if name == "lora":
                results += measured("TRL with PEFT's LoRA", "lora", "bench.peer", common, Path(folder), full, chosen.rounds)
                print(line(results[-1]), flush=True)
        full.end()
    # Its first step warmed up; what counts are those beside the techniques.
    beside = [one["tokens_per_second"] / one["speed_over_full"] for one in results[1:] if "error" not in one]
    results[0]["tokens_per_second"] = statistics.median(beside)
    results[0]["seconds_a_step"] = STEP_TOKENS / results[0]["tokens_per_second"]
    written = {
        "versions": {**machine.versions(), **{package: version(package) for package in ("trl", "peft")}},
        "machine": machine.describe(torch.device("cpu"), torch.float32),
        "setting": {**{key: value for key, value in common.items() if key != "rows"}, "rounds": chosen.rounds},
        "results": results,
    }
    chosen.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"written to {chosen.out}")


def player(module: str, setting: dict[str, Any], folder: Path, name: str) -> Player:
    """A side in a process of its own."""
    place = folder / name.replace(" ", "-").replace("'", "")
    place.mkdir()
    encoded = folder / "encoded.json"
    file = place / "setting.json"
    file.write_text(json.dumps({**setting, "encoded": str(encoded if module == "bench.peer" else place / "encoded.json")}))
    if module == "bench.peer":
        encoded.write_text((folder / "full" / "encoded.json").read_text())
    return Player(module, file, place / "log")


def measured(
    name: str, tune: Any, module: str, common: dict[str, Any], folder: Path, full: Player, rounds: int
) -> list[dict[str, Any]]:
    """A technique's steps, each beside one of full fine-tuning, after one that does not count; nothing where it cannot run."""
    try:
        other = player(module, {**common, "tune": tune}, folder, name)
    except RuntimeError as error:
        return [{"name": name, "error": str(error).strip().splitlines()[-1][:200]}]
    try:
        other.step()
        pairs = [(other.step(), full.step()) for _ in range(3 * rounds if name in PROMISED else rounds)]
    finally:
        other.end()
    return [{"name": name, **facts(other.loaded, [one for one, _ in pairs], [two for _, two in pairs])}]


def facts(loaded: dict[str, Any], steps: list[dict[str, Any]], full: list[dict[str, Any]]) -> dict[str, Any]:
    """What some steps took, and beside those of full fine-tuning."""
    seconds, of_full = (sum(step["seconds"] for step in some) for some in (steps, full))
    return {
        **loaded,
        "tokens_per_second": sum(step["tokens"] for step in steps) / seconds,
        "seconds_a_step": seconds / len(steps),
        "speed_over_full": of_full / seconds,
        "speed_over_full_median": statistics.median(two["seconds"] / one["seconds"] for one, two in zip(steps, full, strict=True)),
        "processor_over_full": sum(s["processor_seconds"] for s in full) / sum(s["processor_seconds"] for s in steps),
        "peak_bytes": max(step["peak_bytes"] for step in steps),
    }


def line(one: dict[str, Any]) -> str:
    """For people who wait."""
    if "error" in one:
        return f"{one['name']}: {one['error']}"
    return (
        f"{one['name']}: {one.get('trained_parameters', 0):,} parameters, {one['tokens_per_second']:,.0f} tokens/s, "
        f"{one['speed_over_full']:.2f} of full's, {one['peak_bytes'] / 2**20:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
