"""Every recipe that comes with luthier can be read, says what it shows, and brings its rows along."""

from __future__ import annotations

from pathlib import Path

import pytest

import luthier
from luthier.evaluate.planned import evaluation_sets
from luthier.recipe.parts import choose_parts
from luthier.rows.sources import read_rows

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_whole(path: Path) -> None:
    recipe = luthier.read_recipe(path)
    assert choose_parts(recipe)["tune"] and evaluation_sets(recipe.evaluate, recipe.train)
    assert all(source.rows for source in read_rows(recipe.rows))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_what_it_shows_and_names_its_control(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    said = " ".join(line.removeprefix("#").strip() for line in lines[: next(i for i, one in enumerate(lines) if one[:1] != "#")])
    assert f"luthier train recipes/{path.name}" in said and "luthier compare" in said
