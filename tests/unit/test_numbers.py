"""Numbers that a model gave to rows: what a store holds, what it costs, and what becomes of one that is damaged, stale or half written."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
import pytest
import torch
from filelock import FileLock
from torch import Tensor
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.evaluate import numbers as making
from luthier.kinds import LossTerm, RowMap, Stored
from luthier.lab.cache import content
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.planning import numbers as reading
from luthier.planning.plan import Plan, make_plan
from luthier.recipe import make_recipe
from luthier.results.opened import open_model
from luthier.rows import chunks, numbers
from luthier.rows.batches import collate
from luthier.rows.encode import Encoded, encode_all
from luthier.rows.files import find
from luthier.rows.numbers import Entry, Numbers, parts_of, write_part
from luthier.rows.read import read
from luthier.runs import store
from luthier.runs.inputs import inputs_of
from luthier.runs.measure import likelihood_of_rows
from luthier.runs.store import store_numbers

TOKENIZER: Any = tiny_tokenizer()
MODEL = "tiny:llama"
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No, föur."},
]
PAIRS: list[dict[str, Any]] = [
    {"id": "door", "prompt": "The door is", "chosen": " red and old.", "rejected": " blue."},
    {"id": "gate", "prompt": TURNS[:3], "chosen": "No.", "rejected": "Yes, certainly."},
    {"prompt": "The barn is", "chosen": " grey.", "rejected": " a little too large for us."},
    {"id": "mill", "chosen": TURNS, "rejected": [*TURNS[:3], {"role": "assistant", "content": "Maybe."}]},
    {"prompt": "The barn is", "chosen": " grey.", "rejected": " a little too large for us."},
]
MIXED: list[dict[str, Any]] = [
    {"id": "asked", "prompt": "What is the color of the door?", "completion": "Red."},
    {"id": "talk", "messages": TURNS},
    {"text": "A document that is quite a bit longer than the answers."},
    {"id": "pair", "prompt": "The door is", "chosen": " red and old.", "rejected": " blue."},
    {"id": "group", "members": [{"prompt": "A?", "completion": "B."}, {"prompt": "C?", "completion": "Dee."}, {"text": "E f g."}]},
]


def file_of(folder: Path, rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stored(source: Path, kind: str = "likelihood", model: str = MODEL, **more: Any) -> Numbers:
    options = {"precision": "fp32", "top_k": 5 if kind == "teacher" else 0, **more}
    return Numbers(Path(store_numbers(kind, str(source), model, **options)["out"]))


def entry_of(held: Numbers, id: str) -> int:
    (place,) = held.find([id])
    assert place >= 0
    return int(place)


def targets_of(rows: Iterable[dict[str, Any]], **options: Any) -> dict[str, list[tuple[Encoded, Tensor]]]:
    """Rows by id, each with its mates, and the logits [T, V] that plain transformers gives each."""
    model = tiny("llama").float()
    found = encode_all(read(list(rows)), TOKENIZER, **options).rows
    with torch.no_grad():
        return {
            row.id: [(one, model(input_ids=torch.tensor([one.token_ids])).logits[0].log_softmax(-1)) for one in row.group]
            for row in found
        }


def planned(source: Any, objective: Any = ("dpo", "stored_reference"), **keys: Any) -> Plan:
    rows = {"train": str(source) if isinstance(source, Path) else source, **keys.pop("rows", {})}
    train = {"steps": 3, "batch_rows": 4, "precision": "fp32", **keys.pop("train", {})}
    return make_plan(make_recipe({"model": MODEL, "rows": rows, "objective": list(objective), "train": train, **keys}))


def told(source: Any, **keys: Any) -> str:
    """What a run says of a store that it cannot use."""
    with pytest.raises(LuthierError) as refused:
        planned(source, **keys)
    return str(refused.value)


def test_likelihoods_are_those_of_plain_transformers(tmp_path: Path) -> None:
    """Of each answer of a pair, of each member of a group, and of a conversation's assistant turns; in fp64."""
    held = stored(file_of(tmp_path, MIXED))
    wanted = targets_of(MIXED)
    assert len(held) == len(MIXED) == len(wanted)
    for id, members in wanted.items():
        sums = []
        for one, log_TV in members:
            places = [place for place, is_target in enumerate(one.supervised) if is_target]
            sums.append(sum(float(log_TV[place - 1, one.token_ids[place]]) for place in places))
        found = held.likelihoods(entry_of(held, id))
        assert found.dtype == numpy.float64 and found.tolist() == pytest.approx(sums, rel=2e-6)
    assert len(held.likelihoods(entry_of(held, "group"))) == 3


