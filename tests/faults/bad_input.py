"""A small folder with a recipe that would train, for tests that break one thing in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import luthier
from luthier.errors import LuthierError

ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three", "four")]
ASKED = [{"prompt": row["prompt"], "answer": row["completion"]} for row in ROWS]
RECIPE: dict[str, Any] = {
    "model": "tiny:llama",
    "rows": {"train": "rows.jsonl"},
    "train": {"steps": 2, "batch_rows": 4, "precision": "fp32"},
    "evaluate": {"asked": {"rows": "asked.jsonl", "max_new_tokens": 4}},
}


class Missing:
    """A key that is left out; it has a name, so that tests have one."""

    def __repr__(self) -> str:
        return "missing"


MISSING = Missing()
"""Instead of a value: the key is left out."""

Content = str | bytes | Sequence[Any]


def lines(rows: Sequence[Any]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(path: Path, content: Content) -> None:
    """Write text, bytes, or rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else lines(content)).encode())


def write_recipe(folder: Path, changes: Mapping[str, Any]) -> Path:
    """A valid recipe with its rows, and some keys (`train.steps`) changed."""
    put(folder / "rows.jsonl", ROWS)
    put(folder / "asked.jsonl", ASKED)
    recipe = {**copy.deepcopy(RECIPE), "out": str(folder / "runs")}
    for key, value in changes.items():
        *path, last = key.split(".")
        here = recipe
        for step in path:
            here = here.setdefault(step, {})
        if value is MISSING:
            del here[last]
        else:
            here[last] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


def refused(call: Callable[[], Any], where: Sequence[str], fix: str) -> LuthierError:
    """The error of a call: it names the place and the remedy, and is no other kind of exception."""
    with pytest.raises(Exception) as caught:
        call()
    error = caught.value
    assert type(error) is LuthierError, repr(error)
    assert error.what and error.fix, error
    assert all(word in error.where for word in where), error
    assert fix in error.fix, error
    return error


def refused_to_train(folder: Path, recipe: Path, where: Sequence[str], fix: str, overrides: Sequence[str] = ()) -> None:
    """Training is refused with its place and remedy, and nothing was begun."""
    refused(lambda: luthier.train(luthier.read_recipe(recipe, overrides)), where, fix)
    assert not list(folder.glob("runs/*")), "a run was begun"
    assert not list(folder.rglob("*.safetensors")), "weights were written"
