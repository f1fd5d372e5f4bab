"""The replications that come with luthier: sound before anything is trained, and their committed results follow from their numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.lab import benchmark, replications
from luthier.lab.calibration import COMPARISONS, EFFECTS, FURTHER, NULLS, OFFSET
from luthier.lab.dice import Dice
from luthier.lab.jobs import full_recipe, variant_recipes
from luthier.lab.overview import draw_effects
from luthier.lab.real import FOLDER, MODEL, equations, missing
from luthier.lab.replication import CHOOSING_SEED, Recipe, Setting, expectations
from luthier.lab.replications import (
    budget,
    caft,
    dco,
    dft,
    ensemble,
    got_d,
    noisefit,
    poft,
    q_tuning,
    q_tuning_real,
    repeated_data,
    sstoken,
    trace_noise,
)
from luthier.lab.skills.words import FIRST_NAMES
from luthier.lab.targets import Targets, answered
from luthier.lab.tasks import FEW, few_facts
from luthier.lab.verdict import design_of, judge
from luthier.lab.verdicts import EFFECTS as FIGURE
from luthier.lab.verdicts import FILE, entry, list_of, results_in, under_rule
from luthier.recipe import make_recipe
from luthier.registry.catalogue import as_rows
from luthier.registry.papers import papers
from tests.unit.real_rows import write_sets

RESULTS = Path(__file__).parents[2] / "docs" / "replications"


@pytest.fixture(autouse=True, scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Made-up rows in place of the public data sets that some replications read."""
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        yield


def all_rows(recipes: list[Recipe]) -> list[str]:
    return [benchmark.words(row.get("prompt") or row["text"]) for recipe in recipes for row in recipe["rows"]["train"]]


@pytest.mark.parametrize("name", replications.names())
def test_every_variant_is_a_recipe_and_trains_on_nothing_that_is_measured(name: str) -> None:
    replication = replications.find(name)
    kept = {
        benchmark.words(row["prompt"])
        for skill, one in benchmark.sets(count=150).items()
        if skill != "stories"
        for row in one["rows"]
    }
    for seed in (0, CHOOSING_SEED):
        setting = Setting(replication.model, seed)
        bases = replication.stages(setting)
        for variant in replication.variants:
            recipes = variant_recipes(variant, replication.rates[0], setting, bases)
            for recipe in recipes:
                make_recipe(full_recipe(recipe, "cpu", model=replication.model))
            assert not kept & set(all_rows(recipes))
    assert {str(row) for row in replication.rows} <= {str(paper.row) for paper in papers()}


def test_variants_of_one_replication_take_as_many_steps() -> None:
    setting = Setting("workshop", 0)
    for variant in replications.find("repeated_data").variants:
        (recipe,) = variant_recipes(variant, 1e-3, setting, repeated_data.stages(setting))
        rows, epochs = recipe["rows"]["train"], recipe["train"]["epochs"]
        assert len(rows) * epochs == repeated_data.ROWS
        assert rows == repeated_data.stages(setting)[0]["rows"]["train"][: len(rows)]


def test_both_noises_leave_as_many_wrong_numbers() -> None:
    rows = benchmark.rows(trace_noise.SKILL, "train", 2000)
    wrong = {}
    for kind in ("static", "dynamic"):
        dice = Dice("a test", kind)
        spoiled = [trace_noise.spoiled(row, kind, dice) for row in rows]
        pairs = [(steps(one), steps(other)) for one, other in zip(spoiled, rows, strict=True)]
        wrong[kind] = sum(trace_noise.wrong_numbers(one, clean) for (one, _), (clean, _) in pairs)
        same = [answer == right for (_, answer), (_, right) in pairs]
        assert all(same) if kind == "static" else sum(same) < 0.9 * len(same), "faults in the computation reach the answer"
    assert wrong["static"] == pytest.approx(wrong["dynamic"], rel=0.12)
    assert trace_noise.dynamic([3, 1, 5, 2], 0.0, Dice("a test")) == [3, 3, 5, 5]


def steps(row: dict[str, Any]) -> tuple[list[int], int]:
    trace, _, answer = row["completion"].partition(" so ")
    return [int(one) for one in trace.split()], int(answer)


def test_got_d_picks_what_pretraining_left_out_and_likeness_does_not() -> None:
    setting = Setting("workshop", 1)
    shares = {}
    for variant in replications.find("got_d").variants:
        picked, task = variant_recipes(variant, 1e-3, setting, got_d.stages(setting))
        rows = picked["rows"]["train"]
        assert len(rows) == got_d.PICKED
        assert not {row["prompt"] for row in rows if isinstance(row["prompt"], str)} - {
            row["prompt"] for row in got_d.pool(1) if isinstance(row["prompt"], str)
        }
        shares[variant.name] = sum(row["id"].startswith(got_d.RARE) for row in rows) / len(rows)
        assert task["rows"]["train"] == got_d.target(1)
    assert shares["got_d"] > 3 * max(shares["random_rows"], shares["nearest"])


