"""The page of formats says what is true: each example on it is read, written and learned as it says there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.models.tiny import tiny_tokenizer
from luthier.recipe import make_recipe
from luthier.rows.files import FORMATS
from luthier.rows.look import Look, look
from luthier.rows.read import read
from luthier.rows.shapes import Row, known_shapes

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
EXAMPLE = re.compile(r"```json\n(.*?)```\n\n(?:```text\n(.*?)```\n\n)?(.*?)(?=\n```|\n#|\Z)", re.DOTALL)
"""Records, the text they become, and what is said of them."""
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ (tool.function or tool) | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = _tokenizer()
EXAMPLES = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
LINES = [
    re.split(r"\s*\|\s*", line)[1:-1] for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| .* \| `\{", line)
]


def records_of(block: str) -> list[dict[str, Any]]:
    """One record, a list of them, or one a line."""
    try:
        given = json.loads(block)
    except ValueError:
        return [json.loads(line) for line in block.splitlines()]
    return given if isinstance(given, list) else [given]


def written(looked: Look) -> str:
    """Rows as a terminal without colors shows them."""
    samples = []
    for sample in looked.samples:
        text = "".join(f"[[{piece.text}]]" if piece.target else piece.text for piece in sample.pieces)
        samples.append(text.replace("]][[", "").rstrip("\n"))
    return "\n---\n".join(samples) + "\n"


def test_the_page_has_every_format() -> None:
    assert len(EXAMPLES) > 20 and len(LINES) > 40
    page = PAGE.read_text(encoding="utf-8")
    read_as = {name for _, _, said in EXAMPLES for name in re.findall(r"Read as `([^`]*)`", said)}
    becomes = {row.shape for records, _, _ in EXAMPLES for row in read(records_of(records))}
    assert read_as == becomes
    keys = [set(record) for records, _, _ in EXAMPLES for record in records_of(records)]
    for name in known_shapes():
        assert any(set(name.split("+")) <= some for some in keys), f"no example of {name}"
    for ending in FORMATS:
        assert f"`{ending}`" in page, ending


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{n}-{'-'.join(records_of(e[0])[0])}" for n, e in enumerate(EXAMPLES)])
def test_an_example_is_read_and_learned_as_it_says(example: tuple[str, str, str]) -> None:
    records, text, said = example
    looked = look(records_of(records), TOKENIZER)
    found = re.search(r"Read as `([^`]*)`", said)
    assert found is not None, "an example says what it is read as"
    assert list(looked.shape_counts) == [found[1]]
    if text:
        assert written(looked) == text
        assert not looked.skipped and not looked.dropped
    not_read = re.search(r"Not\s+read: (.*?)\.", said, re.DOTALL)
    assert set(looked.ignored_columns) == (set(re.findall(r"`([^`]*)`", not_read[1])) if not_read else set())


@pytest.mark.parametrize("line", LINES, ids=[f"{n}-{line[0]}" for n, line in enumerate(LINES)])
def test_a_line_about_another_tool_is_true(line: list[str]) -> None:
    _, record, setting, read_as = line
    data: dict[str, Any] = {"model": "m", "rows": {"train": "f", **(yaml.safe_load(setting.strip("`")) if setting else {})}}
    columns = make_recipe(data).rows.columns
    rows = [json.loads(record.strip("`"))]
    name = re.search(r"`([^`]*)`", read_as)
    if name is None:
        assert read_as == "*refused*"
        with pytest.raises(LuthierError):
            read(rows, columns=columns)
        return
    (row,) = read(rows, columns=columns)
    assert row.shape == name[1]
    if row.shape not in ("prompt", "members", "text+tags"):
        looked = look(rows, TOKENIZER, columns=columns)
        assert looked.supervised_tokens and not looked.skipped
    if columns:
        assert _as_it_stands(rows) != row, "what is set is needed"


@pytest.mark.parametrize(
    ("name", "columns", "shape"),
    [
        ("gsm8k/test", {"prompt": "question", "completion": "answer"}, "prompt+completion"),
        ("dolly_subset/train", {"input": "context", "output": "response"}, "instruction"),
        ("banking77/test", {"label": "category"}, "text+label"),
        ("toolcall_glaive/train", None, "messages"),
        ("dpo_en/train", None, "prompt+chosen+rejected"),
        ("kto_en/train", None, "messages"),
        ("truthfulqa/test", {"prompt": "Question", "answer": "Correct Answers"}, "prompt+answer"),
        ("cl_benchmark/test", {"text": "sentence"}, "text+label"),
        ("wiki_small/train", None, "text"),
    ],
)
def test_public_data_sets_are_read_without_renaming_a_column(name: str, columns: dict[str, str] | None, shape: str) -> None:
    path = Path(os.environ.get("LUTHIER_DATA", "")) / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"LUTHIER_DATA names no folder with {name}.jsonl")
    rows = read(path, columns=columns, on_bad_row="skip")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert set(rows.shape_counts) == {shape} and len(rows) + len(rows.skipped) == len(records)
    assert len(rows.skipped) <= len(records) // 100, rows.skipped[:3]
    if columns:
        keys = {own: key for key, own in columns.items()}
        renamed = [{keys.get(name, name): value for name, value in one.items()} for one in records]
        assert rows.fingerprint() == read(renamed, on_bad_row="skip").fingerprint()


def test_calls_of_another_tool_are_read_or_named() -> None:
    def called(value: Any) -> list[dict[str, Any]]:
        turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
        found: list[dict[str, Any]] = read([{"conversations": turns}])[0].fields["messages"][1]["tool_calls"]
        return found

    one = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert called('{"name": "f", "arguments": {"x": 1}}') == called({"name": "f", "arguments": '{"x": 1}'}) == [one]
    assert called('[{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]')[1]["function"] == {"name": "g", "arguments": {}}
    nameless = "a call without a `name`"
    for value, what in (("f(x)", "a call, but not JSON"), ("[]", nameless), ('{"arguments": {}}', nameless), ("3", nameless)):
        with pytest.raises(LuthierError, match=what):
            called(value)


def _as_it_stands(records: list[dict[str, Any]]) -> Row | None:
    try:
        return read(records)[0]
    except LuthierError:
        return None
