"""Pairs of ranked answers: which two are compared, by how much they differ, and what of them is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import RowMap
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.rows.encode import encode_all
from luthier.rows.read import read
from luthier.rows.shapes import Row

FIVE = {
    "id": "five",
    "prompt": "q",
    "answers": ["low", "top", "mid", "also mid", "floor"],
    "scores": [2, 9, 5, 5, -1.5],
    "source": "s",
}


def map_of(**options: Any) -> RowMap:
    (value,) = registry.make({"ranked_pairs": options}, ("row_map",)).values
    assert isinstance(value, RowMap)
    return value


def made(*records: dict[str, Any], **options: Any) -> list[Row]:
    return map_of(**options).map(list(read(records)), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        # From the best to the worst: 9 (place 1), 5 (2), 5 (3), 2 (0), -1.5 (4); the two fives make no pair.
        ("all", {"1>2": 4, "1>3": 4, "1>0": 7, "1>4": 10.5, "2>0": 3, "2>4": 6.5, "3>0": 3, "3>4": 6.5, "0>4": 3.5}),
        ("best", {"1>2": 4, "1>3": 4, "1>0": 7, "1>4": 10.5}),
        ("adjacent", {"1>2": 4, "3>0": 3, "0>4": 3.5}),
    ],
)
def test_the_higher_score_is_chosen(pairs: str, wanted: dict[str, float]) -> None:
    found = made(FIVE, pairs=pairs, margin="by")
    assert {one.id.removeprefix("five#"): one.columns["by"] for one in found} == wanted
    for one in found:
        first, second = map(int, one.id.removeprefix("five#").split(">"))
        assert one.shape == "prompt+chosen+rejected" and one.columns["source"] == "s"
        assert one.fields == {"prompt": "q", "chosen": FIVE["answers"][first], "rejected": FIVE["answers"][second]}
    told = map_of(pairs=pairs).told
    assert told is not None
    ties = {"all": 1, "best": 0, "adjacent": 1}[pairs]
    for others in ([], list(read([{"text": "t"}, {"text": "u"}]))):
        said = f"{len(wanted)} pairs of 1 ranked rows; {ties} more have equal scores and make none"
        assert told([*read([FIVE]), *others], [*found, *others]) == said


def test_answers_that_share_the_best_score_are_not_compared() -> None:
    record = {"prompt": "q", "answers": ["a", "b", "c"], "scores": [1, 3, 3]}
    assert [one.id.partition("#")[2] for one in made(record, pairs="best")] == ["1>0"]
    assert [one.id.partition("#")[2] for one in made(record)] == ["1>0", "2>0"]


def test_two_answers_are_their_one_pair() -> None:
    """As its card says, whichever are compared; other rows stay as they are, and the first one told of is not lost."""
    record = {"prompt": "q", "answers": ["bad", "good"], "scores": [False, True]}
    for pairs in ("all", "best", "adjacent"):
        (pair, other) = made(record, {"text": "t"}, pairs=pairs)
        assert (pair.fields["chosen"], pair.fields["rejected"]) == ("good", "bad") and "margin" not in pair.columns
        assert other.shape == "text"


def test_rows_that_make_no_pair_are_refused() -> None:
    tie = {"prompt": "q", "answers": ["a", "b"], "scores": [1, 1]}
    with pytest.raises(LuthierError, match="no two answers to one prompt differ in their scores"):
        made(tie)
    with pytest.raises(LuthierError, match="has a key `source` already"):
        made(FIVE, margin="source")
    tokenizer: Any = tiny_tokenizer()
    with pytest.raises(LuthierError, match=r"`prompt\+answers\+scores` has no one answer to learn") as unmapped:
        encode_all(list(read([FIVE])), tokenizer)
    assert "rows.map: ranked_pairs" in unmapped.value.fix


def test_a_recipe_learns_margins_from_scores(tmp_path: Path) -> None:
    """From the file to encoded pairs: the difference of the scores is what the loss reads of each."""
    file = tmp_path / "ranked.jsonl"
    file.write_text('{"id": "r", "prompt": "ab", "answers": ["x", "yz", "w"], "scores": [1, 4, 2]}\n', encoding="utf-8")
    plan = make_plan(
        make_recipe(
            {
                "model": "tiny:llama",
                "rows": {"train": str(file), "map": {"ranked_pairs": {"pairs": "adjacent", "margin": "margin"}}},
                "objective": "odpo",
                "train": {"batch_rows": 2, "epochs": 1},
                "out": str(tmp_path / "runs"),
            }
        )
    )
    assert {row.id: (row.columns["margin"], len(row.group)) for row in plan.rows.rows} == {"r#1>2": (2.0, 2), "r#2>0": (1.0, 2)}
    assert any("2 pairs of 1 ranked rows; 0 more" in one for one in plan.mapped)
