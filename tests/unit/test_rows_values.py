"""What rows are made of is shared between steps, sets and the cache, so nothing changes it in place."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import numpy
import pytest

from luthier.kinds import RowScore
from luthier.models.tiny import tiny_tokenizer
from luthier.rows import numbered, sources, stored
from luthier.rows.chat import form_of, render_training
from luthier.rows.chunks import Encoding, Records, encode_chunk
from luthier.rows.encode import encode_all
from luthier.rows.limits import Limits
from luthier.rows.look import look
from luthier.rows.mixture import Source, make_mixture
from luthier.rows.read import read
from luthier.rows.select import score_rows, select_rows
from luthier.rows.unwritten import Dialogue, unwritten

RECORDS = [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}]


def test_values_of_rows_cannot_be_changed(tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    rows, form = read(RECORDS), form_of(tokenizer)
    found, looked = encode_all(rows, tokenizer), look(rows, tokenizer)
    source = Source("one", 2.0, range(2))
    alike = RowScore(lambda rows, services: [1.0] * len(rows))
    encoding = Encoding(form, "assistant", None, "refuse")
    stored.write(tmp_path / "kept", [encode_chunk(Records(list(rows), []), encoding)], {})
    streamed = sources.Streamed("rows", str(tmp_path / "rows.jsonl"))
    together = sources.Joined([rows, rows])
    assert len(list(streamed.records())) == 2 and len(list(together)) == 4
    joined: Any = numbered.Joined(["store"], numpy.zeros(1), numpy.ones(1))  # type: ignore[list-item]
    assert joined.of(0) == ("store", 1)
    dialogue = Dialogue([{"role": "user", "content": "q"}], 0, None, "", "here")
    assert unwritten(dialogue, "q", lambda one: "", [], "it") == ()
    mixture = make_mixture([source], found.sizes, temperature=1.0, share="rows", seed=0)
    values: list[Any] = [
        *(rows, rows[0], form, form.choice, render_training(rows[0], form), found, found.rows[0], Limits(9, "refuse"), encoding),
        *(looked, looked.samples[0], looked.samples[0].pieces[0], source, mixture, streamed, together, joined, dialogue),
        *(score_rows(rows, alike), select_rows(RECORDS, alike, count=1), stored.read(tmp_path / "kept")),
    ]
    assert len({type(value) for value in values}) == 21
    for value in values:
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, None)
