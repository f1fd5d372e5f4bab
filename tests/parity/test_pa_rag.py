"""PA-RAG: how citations are judged and rewritten, and what pairs are made of answers from retrieved passages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import RowMap
from luthier.methods.row_map._citations import Entails, moved_marks, precision, recall, rewritten, statements_of
from luthier.methods.row_map._retrieved import coverage
from luthier.models.tiny import tiny_tokenizer
from luthier.rows.encode import encode_all
from luthier.rows.read import read
from luthier.rows.shapes import Row

PASSAGES = 5


def map_of(name: str, **options: Any) -> RowMap:
    (value,) = registry.make({name: options}, ("row_map",)).values
    assert isinstance(value, RowMap)
    return value


def made(name: str, *records: dict[str, Any], **options: Any) -> list[Row]:
    return map_of(name, **options).map(list(read(records)), None)  # type: ignore[arg-type]


def table(**sets: Sequence[Sequence[int]]) -> Entails:
    """Entailment by the smallest sets of passages that entail each statement, known by its first word."""
    return lambda statement, numbers: any(set(one) <= set(numbers) for one in sets[statement.split()[0].rstrip(".")])


def test_recall_and_precision_of_citations() -> None:
    """Statements supported 1, 0, 1; the first cites one passage, the second one, the third two that are both needed."""
    entails = table(A=[[1]], B=[[4]], C=[[2, 3]])
    answer = statements_of("A is so [1]. B is so [2]. C is so [2][3].")
    assert [one.marks for one in answer] == [(1,), (2,), (2, 3)] and [one.bare for one in answer] == [
        "A is so.",
        "B is so.",
        "C is so.",
    ]
    assert recall(answer, entails, PASSAGES) == pytest.approx(2 / 3) and precision(answer, entails, PASSAGES) == pytest.approx(
        3 / 4
    )
    # A redundant mark, one beside two that are needed, and two of which each is enough.
    for marks, sets, wanted in (
        ("[1][2]", [[1]], 1 / 2),
        ("[2][3][4]", [[2, 3]], 2 / 3),
        ("[4][2][3]", [[2, 3]], 2 / 3),
        ("[1][2]", [[1], [2]], 1.0),
    ):
        one = statements_of(f"A is so {marks}.")
        assert recall(one, table(A=sets), PASSAGES) == 1.0
        assert precision(one, table(A=sets), PASSAGES) == pytest.approx(wanted)
    # One passage that does not exist: it counts against both.
    invented = statements_of("A is so [1]. B is so [8].")
    assert recall(invented, table(A=[[1]], B=[[8]]), PASSAGES) == precision(invented, table(A=[[1]], B=[[8]]), PASSAGES) == 0.5
    bare = statements_of("A is so.")
    assert recall(bare, table(A=[[]]), PASSAGES) == precision(bare, table(A=[[]]), PASSAGES) == 0.0


@pytest.mark.parametrize(
    ("before", "sets", "after"),
    [
        ("A is so [1][2].", [[1]], "A is so [1]."),
        ("A is so [2][1].", [[1], [2]], "A is so [2]."),
        ("A is so [4][2][3].", [[2, 3]], "A is so [2][3]."),
        ("A is so [5].", [[2, 4], [1, 2, 3]], "A is so [2][4]."),
        ("A is so [5].", [[1, 2], [3]], "A is so [3]."),
        ("A is so.[5] ", [[3]], "A is so.[3] "),
        ("A is so. [9][1]\n", [[1]], "A is so. [1]\n"),
        ("A is [5] so (it is).", [[2]], "A is [2] so (it is)."),
        ("A is so", [[2]], "A is so [2]"),
        ('A is "so." ', [[4, 1, 5]], 'A is "so [1][4][5]." '),
        ("A is so [1].", [[1, 2, 3, 4]], "A is so."),
        ("A is so [3] [1].", [[1, 3]], "A is so [3] [1]."),
    ],
)
def test_citations_are_rewritten_to_what_is_needed(before: str, sets: list[list[int]], after: str) -> None:
    """Its own passages without what is redundant, from the last one on; else the fewest others, at most three; else none."""
    (one,) = statements_of(before)
    assert rewritten(one, table(A=sets), PASSAGES).text == after


def test_sentences_add_up_to_their_answer() -> None:
    answer = 'It weighs 3.5 kg. [1] "Really?" [2][3] Yes!\nAnd then [4] more, without an end'
    assert [one.text for one in statements_of(answer)] == [
        "It weighs 3.5 kg. [1] ",
        '"Really?" [2][3] ',
        "Yes!\n",
        "And then [4] more, without an end",
    ]


TOLD: Mapping[str, Any] = {"A is so.": [[1]], "B is so.": [[2, 3], [4]], "C is so.": []}
CITED = {
    "id": "r",
    "prompt": "q",
    "passages": ["p"] * 5,
    "answers": [
        "A is so [1]. B is so [2].",
        "A is so [1]. B is so [4].",
        "A is so [5]. B is so [4].",
        "A is so [1]. C is so [2].",
        "A is so [1][2]. B is so [4].",
    ],
    "entailed": TOLD,
}


def test_pairs_differ_in_their_citations_alone() -> None:
    """Of five answers the second is right, the fourth cannot be made so, and the last cites more than it needs."""
    found = made("citation_pairs", CITED)
    assert [one.id for one in found] == ["r#citations0", "r#citations2", "r#citations4"]
    for one, place in zip(found, (0, 2, 4), strict=True):
        assert one.fields == {"prompt": "q", "chosen": "A is so [1]. B is so [4].", "rejected": CITED["answers"][place]}
    tokenizer: Any = tiny_tokenizer()
    encoded = encode_all(found, tokenizer)
    assert not any("no part of its text" in note for note in encoded.notes), "what was read is left with the pair"
    with pytest.raises(LuthierError, match=r"`entailed` does not say which passages entail `B is so\.`"):
        made("citation_pairs", {**CITED, "entailed": {"A is so.": [[1]]}})
    with pytest.raises(LuthierError, match="no row makes a pair"):
        made("citation_pairs", {**CITED, "answers": CITED["answers"][1:2]})
    with pytest.raises(LuthierError, match="the row's `passages` is no list of texts"):
        made("citation_pairs", {**CITED, "passages": [{"text": "p"}]})
    for share in (0.0, 1.5):
        with pytest.raises(LuthierError, match=f"the share is {share}"):
            map_of("citation_pairs", share=share)


def test_without_verdicts_words_are_compared() -> None:
    """Half of `Ann`, `met`, `Bo` and `Oslo` stand in the first passage, all in the first two; common words do not count."""
    record = {"prompt": "q", "passages": ["Bo is in Oslo.", "Ann met him.", "Cy."], "answers": ["Ann met Bo in the Oslo [3]."]}
    assert made("citation_pairs", record)[0].fields["chosen"] == "Ann met Bo in the Oslo [1][2]."
    assert made("citation_pairs", record, share=0.5)[0].fields["chosen"] == "Ann met Bo in the Oslo [1]."
    assert made("citation_pairs", record, share=0.51)[0].fields["chosen"] == "Ann met Bo in the Oslo [1][2]."


ASKED = {
    "id": "r",
    "prompt": "noisy",
    "short_answers": ["1347", ["Oslo", "Kristiania"]],
    "answers": ["Oslo.", "In 1,347 in Kristiania [2].", "Nothing."],
}


def test_what_is_rejected_misses_something() -> None:
    """Both answers stand behind the same prompt; the chosen one names all there is to name, the rejected one does not."""
    (row,) = made("informativeness_pairs", ASKED)
    assert (row.id, row.fields) == ("r#informativeness", {"prompt": "noisy", "chosen": ASKED["answers"][1], "rejected": "Oslo."})
    (turned,) = made("informativeness_pairs", {**ASKED, "answers": ASKED["answers"][::-1]})
    assert (turned.fields["chosen"], turned.fields["rejected"]) == (ASKED["answers"][1], "Nothing.")
    (turned,) = made("informativeness_pairs", {**ASKED, "answers": ASKED["answers"][1:]})
    assert (turned.fields["chosen"], turned.fields["rejected"]) == (ASKED["answers"][1], "Nothing.")
    (before,) = read([ASKED])
    assert [coverage(row.fields[side], before) for side in ("chosen", "rejected")] == [1.0, 0.5]
    told = map_of("informativeness_pairs").told
    none = {**ASKED, "id": "s", "answers": ["Oslo."]}
    rows = list(read([ASKED, none, {"text": "t"}]))
    assert told is not None
    found = made("informativeness_pairs", ASKED, none, {"text": "t"})
    assert told(rows, found) == "1 pairs of 2 prompts; 1 prompts make none" and found[1].shape == "text"
    for short in (None, [], [[]], "1347"):
        with pytest.raises(LuthierError, match="`short_answers` is no list of texts"):
            made("informativeness_pairs", {**ASKED, "short_answers": short})


def test_what_is_rejected_was_misled_by_the_same_prompt() -> None:
    """The chosen answer was written from other passages: its citations count those of the noisy prompt."""
    record = {
        **ASKED,
        "passages": ["noise", "second", "first"],
        "clean_passages": ["first", "second ", "third"],
        "clean_answers": ["Oslo [1].", "In 1347 [1][3] in Oslo [2]."],
    }
    (row,) = made("robustness_pairs", record)
    assert (row.id, row.fields) == (
        "r#robustness",
        {"prompt": "noisy", "chosen": "In 1347 [3] in Oslo [2].", "rejected": "Oslo."},
    )
    with pytest.raises(LuthierError, match="no row makes a pair"):
        made("robustness_pairs", {**record, "answers": [ASKED["answers"][1]]})
    with pytest.raises(LuthierError, match="`clean_passages` is no list of texts"):
        made("robustness_pairs", {key: value for key, value in record.items() if key != "clean_passages"})


def test_marks_follow_their_passages() -> None:
    """A passage that stands there twice is the first of the two; one that nobody gave is left out."""
    assert moved_marks("a [1][2] b [3][9].", ["x", "y", "z"], ["z", "x", "x"]) == "a [2] b [1]."