def test_the_largest_probabilities_are_those_of_plain_transformers(tmp_path: Path) -> None:
    """In fp32, the largest first, with the ids of their tokens and the probability of all others."""
    held = stored(file_of(tmp_path, MIXED), "teacher")
    for id, members in targets_of(MIXED).items():
        arrays = held.arrays(entry_of(held, id))
        log_NK, id_NK, rest_N = (arrays[name] for name in numbers.COLUMNS["teacher"])
        assert (log_NK.dtype, id_NK.dtype, rest_N.dtype) == (numpy.float32, numpy.int32, numpy.float32)
        wanted_NV = torch.cat([log_TV[torch.tensor(one.supervised).nonzero()[:, 0] - 1] for one, log_TV in members])
        top = wanted_NV.topk(5)
        assert log_NK.shape == id_NK.shape == top.values.shape and rest_N.shape == (len(wanted_NV),)
        assert numpy.allclose(log_NK, top.values, atol=2e-5)
        # Near ties may change places; whoever stands there is as likely.
        assert numpy.allclose(wanted_NV.gather(-1, torch.tensor(id_NK.tolist())), log_NK, atol=2e-5)
        assert all(len(set(row)) == 5 for row in id_NK.tolist())
        assert numpy.allclose(rest_N, 1.0 - top.values.exp().sum(-1), atol=1e-5)


def test_tokens_beyond_the_tokenizers_own_get_no_probabilities(tmp_path: Path) -> None:
    """Embeddings are padded to round sizes, and not to the same in a teacher and its student: such ids count among the rest."""
    rows = encode_all(read(MIXED[:2]), TOKENIZER).rows
    tune, _ = open_model(MODEL, precision="fp32")
    found = making.entries_of(tune, rows, "teacher", top_k=7, vocabulary=50)
    for entry, (one, log_TV) in zip(found, (both for (both,) in targets_of(MIXED[:2]).values()), strict=True):
        wanted_NV = log_TV[torch.tensor(one.supervised).nonzero()[:, 0] - 1]
        log_N7, id_N7, rest_N = (torch.tensor(entry.values[name]) for name in numbers.COLUMNS["teacher"])
        assert torch.allclose(log_N7.reshape(-1, 7), wanted_NV[:, :50].topk(7).values, atol=2e-5) and int(id_N7.max()) < 50
        assert torch.allclose(rest_N, 1.0 - log_N7.reshape(-1, 7).exp().sum(-1), atol=1e-5)
    source = file_of(tmp_path, MIXED[:3])
    held = stored(source, "teacher")
    assert held.facts["vocabulary"] == len(TOKENIZER) == 259
    (part,) = held.parts
    table = pyarrow.parquet.read_table(part)
    facts = json.dumps({**held.facts, "vocabulary": 10**4})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"luthier": facts}), part)
    teacher = ["cross_entropy", LossTerm(lambda view, own: view["nll"].sum() * 0.0, stored=Stored("teacher"))]
    assert f"the vocabulary: 10000 tokens, now {tiny('llama').config.vocab_size}" in told(source, objective=teacher)


def test_a_store_is_plain_parquet(tmp_path: Path) -> None:
    """Any tool reads it, and the metadata says what made it."""
    held = stored(file_of(tmp_path, MIXED), "teacher")
    assert held.folder == tmp_path / "rows.jsonl.stored" / "teacher"
    table = pyarrow.parquet.read_table(held.parts[0])
    assert table["id"].to_pylist() == [row.id for row in read(MIXED)]
    pair = table.to_pylist()[3]
    assert len(pair["targets"]) == 2 and len(pair["teacher_token_id"]) == 5 * sum(pair["targets"]) == 5 * len(pair["teacher_rest"])
    facts = json.loads(table.schema.metadata[b"luthier"])
    assert facts.items() >= {"kind": "teacher", "model": MODEL, "precision": "float32", "top_k": 5, "template_name": None}.items()
    assert all(facts[name] for name in ("tokenizer", "template", "fingerprint", "code", "luthier"))
    assert facts["command"].startswith(f"luthier rows store teacher {tmp_path / 'rows.jsonl'} --model {MODEL} --top-k 5")


def test_more_probabilities_than_there_are_tokens(tmp_path: Path) -> None:
    held = stored(file_of(tmp_path, MIXED[:1]), "teacher", top_k=10**6)
    arrays = held.arrays(0)
    assert held.facts["top_k"] == arrays["teacher_token_id"].shape[1] == tiny("llama").config.vocab_size
    assert not arrays["teacher_rest"].any()


def test_fewer_probabilities_than_were_asked_for_are_told(tmp_path: Path) -> None:
    """A number of probabilities beyond the vocabulary became the vocabulary's size without a word."""
    source = file_of(tmp_path, MIXED[:1])
    told = [store_numbers("teacher", str(source), MODEL, top_k=count).get("top_k") for count in (260, 259)]
    assert told == ["259, all tokens that there are, of 260 that were asked for", None]


