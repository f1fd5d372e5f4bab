"""Rows with the numbers of a store, by hand: which store counts, which numbers are whose, and how much of an error is shown."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
import pytest

from luthier.errors import LuthierError
from luthier.kinds import TEACHER
from luthier.models.tiny import tiny_tokenizer
from luthier.rows import numbers
from luthier.rows.encode import Encoded, EncodedRows, encode_all
from luthier.rows.lazy import LazyRows
from luthier.rows.numbered import bare, join
from luthier.rows.numbers import LIKELIHOOD, MADE_WITH, Entry, Numbers, beside, command_of, differences, write_part
from luthier.rows.read import read

TEXTS = [{"id": f"row{number}", "text": "a" * (number + 1)} for number in range(6)]
PAIR = {"id": "pair", "prompt": "q", "chosen": "yes", "rejected": "n"}


def encoded(records: list[dict[str, Any]]) -> EncodedRows:
    return encode_all(read(records), tiny_tokenizer())


def store(folder: Path, rows: Sequence[Encoded], values: Sequence[Sequence[float]], part: int = 0) -> Numbers:
    """A store of likelihoods."""
    entries = [
        Entry(row.id, row.digest, tuple(sum(one.supervised) for one in row.group), {LIKELIHOOD: numpy.array(found)})
        for row, found in zip(rows, values, strict=True)
    ]
    write_part(folder, part, entries, {"kind": "likelihood", "command": "again"})
    return Numbers(folder)


def told(rows: EncodedRows, *stores: Numbers) -> LuthierError:
    with pytest.raises(LuthierError) as refused:
        join(rows, stores, lambda first: f"fix {len(first)}")
    return refused.value


def test_of_two_stores_the_first_that_holds_a_row_counts(tmp_path: Path) -> None:
    rows = encoded([*TEXTS[:3], PAIR])
    first = store(tmp_path / "first", rows.rows[:2], [[-1.0], [-2.0]])
    second = store(tmp_path / "second", rows.rows, [[-5.0], [-6.0], [-7.0], [-8.0, -9.0]])
    found = join(rows, [first, second], lambda first: "").rows
    wanted: list[dict[str, float]] = [{LIKELIHOOD: value, "reference_chosen": value} for value in (-1.0, -2.0, -7.0)]
    wanted.append({"reference_chosen": -8.0, "reference_rejected": -9.0})
    assert [row.columns for row in found] == wanted and found[3].mates[0].columns == wanted[3]
    assert [row.columns for row in bare(found)] == wanted


def test_members_of_a_group_have_their_own_likelihoods(tmp_path: Path) -> None:
    rows = encoded([{"id": "group", "members": [{"text": "a"}, {"text": "bc"}, {"text": "d"}]}])
    (row,) = join(rows, [store(tmp_path, rows.rows, [[-1.0, -2.0, -3.0]])], lambda first: "").rows
    assert [one.columns for one in row.group] == [{LIKELIHOOD: value} for value in (-1.0, -2.0, -3.0)]


def test_at_most_five_rows_without_numbers_are_named(tmp_path: Path) -> None:
    rows = encoded([*TEXTS, PAIR])
    five = told(rows, store(tmp_path / "two", rows.rows[5:], [[-1.0], [-1.0, -2.0]]))
    assert five.what == "5 of 7 rows have no numbers in the store" and five.fix == "fix 5"
    assert five.where == ", ".join(f"row {number + 1} (row row{number})" for number in range(5)) + f"; store: {tmp_path / 'two'}"
    six = told(rows, store(tmp_path / "one", rows.rows[6:], [[-1.0, -2.0]]))
    assert six.what.startswith("6 of 7 rows") and "(row row4) and 1 more; store:" in six.where and six.fix == "fix 5"
    changed = store(tmp_path / "changed", [row.group[0] for row in rows.rows], [[-1.0]] * 7)
    assert told(rows, changed).what.startswith("1 of 7 rows are not as they were when their numbers were made")


def test_later_numbers_of_a_row_stand_for_earlier_ones(tmp_path: Path) -> None:
    rows = encoded(TEXTS[:3]).rows
    store(tmp_path, rows, [[-1.0], [-2.0], [-3.0]])
    held = store(tmp_path, [rows[1], rows[1]], [[-4.0], [-5.0]], part=1)
    assert len(held) == 3 and [path.name for path in held.parts] == ["part-000000.parquet", "part-000001.parquet"]
    assert [held.likelihoods(int(place)).tolist() for place in held.find([row.id for row in rows])] == [[-1.0], [-5.0], [-3.0]]
    assert held.find([f"other{number}" for number in range(40)]).tolist() == [-1] * 40


def test_what_each_target_has_stands_at_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pair first those of the chosen answer, then those of the rejected one; two probabilities for each target."""
    monkeypatch.setattr(numbers, "_GROUP_BYTES", 16)
    rows = encoded([PAIR, TEXTS[0]])
    entries = []
    for row in rows.rows:
        targets = tuple(sum(one.supervised) for one in row.group)
        count = sum(targets)
        of_all = (
            numpy.arange(2 * count, dtype="f4"),
            numpy.arange(2 * count, dtype="i4") + 100,
            numpy.arange(count, dtype="f4") / 8,
        )
        entries.append(Entry(row.id, row.digest, targets, dict(zip(TEACHER, of_all, strict=True))))
    write_part(tmp_path, 0, entries, {"kind": "teacher", "command": "again"})
    found = join(rows, [Numbers(tmp_path)], lambda first: "").rows
    for row in found:
        number = 0
        for one in row.group:
            log_TK, id_TK, rest_T = (one.token_columns[name] for name in TEACHER)
            for place, is_target in enumerate(one.supervised):
                wanted = ([2 * number, 2 * number + 1], [2 * number + 100, 2 * number + 101], number / 8)
                read_here = (log_TK[place].tolist(), id_TK[place].tolist(), rest_T[place])  # type: ignore[union-attr]
                assert read_here == (wanted if is_target else ([0, 0], [0, 0], 0.0))
                number += is_target
    assert [row.columns for row in bare(found)] == [{}, {}]


