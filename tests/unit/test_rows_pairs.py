"""Two answers to one prompt: in which spellings they are read, how they become tokens, and what happens to those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.errors import LuthierError
from luthier.models.tiny import tiny_tokenizer
from luthier.recipe import RowsRecipe
from luthier.rows.batches import collate, padding_share, plan_epoch
from luthier.rows.cache import keep
from luthier.rows.chat import form_of
from luthier.rows.chunks import Encoding
from luthier.rows.encode import Encoded, EncodedRows, Sizes, encode_all, renamed
from luthier.rows.groups import SAME, run_tokens
from luthier.rows.read import read
from luthier.rows.sources import read_rows
from tests.faults.test_faults_templates import CHATML, byte_level

ASKED = {"role": "user", "content": "q"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))
HUMAN = "\n\nHuman: q\n\nAssistant: a\n\nHuman: more?\n\nAssistant: "


def fields(record: dict[str, Any]) -> dict[str, Any]:
    (row,) = read([record])
    assert row.shape == "prompt+chosen+rejected"
    return dict(row.fields)


def test_chosen_answers_are_completions_beside_rows_that_stay() -> None:
    (value,) = luthier.part("chosen_answers").values
    pair = {"id": "p", "prompt": "q", "chosen": "good", "rejected": "bad", "level": 3}
    plain = {"id": "r", "prompt": "q", "completion": "good"}
    rows = list(read([pair, plain, {"text": "t"}]))
    chosen, *others = value.map(rows, None)
    assert (chosen.id, chosen.shape, chosen.columns) == ("p", "prompt+completion", {"level": 3})
    assert chosen.fields == {"prompt": "q", "completion": "good"} and others == rows[1:]


def test_whole_dialogues_begin_with_their_prompt() -> None:
    """As messages, in ShareGPT's spelling, as texts of a human and an assistant, and as any two texts that begin alike."""
    turns = [ASKED, {"role": "assistant", "content": "a"}, {"role": "user", "content": "more?"}]
    wanted = {"prompt": turns, "chosen": [GOOD], "rejected": [BAD]}
    assert fields({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}) == wanted
    assert fields({"chosen": HUMAN + "good", "rejected": HUMAN + "bad"}) == wanted
    spoken = [{"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]} for one in turns]
    said = {key: {"from": "gpt", "value": text} for key, text in (("chosen", "good"), ("rejected", "bad"))}
    assert fields({"conversations": spoken, **said}) == wanted
    assert fields({"chosen": "Q: 1 + 1? A: 12", "rejected": "Q: 1 + 1? A: 13"}) == {
        "prompt": "Q: 1 + 1? A: ",
        "chosen": "12",
        "rejected": "13",
    }, "no word is cut in two"
    assert fields({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]})["chosen"] == [GOOD]
    said = {"prompt": "Q: one? A: ", "chosen": "yes it is", "rejected": "no it was"}
    assert fields({key: said["prompt"] + said[key] for key in ("chosen", "rejected")}) == said
    longer = {"prompt": [ASKED], "chosen": [GOOD], "rejected": [GOOD, ASKED, BAD]}
    assert fields({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]}) == longer
    assert fields({"chosen": [ASKED, GOOD, ASKED, BAD], "rejected": [ASKED, GOOD]})["chosen"] == [GOOD, ASKED, BAD]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"chosen": [ASKED, GOOD], "rejected": [{"role": "user", "content": "p"}, BAD]},
            "no prompt in common: one begins with user: `q`",
        ),
        ({"chosen": "good", "rejected": "bad"}, "no prompt in common"),
        ({"chosen": "good", "rejected": "gone"}, "no prompt in common"),
        ({"chosen": "Well, good", "rejected": "Well, "}, "no answer behind it"),
        ({"chosen": [ASKED, GOOD], "rejected": "q bad"}, "one is text and the other messages"),
        (
            {"chosen": [ASKED, GOOD, ASKED, GOOD], "rejected": [ASKED, GOOD, {"role": "user", "content": "p"}, BAD]},
            "differ first in message 3, and in `chosen` that is user: `q`",
        ),
        (
            {"prompt": [ASKED, GOOD, ASKED], "chosen": [ASKED, BAD, ASKED, GOOD], "rejected": [BAD]},
            "`chosen` begins with another prompt than `prompt`: its message 2 is assistant: `bad`",
        ),
        ({"prompt": [ASKED, GOOD, ASKED], "chosen": [ASKED, GOOD], "rejected": [BAD]}, "its message 3 is nobody: ``"),
    ],
    ids=str,
)
def test_prompts_that_differ_are_shown_where_they_do(record: dict[str, Any], words: str) -> None:
    with pytest.raises(LuthierError, match=words):
        list(read([record]))


