"""Choosing rows before training: texts of rows, embeddings, scores, choices, and the two commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from luthier import registry
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.kinds import RowScore
from luthier.models.load import resolve
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.recipe import make_recipe
from luthier.rows import embed
from luthier.rows.embed import HASH_WIDTH, embedder, hashed, pooled
from luthier.rows.read import read
from luthier.rows.select import how_many, score_rows, select_rows
from luthier.rows.texts import text_of

ASKED = [{"role": "user", "content": "two?"}]
TOLD = [{"role": "assistant", "content": "three"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": 2}}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A pool of much about tides and little about foxes, and a target of both."""
    pool = [{"text": f"the tide comes in at {hour}", "n": hour, "tags": ["sea"]} for hour in range(20)]
    pool += [{"id": f"fox{i}", "text": f"a red fox runs {i}"} for i in range(4)]
    target = [{"text": f"the tide goes out at {hour}"} for hour in range(4)] + [{"text": f"a red fox sleeps {i}"} for i in range(4)]
    found = {"pool": tmp_path / "pool.jsonl", "target": tmp_path / "target.jsonl"}
    for name, rows in (("pool", pool), ("target", target)):
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def call(*words: object, code: int = 0) -> Any:
    """The command's one JSON document."""
    result = CliRunner().invoke(app, ["rows", *map(str, words), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "one"}, "one"),
        ({"text": "one", "label": "good"}, "one"),
        ({"prompt": "two?", "completion": "three"}, "two?\nthree"),
        ({"prompt": ASKED, "completion": TOLD}, "two?\nthree"),
        ({"instruction": "add", "input": "", "output": "three"}, "add\nthree"),
        ({"instruction": "add", "input": "1, 2", "output": "three"}, "add\n1, 2\nthree"),
        ({"messages": [{"role": "system", "content": ""}, *ASKED, *TOLD]}, "two?\nthree"),
        ({"conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "three"}]}, "two?\nthree"),
        ({"prompt": "two?", "chosen": "three", "rejected": "four"}, "two?\nthree"),
        ({"prompt": "two?", "answer": ["three", "3"]}, "two?\nthree"),
        ({"question": "two?", "choices": ["four", "three"], "answer": 1}, "two?\nthree"),
        ({"prompt": ASKED}, "two?"),
    ],
)
def test_the_text_of_every_shape(record: dict[str, Any], text: str) -> None:
    assert text_of(read([record])[0]) == text


def test_tool_calls_are_text_too() -> None:
    record = {"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [{"name": "unused"}]}
    assert text_of(read([record])[0]).split("\n") == ["two?", json.dumps([CALL], sort_keys=True, separators=(",", ":"))]


def test_hashed_words_by_hand() -> None:
    """`a b a`: a twice, b once, `a b` once, `b a` once, so weights 1 + log 2, 1, 1, 1 before they are scaled."""
    (found,) = hashed(["A b a"])
    weights = sorted(found[found > 0].tolist(), reverse=True)
    size = math.sqrt((1 + math.log(2)) ** 2 + 3)
    assert weights == pytest.approx([(1 + math.log(2)) / size, 1 / size, 1 / size, 1 / size], abs=1e-6)
    assert found.shape == (HASH_WIDTH,) and torch.equal(hashed(["a B a"])[0], found)
    assert not torch.equal(hashed(["a a b"])[0], found), "order counts, by pairs"
    assert float(hashed([""]).norm()) == float(hashed(["\u00fc \u65e5\u672c !?"]).norm().round()) == 1.0
    # crc32 of "a" is 0xe8b7be43.
    assert hashed(["a"])[0].argmax() == 0xE8B7BE43 % HASH_WIDTH


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "roberta"])
def test_pooling_is_the_mean_over_real_tokens_alone(architecture: str) -> None:
    model = tiny(architecture, seed=1)
    rows = [[10, 11, 12, 13, 14, 15], [20, 21], [30]]
    found = pooled(model, rows)
    for ids, row in zip(rows, found, strict=True):
        with torch.no_grad():
            hidden_TD = model.base_model(torch.tensor([ids])).last_hidden_state[0]
        wanted = hidden_TD.mean(0) / hidden_TD.mean(0).norm()
        assert torch.allclose(row, wanted, atol=1e-5), "alone and beside longer texts"


