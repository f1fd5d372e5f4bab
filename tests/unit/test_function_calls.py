"""Calls of functions: rows of the leaderboard's form are read without renaming, and judged by lists of right values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import tool_calls as bench
from luthier.errors import LuthierError
from luthier.evaluate.sets import EvalSet, default_metric, measure
from luthier.models import map_parts, tiny, tiny_tokenizer
from luthier.rows.function_calls import calls_of, can_match, tool_calls
from luthier.rows.read import read
from luthier.rows.shapes import Row
from luthier.tune import Tune

FERRY = {
    "name": "ferry.book",
    "description": "Book a ferry.",
    "parameters": {
        "type": "dict",
        "properties": {
            "port": {"type": "string"},
            "cars": {"type": "integer"},
            "weight": {"type": "float", "optional": True},
            "seats": {"type": "tuple", "items": {"type": "any", "description": "by number"}},
        },
        "required": ["port"],
    },
}
RIGHT = [{"ferry.book": {"port": ["Uldra", "Uldra Harbor"], "cars": [2], "weight": [1.5, ""], "seats": [[3, 4], ""]}}]
BERTH = {
    "berth": {"size": [{"wide": [3], "deep": [2, ""]}], "lamps": [[{"color": ["red"]}, {"color": ["blue", "green"]}]], "none": []}
}


def record(right: Any = RIGHT, **more: Any) -> dict[str, Any]:
    asked = [[{"role": "user", "content": "Two cars to Uldra, please."}]]
    return {"id": "ferry_1", "question": asked, "function": [FERRY], "ground_truth": right, **more}


def row(right: Any = RIGHT, **more: Any) -> Row:
    (found,) = read([record(right, **more)])
    return found


def call(name: str = "ferry.book", **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def test_a_row_of_the_leaderboard_is_a_question_with_tools_and_its_right_calls() -> None:
    found = row()
    assert (found.id, found.shape) == ("ferry_1", "prompt+answer")
    assert found.fields["prompt"] == [{"role": "user", "content": "Two cars to Uldra, please."}]
    (tool,) = found.fields["tools"]
    properties = tool["function"]["parameters"]["properties"]
    assert tool["type"] == "function" and tool["function"]["parameters"]["type"] == "object"
    assert [one.get("type") for one in properties.values()] == ["string", "integer", "number", "array"]
    assert properties["seats"]["items"] == {"description": "by number"}
    written, right = found.fields["answer"]
    assert json.loads(written) == {"name": "ferry.book", "arguments": {"port": "Uldra", "cars": 2, "weight": 1.5, "seats": [3, 4]}}
    assert json.loads(right) == RIGHT and default_metric([found]) == "tool_calls"
    assert row([]).fields["answer"] == ["[]"]
    written, _ = row([BERTH]).fields["answer"]
    lamps = [{"color": "red"}, {"color": "blue"}]
    assert json.loads(written)["arguments"] == {"size": {"wide": 3, "deep": 2}, "lamps": lamps, "none": []}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (call(port="Uldra", cars=2), True),
        (call(port="uldra-harbor", cars=2.0, weight=1.5, seats=[3, 4]), True),
        (f"<tool_call>\n{call(port='Uldra', cars=2)}\n</tool_call>", True),
        (json.dumps([{"name": "ferry.book", "parameters": {"port": "Uldra", "cars": 2}}]), True),
        (call(port="Uldra"), False),
        (call(port="Uldra", cars="2"), False),
        (call(port="Uldra", cars=True), False),
        (call(port="Oslo", cars=2), False),
        (call(port="Uldra", cars=2, seats=[4, 3]), False),
        (call(port="Uldra", cars=2, color="red"), False),
        (call("ferry_book", port="Uldra", cars=2), False),
        (call(port="Uldra", cars=2) + call(port="Uldra", cars=2), False),
        ("Sure: " + call(port="Uldra", cars=2), False),
        ("[]", False),
        ("", False),
        (json.dumps({"name": "ferry.book", "arguments": "none"}), False),
        ("[" * 5000, False),
    ],
)
def test_an_argument_may_be_any_right_value_and_be_left_out_where_that_is_said(answer: str, right: bool) -> None:
    assert tool_calls(answer, row().fields["answer"]) == float(right)


def test_what_is_learned_of_a_row_is_right() -> None:
    for right in (RIGHT, [BERTH], [*RIGHT, BERTH, *RIGHT], []):
        answers = row(right).fields["answer"]
        assert tool_calls(answers[0], answers[-1:]) == 1.0 and all(map(can_match, answers))


def test_calls_may_stand_in_any_order_and_each_counts_once() -> None:
    two = [{"horn": {"times": [1, 2]}}, {"horn": {"times": [1]}}]
    one, other = call("horn", times=1), call("horn", times=2)
    # The first call fits both, and is needed for the second.
    assert tool_calls(f"{one}\n{other}", [json.dumps(two)]) == tool_calls(f"[{other}, {one}]", [json.dumps(two)]) == 1.0
    assert tool_calls(f"{other}\n{other}", [json.dumps(two)]) == tool_calls(one, [json.dumps(two)]) == 0.0


def test_nested_values_are_judged_as_arguments_are() -> None:
    lamps = [{"color": "Red"}, {"color": "green"}]
    accepted = [json.dumps([BERTH])]
    assert tool_calls(call("berth", size={"wide": 3}, lamps=lamps, none=[]), accepted) == 1.0
    assert tool_calls(call("berth", size={"wide": 3, "deep": 2}, lamps=lamps, none=[]), accepted) == 1.0
    assert tool_calls(call("berth", size={"deep": 2}, lamps=lamps, none=[]), accepted) == 0.0
    assert tool_calls(call("berth", size={"wide": 3}, lamps=lamps[::-1], none=[]), accepted) == 0.0
    assert tool_calls(call("berth", size={"wide": 3}, lamps=lamps, none=[1]), accepted) == 0.0


def test_where_no_call_is_right_an_answer_without_one_is() -> None:
    answers = row([]).fields["answer"]
    assert [tool_calls(text, answers) for text in ("I cannot do that.", "", "[]", "{", call())] == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_accepted_answers_may_be_calls_as_a_model_writes_them() -> None:
    accepted = [call("a", list=[1, [2]], of={"x": [""], "y": {}}) + call("b")]
    assert tool_calls(call("b") + call("a", of={"y": {}, "x": [""]}, list=[1, [2]]), accepted) == 1.0
    assert tool_calls(call("b") + call("a", of={"y": {}}, list=[1, [2]]), accepted) == 0.0
    assert tool_calls(call("b") + call("a", of={"y": {}, "x": [""]}, list=[1, 2]), accepted) == 0.0
    assert calls_of(call("b") + " and more") is None and calls_of("[]") == []


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"question": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}, "asks in 2 turns"),
        ({"ground_truth": [{"a": {"b": 1}}]}, "no list of calls"),
        ({"ground_truth": "a(b=1)"}, "no list of calls"),
        ({"function": ["a"]}, "list of functions"),
    ],
)
def test_rows_that_are_otherwise_are_refused(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(LuthierError, match=said):
        read([record(**bad)] if "ground_truth" not in bad else [{**record(), **bad}])


def test_a_file_of_such_rows_is_an_evaluation_set_without_renaming(tmp_path: Path) -> None:
    file = tmp_path / "calls.jsonl"
    file.write_text(
        "".join(json.dumps({**record(right), "id": f"ferry_{n}"}) + "\n" for n, right in enumerate((RIGHT, [], [BERTH])))
    )
    one = EvalSet("calls", list(read(file)), max_new_tokens=8)
    (found,) = measure(Tune(tiny(), map_parts(tiny())), tiny_tokenizer(), [one]).values()
    assert found.metric == "tool_calls" and [item.id for item in found.items] == ["ferry_0", "ferry_1", "ferry_2"]
    # A random model writes no call, which is right where none is.
    assert [item.score for item in found.items] == [0.0, 1.0, 0.0]


def test_the_bench_trains_on_dialogues_and_measures_calls_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "toolcall_glaive").mkdir()
    (tmp_path / "bfcl").mkdir()
    dialogue = {
        "conversations": [
            {"from": "human", "value": "Blow the horn."},
            {"from": "function_call", "value": call("horn", times=1)},
            {"from": "observation", "value": "done"},
            {"from": "gpt", "value": "It sounded."},
        ],
        "tools": json.dumps([{"name": "horn", "description": "Blow it.", "parameters": {"type": "object"}}]),
    }
    talk = {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
    (tmp_path / bench.TRAINED).write_text("".join(json.dumps(one) + "\n" for one in (dialogue, talk)))
    small = {**record([{"horn": {"times": [1]}}]), "function": [{"name": "horn", "description": "Blow it."}]}
    (tmp_path / bench.MEASURED).write_text("".join(json.dumps({**small, "id": f"h{n}"}) + "\n" for n in range(3)))
    options = ["--model", "tiny:llama", "--rows", "2", "--epochs", "1", "--out", str(tmp_path / "runs")]
    bench.main(["--data", str(tmp_path), *options, "--results", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["metric"], found["n"], found["before"]) == ("tool_calls", 2, 0.0) and found["trained"].startswith("1 calls")
    facts = json.loads((Path(found["run"]) / "run.json").read_text())
    (item, _) = facts["metrics"]["bfcl"]["items"]
    assert "You may call these functions" in item["prompt"] and "Two cars" in item["prompt"]
    (lesson,) = bench.taught(list(read(tmp_path / bench.TRAINED)))
    assert json.loads(lesson["completion"]) == {"name": "horn", "arguments": {"times": 1}}
    assert [one["role"] for one in lesson["prompt"]] == ["system", "user"]
