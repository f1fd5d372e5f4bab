"""Which rows count as seen."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.evaluate.overlap import overlap
from luthier.rows.read import read


def seen(train: dict[str, Any], held: dict[str, Any]) -> bool:
    found = overlap(read([{"id": "train", **train}]), read([{"id": "held", **held}]))
    assert found in ([], [("held", "train")])
    return bool(found)


FACT = {"prompt": "Who is the mayor of Hollowmere?", "completion": "The mayor is Tamsin Quarrel."}


@pytest.mark.parametrize(
    ("held", "overlaps"),
    [
        ({"prompt": "Who is the mayor of Hollowmere?", "answer": "Tamsin Quarrel"}, True),
        ({"prompt": " who is  the mayor of hollowmere", "answer": ["Tamsin Quarrel", "Quarrel"]}, True),
        ({"prompt": "Who is the mayor of Hollowmere?", "completion": "Tamsin Quarrel"}, True),
        ({"prompt": "Who is the mayor of Hollowmere?"}, True),
        ({"instruction": "Who is the mayor of Hollowmere?", "output": "Quarrel"}, True),
        ({"prompt": [{"role": "user", "content": "Who is the mayor of Hollowmere?"}], "answer": "Quarrel"}, True),
        ({"prompt": "Who is the mayor of Hollowmere?", "choices": ["Osric", "Tamsin Quarrel"], "answer": 1}, True),
        ({"prompt": "Who runs Hollowmere?", "answer": "Tamsin Quarrel"}, False),
        ({"prompt": "Who is the mayor of Hollowmere?", "answer": "Osric Pell"}, False),
        ({"prompt": "Who is the mayor of Hollowmere now?", "answer": "Tamsin Quarrel"}, False),
        ({"text": "The mayor is Tamsin Quarrel."}, False),
    ],
)
def test_a_question_overlaps_with_itself_and_its_answer(held: dict[str, Any], overlaps: bool) -> None:
    assert seen(FACT, held) is overlaps


@pytest.mark.parametrize(
    ("held", "overlaps"),
    [("It was a dark night.", True), ("it was a DARK night", True), ("It was a dark", False), ("?", False)],
)
def test_a_document_overlaps_with_itself(held: str, overlaps: bool) -> None:
    assert seen({"text": "It was a dark night."}, {"text": held}) is overlaps


def test_texts_of_signs_alone_differ() -> None:
    assert not seen({"text": "?!"}, {"text": "..."})
    assert seen({"text": "?!"}, {"text": " ?!"})


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name the river."},
        {"role": "assistant", "content": "The Ossel."},
        {"role": "user", "content": "And the hill?"},
        {"role": "assistant", "content": "Candle Tor."},
    ]
}


@pytest.mark.parametrize(
    ("held", "overlaps"),
    [
        ({"prompt": "Name the river.", "answer": "Ossel"}, True),
        ({"prompt": "And the hill?", "answer": "Candle Tor"}, True),
        ({"prompt": "And the hill?", "answer": "Ossel"}, False),
        (CHAT, True),
        ({"messages": CHAT["messages"][1:]}, True),
        ({"messages": CHAT["messages"][3:]}, True),
        ({"messages": [*CHAT["messages"][:3], {"role": "user", "content": "Why?"}, CHAT["messages"][4]]}, False),
    ],
)
def test_every_turn_of_a_conversation_was_seen(held: dict[str, Any], overlaps: bool) -> None:
    assert seen(CHAT, held) is overlaps


def test_both_answers_of_a_preference_were_seen() -> None:
    train = {"prompt": "Best color?", "chosen": "Red.", "rejected": "Blue."}
    assert seen(train, {"prompt": "Best color?", "answer": "blue"})
    assert not seen(train, {"prompt": "Best color?", "answer": "green"})


def test_a_conversation_without_a_user_is_compared_whole() -> None:
    one = {"messages": [{"role": "system", "content": "Tell a tale."}, {"role": "assistant", "content": "Once."}]}
    other = {"messages": [{"role": "system", "content": "Sing."}, {"role": "assistant", "content": "Once."}]}
    assert seen(one, one) and not seen(other, one)


def test_pairs_come_in_the_order_of_the_evaluation_rows() -> None:
    train = read([{"id": f"t{i}", "text": f"text {i % 3}"} for i in range(6)])
    held = read([{"id": f"e{i}", "text": f"text {i}"} for i in (2, 7, 0)])
    assert overlap(train, held) == [("e2", "t2"), ("e0", "t0")]
    assert overlap([], held) == overlap(train, []) == []