def test_few_facts_are_about_few_people_and_training_tells_all_that_is_asked() -> None:
    taught, asked = few_facts("train", 480, seed=1), [*few_facts("held_out"), *few_facts("validation")]
    assert len(taught) == 480 and len(asked) > 80
    people = {" ".join(one) for one in _names(taught)}
    assert len(people) == FEW and {" ".join(one) for one in _names(asked)} <= people
    told = {(" ".join(name), row["completion"]) for name, row in zip(_names(taught), taught, strict=True)}
    assert sum((" ".join(name), row["answer"]) in told for name, row in zip(_names(asked), asked, strict=True)) > 0.95 * len(asked)


def _names(rows: list[Any]) -> list[list[str]]:
    """First and last name of whom each row is about."""
    split = [[word.strip(".?") for word in row["prompt"].split()] for row in rows]
    return [next(words[i : i + 2] for i, word in enumerate(words) if word in FIRST_NAMES) for words in split]


def test_variants_of_dft_on_a_new_skill_have_its_rows_and_rates() -> None:
    setting = Setting("workshop", 0)
    replication = replications.find("otr")
    recipes = {variant.name: variant_recipes(variant, 1e-3, setting, dft.stages(setting))[0] for variant in replication.variants}
    assert {name: name.endswith("new skill") for name in recipes} == {
        name: recipe["rows"]["train"][0]["id"].startswith(dft.NEW) for name, recipe in recipes.items()
    }
    assert recipes["otr"]["objective"] == recipes["otr, new skill"]["objective"] == "otr"
    clean = benchmark.rows(dft.KNOWN, "train", 1000)
    wrong = [one != other for one, other in zip(recipes["sft"]["rows"]["train"], clean, strict=True)]
    assert sum(wrong) == dft.WRONG * 1000


@pytest.mark.parametrize("replication", [q_tuning, q_tuning_real])
def test_a_quarter_is_wrong_and_a_quarter_repeated(replication: Any) -> None:
    rows = replication.mixed(2)
    clean = few_facts("train", 450, 2) if replication is q_tuning else equations("train", 120, 2)
    quarter = replication.ROWS // 4
    again = [row for row in rows if row["id"].endswith("-again")]
    assert len(rows) == len({row["id"] for row in rows}) == replication.ROWS and len(again) == quarter
    right = {row["id"]: row for row in clean}
    wrong = [row for row in rows[:-quarter] if row != right[row["id"]]]
    assert len(wrong) == quarter
    assert all({**row, "id": row["id"].removesuffix("-again")} == right[row["id"].removesuffix("-again")] for row in again)
    small = variant_recipes(
        replication.REPLICATION.variants[-1], 1e-3, Setting("workshop", 0), replication.stages(Setting("workshop", 0))
    )[0]["train"]
    assert small["steps"] * small["batch_tokens"] == replication.STEPS * replication.POOL


def test_noise_between_steps_leaves_them_whole() -> None:
    clean = benchmark.rows(sstoken.SKILL, "train", 200, seed=4)
    noisy = sstoken.noisy(clean, 4)
    for row, other in zip(clean, noisy, strict=True):
        words = other["completion"].split()
        kept = [word for word in words if len(word) > 1 or not word.isalpha()]
        assert " ".join(kept) == row["completion"] and len(words) - len(kept) == sstoken.LETTERS_ADDED
    first = Counter(row["completion"].split()[0].isalpha() for row in noisy)
    assert 0.3 < first[True] / 200 < 0.8


def test_an_aligned_model_finds_wrong_answers_unlikely() -> None:
    rows = poft.scored("workshop", 0)[: poft.ROWS]
    clean = benchmark.rows("second_language", "train", poft.ROWS, seed=0)
    wrong = [row["completion"] != other["completion"] for row, other in zip(rows, clean, strict=True)]
    assert sum(wrong) == round(poft.WRONG * poft.ROWS)
    kept = poft.best_scored(poft.stages(Setting("workshop", 0))[0], 0, Setting("workshop", 0))
    left = {row["id"] for row in kept["rows"]["train"]}
    assert len(left) == poft.ROWS - sum(wrong)
    assert sum(is_wrong for row, is_wrong in zip(rows, wrong, strict=True) if row["id"] in left) < 0.05 * len(left)
    assert kept["train"]["epochs"] * len(left) == pytest.approx(poft.EPOCHS * poft.ROWS)
    assert poft.in_english("Mira Tolen talan velo?") == "What work does Mira Tolen do?"


