"""ERank's supervised stage: the answer nearest to the mean of a teacher's scores."""

from __future__ import annotations

from typing import Any

import pytest

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import RowMap
from luthier.models.tiny import tiny_tokenizer
from luthier.rows.encode import encode_all
from luthier.rows.read import read
from luthier.rows.shapes import Row


def map_of(**options: Any) -> RowMap:
    (value,) = registry.make({"score_consensus": options}, ("row_map",)).values
    assert isinstance(value, RowMap)
    return value


def made(*records: dict[str, Any], **options: Any) -> list[Row]:
    return map_of(**options).map(list(read(records)), None)  # type: ignore[arg-type]


def judged(*scores: float) -> dict[str, Any]:
    return {
        "id": "r",
        "prompt": "query and document",
        "answers": [f"thought {i}: {s}" for i, s in enumerate(scores)],
        "scores": [*scores],
    }


@pytest.mark.parametrize(
    ("scores", "kept", "mean"),
    [
        # The median would keep 1, 3 and 9, the highest 9: of 1, 9 and 3 the mean is 13/3.
        ((1, 9, 3), 2, 13 / 3),
        ((0, 0, 10), 0, 10 / 3),
        ((10, 1, 2, 8, 9), 3, 6.0),
        # Equally near: the first.
        ((6, 4), 0, 5.0),
        ((7,), 0, 7.0),
    ],
)
def test_the_answer_nearest_to_the_mean_is_kept(scores: tuple[float, ...], kept: int, mean: float) -> None:
    (row,) = made(judged(*scores), column="consensus")
    assert (row.id, row.shape, row.fields) == (
        "r",
        "prompt+completion",
        {"prompt": "query and document", "completion": f"thought {kept}: {scores[kept]}"},
    )
    assert row.columns == {"consensus": pytest.approx(mean, rel=1e-12)}
    (bare,) = made(judged(*scores))
    assert not bare.columns and bare.fields == row.fields


def test_one_answer_a_row_is_that_answer() -> None:
    """As its card says, token by token; other rows stay as they are."""
    tokenizer: Any = tiny_tokenizer()
    plain = {"id": "r", "prompt": "query and document", "completion": "thought 0: 7"}
    found, wanted = (encode_all(rows, tokenizer).rows[0] for rows in (made(judged(7)), list(read([plain]))))
    assert (found.token_ids, found.supervised) == (wanted.token_ids, wanted.supervised)
    assert made(plain) == list(read([plain]))


def test_what_became_of_the_answers_is_told() -> None:
    records = [judged(1, 9, 3), {**judged(4, 4), "id": "s"}, {**judged(4, 5), "id": "u"}, {"text": "t"}]
    before = list(read(records))
    told = map_of().told
    assert told is not None
    assert told(before, made(*records)) == "of 7 answers one is kept for each of 3 prompts, of which 2 have scores that differ"
    with pytest.raises(LuthierError, match="has a key `source` already"):
        made({**judged(1), "source": "s"}, column="source")
