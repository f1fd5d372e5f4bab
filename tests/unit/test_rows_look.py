"""Looking at data shows what is learned, and nothing in the data can act on the terminal."""

from __future__ import annotations

import io
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from luthier.cli import app
from luthier.models.tiny import tiny_tokenizer
from luthier.rows.chat import PLAIN
from luthier.rows.look import Look, Piece, _quantiles, _reasons, _visible, look, render, shortened
from luthier.rows.read import read
from luthier.rows.shapes import BadRow

RECORDS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "q", "completion": "é 🎉"},
    {"id": "b", "prompt": "q", "chosen": "good", "rejected": "bad"},
    {"id": "c", "prompt": "open"},
    {"id": "d", "text": "x" * 40},
    {"id": "e", "messages": [{"role": "user", "content": "q"}]},
]

SHORT = "lengths   shortest 4, median 4, 90% 4, 99% 4, longest 4"


def shown(looked: Look) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(render(looked))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_facts() -> None:
    looked = look(RECORDS, tiny_tokenizer(), max_length=37)
    assert looked.rows == 5
    assert looked.shape_counts == {
        "prompt+completion": 1,
        "prompt+chosen+rejected": 1,
        "prompt": 1,
        "text": 1,
        "messages": 1,
    }
    prompt = 1 + 5 + 1 + 1 + 1 + 1 + 10
    assert [(sample.id, sample.tokens, sample.labels) for sample in looked.samples] == [
        ("a", prompt + 7 + 2, 8),
        ("b/chosen", prompt + 4 + 2, 5),
        ("b/rejected", prompt + 3 + 2, 4),
        ("c", prompt + 3, 0),
    ]
    assert looked.too_long == 1
    assert looked.lengths == {"shortest": 23, "median": 26, "90%": 41, "99%": 41, "longest": 41}
    assert looked.tokens == sum(sample.tokens for sample in looked.samples)
    assert looked.supervised_tokens == 17
    assert [bad.where for bad in looked.skipped] == ["row 5 (row e)", "row 4 (row d)"]
    assert len(look(RECORDS, tiny_tokenizer(), 2).samples) == 2


def test_cut_rows_are_shown_as_cut() -> None:
    looked = look(RECORDS[:1], tiny_tokenizer(), max_length=20, too_long="left")
    assert looked.samples[0].truncated == looked.lengths["longest"] - 20
    dropped = look(RECORDS[:1] + RECORDS[2:3], tiny_tokenizer(), max_length=20, too_long="right")
    assert [bad.where for bad in dropped.dropped] == ["row 1 (row a)"]


def test_pieces_are_the_mask() -> None:
    (sample,) = look(RECORDS[:1], tiny_tokenizer()).samples
    assert sample.pieces == (
        Piece("<|im_start|>", False, True),
        Piece("user\nq", False, False),
        Piece("<|im_end|>", False, True),
        Piece("\n", False, False),
        Piece("<|im_start|>", False, True),
        Piece("assistant\n", False, False),
        Piece("é 🎉", True, False),
        Piece("<|im_end|>", True, True),
        Piece("\n", False, False),
    )


def test_targets_are_colored() -> None:
    looked = look(RECORDS[:1], tiny_tokenizer())
    group: Any = render(looked)
    (text,) = [part for part in group.renderables if isinstance(part, Text) and "assistant" in part.plain]
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == ["é 🎉", "<|im_end|>"]


def test_markup_and_control_characters_are_shown_not_obeyed() -> None:
    records = [{"id": "[red]x[/red]", "prompt": "[bold]q[/bold][/nothing]", "completion": "\x1b[31mred\x07\r\u009b2J"}]
    output = shown(look(records, tiny_tokenizer()))
    assert "[bold]q[/bold][/nothing]" in output and "[red]x[/red]" in output
    assert "\\x1b[31mred\\x07\\x0d\\x9b2J" in output
    assert not {"\x07", "\r", "\u009b"} & set(output) and "\x1b[31m" not in output


def test_long_pieces_areshortened() -> None:
    output = shown(look([{"text": "a" + "b" * 5000 + "c"}], tiny_tokenizer()))
    assert "more characters" in output and len(output) < 3000


def test_problems_are_listed(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in RECORDS] + ['{"text": ""}'] * 7
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    looked = look(path, tiny_tokenizer())
    assert len(looked.skipped) == 8
    output = shown(looked)
    assert "train.jsonl:6: `text` is empty" in output and "…" in output
    assert look(read(RECORDS, name="mine"), tiny_tokenizer()).name == "mine"


def test_json_is_plain() -> None:
    facts = look(RECORDS, tiny_tokenizer(), max_length=37).as_json()
    assert set(json.loads(json.dumps(facts))) == {field.name for field in fields(Look)}
    assert facts["skipped"][0] == {
        "where": "row 5 (row e)",
        "reason": "the conversation has no assistant turn to learn",
        "fix": "add the assistant's answer, or learn every turn with loss_on: all",
    }
    assert facts["samples"][0]["pieces"][6] == {"text": "é 🎉", "target": True, "special": False}


