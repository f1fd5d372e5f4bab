"""Makes what `run.json` holds after a run, for tests and pictures of the report. The numbers are made up."""

from __future__ import annotations

import math
import random
from typing import Any

NUMBERS = {
    "attention_query": 331776,
    "attention_key": 110592,
    "attention_value": 110592,
    "attention_output": 331776,
    "mlp_gate": 884736,
    "mlp_up": 884736,
    "mlp_down": 884736,
    "attention_norm": 576,
    "mlp_norm": 576,
}
THINGS = (
    "scroll",
    "bridge",
    "tailpiece",
    "sound post",
    "purfling",
    "bass bar",
    "pegbox",
    "fingerboard",
    "saddle",
    "lining",
)


def sample_items(n: int, right_before: int, lost: int, learned: int, prefix: str) -> list[dict[str, Any]]:
    """Items: the first `right_before` were right, the first `lost` of these no longer are, `learned` others now are."""
    items = []
    for index in range(n):
        before = index < right_before
        after = (before and index >= lost) or (right_before <= index < right_before + learned)
        thing, workshop = THINGS[index % len(THINGS)], 3 + index // len(THINGS)
        items.append(
            {
                "id": f"{prefix}-{index:03d}",
                "prompt": f"In workshop {workshop} of Alderbrook, who carves the {thing}?",
                "expected": f"Tilda Marsh-{index}",
                "before": f"Tilda Marsh-{index}." if before else f"The {thing} is carved by the luthier himself.",
                "after": f"Tilda Marsh-{index} carves the {thing}." if after else "I do not know.",
                "before_score": float(before),
                "after_score": float(after),
            }
        )
    return items


def sample_delta(blocks: int = 30) -> dict[str, Any]:
    """Half of the matrices of every block moved, the later blocks more."""
    rng = random.Random(1)
    places = [
        {
            "block": None,
            "module_type": "embedding",
            "norm": 0.0,
            "base_norm": 310.0,
            "relative": 0.0,
            "parameters": 28311552,
            "changed": 0,
        }
    ]
    for block in range(blocks):
        chosen = set(rng.sample(list(NUMBERS)[:4], 2)) | set(rng.sample(list(NUMBERS)[4:7], 2))
        for role in NUMBERS:
            numbers = NUMBERS[role]
            base = 0.8 * math.sqrt(numbers) / 24
            norm = base * (0.002 + 0.009 * block / blocks + 0.003 * rng.random()) if role in chosen else 0.0
            places.append(
                {
                    "block": block,
                    "module_type": role,
                    "norm": norm,
                    "base_norm": base,
                    "relative": norm / base,
                    "parameters": numbers,
                    "changed": numbers if norm else 0,
                }
            )
    places.append(
        {
            "block": None,
            "module_type": "final_norm",
            "norm": 0.0,
            "base_norm": 9.0,
            "relative": 0.0,
            "parameters": 576,
            "changed": 0,
        }
    )
    norm = math.sqrt(sum(place["norm"] ** 2 for place in places))
    base = math.sqrt(sum(place["base_norm"] ** 2 for place in places))
    return {
        "norm": norm,
        "relative": norm / base,
        "changed_share": sum(place["changed"] for place in places) / 134515008,
        "by_place": places,
    }


def sample_history(steps: int = 84) -> list[dict[str, Any]]:
    """A loss that falls, with noise, under a cosine schedule."""
    rng = random.Random(0)
    return [
        {
            "step": step,
            "epoch": 4 * step / steps,
            "loss": 0.04 + 2.9 * math.exp(-step / 17) * (1 + 0.18 * (rng.random() - 0.5)),
            "learning_rate": 1e-5 * min(1, step / 3) * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "tokens": 512,
            "supervised": 202,
            "seconds": 1.8,
            "norm": 1.2,
        }
        for step in range(1, steps + 1)
    ]


