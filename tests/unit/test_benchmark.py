"""The synthetic benchmark: every answer is right, nothing that is asked was taught, and every draw is the same everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.evaluate.metrics import METRICS
from luthier.lab import benchmark
from luthier.lab.dice import Dice
from luthier.lab.skill import Split
from luthier.lab.skills import facts, words
from luthier.lab.workshop import COUNTS, SEED
from luthier.recipe import EvaluationSet
from luthier.rows.read import read
from tests.unit.benchmark_oracles import is_right

CHECKED = [name for name in benchmark.SKILLS if name != "stories"]
BY_PHRASING = [name for name, skill in benchmark.SKILLS.items() if skill.splits == "by phrasing"]
BY_PERSON = [name for name, skill in benchmark.SKILLS.items() if skill.splits == "by person"]
PLACES: list[tuple[int, int]] = [(0, 1), (5, 2), (11, 3)]
"""Seeds and difficulties."""
Row = Mapping[str, Any]


@cache
def asked(name: str, seed: int, difficulty: int, split: Split = "held_out") -> list[Row]:
    """Held-back or validation rows, as many as a set of an experiment, or all there are."""
    count = 60 if split == "held_out" else 15
    return benchmark.sets([name], count=count, seed=seed, difficulty=difficulty, split=split)[name]["rows"]


@cache
def taught(name: str, seed: int, difficulty: int) -> list[Row]:
    """Training rows; of the built-in model's, the first part."""
    count = COUNTS[name] // 8 if (name, seed, difficulty) == (name, SEED, 1) and name in COUNTS else 300
    return benchmark.rows(name, "train", count, seed=seed, difficulty=difficulty)


def lesson(row: Row) -> tuple[str, ...]:
    """All words of a training row, the target too."""
    return tuple(f"{benchmark.words(row.get('prompt', ''))} {benchmark.words(row.get('completion', row.get('text')))}".split())


def question(row: Row) -> str:
    return benchmark.words(row.get("prompt") or row["text"])


@pytest.mark.parametrize("name", benchmark.SKILLS)
def test_no_question_is_taught(name: str) -> None:
    for seed, difficulty in PLACES:
        kept = {split: {question(row) for row in asked(name, seed, difficulty, split)} for split in ("held_out", "validation")}
        assert len(kept["held_out"]) == len(asked(name, seed, difficulty)) and not kept["held_out"] & kept["validation"]
        for taught_seed, taught_difficulty in [(SEED, 1), *PLACES]:
            known = {question(row) for row in taught(name, taught_seed, taught_difficulty)}
            assert not known & (kept["held_out"] | kept["validation"])


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_no_training_row_of_any_skill_holds_a_whole_question_with_its_answer(difficulty: int) -> None:
    kept: dict[tuple[str, ...], str] = {}
    lengths: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for name in CHECKED:
        for row in [*asked(name, 0, difficulty), *asked(name, 0, difficulty, "validation")]:
            whole = (*question(row).split(), *benchmark.words(row["answer"]).split())
            kept[whole] = name
            lengths[whole[:2]].add(len(whole))
    found = set()
    for name in benchmark.SKILLS:
        for row in [*taught(name, SEED, 1), *taught(name, SEED, difficulty)]:
            told = lesson(row)
            for start in range(len(told)):
                runs = [told[start : start + length] for length in lengths.get(told[start : start + 2], ())]
                found |= {(name, kept[run]) for run in runs if run in kept}
    assert not found


def test_two_operations_on_letters_never_show_one_of_them_whole() -> None:
    """With the letters last, a row such as "First double, then sort: c a b" would end in a whole row of `sort`."""
    items = {"reverse": ("Reverse", "reverse"), "sort": ("Sort", "sort"), "capitals": ("Capitals", "case")}
    for row in benchmark.rows("compose", "train", 1500, seed=SEED):
        told, asks = lesson(row), len(question(row).split())
        for start, (head, skill) in ((told.index(one) + 1, item) for one, item in items.items() if one in told):
            for length in range(3, asks - start + 1):
                letters, answer = told[start : start + length], " ".join(told[start + length : start + 2 * length])
                shown = answer.upper() if skill == "case" else answer
                assert not is_right(skill, f"{head}: {' '.join(letters)}", shown), row


