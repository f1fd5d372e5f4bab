"""What training costs: time as the run measured it, and operations, which no other process disturbs."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from torch.utils.flop_counter import FlopCounterMode

from luthier.lab import benchmark
from luthier.lab.replication import Finished
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.results.folder import Run

_SAMPLE = 16
"""Rows of the step that is counted."""


def seconds(runs: Sequence[Run]) -> float:
    """Seconds of training for a thousand tokens."""
    return 1000 * fsum(run.facts["seconds"] for run in runs) / fsum(run.facts["tokens"] for run in runs)


def backward_share(finished: Finished) -> float:
    """Floating-point operations of a backward pass with the variant's tune, divided by those of the forward pass.

    About 2 where every matrix trains: a product for the weight's gradient and one for the input's, each as large as the forward's.
    """
    recipe = {
        "model": finished.setting.model,
        "seed": finished.setting.seed,
        "tune": finished.runs[0].facts["recipe"]["tune"],
        "rows": {"train": benchmark.rows("traces", "train", _SAMPLE)},
        # One step of many: what some techniques do at the end of a phase is not counted.
        "train": {"steps": 100, "batch_rows": _SAMPLE, "precision": "fp32", "device": "cpu"},
    }
    plan = make_plan(make_recipe(recipe))
    _, batches = plan.feed.at(0)
    now = plan.clock.at(0, 0.0)
    services = plan.engine.services("costs", now)
    with FlopCounterMode(display=False) as forward:
        for batch in batches:
            services.forward(batch, ("nll",))
    with FlopCounterMode(display=False) as both:
        plan.engine.step(batches, now)
    return float(both.get_total_flops() / forward.get_total_flops()) - 1
