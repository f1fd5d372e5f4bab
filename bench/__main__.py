"""`python -m bench`: luthier beside a plain transformers loop (and PEFT for LoRA), on the same rows, model and number types.

Both sides take steps in turn, so that a machine whose speed drifts slows both alike; what counts is the ratio. Results go to
`bench/results.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from luthier import machine
from luthier.kinds import Batch
from luthier.models.load import load_model, resolve
from luthier.plan import make_plan
from luthier.recipe import make_recipe

ROWS = "recipes/data/hollowmere/train.jsonl"
Step = Callable[[], tuple[int, int]]
"""Takes one step; returns its real and supervised tokens."""


def luthier_steps(tune: Any, model: str, precision: str) -> Step:
    """luthier as a recipe runs it."""
    recipe = make_recipe(
        {
            "model": model,
            "rows": {"train": ROWS},
            "tune": tune,
            "train": {"precision": precision, "epochs": 1000, **SIZE},
        }
    )
    plan = make_plan(recipe)
    plan.model.train()
    numbers = iter(range(plan.clock.steps))

    def step() -> tuple[int, int]:
        number = next(numbers)
        epoch, batches = plan.feed.at(number)
        result = plan.engine.step(batches, plan.clock.at(number, epoch))
        return result.tokens, result.supervised

    return step


SIZE = {"batch_tokens": 1024, "micro_batch_tokens": 2048}


def plain_steps(tune: Any, model: str, precision: str) -> Step:
    """The loop of a tutorial: labels into the model, loss out, torch's AdamW; the same rows a step, in the order they come."""
    source = resolve(model)
    plain: Any = load_model(source, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    if tune == "lora":
        from peft import LoraConfig, get_peft_model

        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        plain = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules=linear))
    plain.train()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batches = _shuffled(model, precision)

    def step() -> tuple[int, int]:
        batch = next(batches)
        loss = plain(
            input_ids=batch.token_ids_BT, attention_mask=batch.attend_BT.long(), labels=batch.label_BT, use_cache=False
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return batch.tokens, batch.supervised

    return step


def _shuffled(model: str, precision: str) -> Iterator[Batch]:
    recipe = make_recipe({"model": model, "rows": {"train": ROWS}, "train": {"epochs": 1000, "precision": precision, **SIZE}})
    feed = make_plan(recipe).feed
    for number in range(10**6):
        yield feed.at(number)[1][0]


def measure(first: Step, second: Step, rounds: int) -> dict[str, Any]:
    """Steps of both in turn. Returns tokens a second of each, and the ratio of each pair."""
    speeds: dict[str, list[float]] = {"luthier": [], "plain": []}
    supervised: dict[str, list[float]] = {"luthier": [], "plain": []}
    for number in range(rounds + 1):
        for name, step in (("luthier", first), ("plain", second)):
            began = time.perf_counter()
            tokens, targets = step()
            seconds = time.perf_counter() - began
            if number:
                speeds[name].append(tokens / seconds)
                supervised[name].append(targets / seconds)
    ratios = [a / b for a, b in zip(speeds["luthier"], speeds["plain"], strict=True)]
    return {
        "luthier_tokens_per_second": statistics.median(speeds["luthier"]),
        "plain_tokens_per_second": statistics.median(speeds["plain"]),
        "luthier_supervised_tokens_per_second": statistics.median(supervised["luthier"]),
        "plain_supervised_tokens_per_second": statistics.median(supervised["plain"]),
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "rounds": rounds,
    }


def main() -> None:
    """Measure every setting and write the results."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    chosen = parser.parse_args()
    results = []
    for tune, peer in (
        ("full", "transformers and torch AdamW"),
        ("lora", "PEFT and torch AdamW"),
        ("half", "transformers, full"),
    ):
        print(f"{tune} beside {peer} ...", flush=True)
        plain = plain_steps("full" if tune == "half" else tune, chosen.model, chosen.precision)
        found = measure(luthier_steps(tune, chosen.model, chosen.precision), plain, chosen.rounds)
        results.append({"tune": tune, "peer": peer, "precision": chosen.precision, "model": chosen.model, **found})
        print(
            f"  luthier {found['luthier_tokens_per_second']:,.0f} tokens/s, peer {found['plain_tokens_per_second']:,.0f}, "
            f"ratio {found['ratio']:.2f} ({found['ratio_spread'][0]:.2f} to {found['ratio_spread'][1]:.2f})",
            flush=True,
        )
    dtype = torch.bfloat16 if chosen.precision == "bf16" else torch.float32
    facts = {
        "versions": machine.versions(),
        "machine": machine.describe(torch.device("cpu"), dtype),
        "results": results,
    }
    chosen.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"written to {chosen.out}")


if __name__ == "__main__":
    main()