@pytest.mark.parametrize("name", BY_PHRASING)
def test_no_held_back_phrasing_is_taught_by_any_skill(name: str) -> None:
    people = "|".join(f"{first} [A-Z][a-z]+" for first in words.FIRST_NAMES)
    entity = re.compile(rf"\b(?:{people}|{'|'.join(words.CITIES)})\b")
    phrasings: dict[str, set[str]] = {"held_out": set(), "validation": set(), "train": set()}
    for seed, difficulty in PLACES:
        for split in ("held_out", "validation"):
            phrasings[split] |= {entity.sub("{e}", row["prompt"]) for row in asked(name, seed, difficulty, split)}
    for other in benchmark.SKILLS:
        for seed, difficulty in [(SEED, 1), *PLACES]:
            for row in taught(other, seed, difficulty):
                if isinstance(row.get("prompt"), str):
                    phrasings["train"].add(entity.sub("{e}", row["prompt"]))
    assert all("{e}" in one for split in ("held_out", "validation") for one in phrasings[split])
    assert not phrasings["train"] & (phrasings["held_out"] | phrasings["validation"])
    assert not phrasings["held_out"] & phrasings["validation"]


@pytest.mark.parametrize("name", BY_PERSON)
def test_no_held_back_person_is_taught(name: str) -> None:
    def people(rows: list[Row]) -> set[str]:
        found = {re.findall(r"\b[A-Z][a-z]+ [A-Z][a-z]+\b", row["prompt"])[-1] for row in rows}
        assert found <= set(facts.world().known)
        return found

    for seed, difficulty in PLACES:
        sides = [people(asked(name, seed, difficulty, split)) for split in ("held_out", "validation")]
        trained = people(taught(name, seed, difficulty)) | people(taught(name, SEED, 1))
        assert not sides[0] & sides[1] and not trained & (sides[0] | sides[1])


def test_people_of_new_and_updated_facts_are_others_than_those_asked_about_elsewhere() -> None:
    here = facts.world()
    assert (len(here.known), len(here.updated), len(here.new)) == (facts.KNOWN, facts.UPDATED, facts.NEW)
    assert len({*here.known, *here.updated, *here.new}) == facts.KNOWN + facts.UPDATED + facts.NEW
    assert set(here.changed) == {(one, name) for one in here.updated for name in facts.PERSON}
    assert all(here.facts[fact] != value for fact, value in here.changed.items())
    learnt = " ".join(row["prompt"] for name in ("facts", "two_hop") for row in taught(name, SEED, 1))
    assert not [one for one in here.new if one in learnt]
    assert not [one for one in here.updated for row in asked("facts", 0, 1) if one in row["prompt"]]


@pytest.mark.parametrize("name", CHECKED)
def test_every_answer_is_right(name: str) -> None:
    for seed, difficulty in PLACES:
        for row in [*asked(name, seed, difficulty), *asked(name, seed, difficulty, "validation")]:
            assert is_right(name, row["prompt"], row["answer"]), row
        for row in taught(name, seed, difficulty):
            answer = row["completion"].split(" so ")[-1]
            assert is_right(name, row["prompt"], answer), row


def test_stories_hang_together() -> None:
    for row in taught("stories", 0, 1):
        text = row["text"]
        assert len({one for one in words.FIRST_NAMES if re.search(rf"\b{one}\b", text)}) == 2
        assert len({one for one in words.CITIES if re.search(rf"\b{one}\b", text)}) == 1
        for sort in (words.OBJECTS, words.FOODS):
            assert len({one for one in sort if re.search(rf"\b{one}\b", text)}) == 1


