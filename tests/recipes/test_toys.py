"""A toy technique of every kind, each one file and no edit elsewhere, runs from a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier import registry
from luthier.registry import KINDS, kinds_under
from luthier.rows.select import select_rows

TOYS = Path(__file__).parent.parent / "toys"
FOUND = sorted((path.parent.name, path.stem) for path in TOYS.glob("*/*.py") if not path.stem.startswith("_"))
ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three", "four")]

RECIPE_KEYS = {
    **dict.fromkeys(kinds_under("tune"), "tune"),
    **dict.fromkeys(kinds_under("objective"), "objective"),
    "token_weight": "token_weight",
    "gradient_estimator": "gradient_estimator",
    "callback": "callbacks",
    "freezing": "freeze",
}


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the toys be found, as a user would."""
    monkeypatch.setenv("LUTHIER_METHODS", str(TOYS))
    yield


def test_there_is_a_toy_of_every_kind() -> None:
    # What reads rows that belong together has techniques of its own, and needs other rows than these.
    assert {kind for kind, _ in FOUND} == KINDS.keys() - {"pair_loss", "step_loss", "head", "reference"}


@pytest.mark.parametrize(("kind", "name"), FOUND)
def test_a_toy_runs_from_a_recipe(kind: str, name: str, tmp_path: Path) -> None:
    assert name in registry.names(kind)
    recipe: dict[str, Any] = {
        "model": "tiny:llama",
        "rows": {"train": ROWS},
        "out": str(tmp_path),
        "train": {"steps": 2, "batch_rows": 4, "micro_batch_tokens": 150, "precision": "fp32", "learning_rate": 1e-3},
    }
    if kind == "row_score":
        recipe["rows"]["train"] = list(select_rows(ROWS, name, count=2).records)
        assert len(luthier.train(recipe).facts["history"]) == 2
        return
    if kind == "probe":
        run = luthier.train(recipe)
        assert luthier.probe(name, str(run.folder)).numbers["changed"] > 0
        return
    if kind == "row_map":
        recipe["rows"]["map"] = name
    elif kind in kinds_under("optimizer"):
        rest = ["adamw"] if kind == "optimizer" else []
        recipe["optimizer"] = [name, *rest] if kind == "optimizer" else ["adamw", name]
    else:
        recipe[RECIPE_KEYS[kind]] = name
    if kind == "gradient_estimator":
        recipe["optimizer"] = ["sgd"]
    run = luthier.train(recipe)
    assert run.facts["status"] == "finished" and len(run.facts["history"]) == 2
