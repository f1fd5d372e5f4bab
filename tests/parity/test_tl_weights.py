"""TL-Training's key tokens: which they are, the card's numbers by hand, turns of a whole run, and what streaming and cutting keep."""

from __future__ import annotations

import json
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import luthier
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.token_weight._tool_calls import END, KEY, TOOL_CALLS, _parameter_ends
from luthier.methods.token_weight.tl_weights import turns
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.rows.batches import collate
from luthier.rows.encode import Encoded, encode_all
from luthier.rows.read import read
from tests.faults.test_faults_templates import CHATML, LLAMA3, byte_level
from tests.faults.test_faults_tool_turns import CHATML_TOOLS, MISTRAL_TOOLS
from tests.objectives import gradient_of, loss_of, view_on
from tests.toys.helpers import gap, gradients, rows_of_eight

LOGITS = [[0.0, log(exp(loss) - 1)] for loss in range(1, 11)]
"""Cross-entropies of 1 to 10 at label 0."""


def tools(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name}} for name in names]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def words(template: str | None = None) -> Any:
    """One token for a word, an underscore joined to what follows it; `_user` and a plural `s` are two."""
    found = ["[UNK]", "</s>", *"(){}[]:,='\" \n<>/|.?1234567890"]
    found += ["get", "_weather", "_now", "_hour", "_user", "s", "list", "_x", "im_start", "im_end", "tool", "_call", "_calls"]
    found += ["name", "arguments", "city", "days", "unit", "oslo", "rain", "assistant", "user", "add", "say", "it", "rains"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(found)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"im_start|im_end|_user|_?[a-z]+|."), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>", pad_token="</s>")
    made.chat_template = template
    return made


def encoded(record: dict[str, Any], tokenizer: Any, **options: Any) -> Encoded:
    (row,) = encode_all(read([record]), tokenizer, annotations=(TOOL_CALLS,), **options).rows
    return row


def marked(row: Encoded, tokenizer: Any, mark: float) -> list[tuple[int, str]]:
    """Tokens with a mark: their place among the targets, and their text."""
    targets = [place for place, target in enumerate(row.supervised) if target]
    marks = row.token_columns["tool_calls"]
    return [
        (number, tokenizer.convert_ids_to_tokens(row.token_ids[place]))
        for number, place in enumerate(targets)
        if marks[place] == mark
    ]


@pytest.mark.parametrize("form", ["text", "messages", "prompt and completion"])
@pytest.mark.parametrize(
    ("name", "others", "keys"),
    [
        ("get_weather_now", ["get_weather_hour", "list_x"], [(0, "get"), (2, "_now")]),
        ("get_user", ["get_users"], [(0, "get"), (2, "(")]),
        ("get_users", ["get_user"], [(0, "get"), (2, "s")]),
        ("get_users", ["get_user", "get_weather", "get_user_now"], [(0, "get"), (1, "_user"), (2, "s")]),
        ("list_x", ["get_user"], [(0, "list")]),
        ("list_x", [], [(0, "list")]),
    ],
)
def test_key_tokens_by_hand(form: str, name: str, others: list[str], keys: list[tuple[int, str]]) -> None:
    """The first token, and where each other name parts from it; positions come once."""
    tokenizer = words("{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}")
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    record: dict[str, Any] = {"prompt": "rain?", "completion": f"{name}(city='oslo')", "tools": tools(*others, name)}
    if form != "text":
        asked = [{"role": "user", "content": "rain?"}]
        said = [{"role": "assistant", "content": f"{name}(city='oslo')"}]
        record["prompt"], record["completion"] = asked, said
        record = record if form == "prompt and completion" else {"messages": [*asked, *said], "tools": record["tools"]}
    row = encoded(record, tokenizer)
    assert marked(row, tokenizer, KEY) == keys
    assert [text for _, text in marked(row, tokenizer, END)] == ["'"]