@pytest.mark.parametrize("name", CHECKED)
def test_the_checker_tells_right_from_wrong(name: str) -> None:
    answers = {row["answer"] for row in asked(name, 0, 1)}
    assert len(answers) > 1
    for row in asked(name, 0, 1):
        answer = row["answer"]
        assert benchmark.check(name, answer, row) and benchmark.check(name, f" {answer}\n", row)
        wrong = [other for other in answers if other != answer] + ["", answer[:-1]]
        if benchmark.SKILLS[name].metric == "last_number":
            wrong += [str(int(answer) + 1), f"{answer} so {int(answer) - 1}"]
            assert benchmark.check(name, f"1+2=3 3+4=7 so {answer}", row)
        elif benchmark.SKILLS[name].metric == "tool_call":
            call = json.loads(answer)
            assert benchmark.check(
                name, json.dumps({"arguments": dict(reversed(call["arguments"].items())), "name": call["name"]}), row
            )
            for other in ({**call["arguments"], "more": 1}, {key: str(value) for key, value in call["arguments"].items()}):
                wrong.append(json.dumps({**call, "arguments": other}))
            wrong.append(json.dumps({**call, "name": call["name"].upper()}))
        else:
            wrong += [answer + " x", answer.swapcase() if answer.swapcase() != answer else "x"]
        assert not [one for one in wrong if benchmark.check(name, one, row)]


def test_running_text_has_no_right_answer() -> None:
    with pytest.raises(LuthierError, match="no right answer"):
        benchmark.check("stories", "Mira slept.", benchmark.rows("stories", "held_out", 1)[0])


DIGESTS = """
import hashlib, json
from luthier.lab import benchmark

def digest(name):
    found = [benchmark.rows(name, split, 50) for split in ("train", "held_out")]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

print(json.dumps({name: digest(name) for name in benchmark.SKILLS}))
"""
GOLDEN = {
    "facts": "c65a0fed4e48ca72",
    "two_hop": "6b51a5fd44d4220f",
    "arithmetic": "3a9695ba80426eab",
    "boxes": "b2161bd5d23ca408",
    "copy": "c901c38690f605dd",
    "reverse": "31da9c4629f95c2a",
    "count": "a26148c8035cfefc",
    "case": "c82b3f392847a5c8",
    "sentiment": "2aa39aafea9d7db6",
    "topic": "16cd0db0949eabb8",
    "pairs": "c1cef757005a62c7",
    "refusals": "a6333e8c1870c972",
    "translate": "882cd7911a7dd4f4",
    "in_context": "3f8cdfc4b06a34cf",
    "stories": "0a851ef563c1a2be",
    "traces": "1792f32ba115112e",
    "sort": "4cfce0cf4f35847a",
    "compose": "327f0588d7adc66f",
    "tools": "fb3570682c10c369",
    "new_facts": "fe1e73de1a37b1f2",
    "updated_facts": "e457c92d6c128e57",
    "second_language": "1c0ff29b865c0d4f",
    "largest": "fa4c305b542d2943",
}
"""SHA-256 of each skill's first rows on both sides: a change here is a change of the benchmark, and makes earlier results another's."""


@pytest.mark.parametrize("name", benchmark.SKILLS)
def test_rows_are_the_same_everywhere(name: str) -> None:
    found = [benchmark.rows(name, split, 50) for split in ("train", "held_out")]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == GOLDEN[name]


def test_rows_do_not_depend_on_how_python_hashes() -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONHASHSEED": "4321", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", DIGESTS], cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == GOLDEN


@pytest.mark.parametrize("name", benchmark.SKILLS)
def test_another_seed_gives_other_rows_and_more_rows_begin_the_same(name: str) -> None:
    rows = benchmark.rows(name, "train", 40, seed=5)
    assert rows == benchmark.rows(name, "train", 60, seed=5)[:40]
    assert [{**row, "id": ""} for row in rows] != [{**row, "id": ""} for row in benchmark.rows(name, "train", 40, seed=6)]
    assert [row["id"] for row in rows] == [f"{name}-train-5-{number}" for number in range(40)]


