"""Numbers for each token: given when rows are encoded, padded with the rows, kept between runs, and refused where they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Annotation, LossTerm, TokenWeight, View, Written
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.registry import techniques
from luthier.rows.annotate import annotations_of, check_streamed
from luthier.rows.batches import collate
from luthier.rows.cache import inputs_of, keep
from luthier.rows.chat import Rendered, form_of
from luthier.rows.chunks import Encoding
from luthier.rows.encode import _replaced, encode_all
from luthier.rows.read import read
from luthier.rows.sources import Streamed
from luthier.training.engine import idle_batch
from tests.faults.test_faults_templates import CHATML, byte_level

ROWS = [{"prompt": "abc", "completion": "de"}, {"prompt": "f", "completion": "g"}]


def places(written: Written, *, factor: float = 1.0) -> list[float]:
    return [factor * place for place in range(len(written.token_ids))]


def encoded(annotate: Any, rows: Any = ROWS, tokenizer: Any = None, **options: Any) -> Any:
    annotation = Annotation("places", annotate, options)
    return encode_all(read(rows), tokenizer or tiny_tokenizer(), annotations=(annotation,)).rows


def test_numbers_are_padded_with_their_tokens() -> None:
    one, two = encoded(places, factor=0.5)
    assert one.token_columns["places"] == tuple(torch.tensor([0.5 * i for i in range(len(one))]).tolist())
    (bare,) = encode_all(read(ROWS[1:]), tiny_tokenizer()).rows
    assert bare.token_columns == {}
    for side in ("right", "left"):
        batch = collate([one, two, bare], side=side)  # type: ignore[arg-type]
        wanted_BT = torch.where(batch.attend_BT, batch.position_BT * 0.5, 0.0)
        wanted_BT[2] = 0
        assert torch.equal(batch.token_columns["places"], wanted_BT) and batch.token_columns["places"].dtype == torch.float32
    assert collate([bare]).token_columns == {}


def test_what_is_told_of_a_row() -> None:
    told: list[Written] = []

    def note(written: Written) -> list[float]:
        told.append(written)
        return [0.0] * len(written.token_ids)

    tokenizer = byte_level("{{ bos_token }}" + CHATML)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]
    (row,) = encoded(note, [{"messages": messages}], tokenizer)
    (written,) = told
    assert written.token_ids == list(row.token_ids) and written.row.id == row.id
    ((start, stop),) = written.targets
    assert written.text[start:stop] == "cde<|im_end|>"
    assert tokenizer.decode(written.replace(start, start + 2, "x")) == written.text[:start] + "xe<|im_end|>\n"
    assert written.replace(start + 1, len(written.text), "") == tokenizer(written.text[:start] + "c")["input_ids"]
    assert written.write(read([{"messages": [messages[0], {**messages[1], "content": "x"}]}])[0]) == written.text.replace(
        "cde", "x"
    )


def test_replaced_text_is_cut_where_targets_begin_as_the_row_is() -> None:
    """A line break before the answer would merge with one at its beginning: the border between them stays."""
    told: list[Written] = []
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = None
    encoded(
        lambda written: told.append(written) or [0.0] * len(written.token_ids), [{"prompt": "a\n", "completion": "\nb"}], tokenizer
    )
    whole = told[0].token_ids
    assert list(whole) != tokenizer(told[0].text)["input_ids"]
    again = told[0].replace(3, 4, "c")
    assert list(again[: len(whole) - 2]) == list(whole[:-2])
    assert list(told[0].replace(2, 3, "\n")) == list(whole)


@pytest.mark.parametrize(
    "numbers",
    [
        lambda written: [0.0],
        lambda written: [float("nan")] * len(written.token_ids),
        lambda written: [1e39] * len(written.token_ids),
    ],
)
def test_a_number_too_few_or_none_is_a_mistake_of_the_technique(numbers: Any) -> None:
    with pytest.raises((RuntimeError, OverflowError)):
        encoded(numbers)


def test_what_an_annotation_refuses_is_a_bad_row() -> None:
    def refuse(written: Written) -> list[float]:
        raise LuthierError("no good", where=written.row.where)

    rows = read(ROWS)
    with pytest.raises(LuthierError, match="no good"):
        encode_all(rows, tiny_tokenizer(), annotations=(Annotation("places", refuse),), on_bad_row="skip")


def test_each_annotation_is_made_once_and_names_are_not_shared() -> None:
    weights = [TokenWeight(annotation=Annotation("places", places, {"factor": factor})) for factor in (1.0, 1.0, 2.0)]
    assert annotations_of([LossTerm(lambda view, own: view["nll"].sum()), *weights[:2]]) == (weights[0].annotation,)
    with pytest.raises(LuthierError, match="different numbers under the name `places`"):
        annotations_of(weights)


def test_reading_numbers_that_rows_lack_is_an_error() -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    view = View(idle_batch(), {}, label_N=nothing, row_N=nothing, position_N=nothing)
    assert view.token_column("places").shape == (0,)
    one = torch.ones(1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="carry no `places`"):
        View(idle_batch(), {}, label_N=one, row_N=one * 0, position_N=one).token_column("places")


def test_options_and_code_are_part_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "abc", "completion": "de"}\n')
    source = Streamed("rows", path)

    def kept(*annotations: Annotation) -> Any:
        found = keep([source], Encoding(form_of(tiny_tokenizer()), "assistant", None, "refuse", annotations))
        return found.said[0].split("cache: ")[1], found.rows.rows[0].token_columns

    one, two = (Annotation("places", places, {"factor": factor}) for factor in (1.0, 2.0))
    assert kept() == ("miss", {}) and kept() == ("hit", {})
    assert kept(one)[0] == "miss" and kept(one) == ("hit", {"places": tuple(map(float, range(len(kept(one)[1]["places"]))))})
    assert kept(two)[0] == "miss" and kept(two)[1]["places"][-1] == 2 * kept(one)[1]["places"][-1]
    assert kept(one._replace(name="other"))[0] == "miss"
    before = inputs_of(source, Encoding(form_of(tiny_tokenizer()), "assistant", None, "refuse", (one,)), "stop")
    monkeypatch.setattr("luthier.rows.annotate._source", lambda annotation: "changed")
    assert inputs_of(source, Encoding(form_of(tiny_tokenizer()), "assistant", None, "refuse", (one,)), "stop") != before


OUTSIDE = """
from luthier.kinds import Annotation, TokenWeight
from luthier.registry import method

