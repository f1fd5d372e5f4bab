"""Micro-batches are planned, and memory and time are counted, by the tokens that are run; steps and reports by those that rows have."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.planning.estimate import MOST_ROWS, _count, _size, _spread, _whole_groups
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.rows.batches import plan_epoch
from luthier.rows.encode import EncodedRows, Sizes
from luthier.rows.stored import StoredRows, batch_of
from luthier.training.dryrun import peak_of
from tests.conftest import make_batch
from tests.unit.test_shared_prompts import counted, encoded


def test_micro_batches_hold_what_is_run_and_steps_what_the_rows_have() -> None:
    """Two pairs of 20 + 20 tokens that share 15 run 25 each: both fit into 50, and a step of 80 tokens still has two pairs."""
    rows = encoded([("p" * 15 + "|" + "a" * 5, "p" * 15 + "|" + "b" * 5)] * 4 + [("c" * 30,)])
    sizes = Sizes.of(rows)
    assert list(sizes.tokens) == [40] * 4 + [30] and list(sizes.run) == [25] * 4 + [30]
    assert StoredRows([batch_of(EncodedRows.of(rows))]).sizes().run.tolist() == sizes.run  # type: ignore[attr-defined]
    options: dict[str, Any] = {"tokens": sizes.tokens, "members": sizes.members, "seed": 0, "epoch": 0, "packed": True}
    plans = [plan_epoch(sizes.lengths, run=run, micro_batch_tokens=50, batch_tokens=80, **options) for run in (sizes.run, ())]
    steps = [[sorted(row for group in step for row in group) for step in plan] for plan in plans]
    assert steps[0] == steps[1]
    assert max(len(group) for step in plans[0] for group in step) == 2 and all(len(g) == 1 for step in plans[1] for g in step)


def test_groups_of_many_rows_are_taken_whole() -> None:
    """The longest row's group comes first, and of all groups every second; rows that stand alone are groups of one."""
    batch = make_batch([(3, 1), (9, 2), (5, 1), (4, 1), (8, 3), (2, 1), (6, 1)])._replace(groups=((0, 1), (2, 3), (4, 5)))
    groups = _whole_groups(batch)
    assert groups == [(0, 1), (4, 5), (6,), (2, 3)]
    assert _spread(groups, 2).tolist() == [0, 1, 6] and _spread(groups, 4).tolist() == [0, 1, 4, 5, 6, 2, 3]
    assert batch.take(_spread(groups, 2)).groups == ((0, 1),)


PAIRS = [{"prompt": f"why is it so that {i}", "chosen": " yes" * 3, "rejected": " no" * (2 + i % 3)} for i in range(20)]


@pytest.mark.parametrize(("objective", "shared"), [("dpo", True), (["dpo", "neftune"], False)], ids=str)
def test_the_plan_counts_what_is_run(objective: Any, shared: bool) -> None:
    """Where every pass shares prompts, micro-batches are planned by what is run, and memory is counted for the rows that are in one."""
    train = {"batch_rows": 20, "micro_batch_tokens": 1400, "device": "cpu", "precision": "fp32", "steps": 1, "packing": True}
    recipe = {"model": "tiny:llama", "rows": {"train": PAIRS}, "objective": objective, "tune": "lora", "train": train}
    plan = make_plan(make_recipe(recipe))
    feed, engine = plan.feed, plan.engine
    assert feed.shared == engine.shares_beginnings == shared
    assert ("are not run again" in " ".join(plan.lines())) == shared
    _, batches = feed.at(0)
    assert sum(batch.tokens for batch in batches) == plan.rows.tokens == feed.tokens()[0]
    run = [_size(engine, batch) for batch in batches]
    if not shared:
        assert sum(run) == plan.rows.tokens
        return
    with counted(engine.tune) as seen:
        told = engine.step(batches, plan.clock.at(0, 0.0))
    # Filled by what is run; and with the pass of the base.
    assert len(run) == 1 and plan.rows.tokens > 1400
    assert seen == [one for size in run for one in (size, size)] and max(run) <= 1400 and sum(run) < 0.7 * plan.rows.tokens
    assert told.tokens == plan.rows.tokens
    # Of many rows some groups are run on shapes, and the others are on the line through them.
    assert len(batches[0].row_ids) > MOST_ROWS
    exact = peak_of(engine, batches[:1], plan.clock.at(0, 0.0))
    assert _count(engine, batches[0]).activations == pytest.approx(exact.activations, rel=0.05)