@pytest.mark.parametrize("kind", ["likelihood", "teacher"])
def test_a_kill_costs_the_file_in_progress_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What was finished stays as it is, and only what is missing is made."""
    monkeypatch.setattr(chunks, "MOST_ROWS", 2)
    source = file_of(tmp_path, PAIRS)
    whole = stored(source, kind, folder=tmp_path / "whole")
    asked: list[list[str]] = []
    make = making.entries_of

    def watched(tune: Any, rows: Sequence[Encoded], **options: Any) -> Iterator[Entry]:
        asked.append([row.id for row in rows])
        for number, one in enumerate(make(tune, rows, **options)):
            if len(asked) == 2 and number == 1:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(store, "entries_of", watched)
    with pytest.raises(KeyboardInterrupt):
        stored(source, kind)
    folder = tmp_path / "rows.jsonl.stored" / kind
    first = parts_of(folder)
    before = first[0].read_bytes()
    assert [path.name for path in first] == ["part-000000.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "part-000000.parquet"]
    # What a kill leaves that nothing could clean up after.
    (folder / ".part-000001.parquet.123").write_bytes(before[:100])
    facts = store_numbers(kind, str(source), MODEL, precision="fp32", top_k=5 if kind == "teacher" else 0)
    assert not list(folder.glob(".part*"))
    assert (facts["new"], facts["kept"]) == (3, 2) and asked[2:] == [asked[1], [read(PAIRS)[4].id]]
    assert first[0].read_bytes() == before
    held = Numbers(folder)
    for row in read(PAIRS):
        one, other = entry_of(held, row.id), entry_of(whole, row.id)
        assert int(held.encoded_R[one]) == int(whole.encoded_R[other])
        if kind == "likelihood":
            assert held.likelihoods(one).tolist() == whole.likelihoods(other).tolist()
        else:
            assert all((values == whole.arrays(other)[name]).all() for name, values in held.arrays(one).items())


def test_only_rows_that_changed_are_made_again(tmp_path: Path) -> None:
    """By what is encoded, not by where it stands: reordered rows are kept, an edited one is not, and its later numbers count."""
    source = file_of(tmp_path, PAIRS)
    before = stored(source).likelihoods(0).tolist()
    edited = {**PAIRS[0], "chosen": " green and old."}
    file_of(tmp_path, [*PAIRS[:0:-1], edited])
    facts = store_numbers("likelihood", str(source), MODEL, precision="fp32")
    assert (facts["new"], facts["kept"]) == (1, 4)
    held = Numbers(source.with_name("rows.jsonl.stored") / "likelihood")
    assert len(held) == 5 and len(held.parts) == 2
    after = held.likelihoods(entry_of(held, "door")).tolist()
    assert after[0] != before[0] and after[1] == pytest.approx(before[1], rel=1e-5)


def test_what_targets_have_is_read_a_small_part_at_a_time(tmp_path: Path) -> None:
    """Opening a store reads none of it, and a row costs the row group that it stands in: about a MiB, or itself."""
    rng = numpy.random.default_rng(0)
    large = [
        Entry(
            f"row{number}",
            number,
            (400,),
            {
                "teacher_log_probability": -rng.random(400 * 64, dtype=numpy.float32),
                "teacher_token_id": rng.integers(0, 99, 400 * 64, dtype=numpy.int32),
                "teacher_rest": rng.random(400, dtype=numpy.float32),
            },
        )
        for number in range(23)
    ]
    write_part(tmp_path, 0, iter(large), {"kind": "teacher", "command": "x"})
    file = pyarrow.parquet.ParquetFile(tmp_path / "part-000000.parquet")
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    # 206,400 bytes of values a row: five to a group.
    assert [one.num_rows for one in groups] == [5, 5, 5, 5, 3]
    held = Numbers(tmp_path)
    seen: list[int] = []
    read_group = held._read
    held._group = lambda number: seen.append(number) or read_group(number)  # type: ignore[func-returns-value]
    assert len(held) == 23 and not seen
    for number in (22, 7, 3):
        found = held.arrays(entry_of(held, f"row{number}"))
        assert all((found[name].ravel() == values).all() for name, values in large[number].values.items())
    assert seen == [4, 1, 0]


def spoil_index(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def spoil_numbers(path: Path) -> None:
    """One bit, within the log-probabilities of the first row group."""
    column = next(
        one
        for one in map(pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column, range(6))
        if one.path_in_schema.startswith("teacher_log_probability")
    )
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 4
    path.write_bytes(bytes(content))


def spoil_facts(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).replace_schema_metadata({}), path)


@pytest.mark.parametrize(
    "spoil",
    [spoil_index, spoil_numbers, spoil_facts, lambda path: path.write_bytes(b"PAR1"), lambda path: path.write_bytes(b"")],
    ids=["cut off", "one bit", "no metadata", "too short", "empty"],
)
def test_a_damaged_file_is_named(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    held = stored(file_of(tmp_path, MIXED), "teacher")
    spoil(held.parts[0])
    with pytest.raises(LuthierError) as refused:
        Numbers(held.folder).arrays(0)
    assert refused.value.what.startswith("this is no whole file of numbers of rows: ")
    assert refused.value.where == str(held.parts[0]) and "repeat the command that wrote it" in refused.value.fix


def test_files_that_were_not_made_alike_are_no_store(tmp_path: Path) -> None:
    one, other = stored(file_of(tmp_path, PAIRS[:1])), stored(file_of(tmp_path, PAIRS[1:2], "b.jsonl"), model="tiny:gpt2")
    other.parts[0].rename(one.folder / "part-000001.parquet")
    with pytest.raises(LuthierError, match='were not made alike: the model: "tiny:llama", now "tiny:gpt2"; its numbers: '):
        Numbers(one.folder)


def test_a_store_of_another_model_is_not_added_to(tmp_path: Path) -> None:
    source = file_of(tmp_path, PAIRS)
    stored(source)
    with pytest.raises(
        LuthierError, match=r'made otherwise: the model: "tiny:llama", now "tiny:gpt2".*\n.*\n.*--replace'
    ) as refused:
        stored(source, model="tiny:gpt2")
    assert refused.value.where == str(tmp_path / "rows.jsonl.stored" / "likelihood")
    assert stored(source, model="tiny:gpt2", replace=True).facts["model"] == "tiny:gpt2"
    with pytest.raises(LuthierError, match='its precision: "float32", now "float64"'):
        stored(source, model="tiny:gpt2", precision="fp64")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"kind": "teacher", "top_k": 0}, "0 probabilities a target"),
        ({"options": {"temperature": 2.0}}, "`temperature` changes nothing of what is written"),
        ({"options": {"loss_on": "first"}}, "`loss_on` is 'first'"),
        ({"options": {"max_length": 12}}, "5 of 5 rows cannot be used"),
        ({"tokenizer": "workshop-small"}, "have different vocabularies"),
        ({"model": "no such/model name"}, "no such/model name"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    source = file_of(tmp_path, PAIRS)
    kind, model, options = more.pop("kind", "likelihood"), more.pop("model", MODEL), more.pop("options", {})
    with pytest.raises(LuthierError, match=words):
        store_numbers(kind, str(source), model, options, **more)
    assert not parts_of(tmp_path / "rows.jsonl.stored" / kind)


def test_rows_that_lie_nowhere_need_a_folder() -> None:
    with pytest.raises(LuthierError, match=r"lie in no file or folder(.|\n)*--out FOLDER"):
        store_numbers("likelihood", "hub:some/rows", MODEL)


def test_two_processes_do_not_write_one_store(tmp_path: Path) -> None:
    source = file_of(tmp_path, PAIRS)
    held = stored(source)
    with FileLock(held.folder / ".lock"), pytest.raises(LuthierError, match="another process is writing these numbers"):
        stored(source)


def test_a_folder_of_rows_does_not_hold_its_numbers(tmp_path: Path) -> None:
    """Parquet files beside rows would be read as rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    source = file_of(folder, PAIRS)
    stored(source)
    stored(folder)
    for pattern in (folder, f"{folder}/**", f"{folder}/*/*/*.parquet", f"{tmp_path}/**/*.*"):
        if "parquet" in str(pattern):
            with pytest.raises(LuthierError, match="no file fits this pattern"):
                find(pattern)
        else:
            assert find(pattern).files == (source,)
    assert (tmp_path / "data.stored" / "likelihood" / "part-000000.parquet").is_file()
    assert len(planned(folder).rows.rows) == 5


