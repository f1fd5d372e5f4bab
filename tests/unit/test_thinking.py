"""Chat templates from files and by name, and what becomes of reasoning: in the shapes that public rows have."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

import luthier
from luthier.errors import LuthierError
from luthier.models.load import load_tokenizer
from luthier.models.tiny import CHAT_TEMPLATE, tiny, tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe, read_recipe
from luthier.results.folder import read_run
from luthier.results.opened import open_run
from luthier.results.start import source_of
from luthier.rows.chat import form_of, render_prompt
from luthier.rows.encode import encode, encode_pair
from luthier.rows.read import read
from luthier.rows.shapes import Row
from luthier.rows.template import CHATML, choose
from luthier.runs.rows import look_at_rows
from tests.faults.test_faults_templates import QWEN3, byte_level, learned
from tests.recipes.test_recipes import FACTS, recipe

READS = CHAT_TEMPLATE.replace(
    "message['content']",
    "('<reason>' + message.reasoning_content + '</reason>' if message.reasoning_content else '') + message['content']",
)
UPPER = CHAT_TEMPLATE.replace("message['role']", "message['role'] | upper").replace("assistant", "ASSISTANT")
Q, R = {"role": "user", "content": "1+1?"}, {"role": "user", "content": "2+2?"}


def texts(name: str) -> dict[str, Any]:
    """One conversation of two turns with reasoning, as it stands in public rows."""
    inside = [f"<think>\n{one}\n</think>\n\n{two}" for one, two in (("one more", "2"), ("two more", "4"))]
    if name == "sharegpt":
        return {
            "conversations": [
                turn
                for q, a in zip((Q, R), inside, strict=True)
                for turn in ({"from": "human", "value": q["content"]}, {"from": "gpt", "value": a})
            ]
        }
    if name == "text":
        return {
            "messages": [turn for q, a in zip((Q, R), inside, strict=True) for turn in (q, {"role": "assistant", "content": a})]
        }
    said = zip((Q, R), ("one more", "two more"), ("2", "4"), strict=True)
    return {"messages": [turn for q, r, a in said for turn in (q, {"role": "assistant", "content": a, name: r})]}


def row_of(record: dict[str, Any]) -> Row:
    (row,) = read([record])
    return row


def trained(record: dict[str, Any], template: str, thinking: str = "keep", **options: Any) -> list[str]:
    """What a model learns to write."""
    tokenizer = byte_level(template)
    choose(tokenizer, thinking=thinking)  # type: ignore[arg-type]
    return [one.removesuffix("<|im_end|>") for one in learned(encode(row_of(record), tokenizer, **options), tokenizer)]


@pytest.mark.parametrize("name", ["text", "sharegpt", "reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_public_shapes_is_kept_or_dropped(name: str) -> None:
    """By default all of it is learned, as text where the template reads no key for it; `last` and `drop` leave out what they say."""
    record = texts(name)
    assert trained(record, CHAT_TEMPLATE) == ["<think>\none more\n</think>\n\n2", "<think>\ntwo more\n</think>\n\n4"]
    assert trained(record, CHAT_TEMPLATE, "last") == ["2", "<think>\ntwo more\n</think>\n\n4"]
    assert trained(record, CHAT_TEMPLATE, "drop") == ["2", "4"]
    if name not in ("text", "sharegpt"):
        # A template with a key of its own is given the key.
        assert trained(record, READS) == ["<reason>one more</reason>2", "<reason>two more</reason>4"]
        assert trained(record, READS, "last") == ["2", "<reason>two more</reason>4"]


def test_the_last_turn_reaches_back_to_the_last_question() -> None:
    """What an assistant thinks between calls of tools belongs to the turn; what it thought before the question does not."""
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    record = texts("reasoning_content")
    record["messages"][3:] = [
        {"role": "assistant", "content": "let me see", "reasoning_content": "I should add", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4", "reasoning_content": "so it is"},
    ]
    written = trained(record, READS, "last")
    assert written == ["2", "<reason>I should add</reason>let me see", "<reason>so it is</reason>4"]
    # Asked for its answer, the model reads what it read in training.
    tokenizer = byte_level(READS)
    choose(tokenizer, thinking="last")
    asked = render_prompt(row_of({"messages": record["messages"][:5]}), form_of(tokenizer)).text
    assert "I should add" in asked and "one more" not in asked
    assert tokenizer.decode(encode(row_of(record), tokenizer).token_ids).startswith(asked)


def test_a_prompt_is_written_as_it_was_in_training() -> None:
    """With `last` no turn before the answer has reasoning: in training the answer was the last, and at inference it is to come."""
    record = texts("text")
    tokenizer = byte_level(CHAT_TEMPLATE)
    choose(tokenizer, thinking="last")
    asked = render_prompt(row_of({"messages": record["messages"][:3]}), form_of(tokenizer)).text
    assert "one more" not in asked
    row = encode(row_of(record), tokenizer)
    assert tokenizer.decode(row.token_ids).startswith(asked)
    choose(tokenizer)
    assert "one more" in render_prompt(row_of({"messages": record["messages"][:3]}), form_of(tokenizer)).text


def test_completions_and_pairs_follow_the_same_rule() -> None:
    completion = {"prompt": "1+1?", "completion": "<think>\none more\n</think>\n\n2"}
    assert trained(completion, CHAT_TEMPLATE) == ["<think>\none more\n</think>\n\n2"]
    assert trained(completion, CHAT_TEMPLATE, "last") == ["<think>\none more\n</think>\n\n2"]
    assert trained(completion, CHAT_TEMPLATE, "drop") == ["2"]
    tokenizer = byte_level(CHAT_TEMPLATE)
    choose(tokenizer, thinking="drop")
    pair = row_of(
        {
            "prompt": [Q],
            "chosen": [{"role": "assistant", "content": "2", "thinking": "one more"}],
            "rejected": [{"role": "assistant", "content": "3"}],
        }
    )
    assert learned(encode_pair(pair, tokenizer, pair.fields["chosen"]), tokenizer) == ["2<|im_end|>"]
    # Words that only mention the marks are words.
    mentions = {"prompt": "?", "completion": "write <think>x</think> first"}
    assert trained(mentions, CHAT_TEMPLATE, "drop") == ["write <think>x</think> first"]
    with pytest.raises(LuthierError, match="nothing but its reasoning"):
        trained({"prompt": "?", "completion": "<think>x</think>"}, CHAT_TEMPLATE, "drop")


def test_a_template_that_deletes_reasoning_is_refused_with_it_and_each_remedy_works() -> None:
    record = texts("text")
    with pytest.raises(LuthierError, match=r"deletes the reasoning of an assistant's turn to learn: 'one more'") as refused:
        trained(record, QWEN3)
    for said in ("rows.thinking: last", "rows.thinking: drop", "rows.loss_on: last", "rows.chat_template: FILE.jinja"):
        assert said in refused.value.fix
    assert trained(record, QWEN3, "last") == ["2", "<think>\ntwo more\n</think>\n\n4"]
    assert trained(record, QWEN3, "drop") == ["2", "4"]
    assert trained(record, QWEN3, loss_on="last") == ["<think>\ntwo more\n</think>\n\n4"]
    # Of a turn that is no label nothing is lost: it is read as at inference.
    record["messages"][1]["learn"] = False
    assert trained(record, QWEN3) == ["<think>\ntwo more\n</think>\n\n4"]
    # The same thought in both turns is lost once all the same.
    twice = texts("text")
    twice["messages"][1]["content"] = twice["messages"][3]["content"]
    with pytest.raises(LuthierError, match="'two more'"):
        trained(twice, QWEN3)


def short(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    return recipe(tmp_path, **{"train": {"steps": 1}, **keys})


def test_the_plan_states_what_becomes_of_reasoning(tmp_path: Path) -> None:
    rows = [texts("thinking"), *FACTS[:3]]
    for thinking, said in (("keep", "written in every"), ("last", "last assistant turn alone"), ("drop", "left out of all")):
        keys = {} if thinking == "keep" else {"thinking": thinking}
        lines = make_plan(make_recipe(short(tmp_path, rows={"train": rows, **keys}))).lines()
        (line,) = [one for one in lines if one.startswith("reasoning")]
        assert f"{thinking}: it is" in line and said in line and "25 % of the rows" in line
    assert not [one for one in make_plan(make_recipe(short(tmp_path))).lines() if one.startswith("reasoning")]
    with pytest.raises(LuthierError, match="thinking"):
        make_recipe(short(tmp_path, rows={"train": rows, "thinking": "all"}))


def test_a_template_from_a_file_is_an_input_of_the_run_and_part_of_its_result(tmp_path: Path) -> None:
    """It is found beside the recipe, kept with the run and its exports, and a run is not resumed with another."""
    (tmp_path / "upper.jinja").write_text(UPPER)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What?", "completion": "That."}\n' * 4)
    (tmp_path / "a.yaml").write_text(
        "model: tiny:llama\nrows: {train: rows.jsonl, chat_template: upper.jinja}\ntrain: {steps: 2, precision: fp32}\n"
    )
    read_again = read_recipe(tmp_path / "a.yaml", [f"out={tmp_path}"])

    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    stopped = luthier.train(read_again, tell=interrupt)
    assert stopped.tokenizer.decode(stopped.tokenizer.apply_chat_template([Q], tokenize=True)["input_ids"]).startswith(
        "<|im_start|>USER"
    )
    (tmp_path / "upper.jinja").write_text(UPPER.replace(" | upper", " | upper | trim"))
    with pytest.raises(LuthierError, match="the chat template: "):
        luthier.train(read_again, resume=stopped.folder)
    (tmp_path / "upper.jinja").write_text(UPPER)
    run = luthier.train(read_again, resume=stopped.folder)
    assert run.facts["status"] == "finished" and (run.folder / "chat_template.jinja").read_text() == UPPER
    (tmp_path / "upper.jinja").unlink()
    assert open_run(run.folder)[1].chat_template == UPPER
    run.export(tmp_path / "written")
    assert AutoTokenizer.from_pretrained(tmp_path / "written").chat_template == UPPER
    # Another run that begins with it writes alike, and so does looking at rows.
    assert load_tokenizer(source_of(str(run.folder), str(tmp_path))).chat_template == UPPER
    two = luthier.train(short(tmp_path, model=str(run.folder), name="two"))
    assert two.tokenizer.chat_template == UPPER
    shown = look_at_rows(str(tmp_path / "rows.jsonl"), str(run.folder), out=str(tmp_path))
    assert "USER" in "".join(piece.text for piece in shown.samples[0].pieces)
    with pytest.raises(LuthierError, match="cannot be read") as refused:
        make_plan(read_again)
    assert "upper.jinja" in refused.value.where


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for %}", "no chat template"),
        (" \n", "is empty"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% include 'x' %}", "refuses"),
    ],
)
def test_a_file_that_is_no_template_is_refused(text: str, said: str, tmp_path: Path) -> None:
    """Also one that reaches out of the sandbox."""
    (tmp_path / "bad.jinja").write_text(text)
    with pytest.raises(LuthierError, match=said):
        make_plan(make_recipe(short(tmp_path, rows={"train": FACTS, "chat_template": str(tmp_path / "bad.jinja")})))


def test_a_tokenizer_without_a_template_gets_one_by_name(tmp_path: Path) -> None:
    """Only where it has the two tokens that ChatML is written with, or is given them."""
    plain = tiny_tokenizer()
    plain.chat_template = None
    tiny("llama").save_pretrained(tmp_path / "base")
    plain.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    rows = {"train": FACTS, "chat_template": "chatml"}
    run = luthier.train(short(tmp_path, model=base, rows=rows))
    assert run.tokenizer.chat_template == CHATML == CHAT_TEMPLATE and not run.facts["warnings"]
    run.export(tmp_path / "written")
    assert AutoTokenizer.from_pretrained(tmp_path / "written").chat_template == CHATML
    assert open_run(run.folder)[1].chat_template == CHATML
    with pytest.raises(LuthierError, match="has no chat template `chatm`"):
        make_plan(make_recipe(short(tmp_path, model=base, rows={**rows, "chat_template": "chatm"})))
    (tmp_path / "bare").mkdir()
    for file in os.listdir(base):
        (tmp_path / "bare" / file).write_bytes(
            (tmp_path / "base" / file).read_bytes().replace(b"<|im_start|>", b"<|a|>").replace(b"<|im_end|>", b"<|b|>")
        )
    bare = str(tmp_path / "bare")
    with pytest.raises(LuthierError, match=r"written with `<\|im_start\|>` and `<\|im_end\|>`, which are no tokens") as refused:
        make_plan(make_recipe(short(tmp_path, model=bare, rows=rows)))
    assert "add_tokens: ['<|im_start|>', '<|im_end|>']" in refused.value.fix
    added = {"name": bare, "add_tokens": ["<|im_start|>", "<|im_end|>"]}
    given = luthier.train(short(tmp_path, model=added, rows=rows, tune="lora", name="given"))
    ids = given.tokenizer.apply_chat_template([Q], tokenize=True)["input_ids"]
    size = len(plain)
    assert [one for one in ids if one >= size] == [size, size + 1]
    assert given.tokenizer.decode([size, *plain("a")["input_ids"], size + 1], skip_special_tokens=True) == "a"
    given.export(tmp_path / "whole")
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").decode([size], skip_special_tokens=True) == ""
    # Other tools stop where the model learned to stop.
    assert GenerationConfig.from_pretrained(tmp_path / "whole").eos_token_id == [size + 1, 2]
    assert given.model.generation_config.eos_token_id == 2  # type: ignore[union-attr]
    assert read_run(given.folder).facts["rows"]["supervised_tokens"] > 0