def test_what_fits_is_not_too_long_and_five_samples_are_shown() -> None:
    assert look(RECORDS[:1], tiny_tokenizer(), max_length=29).too_long == 0
    assert look(RECORDS[:1], tiny_tokenizer(), max_length=28).too_long == 1
    assert len(look([{"text": "a" * number} for number in range(1, 8)], tiny_tokenizer()).samples) == 5


def test_notes_of_rows_with_and_without_an_answer_are_counted_together() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = None
    assert look([{"prompt": "q", "completion": "a"}, {"prompt": "q"}, {"prompt": "r"}], tokenizer).notes == {PLAIN: 3}


def test_lengths_are_those_of_rows_at_their_places() -> None:
    assert _quantiles(range(101, 0, -1)) == {"shortest": 1, "median": 51, "90%": 91, "99%": 100, "longest": 101}


def test_long_pieces_keep_their_ends() -> None:
    assert shortened("a" * 600 + "b" * 600) == "a" * 600 + "b" * 600
    assert shortened("a" * 600 + "-" + "b" * 600) == "a" * 600 + " … 1 more characters … " + "b" * 600


def test_at_most_five_reasons_are_shown() -> None:
    bad = [BadRow(f"row {number}", "bad") for number in range(6)]
    assert _reasons(bad[:5]) == "5\n" + "\n".join(f"row {number}: bad" for number in range(5))
    assert _reasons(bad) == "6\n" + "\n".join(f"row {number}: bad" for number in range(5)) + "\n…"


def test_which_characters_are_spelled_out() -> None:
    assert _visible("\x1f ~\x7f\x80\x9f\xa0\n\t") == "\\x1f ~\\x7f\\x80\\x9f\xa0\n\t"


def test_facts_stand_line_by_line() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(replace(look([{"text": "a ."}], tiny_tokenizer()), name="mine")))
    shown_lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert shown_lines[:5] == ["mine", "rows      1 text", "tokens    4, of which 3 are labels (75%)", SHORT, "too long  0"]
    assert shown_lines[-1] == "a .<|im_end|>", "no space is lost"
    nothing = replace(look([{"text": "a"}], tiny_tokenizer()), tokens=0, supervised_tokens=0)
    console.print(render(nothing))
    assert "0, of which 0 are labels (0%)" in console.file.getvalue()  # type: ignore[attr-defined]


def plain(looked: Look) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(looked, marked=True))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_labels_are_in_brackets_without_color() -> None:
    """Neighbors are in one pair of brackets, special tokens among them or not."""
    output = plain(look(RECORDS[:1], tiny_tokenizer()))
    assert "assistant↵\n[[é 🎉<|im_end|>]]↵\n" in output and "learned   what stands between [[ and ]]" in output
    assert "[[" not in shown(look(RECORDS[:1], tiny_tokenizer())) and "what is bold green" in shown(
        look(RECORDS[:1], tiny_tokenizer())
    )
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    last = plain(look([{"messages": turns}], tiny_tokenizer(), loss_on="last"))
    assert last.count("[[") == 2 and "[[a<|im_end|>]]" in last and last.rindex("[[") > last.rindex("user")


def test_the_command_marks_where_it_cannot_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n", encoding="utf-8")
    for color, no_color, marks in ((None, False, True), ("standard", False, False), ("standard", True, True)):
        console = Console(file=io.StringIO(), width=200, force_terminal=color is not None, color_system=color, no_color=no_color)
        monkeypatch.setattr("luthier.cli.rows.out", console)
        monkeypatch.setattr("luthier.cli.face.out", console)
        assert CliRunner().invoke(app, ["rows", "look", str(path), "--model", "tiny:llama"]).exit_code == 0
        assert ("[[" in console.file.getvalue()) == marks  # type: ignore[attr-defined]


def test_what_the_model_does_not_read_is_named() -> None:
    """Columns that only techniques read, and turns that the chat template leaves out."""
    deaf = tiny_tokenizer()
    heard = "{% for message in messages if message['role'] != 'system' %}"
    deaf.chat_template = str(deaf.chat_template).replace("{% for message in messages %}", heard)
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows: list[dict[str, Any]] = [
        {"id": "quiet", "messages": said, "topic": "birds", "score": 2, "about": {"n": 1}},
        {"id": "loud", "messages": [{"role": "system", "content": "Be kind."}, *said], "topic": "fish"},
    ]
    looked = look(rows, deaf)
    assert looked.ignored_columns == {"topic": 2, "score": 1, "about": 1}
    output = plain(looked)
    note = "the chat template does not write `content` of system turns"
    assert "not read  `topic` of 2 rows, `score` of 1 rows, `about` of 1 rows" in output
    assert re.search(rf"row 2, row loud: .*\nnote: {re.escape(note)}\n<", output)
    assert output.count(note) == 2 and output.count("note: ") == 1, "once above, and once where it is"
    assert plain(look(rows[1:], deaf)).count(note) == 1, "what is so in every row is said once"
    labelled = look([{"text": "a", "label": "b", "n": 1}], tiny_tokenizer())
    assert labelled.ignored_columns == {"n": 1}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert look([{"messages": said, "tools": tools, "system": "x"}], tiny_tokenizer()).ignored_columns == {}