def test_rows_that_cannot_be_used_are_counted_or_stop(tmp_path: Path) -> None:
    source = file_of(tmp_path, [*PAIRS, {"prompt": "Hm?", "chosen": "", "rejected": "Yes."}])
    with pytest.raises(LuthierError, match="`chosen` is empty"):
        stored(source)
    facts = store_numbers("likelihood", str(source), MODEL, {"on_bad_row": "skip"})
    assert (facts["new"], facts["skipped"]) == (5, 1)


def columns_of(plan: Plan) -> dict[str, dict[str, float]]:
    """The stored likelihoods of all rows that a run sees, by id without the number of the copy."""
    found = {}
    for step in range(plan.clock.steps):
        for batch in plan.feed.at(step)[1]:
            for place, id in enumerate(batch.row_ids):
                here = {name: float(batch.columns[name][place]) for name in ("reference_chosen", "reference_rejected")}
                assert found.setdefault(id.split("#")[0], here) == here
    return found


def test_a_run_finds_the_numbers_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By id, whatever order the rows are in, streamed or not, of several sources, and in copies of a mixture; two with the same content
    have the same numbers."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    source = file_of(tmp_path, PAIRS)
    held = stored(source)
    one, other = (read(PAIRS)[place].id for place in (2, 4))
    assert other == f"{one}-2" and held.likelihoods(2).tolist() == held.likelihoods(4).tolist()
    found = columns_of(planned(source))
    for row in read(PAIRS):
        wanted = dict(
            zip(("reference_chosen", "reference_rejected"), held.likelihoods(entry_of(held, row.id)).tolist(), strict=True)
        )
        assert found[row.id] == found[f"{row.id}/rejected"] == wanted
    assert len({one["reference_chosen"] for one in found.values()}) == 4
    file_of(tmp_path, PAIRS[::-1])
    assert columns_of(planned(source)) == found
    assert columns_of(planned(source, rows={"streaming": True})) == found
    # Of two sources the second has the content of the first once more, and rows come twice.
    second = file_of(tmp_path, [PAIRS[2], {**PAIRS[0], "id": "again"}], "second.jsonl")
    stored(second)
    for streaming in (False, True):
        both = planned([{"rows": str(source), "weight": 1}, {"rows": str(second), "weight": 3}], rows={"streaming": streaming})
        seen = columns_of(both)
        assert {f"{one}-3", f"{one}-3/rejected", "again", "gate"} <= set(seen)
        assert seen[f"{one}-3"] == found[one]
        assert seen["again"]["reference_chosen"] == pytest.approx(found["door"]["reference_chosen"], rel=1e-6)


