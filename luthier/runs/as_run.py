"""What a run came to be of its recipe, for its report: effective learning rate, batch and ranks, some rows as the model reads them, and how
long was measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any, TypeVar

from luthier.planning.plan import Plan
from luthier.registry import slots_of
from luthier.rows.look import sample_of, shortened

SHOWN_ROWS = 3
"""Training rows that a report shows."""
SHOWN_PIECES = 40
"""Pieces of a row that a report shows, each of tokens that are alike."""
Result = TypeVar("Result")


class Watch:
    """Adds up how long some calls take, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, work: Callable[[], Result]) -> Result:
        """Call and add its time."""
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds += time.perf_counter() - began


def as_run(plan: Plan) -> dict[str, Any]:
    """The settings that took effect, whoever chose them.

    Returns:
        `learning_rate`, the highest, and `learning_rate_from`, who chose it; `batch` with the mean `rows` and `tokens` of an optimizer
        step over all processes and the `micro_batch_tokens`; `ranks` by slot, of the techniques that have one.
    """
    ranks = {slot: part.options["rank"] for _, slot, part in slots_of(plan.chosen) if isinstance(part.options.get("rank"), int)}
    return {
        "learning_rate": plan.clock.learning_rate,
        "learning_rate_from": plan.rate_from,
        "batch": {
            "rows": plan.feed.rows_per_step(),
            "tokens": plan.feed.tokens()[0] / plan.clock.steps,
            "micro_batch_tokens": plan.feed.micro_batch_tokens,
        },
        "ranks": ranks,
    }


def seen_rows(plan: Plan) -> list[dict[str, Any]]:
    """The first training rows as the model reads them, before input maps; of rows that belong together each by itself."""
    rows = [one for place in range(min(SHOWN_ROWS, len(plan.rows.rows))) for one in islice(plan.rows.rows[place].group, SHOWN_ROWS)]
    samples = [sample_of(row, plan.tokenizer) for row in rows]
    return [
        {
            "id": one.id,
            "where": one.where,
            "tokens": one.tokens,
            "labels": one.labels,
            "pieces": [[shortened(piece.text), piece.target] for piece in one.pieces[:SHOWN_PIECES]],
            "left_out": max(0, len(one.pieces) - SHOWN_PIECES),
        }
        for one in samples
    ]
