"""Which variants a sweep has, and what the command line must not ask of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.lab.replication import CHOOSING_SEED
from luthier.sweep.grid import Settings, choosing_set, read_words, split_values, target_set, variants_of

ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "three", "four")]
ASKED = [{"prompt": row["prompt"], "answer": row["completion"]} for row in ROWS]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name, rows in (("rows", ROWS), ("asked", ASKED)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: workshop-small\n"
        "seed: 5\n"
        "rows: {train: rows.jsonl}\n"
        "evaluate:\n"
        "  old: {rows: asked.jsonl, role: retention}\n"
        "  validation: {rows: asked.jsonl}\n"
        "  new: {rows: asked.jsonl}\n"
    )
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("full", ("full",)),
        ("full,half, lora", ("full", "half", "lora")),
        ("full,{lora: {rank: 4, alpha: 8}}", ("full", "{lora: {rank: 4, alpha: 8}}")),
        ("[clip, adamw],[clip, sgd]", ("[clip, adamw]", "[clip, sgd]")),
        ("'a,b',\"c,d\"", ("'a,b'", '"c,d"')),
        ("full,", ("full", "")),
        ("", ("",)),
    ],
)
def test_values_are_cut_at_commas_outside_of_brackets_and_quotes(text: str, values: tuple[str, ...]) -> None:
    assert split_values(text) == values


def test_the_grid_is_the_product_and_single_values_hold_in_all_variants(recipe: Path) -> None:
    asked = read_words(["tune=lora,{lora: {alpha: 8}}", "train.epochs=2", "tune.lora.rank=4,8", "seeds=2", "jobs=3"])
    variants = variants_of(recipe, asked)
    assert asked.settings == Settings(seeds=2, learning_rates=3, jobs=3, choose_by=None)
    assert asked.listed == ["tune", "tune.lora.rank"]
    assert [variant.recipe.tune["lora"] for variant in variants] == [
        {"rank": 4},
        {"rank": 8},
        {"alpha": 8, "rank": 4},
        {"alpha": 8, "rank": 8},
    ]
    assert [variant.recipe.train.epochs for variant in variants] == [2, 2, 2, 2]
    assert variants[1].name == "tune=lora tune.lora.rank=8" and variants[1].slug == "tune-lora-tune-lora-rank-8"
    assert [variant.name for variant in variants_of(recipe, read_words(["tune=full,lora"]))] == ["full", "lora"]
    (alone,) = variants_of(recipe, read_words([]))
    assert alone.name == "small" and not alone.changes


def test_rates_are_chosen_by_the_first_learnt_set_and_the_skill_shown_by_another(recipe: Path) -> None:
    (variant,) = variants_of(recipe, read_words([]))
    assert choosing_set(variant.recipe, None) == "validation" and target_set(variant.recipe, "validation") == "new"
    assert choosing_set(variant.recipe, "old") == "old" and target_set(variant.recipe, "old") == "validation"
    with pytest.raises(LuthierError, match="no evaluation set `valid`") as told:
        choosing_set(variant.recipe, "valid")
    assert "`validation`" in told.value.fix


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["tune"], "`tune` is not key=value", "tune=full,lora"),
        (["=full"], "is not key=value", ""),
        (["tune="], "`tune` lists nothing", "tune=one,two"),
        (["tune=full,,lora"], "nothing between two commas", "tune=one,two"),
        (["tune=full,lora,full"], "lists a value twice", "leave out"),
        (["tune=full", "tune=lora"], "`tune` stands twice", "tune=full,lora"),
        (["seeds=2", "seeds=3"], "`seeds` stands twice", "once"),
        (["seeds=0"], "`0` is no number of seeds", "seeds=3"),
        (["seeds=many"], "`many` is no number of seeds", "seeds=3"),
        (["seeds="], "`` is no number of seeds", "seeds=3"),
        ([f"seeds={CHOOSING_SEED + 1}"], f"{CHOOSING_SEED + 1} seeds", f"at most {CHOOSING_SEED}"),
        (["learning_rates=0"], "`0` is no number of learning_rates", "learning_rates=3"),
        (["jobs=-1"], "`-1` is no number of jobs", "jobs=3"),
        (["seed=1,2"], "`seed` must be the same in all variants", "seeds=N"),
        (["evaluate.new.limit=1,2"], "must be the same in all variants", "one value"),
        (["out=elsewhere"], "lie in the sweep's folder", "--out"),
        (["trian.epochs=1,2"], "there is no key `trian`", "`train`"),
        (["train.epochs=1,many"], "`epochs` is 'many'", "number"),
        (["tune=full,harf"], "harf", "half"),
        (["choose_by=nothing"], "no evaluation set `nothing`", "known: new, old, validation"),
    ],
)
def test_mistakes_are_named_with_a_remedy_and_nothing_starts(
    recipe: Path, words: list[str], what: str, fix: str, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    result = CliRunner().invoke(app, ["sweep", str(recipe), *words, "--out", str(out), "--json"])
    assert result.exit_code == 2, result.output
    told = json.loads(result.stdout)
    assert what in told["error"] and fix in told["fix"] and told["where"]
    assert not out.exists()


def test_a_recipe_that_shows_nothing_learnt_is_refused(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text("model: workshop-small\nrows: {train: rows.jsonl}\nevaluate: {old: {rows: asked.jsonl, role: retention}}\n")
    result = CliRunner().invoke(app, ["sweep", str(recipe), "--json", "--out", str(tmp_path / "sweep")])
    assert result.exit_code == 2
    assert "role: target" in json.loads(result.stdout)["fix"] and not (tmp_path / "sweep").exists()