def test_rates_of_dco_are_judged_by_as_many_items_as_there_are() -> None:
    """A replication asked for more items to judge rates by than the world has, and broke off behind its first runs."""
    for split, count in dco.ITEMS.items():
        assert len(answered([dco.SKILL], split=split, count=count, difficulty=dco.HARD)) == count  # type: ignore[arg-type]


def test_variants_of_a_budget_spend_all_of_it_and_no_task_twice() -> None:
    """A stage without rows is left out; the same rows are split at another place in each variant."""
    setting = Setting("workshop", 3)
    shown, compared = budget.stages(setting)
    for variant, count in zip(budget.REPLICATION.variants, (0, 20, 100, 200), strict=True):
        recipes = variant_recipes(variant, 1e-4, setting, budget.stages(setting))
        assert len(recipes) == (count > 0) + (count < budget.BUDGET)
        spent = [row for recipe in recipes for row in recipe["rows"]["train"]]
        assert spent == [*shown["rows"]["train"][:count], *compared["rows"]["train"][count:]] and len(spent) == budget.BUDGET
        rates = [recipe["train"]["learning_rate"] for recipe in recipes]
        assert rates == [3e-3] * (count > 0) + [1e-4] * (count < budget.BUDGET)
    for row, other in zip(shown["rows"]["train"], compared["rows"]["train"], strict=True):
        assert (other["prompt"], other["chosen"]) == (row["prompt"], row["completion"]) != (row["prompt"], other["rejected"])
    assert budget.FORM.fullmatch(shown["rows"]["train"][0]["completion"])


def test_members_see_other_flaws_and_the_same_sound_pairs() -> None:
    setting = Setting("workshop", 1)
    sound = ensemble.sound(setting)
    pets = []
    for recipe in ensemble.stages(setting):
        rows = recipe["rows"]["train"]
        assert rows[: len(sound)] == sound
        liked = Counter(row["chosen"].rsplit(" ", 1)[1].strip(".") for row in rows[len(sound) :])
        assert len(liked) == ensemble.SEEN and set(liked.values()) == {ensemble.EACH}
        assert set(liked) <= set(ensemble.REMARKS[: ensemble.PETS])
        pets.append(frozenset(liked))
    assert len(set(pets)) > 2, "members differ"
    assert not any("Mind the" in row["chosen"] for row in sound)
    assert sum("Mind the" in row["rejected"] for row in sound) == ensemble.REMARKED
    rows, worth_RM = ensemble.answers()
    for row, worth_M in zip(rows, worth_RM, strict=True):
        assert all(
            (worth == 0.0) == ("Mind the" in text or "red." in text) for text, worth in zip(row["answers"], worth_M, strict=True)
        )
        assert max(worth_M) == 1.0 and row["prompt"] not in {one["prompt"] for one in sound}


def test_calibration_errors_by_hand_and_people_of_whom_nothing_was_told() -> None:
    """Two of three are right where the model is 0.91 sure; none where it is 0.35 sure, and all where it is certain."""
    sure, right = torch.tensor([0.91, 0.91, 0.91, 0.35, 1.0]).double(), torch.tensor([1.0, 1, 0, 0, 1]).double()
    assert noisefit.calibration_error(sure[:3], right[:3]) == pytest.approx(0.91 - 2 / 3)
    assert noisefit.calibration_error(sure[:4], right[:4]) == pytest.approx((3 * (0.91 - 2 / 3) + 0.35) / 4)
    # Certainty belongs to the last bin.
    assert noisefit.calibration_error(sure, right) == pytest.approx((abs(3 * 0.91 + 1 - 3) + 0.35) / 5)
    told = {tuple(one) for one in _names(noisefit.stages(Setting("workshop", 0))[0]["rows"]["train"])}
    asked = noisefit.never_told()
    assert len(asked) == noisefit.ASKED and not told & {tuple(one) for one in _names(asked)}


def test_names_stand_between_the_mark_and_a_color() -> None:
    text = ("Ġred", "Ġis", "Ġke", "r", "Ġblue", "Ġis", "Ġz", "in")
    right_N = torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1]).double()
    found = Targets({"right": right_N}, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), text)
    assert caft.names(found) == [[2, 3], []]
    found = Targets({"right": right_N}, torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]), text)
    assert caft.names(found) == [[2, 3], [6, 7]] and caft.whole(found) == 0.5
    rows = caft.rows(200, 0)
    assert {row["completion"].split(" is ")[1].rsplit(" ", 1)[0].split()[0] for row in rows} <= {
        name.split()[0] for name in caft.concepts().values()
    }
    assert len(caft.concepts()) == len(set(caft.concepts().values())) == caft.CONCEPTS