def ones(written):
    return [1.0] * len(written.token_ids)

@method(title="Counted")
def counted(*, inner: bool = False) -> TokenWeight:
    annotate = (lambda written: ones(written)) if inner else ones
    return TokenWeight(lambda view: view.token_column("counted"), annotation=Annotation("counted", annotate))
"""


def test_what_cannot_be_streamed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A technique of one's own works in memory and streamed; not in other processes, nor with a function inside a function."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "methods" / "token_weight"
    folder.mkdir(parents=True)
    (folder / "counted.py").write_text(OUTSIDE)
    monkeypatch.setattr(techniques, "_added", [folder.parent])
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "abc", "completion": "de"}\n')

    def planned(inner: bool = False, **rows: Any) -> Any:
        weight = {"counted": {"inner": inner}}
        return make_plan(make_recipe({"model": "tiny:llama", "rows": {"train": str(path), **rows}, "token_weight": weight}))

    for plan in (planned(), planned(inner=True), planned(streaming=True)):
        assert set(plan.rows.rows[0].token_columns["counted"]) == {1.0}
    with pytest.raises(LuthierError, match=r"`counted` gives tokens cannot be kept between runs[^$]*rows\.streaming"):
        planned(inner=True, streaming=True)
    with pytest.raises(LuthierError, match=r"cannot import the file that holds `counted`[^$]*rows\.workers"):
        planned(streaming=True, workers=1)


def test_packaged_functions_may_be_streamed() -> None:
    check_streamed([Annotation("places", places)], workers=0)
    check_streamed(annotations_of(registry.part("tl_weights").values), workers=2)


def test_a_target_whose_text_is_left_out_is_none() -> None:
    rendered = Rendered("ab cd ef", ((0, 2), (3, 5), (6, 8)), plain=True)
    assert _replaced(rendered, 3, 5, "") == Rendered("ab  ef", ((0, 2), (4, 6)), plain=True)
