"""Every recipe that comes with luthier can be read, says what it shows, brings its rows along, and takes its first steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import luthier
from luthier.evaluate.planned import evaluation_sets
from luthier.recipe.parts import choose_parts
from luthier.rows.read import read
from luthier.rows.sources import Joined, read_rows

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHORT = {
    "chat": "messages",
    "feedback": "prompt+completion",
    "instructions": "prompt+completion",
    "little_memory": "prompt+completion",
    "search": "members",
    "techniques": "prompt+completion",
    "tools": "messages",
}
"""Recipes that are run here for a step or two, with the format of their rows."""


def head_of(path: Path) -> list[str]:
    """The comment that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(place for place, line in enumerate(lines) if line[:1] != "#")
    return [line.removeprefix("#").strip() for line in lines[:end]]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_whole(path: Path) -> None:
    recipe = luthier.read_recipe(path)
    assert choose_parts(recipe)["tune"] and evaluation_sets(recipe.evaluate, recipe.train)
    assert all(source.rows for source in read_rows(recipe.rows))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_job_its_command_what_to_expect_and_where_to_go(path: Path) -> None:
    head = head_of(path)
    said = re.fullmatch(r"(.+?)  Run: (.+) Expect: (.+) Next: (.+)", " ".join(head), re.DOTALL)
    assert said is not None
    job, run, expect, following = said.groups()
    assert job.strip().endswith(".") and head[0] and len(expect) > 60 and re.search(r"\d", expect)
    assert re.search(rf"luthier (train|sweep) recipes/{path.name}", run)
    assert f"luthier train recipes/{path.name}" in " ".join(head) and "luthier compare" in following


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_stands_on_a_page(path: Path) -> None:
    pages = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8") + (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"| `recipes/{path.name}` |" in pages


@pytest.mark.parametrize("name", SHORT)
def test_a_recipe_runs_and_none_of_its_rows_is_measured(name: str, tmp_path: Path) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = luthier.read_recipe(path)
    trained = list(Joined(read_rows(recipe.rows)))
    measured = [row for one in recipe.evaluate.values() for row in read(one.rows)]
    assert {row.shape for row in trained} == {SHORT[name]}
    asked = {prompt_of(row.fields) for row in trained}
    assert len(measured) >= 30 and not {prompt_of(row.fields) for row in measured} & asked
    short = ["train.steps=2", "repeat_baseline=false", f"out={tmp_path}", "train.precision=fp32", "train.threads=1"]
    short += [f"evaluate.{one}.limit=2" for one in recipe.evaluate]
    run = luthier.train(luthier.read_recipe(path, short))
    assert run.facts["status"] == "finished" and run.facts["steps"] == 2
    assert all(one["n"] == 2 for one in run.facts["metrics"].values())


def prompt_of(fields: object) -> str:
    """What a row asks, whatever its format."""
    assert isinstance(fields, dict)
    if "messages" in fields:
        return str([(one["role"], one["content"]) for one in fields["messages"][:-1]])
    if "members" in fields:
        return str([one.fields["text"] for one in fields["members"]])
    asked = fields["prompt"]
    return asked if isinstance(asked, str) else str([(one["role"], one["content"]) for one in asked])


def test_an_order_is_written_as_the_rows_say() -> None:
    """The file's own rule, worked out anew: the number in digits, the food, and paid where money was given."""
    digits = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    for path, key in (("orders.jsonl", "completion"), ("orders_held_out.jsonl", "answer")):
        for row in read(ROOT / "recipes" / "data" / "inn" / path):
            found = re.fullmatch(r"Write as a line: (\w+) portions of (\w+)(.*)", str(row.fields["prompt"]))
            assert found is not None
            word, food, rest = found.groups()
            paid = "paid" if rest in (", paid at once.", ", here is the money.") else "open"
            answer = row.fields[key] if key == "completion" else row.fields[key][0]
            assert answer == f"{digits[word]} {food}, {paid}"