def test_columns_of_the_rows_themselves_come_first(tmp_path: Path) -> None:
    """And where a row lacks what others have, that is said and no store looked for."""
    own = [{**row, "reference_chosen": -1.0, "reference_rejected": -2.0} for row in PAIRS]
    source = file_of(tmp_path, own)
    stored(source)
    plan = planned(source)
    assert not plan.numbered.said and plan.feed.at(0)[1][0].columns["reference_chosen"].tolist() == [-1.0] * 8
    del own[3]["reference_chosen"]
    file_of(tmp_path, own)
    assert "a row has no log-likelihood `reference_chosen`" in told(source)


def test_the_plan_and_the_run_tell_whose_numbers_they_are(tmp_path: Path) -> None:
    source = file_of(tmp_path, PAIRS)
    held = stored(source)
    plan = planned(source)
    assert f"stored        likelihood by tiny:llama (float32), from {held.folder}" in plan.lines()
    assert inputs_of(plan)["rows.stored"] == held.fingerprint()[:16]
    other = stored(source, folder=tmp_path / "other", precision="fp64")
    assert other.fingerprint() != held.fingerprint()
    named = planned(source, rows={"stored": str(tmp_path / "other")})
    assert "(float64), which is not the model before training, from" in "".join(named.numbered.said)
    # The lab and sweeps know runs by what the store holds, not by its name.
    keys = [content(one.recipe.rows, "rows")["stored"] for one in (plan, named)]
    assert keys == [None, {"numbers": other.fingerprint()}]


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "the tokenizer": ({}, "the tokenizer: "),
    "the chat template": ({}, "the chat template: "),
    "rows.chat_template_options": (
        {"rows": {"chat_template_options": {"mood": "calm"}}},
        'rows.chat_template_options: {}, now {"mood":"calm"}',
    ),
    "the code": ({}, "the code that makes them: "),
    "the model": ({"model": "tiny:gpt2"}, 'the model: "tiny:llama", now "tiny:gpt2"; its numbers: '),
    "its precision": ({"train": {"precision": "fp64"}}, 'its precision: "float32", now "float64"; its numbers: '),
}


@pytest.mark.parametrize("what", CHANGED)
def test_stale_numbers_are_refused_by_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    keys, words = CHANGED[what]
    source = file_of(tmp_path, PAIRS)
    held = stored(source)
    tokenizer = tiny_tokenizer()
    if what == "the tokenizer":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    if what in ("the chat template", "rows.chat_template_options"):
        tokenizer.chat_template = "{% if mood %}{% endif %}" + tokenizer.chat_template
        if what == "rows.chat_template_options":
            monkeypatch.setattr("luthier.results.opened.load_tokenizer", lambda source: tokenizer)
            held = stored(source, replace=True)
    monkeypatch.setattr("luthier.planning.load.load_tokenizer", lambda source: tokenizer)
    if what == "the code":
        monkeypatch.setattr(reading, "code_fingerprint", lambda: "another")
    said = told(source, **keys)
    assert f"the stored numbers are not those of this run: {words}" in said
    # Nothing else is blamed.
    assert said.splitlines()[0].count(", now ") == (1 if "its numbers" not in words else 2)
    model, precision = ("tiny:gpt2", "fp32") if what == "the model" else (MODEL, "fp64" if what == "its precision" else "fp32")
    mood = "chat_template_options.mood=calm " if what == "rows.chat_template_options" else ""
    command = f"luthier rows store likelihood {source} {mood}--model {model} --precision {precision} --replace"
    assert f"where: {held.folder}" in said and f"write them again, as this run has it: {command}" in said
    assert ("rows.stored" in said) == (what == "the model")


def test_a_day_that_a_template_is_told_belongs_to_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}" + tokenizer.chat_template
    for place in ("luthier.results.opened.load_tokenizer", "luthier.planning.load.load_tokenizer"):
        monkeypatch.setattr(place, lambda source: tokenizer)
    source = file_of(tmp_path, PAIRS)
    store_numbers("likelihood", str(source), MODEL, {"chat_template_options": {"date": "2026-01-01"}}, precision="fp32")
    assert planned(source, rows={"chat_template_options": {"date": "2026-01-01"}}).numbered.said
    said = told(source, rows={"chat_template_options": {"date": "2026-01-02"}})
    assert 'the day that the chat template is told: "2026-01-01", now "2026-01-02"' in said
    assert "template_options.date=2026-01-02" in said and "template_options.date=2026-01-01" not in said