def test_rows_of_the_same_content_may_share_numbers(tmp_path: Path) -> None:
    rows = encoded([{"text": "a"}, {"text": "b"}, {"text": "a"}])
    found = join(rows, [store(tmp_path, rows.rows[:2], [[-1.0], [-2.0]])], lambda first: "").rows
    assert [row.columns[LIKELIHOOD] for row in found] == [-1.0, -2.0, -1.0] and found[2].id == f"{found[0].id}-2"


def test_a_flipped_bit_in_a_store_is_found(tmp_path: Path) -> None:
    (part,) = store(tmp_path, encoded(TEXTS[:3]).rows, [[-1.25], [-2.0], [-2.5]]).parts
    content, value = part.read_bytes(), numpy.float64(-2.0).tobytes()
    # The least and the largest of a column also stand beside its values.
    assert content.count(value) == 1
    part.write_bytes(content.replace(value, numpy.float64(-2.25).tobytes()))
    with pytest.raises(LuthierError, match="no whole file of numbers"):
        Numbers(tmp_path)


def test_where_a_store_lies_and_what_writes_it(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert beside(rows, "teacher") is None
    rows.touch()
    assert beside(rows, "teacher") == tmp_path / "rows.jsonl.stored" / "teacher"
    options = {"loss_on": "all", "chat_template_options": {"thinking": True}}
    words = (
        "luthier rows store teacher a.jsonl loss_on=all chat_template_options.thinking=true --model m --top-k 5 --precision float32"
    )
    assert command_of("teacher", "a.jsonl", "m", options, top_k=5, precision="float32") == words
    assert command_of("likelihood", "a.jsonl", "m", {}) == "luthier rows store likelihood a.jsonl --model m"


def test_row_groups_are_filled_up_to_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "_GROUP_BYTES", 16)
    rows = encoded(TEXTS).rows
    (part,) = store(tmp_path, rows, [[-1.0]] * 6).parts
    metadata = pyarrow.parquet.read_metadata(part)
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [2, 2, 2]


def test_what_differs_is_shown_by_its_first_twelve_digits() -> None:
    assert differences({"tokenizer": "a" * 64}, {"tokenizer": "b" * 64}, MADE_WITH) == [
        f"the tokenizer: {'a' * 12}, now {'b' * 12}",
    ]
    shown = int.from_bytes(hashlib.sha256(b"x").digest()[:8], "little")
    assert differences({"template": "x"}, {"template": None}, MADE_WITH) == [f"the chat template: {shown:016x}"[:31] + ", now null"]


def test_a_fault_while_a_row_is_made_does_not_end_the_rows() -> None:
    class Broken(LazyRows):
        def __len__(self) -> int:
            return 2

        def row(self, place: int) -> Encoded:
            raise IndexError("within")

    with pytest.raises(IndexError, match="within"):
        list(Broken())
