"""Documents in blocks: every token stands in one of them, is learned once, and no block is too long."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.evaluate.sets import measure
from luthier.kinds.parts import Reads
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.numbers import _options
from luthier.planning.plan import Plan, make_plan
from luthier.planning.prepare import make_calibration
from luthier.recipe import BlocksRecipe, make_recipe
from luthier.rows.blocks import BLOCK, Splitter, _levels, _paragraphs, _sentences, splitter_of
from luthier.rows.chat import form_of
from luthier.rows.encode import Encoded, encode, encode_all
from luthier.rows.look import look
from luthier.rows.numbers import Numbers
from luthier.rows.read import read
from luthier.rows.shapes import Row

PROSE = (
    "A wheelwright makes wheels. He needs ash, elm and oak.\n\n"
    "The hub is of elm, which does not split. The spokes are of oak! Why oak? It does not bend.\n\n"
    "Rims are of ash.\r\n\r\nA wheel “sings.” It is said so.\n  \n\tAnd so on; 車輪は丸い。木は硬い\uff01終わり🎉🎉"
)

_BPE: dict[str, Any] = {"vocab_size": 340, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}


def _trained(
    model: Any, trainer: Any, pre: Any, post: Any = None, normalizer: Any = None, **special: Any
) -> PreTrainedTokenizerBase:
    made = Tokenizer(model)
    made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator([PROSE] * 3, trainer)
    if post is not None:
        made.post_processor = post(made)
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def _gpt2() -> PreTrainedTokenizerBase:
    """Tells no spaces, and has no token before a text."""
    return _trained(
        models.BPE(),
        trainers.BpeTrainer(special_tokens=["<end>"], **_BPE),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        lambda made: processors.ByteLevel(trim_offsets=True),
        eos_token="<end>",
    )  # fmt: skip


def _llama3() -> PreTrainedTokenizerBase:
    """Joins line breaks to what stands before them, tells spaces, and begins every text with a token."""
    pattern = Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+| ?\p{L}+|\p{N}{1,3}|\s+")
    pre = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    return _trained(
        models.BPE(),
        trainers.BpeTrainer(special_tokens=["<start>", "<end>"], **_BPE),
        pre,
        lambda made: processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", made.token_to_id("<start>"))]),
        bos_token="<start>", eos_token="<end>",
    )  # fmt: skip


def _unigram() -> PreTrainedTokenizerBase:
    """Puts a space before a text, normalizes it and knows no end."""
    return _trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
        pre_tokenizers.Metaspace(),
        normalizer=normalizers.NFKC(),
        unk_token="<unk>",
    )


def _words() -> PreTrainedTokenizerBase:
    """Drops all spaces."""
    return _trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", "<end>"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.Lowercase(),
        unk_token="<unk>",
        eos_token="<end>",
    )


TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    "bytes": tiny_tokenizer(), "gpt2": _gpt2(), "llama3": _llama3(), "unigram": _unigram(), "words": _words()
}  # fmt: skip


def _document(text: str, **more: Any) -> Row:
    return read([{"text": text, **more}])[0]


def _splitter(name: str, tokens: int, **more: Any) -> Splitter:
    tokenizer = TOKENIZERS[name]
    return Splitter(tokenizer, form_of(tokenizer).first_ids, tokens, **more)


def _refused(call: Callable[[], Any]) -> LuthierError:
    with pytest.raises(LuthierError) as told:
        call()
    return told.value


def _texts(rows: Sequence[Row]) -> list[str]:
    return [row.fields["text"] for row in rows]


def _learned(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Encoded]]:
    """The tokens of all blocks without their contexts, which are the labels, but for one that nothing stands before."""
    encoded, first = [encode(row, tokenizer) for row in rows], form_of(tokenizer).first_ids
    found: list[int] = []
    for row, one in zip(rows, encoded, strict=True):
        read_only = len(first) + row.fields[BLOCK].context
        assert one.token_ids[: len(first)] == first
        assert one.supervised == tuple(place >= max(1, read_only) for place in range(len(one)))
        found += one.token_ids[read_only:]
    return found, encoded


@pytest.mark.parametrize("at", ["paragraph", "sentence", "token"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_token_stands_in_one_block_and_is_learned_once(name: str, at: Any) -> None:
    """Whatever a tokenizer does with spaces, line breaks and letters of several bytes."""
    tokenizer, drawn = TOKENIZERS[name], random.Random(name)
    pieces = ["Word", " two", ". ", "! ", "\n\n", "\r\n\r\n", " ", "\n", "\t", "é", "🎉", "丸い。", "3.14", "   ", "a" * 30]
    texts = [PROSE, *("x" + "".join(drawn.choices(pieces, k=drawn.randrange(1, 80))) for _ in range(5))]
    for text in texts:
        whole = encode(_document(text), tokenizer)
        for tokens, overlap in ((8, 0), (17, 0), (17, 6), (40, 20), (10_000, 3)):
            rows = _splitter(name, tokens, overlap=overlap, at=at).blocks(_document(text))
            assert "".join(_texts(rows)) == text, "every letter once"
            learned, encoded = _learned(rows, tokenizer)
            first = len(form_of(tokenizer).first_ids)
            assert learned == list(whole.token_ids[first:]), "every token once, in its place"
            assert max(map(len, encoded)) <= tokens
            for before, after in pairwise(rows):
                context = after.fields[BLOCK].context
                assert context <= overlap
                assert (
                    after.fields[BLOCK].token_ids[:context]
                    == before.fields[BLOCK].token_ids[len(before.fields[BLOCK].token_ids) - context :]
                )
            if len(rows) == 1:
                assert encoded[0].token_ids == whole.token_ids and encoded[0].supervised == whole.supervised


def test_borders_by_hand() -> None:
    """A token of the tiny tokenizer is one letter: the largest border that fits, and the end of the document is no block by itself."""

    def cut(text: str, tokens: int, **more: Any) -> list[str]:
        return _texts(_splitter("bytes", tokens, **more).blocks(_document(text)))

    text = "Ab. Cd.\n\nEf."
    assert cut(text, 8) == ["Ab. ", "Cd.\n\n", "Ef."]
    assert cut(text, 9) == cut(text, 10) == ["Ab. Cd.\n\n", "Ef."] and cut(text, 13) == [text]
    assert cut(text, 12) == ["Ab. Cd.\n\n", "Ef."], "the token that ends a document has its place, too"
    assert cut(text, 8, at="sentence") == ["Ab. ", "Cd.\n\n", "Ef."]
    assert cut("A. B. C.\n\nD. E.", 14) == ["A. B. C.\n\n", "D. E."]
    assert cut("A. B. C.\n\nD. E.", 14, at="sentence") == ["A. B. C.\n\nD. ", "E."]
    assert cut(text, 8, at="token") == ["Ab. Cd.\n", "\nEf."]
    assert cut("abcdefgh", 8, at="token") == cut("abcdefgh", 8) == ["abcdefg", "h"], "no block is an end alone"
    assert cut("ab🎉cd", 5, at="token") == ["ab", "🎉c", "d"], "no letter is cut"


def test_the_same_tokens_are_read_again_and_no_labels() -> None:
    rows = _splitter("bytes", 8, overlap=3, at="token").blocks(_document("Ab. Cd.\n\nEf."))
    first, second = (encode(row, TOKENIZERS["bytes"]) for row in rows)
    assert [TOKENIZERS["bytes"].decode(one.token_ids) for one in (first, second)] == ["Ab. Cd.\n", "d.\n\nEf.<|im_end|>"]
    assert first.supervised == (False, *[True] * 7) and second.supervised == (*[False] * 3, *[True] * 5)
    assert _texts(rows) == ["Ab. Cd.\n", "\nEf."], "a text is what a block adds"
    moved = _splitter("bytes", 9, overlap=3, at="token").blocks(_document("abcd🎉efgh"))
    assert [(row.fields["text"], row.fields[BLOCK].context) for row in moved] == [("abcd🎉e", 0), ("fgh", 1)], (
        "no letter is read in part"
    )
    started = encode(_splitter("llama3", 6, at="token").blocks(_document(PROSE))[1], TOKENIZERS["llama3"])
    assert started.token_ids[0] == TOKENIZERS["llama3"].bos_token_id and started.supervised == (False, *[True] * 5)


def test_where_paragraphs_and_sentences_end() -> None:
    text = "One. Two\n\nThree\nfour?” Five… “Six” 3.14 e\x0cSeven。八」九"
    assert [text[low:high] for low, high in _paragraphs(text)] == ["\n\n", "\x0c"]
    ends = [text[max(0, low - 5) : low] for low, _ in sorted(_sentences(text))]
    assert ends == ["One.", "our?”", "Five…", "even。"]
    assert _levels("Ab.\n\nCd. Ef", [0, 1, 7], [1, 2], "paragraph") == [[], [], [1, 2]], "no token begins at a border"
    assert _levels("Ab.\n\nCd. Ef", [0, 3, 5, 8], [1, 2, 3], "paragraph") == [[2], [2, 3], [1, 2, 3]]
    assert _levels("Ab.\n\nCd.", [0, 3, 5, 5], [1, 2], "paragraph")[0] == [2], "a token within a letter is none to begin with"
    assert not [*_paragraphs("a\r\nb\rc\nd")] and len([*_paragraphs("a\r\n\r\nb\r\rc\u2029d")]) == 3
    for long in ("." * 50_000 + "x", " " * 50_000, "。" * 50_000, "\n" * 50_000):
        assert len([*_sentences(long), *_paragraphs(long)]) <= 1, "in time that grows with the text"


BOOK = [
    f"{name} is a village.\n\nIt has {n} wells. It has no mill."
    for n, name in enumerate(("Ard", "Bel", "Cor", "Dun", "Elm"), start=2)
]
DOCUMENTS = [{"text": text, "topic": "villages"} for text in BOOK]


def _plan(**rows: Any) -> Plan:
    train = {"steps": 1, "precision": "fp32", "batch_rows": 2}
    return make_plan(make_recipe({"model": "tiny:llama", "rows": rows, "train": train}))


def test_blocks_are_rows_that_say_where_they_come_from(tmp_path: Path) -> None:
    document = _document(BOOK[0], topic="villages")
    rows = _splitter("bytes", 30).blocks(document)
    assert [row.id for row in rows] == [f"{document.id}#{n}" for n in (1, 2, 3)]
    assert [row.where for row in rows] == ["row 1#1", "row 1#2", "row 1#3"] and {row.columns["topic"] for row in rows} == {
        "villages"
    }
    assert [row.fields[BLOCK].number for row in rows] == [1, 2, 3] and len({row.fields[BLOCK].document for row in rows}) == 1
    assert [row.id for row in _splitter("bytes", 30).blocks(_document(BOOK[0], id="ard"))] == ["ard#1", "ard#2", "ard#3"]
    again = read([*DOCUMENTS[:1] * 2, {"prompt": "Why?", "completion": "So."}])
    found = list(_splitter("bytes", 30).rows(again))
    assert [row.id for row in found[:6]] == [f"{again[0].id}#{n}{more}" for more in ("", "-2") for n in (1, 2, 3)]
    assert found[6] is again[2] and list(_splitter("bytes", 30).rows(found)) == found, "what is no document stays, and so do blocks"
    (tmp_path / "a book.md").write_text(BOOK[0])
    (tmp_path / "README.md").write_text("What this is.")
    plan = _plan(train=str(tmp_path), blocks={"tokens": 30})
    assert [row.where for row in plan.rows.rows] == [f"{tmp_path / 'a book.md'}#{n}" for n in (1, 2, 3)]
    assert not [one for one in plan.warnings() if "part of its text" in one]


@pytest.mark.parametrize("copies", [1, 2])
def test_streamed_documents_are_the_same_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int) -> None:
    """With the same ids, also where two sources have the same document, and with some of them held out."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    files = [tmp_path / f"{n}.jsonl" for n in range(copies)]
    for file in files:
        file.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    rows = {
        "train": [str(file) for file in files],
        "blocks": {"tokens": 40, "overlap": 5},
        "validate": 0.3,
        "validate_by": "document",
    }
    whole, streamed = (_plan(**rows, streaming=streaming) for streaming in (False, True))
    assert [(row.id, row.token_ids, row.supervised) for row in whole.rows.rows] == [
        (row.id, row.token_ids, row.supervised) for row in streamed.rows.rows
    ]
    assert [row.id for row in whole.sets[0].rows] == [row.id for row in streamed.sets[0].rows]
    learned, measured = ({row.where.partition("#")[0] for row in some} for some in (whole.rows.rows, whole.sets[0].rows))
    assert not learned & measured and len(learned | measured) == 5 * copies, "documents are held out whole"
    assert len(measured) == copies * len({Path(place).name.partition(":")[2] for place in measured}), "from all sources"
    others = _plan(**{**rows, "blocks": {"tokens": 40}}, streaming=True)
    assert [len(row) for row in others.rows.rows] != [len(row) for row in streamed.rows.rows], "other blocks are encoded anew"
    said = (
        "blocks of at most 40 tokens, of which up to 5 stand in the block before and are only read; cut between paragraphs where that is "
        "possible"
    )
    count = len(whole.rows.rows) + len(whole.sets[0].rows)
    assert f"              {5 * copies} documents in {count} {said}" in whole.lines()
    assert f"              {said}" in streamed.lines()