def test_bare_tools_and_tools_as_text() -> None:
    record = {"prompt": "rain?", "completion": "get_user(city='oslo')"}
    for given in ([{"name": "get_users"}, {"name": "get_user"}], json.dumps(tools("get_users", "get_user"))):
        row = encoded({**record, "tools": given}, words("{{ messages[0].content }}{{ ':' + messages[1].content if messages[1] }}"))
        assert row.token_columns["tool_calls"].count(KEY) == 2


FAMILIES = {"chatml": CHATML_TOOLS, "mistral": MISTRAL_TOOLS, "llama3": LLAMA3}


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_as_templates_write_them(family: str) -> None:
    """Byte by byte: the name's first letter, and the letters at which other names part; prose and replies are not calls."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = FAMILIES[family]
    messages = [
        {"role": "user", "content": "get_rain!"},
        {
            "role": "assistant",
            "content": "get_rain" if family == "chatml" else "",
            "tool_calls": [call("get_rain", city="Oslo", days=2)],
        },
        {"role": "tool", "content": "get_rain(city='x')"},
        {"role": "assistant", "content": "It rains, says get_rain(...)."},
    ]
    row = encoded({"messages": messages, "tools": tools("get_rain", "get_raining", "get_sun", "put_rain")}, tokenizer)
    marks, text = row.token_columns["tool_calls"], tokenizer.decode(row.token_ids)
    name, behind = text.index('"get_rain"') + 1, text.index("}", text.index('"days"'))
    place = {number: len(tokenizer(text[:number])["input_ids"]) for number in (name, behind)}
    assert [number for number, mark in enumerate(marks) if mark == KEY] == [place[name] + shift for shift in (0, 4, 8)]
    assert [number for number, mark in enumerate(marks) if mark == END] == [
        place[name] + text.index('", "days"') - name,
        place[behind],
    ]
    assert tokenizer.decode(row.token_ids[place[behind]]) == "}"


def test_parallel_calls_and_names_in_arguments() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML_TOOLS
    calls = [call("find", what="find the find"), call("find", what="get"), call("get")]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "find", "tool_calls": calls}]
    row = encoded({"messages": messages}, tokenizer)
    keys = [place for place, mark in enumerate(row.token_columns["tool_calls"]) if mark == KEY]
    assert [tokenizer.decode(row.token_ids[:place])[-9:] for place in keys] == ['"name": "'] * 3
    assert row.token_columns["tool_calls"].count(END) == 2


def test_what_is_context_only_and_what_calls_nothing_has_no_weight() -> None:
    tokenizer = tiny_tokenizer()
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "get()", "learn": False},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "get together, regret(1), a.get(2)"},
    ]
    assert set(encoded({"messages": messages, "tools": tools("get")}, tokenizer).token_columns["tool_calls"]) == {0.0}
    assert set(encoded({"prompt": "?", "completion": "get()"}, tokenizer).token_columns["tool_calls"]) == {0.0}
    assert set(encoded({"text": "get()"}, tokenizer).token_columns["tool_calls"]) == {0.0}


@pytest.mark.parametrize(
    ("arguments", "ends"),
    [
        ("()", []),
        ("(1)", [")"]),
        ("(a='x, \\' y', b=[1, 2], c={'k': 'v'}, d=f(3))", ["'", ",", ",", ")"]),
        ('(a="x" , )', ['"']),
        ("(a='x', b=3", []),
        ("('it)", []),
    ],
)
def test_where_parameters_end(arguments: str, ends: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    row = encoded({"prompt": "?", "completion": f"get{arguments}", "tools": tools("get")}, tokenizer)
    assert [
        tokenizer.decode(token) for token, mark in zip(row.token_ids, row.token_columns["tool_calls"], strict=True) if mark == END
    ] == ends


def test_parameters_end_within_the_target() -> None:
    """A bracket that is closed behind it, or nowhere, closes nothing."""
    assert _parameter_ends("f(1)", 1, 4) == [3]
    assert _parameter_ends("f(1)", 1, 3) == _parameter_ends("f(1", 1, 3) == []


def test_names_that_a_template_alters_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML_TOOLS.replace("call.function | tojson", "call.function.name | replace('get', 'GET')")
    rows = read(
        [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call("get_x")]}]}]
    )
    with pytest.raises(LuthierError, match="otherwise than they stand in `tool_calls`"):
        encode_all(rows, tokenizer, annotations=(TOOL_CALLS,))


def numbers(marks: list[float], **more: Any) -> dict[str, Any]:
    return {
        "weight": {"tl_weights": more} if more else "tl_weights",
        "token_columns": {"tool_calls": torch.tensor([[0.0, *marks]])},
    }


def test_ten_tokens_by_hand() -> None:
    """Keys at 0 and 2: they weigh 4, the sum is 16. With a parameter's end at 9 they weigh 7/2."""
    marks = [KEY, 0, KEY, 0, 0, 0, 0, 0, 0, 0]
    ends = [*marks[:9], END]
    assert loss_of("cross_entropy", LOGITS, [0] * 10, **numbers(marks)) == pytest.approx(4.1875, abs=1e-12)
    assert loss_of("cross_entropy", LOGITS, [0] * 10, **numbers(ends)) == pytest.approx(65 / 15, abs=1e-12)
    gradient = gradient_of("cross_entropy", LOGITS, [0] * 10, **numbers(marks))
    for place, row in enumerate(gradient):
        slope = (1 - exp(-(place + 1))) * (4 if marks[place] else 1) / 16
        assert row == pytest.approx([-slope, slope], abs=1e-12)


