"""Columns of targets under a run's model, how far a run took it, and coverage, which is exact where one answer is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.columns.targets import find_targets
from luthier.lab.targets import TOP, Targets, answered, drift, targets_of, with_answers
from luthier.results.folder import Run
from luthier.results.opened import open_base, open_run
from luthier.rows.batches import collate
from luthier.rows.encode import encode
from luthier.rows.read import read

ROWS: list[dict[str, Any]] = [
    {"id": str(number), "prompt": f"what is {number}?", "completion": "it is " + "very " * number + "far"} for number in range(5)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A few steps on a tiny model."""
    train = {"steps": 4, "batch_rows": 4, "precision": "fp32", "learning_rate": 1e-2, "threads": 1, "device": "cpu"}
    folder: Path = tmp_path_factory.mktemp("targets")
    return luthier.train({"model": "tiny:llama", "rows": {"train": ROWS}, "train": train, "out": str(folder), "name": "run"})


def log_probabilities(opened: Any) -> torch.Tensor:
    """Of all targets of the rows, [N, V], from the model's own forward pass, row by row."""
    tune, tokenizer = opened
    found = []
    for row in read(ROWS).rows:
        batch = collate([encode(row, tokenizer)])
        where = find_targets(batch)
        with torch.no_grad():
            logits_BTV = tune.model(input_ids=batch.token_ids_BT).logits
        found.append(logits_BTV[0, where.source_N].double().log_softmax(-1))
    return torch.cat(found)


def test_columns_are_those_of_the_model_row_by_row(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.lab.targets.BATCH_ROWS", 2)
    found = targets_of(run, ROWS, ["nll", "right", TOP])
    tune, tokenizer = open_run(run)
    labels = [[token for token, on in zip(one.token_ids, one.supervised, strict=True) if on] for one in _encoded(tokenizer)]
    flat = torch.tensor([label for row in labels for label in row])
    log_NV = log_probabilities((tune, tokenizer))
    assert found.row_N.tolist() == [number for number, row in enumerate(labels) for _ in row]
    assert found.text_N == tuple(tokenizer.convert_ids_to_tokens(flat.tolist()))
    assert torch.allclose(found["nll"], -log_NV.gather(1, flat[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(found["top"], log_NV.exp().amax(-1), atol=1e-5)
    assert torch.equal(found["right"] == 1, log_NV.argmax(-1) == flat)
    assert found.mean("nll") == pytest.approx(float(found["nll"].mean()))


def _encoded(tokenizer: Any) -> Any:
    return [encode(row, tokenizer) for row in read(ROWS).rows]


def test_drift_is_the_divergence_from_the_base(run: Run) -> None:
    tuned_NV, base_NV = log_probabilities(open_run(run)), log_probabilities(open_base(run))
    expected = float((tuned_NV.exp() * (tuned_NV - base_NV)).sum(-1).mean())
    assert expected > 1e-3 and drift(run, ROWS) == pytest.approx(expected, rel=1e-4)


def test_no_column_compares_with_a_base_that_a_run_has_not(run: Run) -> None:
    with pytest.raises(AssertionError, match="knows its base"):
        targets_of(run, ROWS, ["kl"])


def test_coverage_by_hand() -> None:
    """Rows of probability 1/2 * 1/2 and 1/8: one of two samples holds them in 7/16 and 15/64 of the cases."""
    nll_N = torch.tensor([0.5, 0.5, 0.125], dtype=torch.float64).log().neg()
    found = Targets({"nll": nll_N, "right": torch.tensor([1.0, 0.0, 1.0]).double()}, torch.tensor([0, 0, 1]), ("a", "b", "c"))
    assert found.coverage(1) == pytest.approx((1 / 4 + 1 / 8) / 2)
    assert found.coverage(2) == pytest.approx((7 / 16 + 15 / 64) / 2)
    assert found.sum_rows("right").tolist() == [1.0, 1.0] and found.least("right").tolist() == [0.0, 1.0]


def test_items_with_their_answers() -> None:
    rows = answered(["facts", "sort"], count=3)
    assert len(rows) == 6 and all(row.keys() == {"id", "prompt", "completion"} for row in rows)
    assert with_answers([{"id": "1", "prompt": "a?", "answer": "b"}]) == [{"id": "1", "prompt": "a?", "completion": "b"}]
    assert answered(["sort"], difficulty=3) != answered(["sort"])