def test_models_embed_once_and_equal_texts_alike(cache: Path) -> None:
    said: list[str] = []
    texts = ["one", "a longer text", "one", "x" * 600]
    embedded = embedder("tiny:llama", say=said.append)
    found = embedded(texts)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert torch.allclose(found.norm(dim=-1), torch.ones(4), atol=1e-6)
    assert said == ["embedding 3 texts with tiny:llama", "1 of 3 texts are longer than 512 tokens: their beginnings are embedded"]
    ids = [tiny_tokenizer()(text)["input_ids"][:512] for text in texts]
    assert torch.allclose(found[[3, 1]], pooled(tiny("llama"), [ids[3], ids[1]]), atol=1e-5)
    (kept,) = (cache / "embeddings").iterdir()
    said.clear()
    assert torch.equal(embedded(texts), found) and not said, "from the cache"
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(embedded(texts), found) and "damaged" in said[0]
    assert load_file(kept)["embedding"].shape == (3, found.shape[1])
    embedded(["another"])
    embedder("tiny:gpt2")(texts)
    assert len(list((cache / "embeddings").iterdir())) == 3, "other texts and other models are kept apart"


def test_an_unknown_embedder_is_named(files: dict[str, Path]) -> None:
    with pytest.raises(LuthierError) as caught:
        score_rows(files["pool"], "nearest", target=files["target"], embedder="no-such-model")
    assert caught.value.where == "embedder" and "`hash`" in caught.value.fix and "no-such-model" in caught.value.what


def test_nearest_by_hand() -> None:
    """Of `a`, `b` and `a b`, with the target `a`: cosines 1, 0 and 1 / sqrt(3)."""
    pool, target = [{"text": "a"}, {"text": "b"}, {"text": "a b"}], [{"text": "a"}, {"text": "c"}]
    closest = score_rows(pool, "nearest", target=target, embedder="hash").scores
    assert closest == pytest.approx([1.0, 0.0, 1 / math.sqrt(3)], abs=1e-6)
    means = score_rows(pool, {"nearest": {"to": "all"}}, target=target, embedder="hash").scores
    assert means == pytest.approx([0.5, 0.0, 0.5 / math.sqrt(3)], abs=1e-6)


def test_random_rows_follow_the_seed_and_are_even(files: dict[str, Path]) -> None:
    one, again, other = (score_rows(files["pool"], "random_rows", seed=seed).scores for seed in (0, 0, 1))
    assert one == again != other and all(0.0 <= score < 1.0 for score in one)
    first = [
        select_rows([{"text": t} for t in "abcd"], "random_rows", count=1, seed=seed).rows[0].fields["text"] for seed in range(400)
    ]
    assert all(70 <= first.count(text) <= 130 for text in "abcd"), "100 each, within 3.5 standard deviations"