@pytest.mark.parametrize(
    ("marks", "max_weight", "weight"),
    [
        ([KEY] * 5 + [0.0] * 5, 9.0, 1.0),
        ([KEY] * 4 + [0.0] * 5 + [END], 9.0, 5 / 4),
        ([KEY] * 6 + [0.0] * 4, 9.0, 1.0),
        ([KEY] + [0.0] * 9, 9.0, 9.0),
        ([KEY] + [0.0] * 9, 5.0, 5.0),
        ([KEY] + [END] * 9, 9.0, 1.0),
        ([0.0] * 8 + [END] * 2, 9.0, 1.0),
    ],
)
def test_how_much_keys_weigh(marks: list[float], max_weight: float, weight: float) -> None:
    weights = [weight if mark == KEY else 1.0 for mark in marks]
    expected = sum(one * loss for one, loss in zip(weights, range(1, 11), strict=True)) / sum(weights)
    found = loss_of("cross_entropy", LOGITS, [0] * 10, **numbers(marks, max_weight=max_weight))
    assert found == pytest.approx(expected, abs=1e-12)


def test_turns_are_numbered_from_zero_and_end_with_their_row() -> None:
    view = view_on(torch.zeros(6, 2), [0] * 6, ["nll"], rows=[0, 1, 1, 2, 2, 2])
    assert turns(view).tolist() == [0, 1, 1, 2, 2, 2]
    alone = view_on(torch.zeros(3, 2), [0] * 3, ["nll"], rows=[0, 1, 2], token_columns={"tool_calls": torch.zeros(3, 2)})
    (value,) = luthier.part("tl_weights").values
    assert turns(alone).tolist() == [0, 1, 2] and value.weigh(alone).tolist() == [1.0] * 3


def test_reduces_to_cross_entropy_at_weight_one(engine: Any, now: Now) -> None:
    marks = [KEY, 0, KEY, 0, 0, 0, 0, 0, 0, END]
    assert loss_of("cross_entropy", LOGITS, [0] * 10, **numbers(marks, max_weight=1.0)) == pytest.approx(5.5, abs=1e-12)
    plain, one, nine = (
        gradients(engine(token_weight=weight), [rows_of_eight()], now)
        for weight in (None, {"tl_weights": {"max_weight": 1.0}}, "tl_weights")
    )
    assert gap(one, plain) == 0.0 < gap(nine, plain)


CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "get_rain(city='Oslo')"},
        {"role": "user", "content": "Yes."},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": tools("get_rain", "get_sun"),
}
CALL = {"prompt": "Sun?", "completion": "get_sun(city='Rome', days=3)", "tools": tools("get_rain", "get_sun")}