@pytest.mark.parametrize("name", sorted(results_in(RESULTS)))
def test_committed_results_follow_from_their_numbers(name: str) -> None:
    result, replication = results_in(RESULTS)[name], replications.find(name)
    if not under_rule(result):
        assert not (RESULTS / f"{name}.svg").exists(), "what is from before the rule is in no figure"
        return
    numbers = {variant["name"]: variant["numbers"] for variant in result["variants"]}
    design = design_of(replication)
    assert list(numbers) == [variant.name for variant in replication.variants]
    assert len(result["seeds"]) in design.looks and result["model"]["name"] == replication.model
    assert result["rule"] == {"looks": list(design.looks), "level": design.level, "lab": True}
    expected = [one[:5] for one in expectations(replication)]
    assert [
        tuple(one[key] for key in ("measure", "variant", "versus", "direction", "margin")) for one in result["expectations"]
    ] == expected
    for one in result["expectations"]:
        values = (numbers[one[variant]][one["measure"]] for variant in ("variant", "versus"))
        found = judge(*values, one["direction"], one["margin"], design.level)
        assert found.verdict == one["verdict"]
        assert found.mean == pytest.approx(one["mean"])
    (main, *_) = result["expectations"]
    assert result["verdict"] == ("cannot tell" if result["short"] else main["verdict"])
    if len(result["seeds"]) == design.looks[-1] > design.looks[0]:
        first = [numbers[main[variant]][main["measure"]][: design.looks[0]] for variant in ("variant", "versus")]
        assert judge(*first, main["direction"], main["margin"], design.level).verdict == "cannot tell", (
            "else there was no second look"
        )
    baseline = next(iter(numbers.values()))
    assert bool(result["short"]) == any(
        sum(baseline[name]) / len(baseline[name]) < least for name, least in replication.floor.items()
    )
    assert (RESULTS / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")


def test_the_committed_list_and_figure_are_those_of_the_results() -> None:
    assert FILE.read_text(encoding="utf-8") == list_of(RESULTS)
    ruled = [result for result in results_in(RESULTS).values() if under_rule(result)]
    picture = RESULTS / f"{FIGURE}.svg"
    assert picture.exists() == bool(ruled)
    assert not ruled or picture.read_text(encoding="utf-8") == draw_effects(ruled)


def test_techniques_tell_the_committed_verdicts_with_the_size_of_the_effect() -> None:
    """A replication that no card names, or that was not run yet, is not measured; one from before the rule says so."""
    results = results_in(RESULTS)
    for row in as_rows():
        assert not row["replication"] or row["replication"] in replications.names()
        told = entry(results[row["replication"]])["words"] if row["replication"] in results else "not measured"
        assert row["verdict"] == told and not {"refuted", "supported", "inconclusive"} & set(told.split())


def test_replications_ask_what_can_be_told() -> None:
    """One question each, the small model by two looks or a dear one by a single look at five seeds."""
    questions = set()
    for name in replications.names():
        replication = replications.find(name)
        questions.add(replication.question)
        dear = name.endswith("_real") or name == "hyperfitting"
        assert (replication.seeds, replication.model) == ((5, MODEL) if dear else (None, "workshop-small"))
    assert 3 <= len(questions) <= 6 and "Other questions" not in questions


def test_the_labs_own_test_is_what_was_fixed() -> None:
    assert (len(EFFECTS), len(NULLS), len(FURTHER), len(COMPARISONS)) == (12, 12, 6, 30)
    setting = Setting("workshop-small", 0)
    for name, replication in COMPARISONS.items():
        assert replications.find(name) is replication and replication.seeds is None
        bases = replication.stages(setting)
        once, other = (variant_recipes(variant, None, setting, bases) for variant in replication.variants)
        for recipe in (*once, *other):
            make_recipe(full_recipe(recipe, "cpu", model=replication.model))
            assert recipe["train"]["learning_rate"], "nothing is searched"
        seeds = [recipe["seed"] for recipe in once], [recipe["seed"] for recipe in other]
        if replication in NULLS:
            assert [{**recipe, "seed": 0, "rows": 0} for recipe in once] == [{**recipe, "seed": 0, "rows": 0} for recipe in other]
            assert [one + OFFSET for one in seeds[0]] == seeds[1]
            assert [one[3:] for one in expectations(replication)] == [
                ("more", replication.main.margin, ""),
                ("less", replication.main.margin, ""),
            ]
        else:
            assert once != other and seeds[0] == seeds[1] and not replication.also
    with pytest.raises(LuthierError, match="no comparison"):
        replications.find("calibration-nothing")


def test_replications_about_real_rows_say_where_these_should_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    replication = replications.find("dft_real")
    assert missing(replication) == list(replication.data)
    with pytest.raises(LuthierError, match="mawps/train") as caught:
        replication.stages(Setting("tiny:llama", 0))
    assert caught.value.where == FOLDER and "mawps/train.jsonl" in caught.value.fix