def test_dice() -> None:
    dice = Dice("a test", 1)
    thrown = Counter(dice.number(1, 6) for _ in range(6000))
    assert set(thrown) == set(range(1, 7)) and all(abs(count - 1000) < 3 * (6000 * 5 / 36) ** 0.5 for count in thrown.values())
    assert [dice.number(4, 4) for _ in range(3)] == [4, 4, 4] and {dice.number(-1, 0) for _ in range(50)} == {-1, 0}
    for probability in (0.0, 0.1, 0.5, 1.0):
        share = fmean(dice.chance(probability) for _ in range(5000))
        assert abs(share - probability) <= 3 * (probability * (1 - probability) / 5000) ** 0.5
    things = tuple("abcdefgh")
    assert all(len(set(dice.some(things, 5))) == 5 for _ in range(100)) and things == tuple("abcdefgh")
    assert sorted(dice.shuffled(things)) == list(things) and dice.some(things, 0) == []
    orders = Counter(tuple(dice.shuffled("abc")) for _ in range(3000))
    assert len(orders) == 6 and all(abs(count - 500) < 3 * (3000 * 5 / 36) ** 0.5 for count in orders.values())
    assert {dice.pick("ab") for _ in range(50)} == {"a", "b"}


def test_dice_are_equal_for_equal_names_and_on_every_platform() -> None:
    one, same, other = Dice("world", 1), Dice("world", 1), Dice("world", 2)
    draws = [one.number(0, 999) for _ in range(8)]
    assert draws == [same.number(0, 999) for _ in range(8)] != [other.number(0, 999) for _ in range(8)]
    assert draws == DRAWN


DRAWN = [897, 952, 65, 563, 413, 20, 737, 600]
GROWS = ("boxes", "copy", "reverse", "count", "case", "pairs", "refusals", "translate", "in_context", "stories", "arithmetic")
GROWS += ("traces", "sort", "compose", "largest")


@pytest.mark.parametrize(("name", "last"), [*((name, 3) for name in GROWS), ("sentiment", 2), ("topic", 2)])
def test_a_higher_difficulty_is_longer(name: str, last: int) -> None:
    lengths = []
    for difficulty in range(1, last + 1):
        rows = benchmark.rows(name, "train", 300, difficulty=difficulty)
        lengths.append(fmean(len(str(row.get("prompt", ""))) + len(row.get("completion", row.get("text"))) for row in rows))
    assert all(longer > 1.02 * shorter for shorter, longer in pairwise(lengths)), lengths


SPOILED = [name for name, skill in benchmark.SKILLS.items() if skill.spoil and name != "traces"]


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.333, 1.0])
def test_noise_makes_exactly_its_share_of_the_answers_wrong(name: str, noise: float) -> None:
    clean = benchmark.rows(name, "train", 101)
    noisy = benchmark.rows(name, "train", 101, noise=noise)
    wrong = [row for row in noisy if not is_right(name, row["prompt"], row["completion"].split(" so ")[-1])]
    assert len(wrong) == round(noise * 101)
    assert [(row["id"], row["prompt"]) for row in noisy] == [(row["id"], row["prompt"]) for row in clean]
    assert sum(old != new for old, new in zip(clean, noisy, strict=True)) == len(wrong)


