"""The claims that come with luthier: sound before anything is trained, and their committed results follow from their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.catalogue import as_rows
from luthier.errors import LuthierError
from luthier.lab import claims, world
from luthier.lab.claim import CHOOSING_SEED, Recipe, Setting
from luthier.lab.claims import got_d, repeated_data, trace_noise
from luthier.lab.dice import Dice
from luthier.lab.jobs import arm_recipes, full_recipe
from luthier.lab.real import FOLDER, missing
from luthier.lab.skills.arithmetic import dynamic, running_sum, static, written
from luthier.lab.verdict import judge, together
from luthier.papers import papers
from luthier.recipe import make_recipe

RESULTS = Path(__file__).parents[2] / "docs" / "claims"
DATA = Path(__file__).parents[3] / "shared" / "data"
"""Public sets, where a machine has them."""


def all_rows(recipes: list[Recipe]) -> list[str]:
    return [world.words(row.get("prompt") or row["text"]) for recipe in recipes for row in recipe["rows"]["train"]]


@pytest.mark.parametrize("name", claims.names())
def test_every_arm_is_a_recipe_and_trains_on_nothing_that_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = claims.find(name)
    monkeypatch.setenv(FOLDER, str(DATA))
    if missing(claim):
        pytest.skip(f"needs the public sets {', '.join(missing(claim))} in {DATA}")
    kept = {world.words(row["prompt"]) for skill, one in world.sets(count=150).items() if skill != "stories" for row in one["rows"]}
    for seed in (0, CHOOSING_SEED):
        setting = Setting(claim.model, seed)
        bases = claim.stages(setting)
        for arm in claim.arms:
            recipes = arm_recipes(arm, claim.rates[0], setting, bases)
            for recipe in recipes:
                make_recipe(full_recipe(recipe, "cpu", model=claim.model))
            assert not kept & set(all_rows(recipes))
    assert {str(row) for row in claim.rows} <= {str(paper.row) for paper in papers()}


def test_arms_of_one_claim_take_as_many_steps() -> None:
    setting = Setting("workshop", 0)
    for arm in claims.find("repeated_data").arms:
        (recipe,) = arm_recipes(arm, 1e-3, setting, repeated_data.stages(setting))
        rows, epochs = recipe["rows"]["train"], recipe["train"]["epochs"]
        assert len(rows) * epochs == repeated_data.ROWS
        assert rows == repeated_data.stages(setting)[0]["rows"]["train"][: len(rows)]


def test_both_noises_leave_as_many_wrong_numbers() -> None:
    dice = Dice("a test")
    sums = [[dice.number(1, 9) for _ in range(trace_noise.LENGTH)] for _ in range(2000)]
    wrong = {"static": 0, "dynamic": 0}
    for numbers in sums:
        clean = written(running_sum(numbers))
        wrong["static"] += trace_noise.wrong_numbers(static(clean, trace_noise.static_intensity(), dice), clean)
        wrong["dynamic"] += trace_noise.wrong_numbers(written(dynamic(numbers, trace_noise.DYNAMIC, dice)), clean)
    assert wrong["static"] == pytest.approx(wrong["dynamic"], rel=0.12)
    assert trace_noise.wrong_numbers("0+1=1 1+2=4", "0+1=1 1+2=3") == 1


def test_got_d_picks_what_pretraining_left_out_and_likeness_does_not() -> None:
    setting = Setting("workshop", 1)
    shares = {}
    for arm in claims.find("got_d").arms:
        picked, task = arm_recipes(arm, 1e-3, setting, got_d.stages(setting))
        rows = picked["rows"]["train"]
        assert len(rows) == got_d.PICKED
        assert not {row["prompt"] for row in rows if isinstance(row["prompt"], str)} - {
            row["prompt"] for row in got_d.pool(1) if isinstance(row["prompt"], str)
        }
        shares[arm.name] = sum(row["id"].startswith(got_d.RARE) for row in rows) / len(rows)
        assert task["rows"]["train"] == got_d.target(1)
    assert shares["got_d"] > 3 * max(shares["random_rows"], shares["nearest"])


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_committed_results_follow_from_their_numbers(name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    claim = claims.find(name)
    numbers = {arm["name"]: arm["numbers"] for arm in result["arms"]}
    assert list(numbers) == [arm.name for arm in claim.arms]
    assert len(result["seeds"]) >= 3 and result["model"]["name"] == claim.model
    assert [(one["measure"], one["arm"], one["versus"], one["direction"], one["margin"]) for one in result["expectations"]] == [
        one[:5] for one in claim.expects
    ]
    for one in result["expectations"]:
        found = judge(numbers[one["arm"]][one["measure"]], numbers[one["versus"]][one["measure"]], one["direction"], one["margin"])
        assert found.verdict == one["verdict"]
        assert found.mean == pytest.approx(one["mean"])
    assert result["verdict"] == (
        "inconclusive" if result["short"] else together([one["verdict"] for one in result["expectations"]])
    )
    baseline = next(iter(numbers.values()))
    assert bool(result["short"]) == any(sum(baseline[name]) / len(baseline[name]) < least for name, least in claim.floor.items())
    assert (RESULTS / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")


def test_techniques_tell_the_committed_verdicts() -> None:
    """A claim that no card names, or that was not run yet, is not measured."""
    for row in as_rows():
        path = RESULTS / f"{row['claim']}.json"
        assert not row["claim"] or row["claim"] in claims.names()
        assert row["verdict"] == (json.loads(path.read_text(encoding="utf-8"))["verdict"] if path.is_file() else "not measured")


def test_claims_about_real_rows_say_where_these_should_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    claim = claims.find("dft_real")
    assert missing(claim) == list(claim.data)
    with pytest.raises(LuthierError, match="mawps/train") as caught:
        claim.stages(Setting("tiny:llama", 0))
    assert caught.value.where == FOLDER and "mawps/train.jsonl" in caught.value.mend