STALE = "are not as they were when their numbers were made"
ASKED = [
    {"id": "one", "messages": TURNS},
    {"id": "two", "prompt": "What is the color of the old door?", "completion": "Red."},
    {"id": "three", "messages": [{"role": "assistant", "content": "Ah!"}, *TURNS]},
]


@pytest.mark.parametrize(
    ("rows", "changed"),
    [
        ({"loss_on": "last"}, "2 of 3 rows"),
        ({"loss_on": "all"}, "3 of 3 rows"),
        ({"max_length": 60, "too_long": "left"}, "2 of 3 rows"),
        ({"max_length": 60, "too_long": "right"}, "2 of 3 rows"),
        ({"map": "mapped"}, "1 of 3 rows"),
        ({}, "1 of 3 rows"),
    ],
    ids=str,
)
def test_rows_that_are_encoded_otherwise_are_named(tmp_path: Path, rows: dict[str, Any], changed: str) -> None:
    """Fault 31: what makes other tokens or other targets of a row, in the recipe or in the file, is found row by row."""
    source = file_of(tmp_path, ASKED)
    stored(source, "teacher")
    teacher = ["cross_entropy", LossTerm(lambda view, own: view["nll"].sum() * 0.0, stored=Stored("teacher"))]
    assert planned(source, objective=teacher).numbered.said
    if rows.get("map") == "mapped":
        held_out = [{**turn, "learn": False} if place == 1 else turn for place, turn in enumerate(TURNS)]
        rows = {"map": RowMap(lambda given, services: [*read([{"id": "one", "messages": held_out}]), *list(given)[1:]])}
    elif not rows:
        file_of(tmp_path, [{"id": "one", "messages": [*TURNS[:3], {"role": "assistant", "content": "No, five."}]}, *ASKED[1:]])
    said = told(source, objective=teacher, rows=rows)
    assert f"{changed} {STALE}" in said and "(row one)" in said
    assert ("(row two)" in said) == changed.startswith("3") and f"luthier rows store teacher {source}" in said


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template that knows of an option."""

    def load(source: object) -> Any:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% if mood %}{% endif %}" + tokenizer.chat_template
        return tokenizer

    for place in ("luthier.results.opened", "luthier.planning.load", "luthier.runs.store"):
        monkeypatch.setattr(f"{place}.load_tokenizer", load)


def carried_out(said: str, source: Path) -> None:
    """Do what an error says."""
    for command in said.split("luthier ", 1)[1].split("; or name")[0].split(" && luthier "):
        done = CliRunner().invoke(app, [*shlex.split(command)])
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("before", "keys", "words"),
    [
        ({}, {"model": "tiny:gpt2"}, "--model tiny:gpt2 --precision fp32 --replace"),
        ({}, {"train": {"precision": "fp64"}}, f"--model {MODEL} --precision fp64 --replace"),
        ({}, {"rows": {"max_length": 58, "too_long": "left"}}, f"max_length=58 too_long=left --model {MODEL}"),
        ({"options": {"max_length": 58, "too_long": "left"}}, {}, f"rows.jsonl --model {MODEL} --precision fp32"),
        ({"options": {"chat_template_options": {"mood": True}}}, {}, f"rows.jsonl --model {MODEL} --precision fp32 --replace"),
        (
            {},
            {"rows": {"chat_template_options": {"mood": True}}},
            f"rows.jsonl chat_template_options.mood=true --model {MODEL} --precision fp32 --replace",
        ),
    ],
    ids=str,
)
def test_a_refused_store_tells_the_command_that_mends_it(
    tmp_path: Path, moody: None, before: dict[str, Any], keys: dict[str, Any], words: str
) -> None:
    """The command that an error gave was the one that wrote the store, after which the run was refused again."""
    source = file_of(tmp_path, PAIRS)
    stored(source, **before)
    said = told(source, **keys)
    assert words in said
    carried_out(said, source)
    assert planned(source, **keys).numbered.said


def test_a_named_store_of_other_rows_is_mended_with_those_of_the_run(tmp_path: Path, moody: None) -> None:
    """The command that an error gave wrote numbers of the rows of another run, and with --replace of one source of several."""
    held = stored(file_of(tmp_path, PAIRS[:1]), "teacher", model="tiny:llama", folder=tmp_path / "ot", top_k=3)
    source, second = file_of(tmp_path, MIXED[:2], "chat.jsonl"), file_of(tmp_path, MIXED[2:3], "more.jsonl")
    teacher = ["cross_entropy", LossTerm(lambda view, own: view["nll"].sum() * 0.0, stored=Stored("teacher"))]
    both = {"objective": teacher, "rows": {"stored": str(held.folder)}}
    said = told([str(source), str(second)], **both)
    assert f"teacher {source} --model {MODEL} --top-k 3 --out {held.folder} --precision fp32" in said
    carried_out(said, source)
    assert planned([str(source), str(second)], **both).numbered.said
    other = {"rows": {"stored": str(held.folder), "chat_template_options": {"mood": 1}}, "objective": teacher}
    said = told([str(source), str(second)], **other)
    assert said.count("--replace") == 1
    carried_out(said, source)
    assert planned([str(source), str(second)], **other).numbered.said


def test_rows_without_numbers_are_named(tmp_path: Path) -> None:
    source = file_of(tmp_path, PAIRS)
    stored(source)
    more = [{"prompt": f"{number}?", "chosen": " Yes.", "rejected": " No."} for number in range(7)]
    file_of(tmp_path, [*PAIRS, *more])
    said = told(source)
    assert "7 of 12 rows have no numbers in the store" in said and f"{source}:6 (row " in said and "and 2 more" in said
    assert f"keeps what is still right: luthier rows store likelihood {source} --model tiny:llama --precision fp32" in said
    stored(source)
    assert len(columns_of(planned(source, train={"steps": 4}))) == 24


def test_where_no_numbers_are_the_command_is_told(tmp_path: Path) -> None:
    source = file_of(tmp_path, PAIRS)
    said = told(source)
    assert "`stored_reference` reads numbers that a model gave to the rows beforehand, and there are none" in said
    assert f"luthier rows store likelihood {source} --model MODEL" in said and "`reference_chosen` and `reference_rejected`" in said
    assert "there are none" in told(PAIRS) and "where: rows.stored" in told(PAIRS)
    stored(source)
    second = file_of(tmp_path, PAIRS[2:3], "second.jsonl")
    assert f"luthier rows store likelihood {second} --model MODEL" in told([str(source), str(second)])


def test_numbers_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    source = file_of(tmp_path, PAIRS)
    held = stored(source)
    said = told(source, objective=["dpo"], rows={"stored": str(held.folder)})
    assert "nothing in the run reads numbers of the kind `likelihood`" in said and f"rows.stored: {held.folder}" in said
    assert "there are no numbers of rows here" in told(source, rows={"stored": str(tmp_path)})


def test_token_weights_are_not_in_stored_likelihoods(tmp_path: Path) -> None:
    source = file_of(tmp_path, PAIRS)
    stored(source)
    assert "`dft` weighs labels, and in the stored likelihoods that `stored_reference` reads" in told(source, token_weight="dft")
    assert planned(source, objective=["dpo"], token_weight="dft")


LABELLED: list[dict[str, Any]] = [
    {"id": "door", "prompt": "The door is", "completion": " red and old.", "label": True},
    {"id": "barn", "prompt": "The barn is", "completion": " grey.", "label": False},
    {"id": "talk", "messages": TURNS[:2], "label": False},
]


def test_losses_that_compare_with_other_rows_are_refused(tmp_path: Path) -> None:
    """Rows that were grouped anew were said to have changed, and storing them again changed nothing."""
    source = file_of(tmp_path, LABELLED)
    assert "where `kto` makes other rows than those of the file, leave `stored_reference` out" in told(
        source, objective=["kto", "stored_reference"]
    )
    stored(source)
    said = told(source, objective=["kto", "stored_reference"])
    assert "the rows of the file, of which `kto` makes others: leave `stored_reference` out" in said
    ranked = file_of(
        tmp_path, [{"id": "q", "prompt": "The door is", "answers": [" red.", " so blue."], "scores": [2, 1]}], "q.jsonl"
    )
    assert "where `ranked_pairs` makes other rows than those of the file" in told(ranked, rows={"map": "ranked_pairs"})
    own = [{**row, "reference_chosen": -1.0, "reference_rejected": -2.0} for row in LABELLED]
    assert planned(file_of(tmp_path, own), objective=["kto", "stored_reference"])


def test_a_run_gives_numbers_as_a_model_does(tmp_path: Path) -> None:
    """A reference that is another model is taken where the recipe names its store, and not where it only lies there."""
    source = file_of(tmp_path, PAIRS)
    train = {"steps": 1, "precision": "fp32", "learning_rate": 0.5}
    recipe = {"model": MODEL, "rows": {"train": MIXED[:1]}, "tune": "prompt_tuning", "train": train, "out": str(tmp_path / "runs")}
    run = luthier.train(recipe)
    held = stored(source, model=str(run.folder))
    chosen = [{"id": row.id, "prompt": row.fields["prompt"], "completion": row.fields["chosen"]} for row in read(PAIRS)]
    wanted = likelihood_of_rows(str(run.folder), read(chosen).rows)
    found = [float(held.likelihoods(place)[0]) for place in range(5)]
    assert found == pytest.approx([one.log_likelihood for one in wanted], rel=1e-6)
    assert "its numbers: " in (said := told(source)) and "name this folder under rows.stored" in said
    assert planned(source, rows={"stored": str(held.folder)}).numbered.said
    # What stands beside the weights is part of who gave the numbers.
    base = stored(source, folder=tmp_path / "base")
    assert base.facts["fingerprint"] != held.facts["fingerprint"]


def test_a_runs_numbers_are_stored_in_the_precision_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's numbers were stored in its own precision whatever the command said."""
    monkeypatch.chdir(tmp_path)
    source = file_of(tmp_path, PAIRS)
    train = {"steps": 1, "precision": "fp32", "learning_rate": 0.5}
    first = luthier.train({"model": MODEL, "rows": {"train": MIXED[:1]}, "tune": "lora", "train": train, "name": "first"})
    stored(source, precision="fp32")
    keys = {"model": first.folder.name, "train": {"precision": "fp64"}}
    said = told(source, **keys)
    assert f'the model: "tiny:llama", now "{first.folder.name}"' in said
    assert f"--model {first.folder.name} --precision fp64 --replace; or name this folder" in said
    carried_out(said, source)
    assert Numbers(tmp_path / "rows.jsonl.stored" / "likelihood").facts["precision"] == "float64"
    assert planned(source, **keys).numbered.said
    said = told(source, **{**keys, "train": {"precision": "fp32"}})
    assert "its precision: " in said and "rows.stored" not in said
    beside = luthier.train({"model": MODEL, "rows": {"train": MIXED[:1]}, "tune": "prompt_tuning", "train": train})
    with pytest.raises(LuthierError, match="this run brings its own precision, float32") as refused:
        stored(source, model=str(beside.folder), precision="fp64", replace=True)
    assert refused.value.where == "--precision fp64"