def test_one_document_is_enough_to_hold_blocks_out(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(BOOK))
    plan = _plan(train=str(tmp_path / "book.txt"), blocks={"tokens": 64}, validate=2)
    assert len(plan.sets[0].rows) == 2 and plan.sets[0].chosen_metric == "loss"
    own = _plan(train=str(tmp_path / "book.txt"), blocks={"tokens": 64}, validate=str(tmp_path / "book.txt"))
    assert [row.fields[BLOCK] for row in own.sets[0].rows] == [row.fields[BLOCK] for row in own.raw]
    read_again = _plan(train=str(tmp_path / "book.txt"), blocks={"tokens": 64, "overlap": 8}, validate=2)
    found = measure(read_again.engine.tune, read_again.tokenizer, read_again.sets)["validation"]
    blocks = [row.fields[BLOCK] for row in read_again.sets[0].rows]
    labels = [len(block.token_ids) - max(1, block.context) for block in blocks]
    assert [item.weight for item in found.items] == labels and any(block.context for block in blocks), "only read, and not measured"


def test_how_long_blocks_may_be() -> None:
    text = {"text": "word " * 300}
    told = _refused(lambda: _plan(train=[text]))
    assert told.fix.startswith("split it into blocks with rows.blocks: {}, ")
    limited = _refused(lambda: _plan(train=[{"text": "word " * 30}], max_length=100))
    assert limited.fix.startswith("raise max_length") and ", or split it into blocks with rows.blocks: {}" in limited.fix
    assert max(len(row) for row in _plan(train=[text], blocks={}).rows.rows) == 512, "what the model reads"
    assert max(len(row) for row in _plan(train=[text], blocks={}, max_length=100).rows.rows) == 100
    for rows, limit in (({"blocks": {"tokens": 513}}, 512), ({"blocks": {"tokens": 101}, "max_length": 100}, 100)):
        told = _refused(lambda rows=rows: _plan(train=[text], **rows))
        assert (told.what, told.where) == (
            f"blocks of {rows['blocks']['tokens']} tokens are longer than a row may be ({limit})", "rows.blocks.tokens"
        )  # fmt: skip
    assert "split it" not in _refused(lambda: _plan(train=[{"prompt": "a" * 600, "completion": "b"}])).fix
    assert "no row is a document" in _refused(lambda: _plan(train=[{"prompt": "a", "completion": "b"}], blocks={})).what
    assert "how much it reads" in _refused(lambda: splitter_of(BlocksRecipe(), tiny_tokenizer(), (), None)).what
    assert splitter_of(None, tiny_tokenizer(), (), None) is None
    for overlap in (6, 7, 100):
        told = _refused(lambda overlap=overlap: Splitter(tiny_tokenizer(), (3,), 8, overlap))
        assert told.what == f"of blocks of 8 tokens an overlap of {overlap} leaves room for {max(0, 7 - overlap)}"
    assert Splitter(tiny_tokenizer(), (3,), 8, 5).blocks(_document(PROSE))
    assert "at is 'line'" in _refused(lambda: Splitter(tiny_tokenizer(), (), 8, at="line")).what  # type: ignore[arg-type]

    class Slow:
        is_fast = False

    assert "does not tell where" in _refused(lambda: Splitter(Slow(), (), 8)).what  # type: ignore[arg-type]