def test_every_turn_has_its_weighted_mean(engine: Any, now: Now) -> None:
    """A step's loss is the turns' weighted means, each as often as it has targets: keys of one turn leave the others alone."""
    rows = encode_all(read([CONVERSATION, CALL]), tiny_tokenizer(), annotations=(TOOL_CALLS,)).rows
    batch = collate(rows)
    run = engine(token_weight="tl_weights")
    view = run.services("tl_weights", now).forward(batch, ("nll",))
    marks = [mark for row in rows for mark, target in zip(row.token_columns["tool_calls"], row.supervised, strict=True) if target]
    lengths = [len("get_rain(city='Oslo')") + 1, len("It rains.") + 1, len(CALL["completion"]) + 1]
    total, start = 0.0, 0
    for length in lengths:
        here = slice(start, start + length)
        keys, ends = marks[here].count(KEY), marks[here].count(END)
        raised = min((length - keys - ends) / keys, 9.0) if keys else 1.0
        weights = torch.tensor([raised if mark == KEY else 1.0 for mark in marks[here]], dtype=torch.float64)
        total += length * float((weights * view["nll"][here]).sum() / weights.sum())
        start += length
    assert start == len(marks) == batch.supervised
    assert run.step([batch], now).loss == pytest.approx(total / start, abs=1e-12)


@pytest.mark.parametrize("too_long", ["left", "right"])
def test_numbers_are_cut_with_their_tokens(too_long: Any) -> None:
    whole = encoded(CONVERSATION, tiny_tokenizer())
    cut = encoded(CONVERSATION, tiny_tokenizer(), max_length=len(whole) - 20, too_long=too_long)
    kept = {"left": (0, *range(21, len(whole))), "right": range(len(whole) - 20)}[too_long]
    assert cut.token_ids == tuple(whole.token_ids[place] for place in kept)
    assert cut.token_columns == {"tool_calls": tuple(whole.token_columns["tool_calls"][place] for place in kept)}
    assert KEY in cut.token_columns["tool_calls"]


def test_a_beginning_of_sequence_token_shifts_the_numbers() -> None:
    tokenizer = byte_level(CHATML, adds_bos=True)
    tokenizer.chat_template = None
    row = read([{"prompt": "Sun? ", "completion": "get_sun(1)"}])[0]
    (one,) = encode_all([row], tokenizer, annotations=(TOOL_CALLS,)).rows
    assert one.token_ids[0] == tokenizer.bos_token_id and len(one.token_columns["tool_calls"]) == len(one)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    one = encoded({**CALL, "completion": "get_sun(1)"}, tokenizer)
    first = one.token_columns["tool_calls"].index(KEY)
    assert tokenizer.decode(one.token_ids[:first]) == "<s>Sun?" and one.supervised[first] and not one.supervised[first - 1]


def recipe(folder: Path, **rows: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (CONVERSATION, CALL, {"prompt": "Hi", "completion": "Hello"})))
    train = {"steps": 3, "batch_rows": 2, "precision": "fp32", "learning_rate": 1e-3}
    keys = {"model": "tiny:llama", "rows": {"train": str(path), **rows}, "token_weight": "tl_weights", "train": train}
    return make_recipe({**keys, "out": str(folder / "runs")})


def test_a_streamed_run_is_the_run_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    plain, streamed = make_plan(recipe(tmp_path)), make_plan(recipe(tmp_path, streaming=True))
    assert tuple(streamed.rows.rows) == plain.rows.rows
    assert [row.token_columns["tool_calls"].count(KEY) for row in plain.rows.rows] == [2, 2, 0]
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "other"))
    weights = {"tl_weights": {"max_weight": 9.0}, "plain": {"max_weight": 1.0}}
    runs = [
        luthier.train({**recipe(tmp_path, **rows).as_plain(), "token_weight": {"tl_weights": weights[name]}}).facts[
            "weights_sha256"
        ]
        for name, rows in (("tl_weights", {}), ("tl_weights", {"streaming": True, "workers": 1}), ("plain", {}))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_max_weight_is_refused_below_one() -> None:
    for value in (0.5, -1.0):
        with pytest.raises(LuthierError, match=f"`max_weight` is {value}"):
            luthier.part("tl_weights", max_weight=value)