@pytest.mark.parametrize("name", SPOILED)
def test_a_wrong_answer_looks_like_a_right_one(name: str) -> None:
    clean, noisy = benchmark.rows(name, "train", 1500), benchmark.rows(name, "train", 300, noise=1.0)
    for row, right in zip(noisy, clean, strict=False):
        answer = row["completion"]
        if name == "sort":
            assert sorted(answer.split()) == right["completion"].split()
        elif name == "arithmetic":
            assert answer.isdigit() and 1 <= abs(int(answer) - int(right["completion"])) <= 9
        elif name == "largest":
            steps, last = answer.split(" so ")
            assert len(steps.split()) == len(right["completion"].split()) - 2 and steps.split()[-1] == last and 1 <= int(last) <= 9
        else:
            kind = facts.PERSON if name in ("new_facts", "second_language") else {}
            alike = [one.values for one in kind.values() if right["completion"] in one.values]
            assert answer in (alike[0] if alike else {one["completion"] for one in clean})


def test_noise_makes_every_other_label_as_likely() -> None:
    clean, noisy = benchmark.rows("pairs", "train", 900), benchmark.rows("pairs", "train", 900, noise=1.0)
    turned = Counter((old["completion"], new["completion"]) for old, new in zip(clean, noisy, strict=True))
    assert len(turned) == 6 and all(abs(count - 150) < 4 * (900 * 5 / 36) ** 0.5 for count in turned.values())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("sentimnt", "train", 5), {}, "did you mean `sentiment`?"),
        (("topic", "test", 5), {}, "write train, validation, held_out"),
        (("topic", "train", 0), {}, "a difficulty from 1 to 9"),
        (("topic", "train", 5), {"difficulty": 0}, "a difficulty from 1 to 9"),
        (("topic", "train", 5), {"noise": 1.5}, "write a number from 0 to 1"),
        (("topic", "train", 5), {"noise": -0.5}, "write a number from 0 to 1"),
        (("topic", "train", 5), {"kind": "dynamic"}, "there is no option `kind`"),
        (("traces", "train", 5), {"knd": "dynamic"}, "did you mean `kind`?"),
        (
            ("copy", "train", 5),
            {"noise": 0.5},
            "noise is for training rows of: arithmetic, sentiment, topic, pairs, traces, sort, ",
        ),
        (("topic", "held_out", 5), {"noise": 0.5}, "there is no noise here"),
        (("two_hop", "held_out", 5000), {}, "has no 5000 different held_out items at difficulty 1"),
    ],
)
def test_what_cannot_be_had(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(LuthierError, match=re.escape(message)):
        benchmark.rows(*arguments, **options)


def test_one_more_than_there_are_is_refused_and_the_number_told_is_had() -> None:
    with pytest.raises(LuthierError) as raised:
        benchmark.rows("two_hop", "held_out", 5000)
    most = int(re.findall(r"ask for (\d+) or fewer", str(raised.value))[0])
    assert len(benchmark.rows("two_hop", "held_out", most)) == most


def test_sets_are_what_recipes_take() -> None:
    sets = benchmark.sets(count=12, role="target", seed=3)
    assert list(sets) == list(benchmark.SKILLS)
    ids = [row["id"] for one in sets.values() for row in one["rows"]]
    assert len(ids) == 12 * len(sets) == len(set(ids))
    for name, one in sets.items():
        kept = EvaluationSet(**one)
        metric = METRICS[str(kept.metric)]
        assert kept.role == "target" and kept.max_new_tokens == benchmark.SKILLS[name].max_new_tokens
        rows = read(one["rows"])
        assert len(rows) == 12 and not rows.skipped and len(rows.shape_counts) == 1
        assert one["rows"] == benchmark.rows(name, "held_out", 12, seed=3)
        assert name == "stories" or all(metric.readable(row["answer"]) for row in one["rows"])


def test_sets_of_some_skills_and_of_a_skill_that_has_fewer() -> None:
    sets = benchmark.sets(["two_hop", "sort"], count=400, split="validation")
    assert list(sets) == ["two_hop", "sort"] and all(one["role"] == "retention" for one in sets.values())
    assert len(sets["two_hop"]["rows"]) < 400 == len(sets["sort"]["rows"])
    with pytest.raises(LuthierError, match="did you mean `sort`"):
        benchmark.sets(["sorts"])