def test_blocks_are_looked_at_and_judged_before_a_run(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(BOOK))

    def said(*words: str) -> Any:
        done = CliRunner().invoke(app, ["rows", *words, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    looked = said("look", str(tmp_path / "book.txt"), "blocks.tokens=64", "--model", "tiny:llama")
    plan = _plan(train=str(tmp_path / "book.txt"), blocks={"tokens": 64})
    assert (looked["rows"], looked["tokens"], looked["too_long"]) == (len(plan.rows.rows), plan.rows.tokens, 0)
    assert looked["blocks"].startswith(f"1 document in {looked['rows']} blocks of at most 64 tokens; cut between paragraphs")
    assert look(tmp_path / "book.txt", tiny_tokenizer()).blocks == ""
    stored = said(
        "store", "likelihood", str(tmp_path / "book.txt"), "blocks.tokens=64", "--model", "tiny:llama", "--precision", "fp32"
    )
    assert stored["new"] == looked["rows"]
    held = Numbers(Path(stored["out"]))
    places = held.find([row.id for row in plan.rows.rows])
    assert [int(held.encoded_R[place]) for place in places] == [row.digest for row in plan.rows.rows], "they are those of the run"
    recipe = make_recipe({"model": "m", "rows": {"train": "a", "blocks": {"tokens": 64}}}).rows
    assert _options(recipe, "a") == {"blocks": {"tokens": 64, "overlap": 0, "at": "paragraph"}}


def test_without_an_end_none_is_learned() -> None:
    rows = _splitter("unigram", 12).blocks(_document(PROSE))
    found = encode_all(rows, TOKENIZERS["unigram"])
    assert not found.notes and found.sizes.tokens[0] <= 12
    special = _splitter("bytes", 12).blocks(_document("So <|im_end|> it is, and so on."))
    assert any("special tokens as text" in note for note in encode_all(special, TOKENIZERS["bytes"]).notes)
    ended = _splitter("bytes", 12).blocks(_document("It is over.<|im_end|>"))
    assert encode(ended[-1], TOKENIZERS["bytes"]).token_ids[-2:] == (
        TOKENIZERS["bytes"]("." )["input_ids"][0], TOKENIZERS["bytes"].eos_token_id
    )  # fmt: skip
    whole = _splitter("bytes", 99).blocks(_document("It is over.<|im_end|>"))
    assert (
        encode(whole[0], TOKENIZERS["bytes"]).token_ids == encode(_document("It is over.<|im_end|>"), TOKENIZERS["bytes"]).token_ids
    )


def test_rows_that_techniques_calibrate_on_are_split_and_named_alike(tmp_path: Path) -> None:
    """A document that they name was refused for its length, and a table for its columns."""
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "word " * 200}) + "\n")
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": "plain"}) + "\n")
    recipe = make_recipe({"model": "m", "rows": {"train": "a", "columns": {"text": "body"}, "blocks": {"tokens": 64}}}).rows
    calibration = make_calibration(
        recipe, 64, 0, encode_all([_document("a")], tiny_tokenizer()), tiny_tokenizer(), Reads(context=512)
    )
    (batch,) = calibration(1, str(tmp_path / "other.jsonl"))
    assert 32 < batch.token_ids_BT.shape[1] <= 64
    assert len(calibration(1, str(tmp_path / "plain.jsonl"))) == 1