def encoded(records: list[dict[str, Any]], **options: Any) -> EncodedRows:
    tokenizer: Any = tiny_tokenizer()
    return encode_all(list(read(records)), tokenizer, **options)


PAIR = {"id": "p", "prompt": "abcdefgh", "chosen": "xyz", "rejected": "vw", "margin": 2.0}


def test_both_answers_stand_behind_the_same_tokens() -> None:
    found = encoded([PAIR])
    (row,) = found.rows
    chosen, rejected = row.group
    first = chosen.supervised.index(True)
    assert chosen.token_ids[:first] == rejected.token_ids[:first] and rejected.supervised.index(True) == first
    assert (row.id, rejected.id, row.columns["margin"], rejected.columns["margin"]) == ("p", "p/rejected", 2.0, 2.0)
    sizes = found.sizes
    assert (sizes.tokens, sizes.longest, sizes.members) == ([len(chosen) + len(rejected)], [len(chosen)], [2])
    assert sizes.targets == [sum(chosen.supervised) + sum(rejected.supervised)]
    again = renamed(row, "p#2")
    assert (again.id, again.mates[0].id) == ("p#2", "p#2/rejected")


def test_the_same_answer_twice_is_counted_and_named() -> None:
    found = encoded([PAIR, {**PAIR, "id": "r", "rejected": "xyz"}])
    assert found.notes[SAME] == 1 and "row r" in found.first_noted[SAME] and len(found.rows) == 2


@pytest.mark.parametrize("too_long", ["left", "right"])
def test_pairs_that_are_too_long_lose_as_much_of_both_prompts_or_are_left_out(too_long: Any) -> None:
    """Answers are never cut: each lost as many tokens as it was too long itself, so that the prompts differed."""
    whole = encoded([PAIR]).rows[0]
    limit = len(whole) - 3
    found = encoded([PAIR, {**PAIR, "id": "r", "chosen": "y" * 40}], max_length=limit, too_long=too_long)
    (row,) = found.rows
    assert [len(one) for one in row.group] == [len(one) - 3 for one in whole.group] and row.truncated == 6
    assert row.token_ids[0] == whole.token_ids[0] or whole.token_ids[0] != tiny_tokenizer().bos_token_id
    for one, before in zip(row.group, whole.group, strict=True):
        assert sum(one.supervised) == sum(before.supervised) and one.token_ids[-4:] == before.token_ids[-4:]
    (dropped,) = found.dropped
    assert "answers are not cut" in dropped.reason and "row r" in dropped.where
    with pytest.raises(LuthierError, match=f"at most {limit} are allowed"):
        encoded([PAIR], max_length=limit)


def test_a_pair_that_is_one_token_too_long() -> None:
    whole = encoded([PAIR]).rows[0]
    with pytest.raises(LuthierError, match=f"has {len(whole)} tokens, and at most {len(whole) - 1} are allowed"):
        encoded([PAIR], max_length=len(whole) - 1)
    cut = encoded([PAIR], max_length=len(whole) - 1, too_long="left").rows[0]
    assert [len(one) for one in cut.group] == [len(one) - 1 for one in whole.group]
    assert encoded([PAIR], max_length=len(whole)).rows[0] == whole