def test_a_model_that_predicts_nothing_is_refused_by_the_option(tmp_path: Path) -> None:
    """An encoder was refused without a word of where it was named."""
    with pytest.raises(LuthierError, match="does not predict next tokens here") as refused:
        stored(file_of(tmp_path, PAIRS), model="tiny:bert")
    assert refused.value.where == "--model tiny:bert"


def test_the_tokenizer_of_another_model_may_write_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that was taught another chat template says what it expects at the student's own targets."""
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_end|>", "<|im_end|>!")
    monkeypatch.setattr("luthier.results.opened.load_tokenizer", lambda source: other)
    source = file_of(tmp_path, PAIRS)
    stored(source)
    assert "the chat template: " in told(source)
    held = stored(source, tokenizer=MODEL, replace=True)
    assert planned(source).numbered.said and "--tokenizer tiny:llama" in held.command


def test_the_command_at_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    file_of(tmp_path, MIXED)
    call = CliRunner()
    shown = call.invoke(app, ["rows", "store", "teacher", "rows.jsonl", "--model", MODEL, "--top-k", "3", "loss_on=last"])
    assert shown.exit_code == 0 and max(map(len, shown.output.splitlines())) <= 80
    assert [line.split()[0] for line in shown.stdout.splitlines()] == [
        *("numbers", "model", "precision", "new", "kept", "dropped", "skipped", "bytes", "out"),
    ]
    again = call.invoke(app, ["rows", "store", "teacher", "rows.jsonl", "--model", MODEL, "--top-k", "3", "loss_on=last", "--json"])
    assert json.loads(again.stdout).items() >= {"new": 0, "kept": 5, "out": "rows.jsonl.stored/teacher"}.items()
    refused = call.invoke(app, ["rows", "store", "teacher", "rows.jsonl", "--model", MODEL, "--top-k", "4"])
    assert refused.exit_code == 2 and max(map(len, refused.stderr.splitlines())) <= 80 and "top_k: 3, now 4" in refused.stderr
    for kind in ("likelihood", "teacher"):
        text = call.invoke(app, ["rows", "store", kind, "--help"]).stdout
        assert "--replace" in text and max(map(len, text.splitlines())) <= 80
    assert math.isclose(
        json.loads(again.stdout)["bytes"], sum(one.stat().st_size for one in parts_of(Path("rows.jsonl.stored/teacher")))
    )


def test_a_batch_carries_numbers_of_several_widths() -> None:
    """Rows that lack some, and padding, have zeros; types are kept."""
    wide = numpy.arange(6, dtype=numpy.int32).reshape(3, 2)
    one = Encoded("a", (1, 2, 3), (False, True, True), "", {}, 0, "text", token_columns={"k": wide, "p": (0.5, 1.5, 2.5)})
    other = Encoded("b", (4, 5, 6, 7), (False,) * 3 + (True,), "", {}, 0, "text")
    batch = collate([other, one])
    assert batch.token_columns["k"].dtype == torch.int32 and batch.token_columns["k"].shape == (2, 4, 2)
    assert batch.token_columns["k"][1, :3].tolist() == wide.tolist() and not batch.token_columns["k"][0].any()
    assert batch.token_columns["p"].tolist() == [[0.0] * 4, [0.5, 1.5, 2.5, 0.0]]
    assert batch.take(torch.tensor([1])).token_columns["k"].shape == (1, 4, 2)