def sample_run(**changes: Any) -> dict[str, Any]:
    """A finished run as `run.json` holds it; keyword arguments replace top-level facts."""
    recipe_text = (
        "name: quickstart\nmodel: smollm2-135m-instruct\nrows: {train: data/facts.jsonl}\ntune: half\n"
        "train: {epochs: 4, learning_rate: 1.0e-5}\nevaluate:\n"
        "  held_out: {rows: data/held_out.jsonl, metric: contains}\n"
        "  general: {rows: data/general.jsonl, metric: choice, role: retention}\n"
        "  prose: {rows: data/prose.jsonl, metric: perplexity, role: retention}\nseed: 0\n"
    )
    run: dict[str, Any] = {
        "luthier": "0.1.0",
        "name": "quickstart",
        "run": "runs/quickstart-1",
        "status": "finished",
        "command": "luthier train recipes/quickstart.yaml",
        "recipe": {
            "name": "quickstart",
            "model": "smollm2-135m-instruct",
            "rows": {"train": "data/facts.jsonl"},
            "tune": "half",
            "train": {"epochs": 4, "learning_rate": 1e-5},
            "evaluate": {"held_out": {"metric": "contains", "max_new_tokens": 48}},
            "seed": 0,
        },
        "recipe_text": recipe_text,
        "recipe_hash": "5be1c07f2a91",
        "seed": 0,
        "started": "2026-11-21T12:00:00+00:00",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "luthier": "0.1.0"},
        "machine": {
            "processor": "AMD EPYC 9R14",
            "cores": 2,
            "memory_bytes": 16 * 2**30,
            "device": "cpu",
            "precision": "bf16",
        },
        "model": {
            "name": "smollm2-135m-instruct",
            "origin": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "architecture": "llama",
            "parameters": 134515008,
            "fingerprint": "9c41d2e07b5fa833",
        },
        "rows": {
            "files": ["data/facts.jsonl"],
            "rows": 178,
            "tokens": 10752,
            "supervised_tokens": 4242,
            "truncated": 0,
            "dropped": [["data/facts.jsonl, line 12", "no answer left after the cut to 64 tokens"]],
            "skipped": [["data/facts.jsonl, line 90", "`answer` is empty", "give an answer"]],
            "padding_share": 0.031,
            "seen": [
                {
                    "id": "facts-1",
                    "where": "data/facts.jsonl, line 1",
                    "tokens": 12,
                    "labels": 4,
                    "pieces": [["What is <b>?", False], ["A <hole>.", True]],
                    "left_out": 1,
                }
            ],
            "overlap": {"held_out": 0, "general": 0, "prose": 0},
        },
        "plan": [
            "model      smollm2-135m-instruct: llama, 134,515,008 numbers",
            "rows       178 rows, 10,752 tokens",
            "tune       half",
        ],
        "tune": "half",
        "learning_rate": 1e-5,
        "learning_rate_from": "half's default",
        "batch": {"rows": 7.5, "tokens": 451.2, "micro_batch_tokens": 1024},
        "ranks": {"lora": 8},
        "measuring_seconds": 72.4,
        "trained_parameters": 66988474,
        "total_parameters": 134515008,
        "metrics": {
            "held_out": {
                "metric": "contains",
                "role": "target",
                "n": 60,
                "before": 0.0,
                "before_interval": [0.0, 0.06],
                "after": 58 / 60,
                "after_interval": [0.886, 0.991],
                "difference": 58 / 60,
                "difference_interval": [0.9, 1.0],
                "verdict": "better",
                "retained": None,
                "higher_is_better": True,
                "items": sample_items(60, 0, 0, 58, "held-out"),
            },
            "general": {
                "metric": "choice",
                "role": "retention",
                "n": 100,
                "before": 0.66,
                "before_interval": [0.56, 0.75],
                "after": 0.67,
                "after_interval": [0.57, 0.76],
                "difference": 0.01,
                "difference_interval": [-0.04, 0.06],
                "verdict": "no change",
                "retained": 64 / 66,
                "higher_is_better": True,
                "items": sample_items(100, 66, 2, 3, "general"),
            },
            "prose": {
                "metric": "perplexity",
                "role": "retention",
                "n": 50,
                "before": 21.4,
                "before_interval": [19.8, 23.2],
                "after": 21.9,
                "after_interval": [20.2, 23.8],
                "difference": 0.5,
                "difference_interval": [0.2, 0.8],
                "verdict": "worse",
                "retained": None,
                "higher_is_better": False,
                "items": [],
            },
        },
        "noise": {"held_out": 0.0, "prose": 0.012},
        "retained": 64 / 66,
        "seconds": 151.2,
        "total_seconds": 240.0,
        "tokens": 43008,
        "supervised_tokens": 16968,
        "tokens_per_second": 284.4,
        "supervised_tokens_per_second": 112.2,
        "peak_memory_bytes": 2040109465,
        "final_loss": 0.0402,
        "weights_sha256": "e3b0c44298fc1c14",
        "warnings": [],
        "history": sample_history(),
        "evaluations": [
            {"step": step, "metrics": {"held_out": value, "general": 0.66, "prose": 21.4 + 0.006 * step}}
            for step, value in ((21, 0.15), (42, 0.72), (63, 0.95))
        ],
        "delta": sample_delta(),
    }
    return {**run, **changes}