def test_a_template_that_writes_the_prompt_by_its_answer_is_refused() -> None:
    """Two answers behind different tokens cannot be compared."""
    looking = CHATML.replace("{% for m in messages %}", "{{ messages[-1].content | length }}{% for m in messages %}")
    with pytest.raises(
        LuthierError, match=r"the prompt of the chosen answer and that of the rejected one differ from token \d+ on"
    ):
        encode_all(read([{"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}]), byte_level(looking))


def test_all_text_is_not_learnt_of_pairs() -> None:
    with pytest.raises(LuthierError, match="the answers are compared, and loss_on asks for all text"):
        encoded([PAIR], loss_on="all")


def test_pairs_stand_side_by_side_in_a_batch() -> None:
    rows = encoded([PAIR, {**PAIR, "id": "r", "rejected": "longer by far"}]).rows
    batch = collate(rows)
    assert batch.groups == ((0, 1), (2, 3)) and batch.row_ids == ("p", "p/rejected", "r", "r/rejected")
    assert batch.of_first().targets_by_row().tolist()[1::2] == [0, 0] and batch.learnt_groups() == batch.groups
    some = batch.take(torch.tensor([2, 3, 0]))
    assert some.groups == ((0, 1),) and some.row_ids == ("r", "r/rejected", "p")


def test_a_micro_batch_has_room_for_whole_groups() -> None:
    """A group of two takes twice its longer row with padding, and what both have without; steps count groups."""
    sizes = Sizes([110, 60, 20], [1, 1, 1], [100, 30, 10], [2, 2, 2])
    plan = plan_epoch(
        sizes.lengths, tokens=sizes.tokens, members=sizes.members, micro_batch_tokens=140, batch_rows=3, seed=0, epoch=0
    )
    assert plan == [[[0], [1], [2]]] or plan == [[[0], [1, 2]]]
    wide = plan_epoch(
        sizes.lengths, tokens=sizes.tokens, members=sizes.members, micro_batch_tokens=400, batch_rows=3, seed=0, epoch=0
    )
    assert [len(rows) * 2 * sizes.lengths[rows[0]] <= 400 for rows in wide[0]] == [True] * len(wide[0])
    packed = plan_epoch(
        sizes.lengths,
        tokens=sizes.tokens,
        members=sizes.members,
        micro_batch_tokens=190,
        batch_tokens=190,
        seed=0,
        epoch=0,
        packed=True,
    )
    assert packed == [[[0, 1, 2]]]
    assert padding_share([[[0], [1, 2]]], sizes.lengths, tokens=sizes.tokens, members=sizes.members) == pytest.approx(
        1 - 190 / (200 + 4 * 30)
    )
    assert sizes.take([2, 0]) == Sizes([20, 110], [1, 1], [10, 100], [2, 2])


def test_streamed_pairs_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"id": "p", "prompt": "ab", "chosen": "xyz", "rejected": "v", "margin": 2.0}\n{"id": "r", "text": "one"}\n')
    tokenizer: Any = tiny_tokenizer()
    streamed: Any = read_rows(RowsRecipe(train=str(file), streaming=True))
    for _ in range(2):
        kept = keep(streamed, Encoding(form_of(tokenizer), "assistant", None, "refuse"))
        plain = encode_all(list(read(file)), tokenizer)
        assert [row.group for row in kept.rows.rows] == [row.group for row in plain.rows]
        assert [list(one) for one in kept.rows.sizes] == [list(one) for one in plain.sizes]


@pytest.mark.parametrize("begins", [True, False], ids=["with a first token", "without"])
def test_one_token_of_the_prompt_stays_or_the_pair_is_left_out(begins: bool) -> None:
    """A tokenizer's beginning-of-sequence token is never cut, so that it is the one that stays."""
    tokenizer: Any = tiny_tokenizer()
    if not begins:
        tokenizer.bos_token = "<|other|>"
    whole = encode_all(read([PAIR]), tokenizer).rows[0]
    prompt = whole.supervised.index(True)
    limit = len(whole) - prompt + 1
    (row,) = encode_all(read([PAIR]), tokenizer, max_length=limit, too_long="left").rows
    stays = whole.token_ids[0] if begins else whole.token_ids[prompt - 1]
    assert row.token_ids == (stays, *whole.token_ids[prompt:]) and row.supervised.index(True) == 1
    with pytest.raises(LuthierError, match=r"no token is left to learn: .*answers are not cut"):
        encode_all(read([PAIR]), tokenizer, max_length=limit - 1, too_long="left")


def test_what_a_group_runs_where_its_beginnings_are_run_once() -> None:
    """Of 3 and 4 tokens that begin with the same 2, and 2 that begin both: 3 + 2 + 0."""
    group = [Encoded("r", ids, (False,) * len(ids), "here", {}, 0, "text") for ids in ((1, 2, 3), (1, 2, 9, 9), (1, 2))]
    assert run_tokens(group) == 5 and run_tokens(group[:1]) == 3
