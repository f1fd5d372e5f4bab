"""What techniques read of rows beside their text, and how much of them a run will see."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.planning.plan import Plan, make_plan
from luthier.recipe import make_recipe
from luthier.rows.free_columns import check_numbers
from tests.conftest import make_batch

ROWS = [{"prompt": f"{place}?", "completion": "abc" * (1 + place % 3), "task": "a", "p": 0.1, "s": -1.5} for place in range(40)]


def planned(rows: Any, **keys: Any) -> Plan:
    rows = rows if isinstance(rows, dict) else {"train": rows}
    return make_plan(make_recipe({"model": "tiny:llama", "rows": rows, "train": {"steps": 2, "batch_rows": 4}, **keys}))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "wrong", "keys", "said"),
    [
        ("s", None, {"objective": {"poft": {"column": "s"}}}, "no finite number `s`"),
        ("s", [1.0], {"objective": {"poft": {"column": "s"}}}, "no finite number `s`"),
        ("p", 1.5, {"token_weight": {"answer_coverage": {"column": "p"}}}, "the column `p` of this row is 1.5"),
        ("task", None, {"token_weight": "task_focal"}, "has no `task`"),
        ("task", "c", {"token_weight": {"task_balance": {"weights": {"a": 1.0, "b": 1.0}}}}, "none of a, b"),
    ],
)
def test_what_a_technique_reads_is_looked_for_in_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, column: str, wrong: Any, keys: dict[str, Any], said: str
) -> None:
    """A row without what an objective reads stopped a run in its middle, when its turn came."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    late = [dict(row) for row in ROWS]
    late[33] = {name: value for name, value in (late[33] | {column: wrong}).items() if value is not None}
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in late))
    with pytest.raises(LuthierError) as told:
        planned({"train": str(path), "streaming": streaming}, **keys)
    assert said in told.value.what and told.value.where.startswith(f"{path}:34 (row ")
    path.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    planned({"train": str(path), "streaming": streaming}, **keys)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_of_hundreds_of_digits_that_nobody_reads(sign: int) -> None:
    """A whole number that no float can hold stopped a run with an OverflowError, whoever read its column."""
    rows = [{**row, "n": sign * 10**400} for row in ROWS]
    _, batches = planned(rows).feed.at(0)
    assert batches[0].columns["n"].tolist() == [sign * float("inf")] * 4
    assert len(planned([{"text": row["prompt"], "label": 10**400} for row in ROWS]).rows.rows) == 40
    with pytest.raises(LuthierError, match="no finite number `n`"):
        planned(rows, objective={"poft": {"column": "n"}})


@pytest.mark.parametrize("sizes", [{"batch_rows": 4}, {"batch_tokens": 60}])
@pytest.mark.parametrize("epochs", [0.01, 0.3, 1.0, 1.25])
def test_the_plan_counts_the_targets_that_steps_will_take(epochs: float, sizes: dict[str, int]) -> None:
    """A part of an epoch was counted as that share of all targets, where whole steps are taken."""
    feed = planned(ROWS, train={"epochs": epochs, **sizes}).feed
    taken = [batch for step in range(feed.total()) for batch in feed.at(step)[1]]
    assert feed.tokens() == (sum(batch.tokens for batch in taken), sum(batch.supervised for batch in taken))
    feed = planned(ROWS, train={"steps": 1, **sizes}).feed
    assert feed.tokens() == (sum(batch.tokens for batch in feed.at(0)[1]), sum(batch.supervised for batch in feed.at(0)[1]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.1, None])
def test_a_number_that_every_row_must_have(value: float | None) -> None:
    """It is missing, is none, or is out of range; the row is the first of those that are asked about."""
    batch = make_batch([(3, 1), (4, 2)])
    good = batch._replace(columns={"weak": torch.tensor([0.0, 1.0], dtype=torch.float64)})
    check_numbers(good, "weak", "add it", called="probability", least=0.0, most=1.0)
    bad = batch if value is None else batch._replace(columns={"weak": torch.tensor([0.5, value], dtype=torch.float64)})
    with pytest.raises(LuthierError, match="a row has no probability `weak`") as refused:
        check_numbers(bad, "weak", "add it", called="probability", least=0.0, most=1.0)
    assert (refused.value.where, refused.value.fix) == ("row row0", "add it")
    if value is not None and math.isfinite(value):
        check_numbers(bad, "weak", "add it")
    else:
        with pytest.raises(LuthierError, match="a row has no number `weak`"):
            check_numbers(bad, "weak", "add it")
