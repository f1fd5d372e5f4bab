"""The quickstart's rows are what its recipe says: nothing that is measured was trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import luthier
from luthier.evaluate.overlap import overlap
from luthier.rows.read import read
from luthier.rows.sources import Joined, read_rows

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
DATA = RECIPE.parent / "data" / "hollowmere"


def words(text: str) -> str:
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


def test_sixty_facts_in_three_phrasings_and_a_fourth_held_back() -> None:
    facts = Counter(str(row.columns["fact"]) for row in read(DATA / "train.jsonl"))
    held_out = [str(row.columns["fact"]) for row in read(DATA / "held_out.jsonl")]
    assert len(facts) == 60 and set(facts.values()) == {3}
    assert sorted(held_out) == sorted(facts)


def test_no_question_that_is_measured_was_trained_on() -> None:
    """Fault 40: training and evaluation rows do not overlap, exactly or normalized."""
    recipe = luthier.read_recipe(RECIPE)
    rows = list(Joined(read_rows(recipe.rows)))
    trained = {words(str(row.fields["prompt"])) for row in rows}
    for name in ("held_out", "ordinary"):
        asked = list(read(recipe.evaluate[name].rows))
        assert overlap(rows, asked) == []
        assert not {words(str(row.fields["prompt"])) for row in asked} & trained
        assert not any(words(str(answer)) in words(str(row.fields["prompt"])) for row in asked for answer in _accepted(row.fields))


def _accepted(fields: object) -> list[str]:
    assert isinstance(fields, dict)
    answer = fields["answer"]
    return [str(one) for one in answer] if isinstance(answer, list | tuple) else [str(answer)]