@pytest.mark.parametrize("by", ["got_d", "nearest", "random_rows"])
def test_the_same_command_gives_the_same_scores(by: str, files: dict[str, Path], tmp_path: Path) -> None:
    words = ["score", files["pool"], "--by", by, "--target", files["target"], "--embedder", "hash"]
    facts = call(*words, "--out", tmp_path / "one.jsonl")
    call(*words, "--out", tmp_path / "two.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    found = lines(tmp_path / "one.jsonl")
    assert [one["id"] for one in found] == [row.id for row in read(files["pool"])]
    assert facts["highest"] == max(one["score"] for one in found) and facts["target_rows"] == 8
    assert facts["embedder"] == (None if by == "random_rows" else "hash")


def test_select_writes_the_rare_rows_as_they_were_read(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "picked.jsonl"
    words = ["select", files["pool"], "epsilon=0.02", "--by", "got_d", "--target", files["target"], "--embedder", "hash"]
    facts = call(*words, "--count", 6, "--out", out)
    picked, pool = lines(out), lines(files["pool"])
    assert {row["id"] for row in picked[:4]} == {"fox0", "fox1", "fox2", "fox3"}, "the best first"
    assert all(row in pool for row in picked) and list(picked[5]) == ["text", "n", "tags"]
    assert facts["options"]["epsilon"] == 0.02 and (facts["picked"], facts["rows"], facts["out"]) == (6, 24, str(out))
    assert facts["shared_by_chance"] == 36 / 24 and 0 <= facts["shared_with_random"] <= 6 and facts["also_in_target"] == 0
    assert facts["highest"] == facts["highest_picked"] > facts["lowest_picked"] > facts["lowest"]
    again = call(*words, "--count", 6, "--out", out, code=2)
    assert "exists already" in again["error"]
    shown = CliRunner().invoke(app, ["rows", *map(str, words), "--share", "0.1", "--out", str(tmp_path / "two.jsonl")])
    assert shown.exit_code == 0 and "duplicates_passed_over" in shown.stdout and len(lines(tmp_path / "two.jsonl")) == 2


def test_copies_leave_the_choice_and_not_the_pool() -> None:
    copies = [{"text": "a red fox", "id": f"c{i}"} for i in range(5)]
    pool = [*copies, {"text": "a blue whale"}, {"text": "a red fox", "note": "another column"}]
    target = [{"text": "a red fox"}]
    chosen = select_rows(pool, "nearest", target=target, embedder="hash", count=2)
    assert list(chosen.records) == [pool[0], pool[6]] and chosen.facts["duplicates_passed_over"] == 4
    assert chosen.facts["rows"] == 7 and chosen.facts["also_in_target"] == 6
    with pytest.raises(LuthierError, match="4 rows are asked for, but only 3 of 7 differ") as caught:
        select_rows(pool, "random_rows", count=4)
    assert caught.value.fix == "ask for at most 3"


def test_ties_keep_the_order_of_the_source() -> None:
    pool = [{"text": f"row {i}"} for i in range(9)]
    level = RowScore(lambda rows, services: [1.0 if i in (2, 5, 7) else 0.0 for i in range(len(rows))])
    assert list(select_rows(pool, level, count=5).records) == [pool[i] for i in (2, 5, 7, 0, 1)]
    assert list(select_rows(iter(pool), level, count=1).records) == [pool[2]], "an iterator is read once"


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.parquet"])
def test_records_of_other_files_come_back(name: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"text": "short", "year": 7}, {"text": "a text,\nof two lines", "year": 8}]
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text('text,year\nshort,7\n"a text,\nof two lines",8\n')
    elif name.endswith("json"):
        path.write_text(json.dumps(records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    longest = RowScore(lambda rows, services: [float(len(text_of(row))) for row in rows])
    select_rows(path, longest, count=2, out=tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == records[::-1]


@pytest.mark.parametrize(
    ("rows", "count", "share", "wanted"),
    [(10, 3, None, 3), (10, None, 0.1, 1), (30, None, 0.1, 3), (100, None, 0.29, 29), (3, None, 0.1, 1)],
)
def test_how_many(rows: int, count: int | None, share: float | None, wanted: int) -> None:
    assert how_many(rows, count, share) == wanted


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--by", "got_d", "--count", 2], "needs a target"),
        (["--by", "got_d", "--count", 2, "--target", "empty.jsonl"], "there are no rows"),
        (["--by", "random_rows", "--count", 25], "25 of 24 rows"),
        (["--by", "random_rows", "--count", 0], "0 of 24 rows"),
        (["--by", "random_rows"], "how many rows is not said"),
        (["--by", "random_rows", "--count", 2, "--share", 0.5], "both a count and a share"),
        (["--by", "random_rows", "--share", 1.5], "a share of 1.5"),
        (["--by", "random", "--count", 2], "no technique `random`"),
        (["--by", "lora", "--count", 2], "no technique `lora`"),
        (["eps=1", "--by", "got_d", "--count", 2], "no option `eps`"),
        (["--by", "random_rows", "--count", 2, "--out", "picked.csv"], "not named as JSON lines"),
    ],
)
def test_bad_words(words: list[Any], error: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    before = sorted(tmp_path.iterdir())
    out = [] if "--out" in words else ["--out", "picked.jsonl"]
    assert error in call("select", files["pool"], *words, *out, code=2)["error"]
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")], [float("inf"), 0.0]])
def test_a_score_that_is_no_number_stops_the_choice(scores: list[float]) -> None:
    with pytest.raises(LuthierError, match="1 finite scores for 2 rows"):
        score_rows([{"text": "a"}, {"text": "b"}], RowScore(lambda rows, services: scores))


def test_recipes_and_commands_refuse_each_others_kinds_by_name() -> None:
    from luthier.recipe.parts import choose_parts

    with pytest.raises(LuthierError, match="no technique `got_d`") as caught:
        choose_parts(make_recipe({"model": "tiny:llama", "rows": {"train": [{"text": "a"}]}, "tune": "got_d"}))
    assert "row_score" in caught.value.fix and "luthier rows select --by got_d" in caught.value.fix
    with pytest.raises(LuthierError) as other:
        score_rows([{"text": "a"}], "lora")
    assert "its kind is weight_delta" in other.value.fix
    assert {"got_d", "nearest", "random_rows"} <= set(registry.names("row_score"))


def test_the_facts_of_a_choice_by_hand(tmp_path: Path) -> None:
    given = RowScore(lambda rows, services: [2.0, 5.0, 3.0, 4.0, 1.0])
    pool = [{"text": f"é {i}"} for i in range(5)]
    facts = select_rows(pool, given, count=3, out=tmp_path / "out.jsonl").facts
    assert (facts["highest_picked"], facts["lowest_picked"], facts["shared_by_chance"]) == (5.0, 3.0, 9 / 5)
    assert facts["shared_with_random"] in (1, 2, 3) and select_rows(pool, given, count=5).facts["shared_with_random"] == 5
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()[0] == '{"text": "é 1"}'


def test_draws_follow_seed_0_unless_another_is_given() -> None:
    pool = [{"text": f"row {i}"} for i in range(20)]
    assert score_rows(pool, "random_rows").scores == score_rows(pool, "random_rows", seed=0).scores
    chosen = select_rows(pool, "random_rows", count=9)
    assert chosen == select_rows(pool, "random_rows", count=9, seed=0) and chosen.facts["seed"] == 0


def test_texts_are_embedded_the_longest_first_and_as_many_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[list[int]] = []

    def recorded(model: Any, token_ids: list[list[int]]) -> torch.Tensor:
        lengths.append([len(ids) for ids in token_ids])
        return pooled(model, token_ids)

    monkeypatch.setattr(embed, "pooled", recorded)
    texts = ["x" * 9, "x" * 3, "x" * 10, "x" * 4, "x" * 5]
    for room, wanted in ((20, [[9, 10], [3, 4, 5]]), (3, [[10], [9], [5], [4], [3]])):
        monkeypatch.setattr(embed, "BATCH_TOKENS", room)
        lengths.clear()
        found = embed._made(resolve("tiny:llama"), texts, torch.device("cpu"), lambda text: None)
        assert lengths == wanted
        assert torch.allclose(found, pooled(tiny("llama"), [tiny_tokenizer()(text)["input_ids"] for text in texts]), atol=1e-5)


def test_how_much_of_a_text_is_embedded(tmp_path: Path) -> None:
    """What a sentence encoder's own recipe says, else what the model can hold, and at most 512 tokens."""
    model: Any = tiny("llama")
    for holds, wanted in ((40, 40), (4096, 512)):
        model.config.max_position_embeddings = holds
        assert embed._longest(None, model) == wanted
    for said, wanted in ((256, 256), (1, 1), (0, 512), ("all", 512)):
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": said}))
        assert embed._longest(tmp_path, model) == wanted
    tokenizer = tiny_tokenizer()
    assert embed._cut("", [], tokenizer, 4) == [tokenizer.eos_token_id]
    assert embed._cut("abcdef", [7, 8, 9], tokenizer, 3) == [7, 8, 9]
    tokenizer.eos_token = None
    assert embed._cut("", [], tokenizer, 4) == [0]


def test_texts_that_just_fit_are_not_called_too_long() -> None:
    said: list[str] = []
    embed._made(resolve("tiny:llama"), ["x" * 512], torch.device("cpu"), said.append)
    assert not any("longer than" in text for text in said) and HASH_WIDTH == hashed(["a"]).shape[1] == 2048
