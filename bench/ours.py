"""luthier's side: the loop that `luthier train` runs, without evaluation and saving."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.turns import Turn
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.rows.encode import Encoded
from luthier.rows.groups import prompt_length
from luthier.runs.train import measured
from luthier.training.engine import StepResult
from luthier.training.loop import Plans, Progress, train


def written(row: Encoded) -> dict[str, list[int]]:
    """A row, or a pair, as the other side reads it."""
    if not any(row.supervised) and "label" in row.columns:
        return {"input_ids": list(row.token_ids), "label": row.columns["label"]}
    if not row.mates:
        labels = [one if target else -100 for one, target in zip(row.token_ids, row.supervised, strict=True)]
        return {"input_ids": list(row.token_ids), "labels": labels}
    prompt = prompt_length(row)
    # What a template writes behind the end of a turn is no target here, and would be one there.
    chosen, rejected = ([id for id, target in zip(one.token_ids, one.supervised, strict=True) if target] for one in row.group)
    return {"prompt_ids": list(row.token_ids[:prompt]), "chosen_ids": chosen, "rejected_ids": rejected}


def main(setting: dict[str, Any]) -> None:
    """Write the rows of every step for the other side, then train when told to."""
    turn = Turn()
    plan = make_plan(
        make_recipe(
            {
                "model": setting["model"],
                "rows": {
                    "train": setting["rows"],
                    "max_length": setting["max_length"],
                    "too_long": setting.get("too_long", "right"),
                },
                "tune": {"lora": {"rank": 8, "alpha": 16.0}} if setting["tune"] == "lora" else setting["tune"],
                **setting.get("keys", {}),
                "repeat_baseline": False,
                "train": {
                    "precision": setting["precision"],
                    "batch_rows": setting["rows_a_step"],
                    "micro_batch_tokens": setting["micro_batch_tokens"],
                    "epochs": 1,
                    **setting.get("train", {}),
                },
            }
        )
    )
    rows = plan.rows.rows
    steps = [[rows[i] for group in step for i in group] for step in plan.feed.epoch(0)]
    Path(setting["encoded"]).write_text(json.dumps([written(row) for step in steps for row in step]))
    turn.facts = {
        "trained_parameters": plan.trained_parameters,
        "model_bytes": sum(one.numel() * one.element_size() for one in plan.model.parameters()),
    }
    turn.wait()

    def told(progress: Progress, result: StepResult) -> None:
        turn.done(result.tokens, result.supervised)
        if not plan.sets or progress.step < plan.clock.steps:
            turn.wait()

    train(plan.engine, plan.feed, plan.clock, Plans(), Progress(), tell=told)
    if plan.sets:
        plan.model.eval()
        turn.end({name: result.value for name, result in measured(plan, plan.sets).items()})


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
