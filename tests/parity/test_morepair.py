"""MORepair: two rows of each, apart from each other, whose losses are a weighted mean; and what becomes of a part's other values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Callback, Now, RowMap, TokenWeight
from luthier.methods.row_map.morepair import marked, morepair
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.registry import Part
from luthier.rows.encode import encode
from luthier.rows.shapes import Row, row_of
from tests.steps import TUNES, Given, assert_trains, step_on
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight

ASKED = {"prompt": "abc", "completion": "de", "rationale": "fgh"}


def made(record: dict[str, Any], **options: Any) -> list[Row]:
    rows_of, _ = morepair(**options)
    return rows_of.map([row_of(record, id="one", where="rows.jsonl:1")], None)  # type: ignore[arg-type]


def learnt(row: Row, **options: Any) -> tuple[str, str]:
    """What is read before the targets, and the targets, as text."""
    tokenizer = tiny_tokenizer()
    encoded = encode(row, tokenizer, **options)
    first, count = encoded.supervised.index(True), sum(encoded.supervised)
    assert all(encoded.supervised[first : first + count]), "one piece"
    return tokenizer.decode(encoded.token_ids[:first]), tokenizer.decode(encoded.token_ids[first : first + count])


def weight(**options: Any) -> Part:
    """The token weight of the technique as a part of its own."""
    values = morepair(**options)
    return Part("morepair", "token_weight", {}, values[1:])


def test_two_rows_that_know_nothing_of_each_other() -> None:
    """Each ends in exactly one end token, which is a target."""
    answer, rationale = made(ASKED, rationale_marker="Why? ")
    assert (answer.id, rationale.id) == ("one#answer", "one#rationale")
    assert (answer.columns["target"], rationale.columns["target"]) == ("answer", "rationale")
    end = learnt(row_of({"prompt": "abc", "completion": "de"}, id="two", where=""))[1].removeprefix("de")
    before, after = learnt(answer)
    assert "abc" in before and "Why?" not in before and after == "de" + end and end
    before, after = learnt(rationale)
    assert "Why? abc" in before and after == "fgh" + end
    assert "f" not in "".join(learnt(answer)) and "de" not in after
    assert learnt(answer) == learnt(row_of({"prompt": "abc", "completion": "de"}, id="one", where=""))


def test_both_rows_keep_their_other_columns_and_leave_the_rationale() -> None:
    assert [row.columns for row in made({**ASKED, "level": 3})] == [
        {"level": 3, "target": name} for name in ("answer", "rationale")
    ]


def test_a_target_that_is_cut_has_no_end() -> None:
    _, rationale = made({**ASKED, "rationale": "fgh" * 99}, rationale_marker="?")
    cut = learnt(rationale, max_length=200, too_long="right")[1]
    assert cut and ("fgh" * 99).startswith(cut)


RATIONALE = {"rationale": "because"}
SHAPES: dict[str, dict[str, Any]] = {
    "instruction": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "answer": {"prompt": "Add 1 2.", "answer": ["3"]},
    "messages in a prompt": {"prompt": [{"role": "user", "content": "Add."}], "completion": "3"},
    "one turn": {"messages": [{"role": "user", "content": "Add 1 2."}, {"role": "assistant", "content": "3"}]},
    "conversation": {
        "messages": [
            {"role": "system", "content": "Short."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Add 1 2."},
            {"role": "assistant", "content": "3"},
        ]
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_with_a_prompt(shape: str) -> None:
    record = SHAPES[shape]
    plain = row_of(record, id="one", where="")
    answer, rationale = made({**record, **RATIONALE}, answer_marker="A: ", rationale_marker="R: ")
    loss_on: Any = {"loss_on": "last"}
    (before, target), (asked, reason) = learnt(answer, **loss_on), learnt(rationale)
    assert before.replace("A: ", "", 1) == learnt(plain, **loss_on)[0] == asked.replace("R: ", "", 1)
    assert target == learnt(plain, **loss_on)[1] and reason == target.replace("3", "because")
    assert asked.count("R: ") == 1 == before.count("A: ")
    if shape == "conversation":
        assert "A: Add" in before and "R: Add" in asked


def test_a_marker_stands_before_what_the_user_asks_and_not_in_a_tools_reply() -> None:
    turns = [
        {"role": "user", "content": "Add 1 2."},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]},
        {"role": "tool", "content": '{"sum": 3}'},
    ]
    for fields in ({"messages": [*turns, {"role": "assistant", "content": "3"}]}, {"prompt": turns, "completion": "3"}):
        row = marked(row_of(fields, id="one", where=""), "A: ")
        contents = [one["content"] for one in row.fields.get("messages") or row.fields["prompt"]]
        assert contents[:3] == ["A: Add 1 2.", "", '{"sum": 3}']


def test_where_no_user_asks_a_marker_stands_in_the_last_message() -> None:
    turns = [{"role": "system", "content": "Short."}, {"role": "system", "content": "Add 1 2."}]
    for fields in ({"messages": [*turns, {"role": "assistant", "content": "3"}]}, {"prompt": turns, "completion": "3"}):
        row = marked(row_of(fields, id="one", where=""), "A: ")
        contents = [one["content"] for one in row.fields.get("messages") or row.fields["prompt"]]
        assert contents[:2] == ["Short.", "A: Add 1 2."]


def rows(a: list[float], b: list[float]) -> dict[str, Given]:
    return {"1#answer": Given(a, {"target": "answer"}), "1#rationale": Given(b, {"target": "rationale"})}


def test_losses_by_hand() -> None:
    """1.0 and 3.0: 5/3 at a weight of a half, and 2 whatever their lengths; all targets together would give 1.5."""
    assert step_on(rows([1.0], [3.0]), weight(weight=0.5)).loss == pytest.approx(5 / 3, abs=1e-12)
    for sizes in ((2,), (1, 1)):
        assert step_on(rows([1.0] * 30, [3.0] * 10), weight(), sizes).loss == pytest.approx(2.0, abs=1e-12)


def test_the_order_of_the_two_does_not_matter() -> None:
    pair = rows([0.3, 1.0], [2.0, 0.1, 4.0])
    turned = dict(reversed(pair.items()))
    assert step_on(turned, weight(weight=0.3)).loss == pytest.approx(step_on(pair, weight(weight=0.3)).loss, abs=1e-14)
    assert step_on(turned, weight(weight=0.3)).slopes == step_on(pair, weight(weight=0.3)).slopes


def of_two_targets() -> Any:
    batch = rows_of_eight()
    return batch._replace(texts={"target": tuple(("answer", "rationale")[i % 2] for i in range(8))})


def test_the_gradient_is_the_weighted_mean(engine: Any, now: Now) -> None:
    batch = of_two_targets()
    alone = [batch.take(torch.arange(first, 8, 2)) for first in (0, 1)]
    both = gradients(engine(token_weight=[weight(weight=0.3)], model=model_of()), [batch], now)
    a, b = (gradients(engine(model=model_of()), [one], now) for one in alone)
    wanted = {name: (a[name] + 0.3 * b[name]) / 1.3 for name in a}
    # Behind the head this model's norms round in fp32.
    head = "full/lm_head.weight"
    assert gap({head: both[head]}, {head: wanted[head]}) < 1e-14 and gap(both, wanted) < 1e-6


@pytest.mark.parametrize("tune", TUNES, ids=str)
def test_trains_with(engine: Any, now: Now, tune: Any) -> None:
    assert_trains(engine, now, of_two_targets(), tune=tune, token_weight=[weight()])


WORDS = ("one", "two", "three", "four")
ROWS = [{"id": word, "prompt": f"Say {word}.", "completion": f"{word}!", "rationale": f"Asked for {word}."} for word in WORDS]


def recipe(folder: Path, map: Any, train: Any = ROWS) -> dict[str, Any]:
    return {
        "model": "tiny:llama",
        "rows": {"train": train, **({"map": map} if map is not None else {})},
        "out": str(folder),
        "train": {"steps": 2, "batch_rows": 8, "micro_batch_tokens": 150, "precision": "fp32", "learning_rate": 1e-2},
    }


def test_a_weight_of_zero_is_the_run_without_it(tmp_path: Path) -> None:
    runs = [
        luthier.train(recipe(tmp_path, map, train))
        for map, train in (
            (None, ROWS),
            ({"morepair": {"weight": 0.0}}, [{key: one[key] for key in one if key != "rationale"} for one in ROWS]),
            ("morepair", ROWS),
        )
    ]
    plain, none, both = (run.facts for run in runs)
    assert [row.id for row in made({"prompt": "a", "completion": "b"}, weight=0.0)] == ["one"], "draws are keyed by ids"
    assert none["weights_sha256"] == plain["weights_sha256"] != both["weights_sha256"]
    assert none["history"][0]["tokens"] == plain["history"][0]["tokens"] < both["history"][0]["tokens"] / 2


def test_what_a_part_gives_beside_its_rows_goes_into_the_run(tmp_path: Path) -> None:
    """A row map, a token weight and a callback of one part: one slot and one state."""
    plan = make_plan(make_recipe(recipe(tmp_path, "morepair")))
    assert [one.slot for one in plan.engine.objective.weights] == ["morepair"]
    assert sorted(row.id for row in plan.rows.rows) == sorted(f"{word}#{end}" for word in WORDS for end in ("answer", "rationale"))

    def count(state: dict[str, Any], services: Any) -> None:
        state["steps"] = state.get("steps", 0) + 1

    def look(table: Any) -> Any:
        table.note("steps seen", table.state.get("steps", 0))
        return torch.ones(len(table))

    def more(rows: Any, services: Any) -> list[Row]:
        return [replace(row, id=f"{row.id} {services.slot}") for row in rows]

    part = Part("several", "row_map", {}, (RowMap(more), TokenWeight(look=look), Callback(count)))
    plan = make_plan(make_recipe(recipe(tmp_path, [part, part])))
    assert {row.id for row in plan.rows.rows} == {f"{word} several several.2" for word in WORDS}
    assert [one.slot for one in plan.engine.objective.weights] == ["several", "several.2"]
    for step in range(3):
        result = plan.engine.step(plan.feed.at(step)[1], plan.clock.at(step, 0.0))
        assert result.notes["steps seen"] == step
    assert plan.engine.states["several"] == {"steps": 3} == plan.engine.states["several.2"]


@pytest.mark.parametrize(
    ("record", "options", "what"),
    [
        ({"prompt": "a", "completion": "b"}, {}, "the row `one` has no text `rationale`"),
        (ASKED, {"field": "why"}, "the row `one` has no text `why`"),
        ({**ASKED, "rationale": " "}, {}, "has no text `rationale`"),
        ({**ASKED, "rationale": 3}, {}, "has no text `rationale`"),
        ({**ASKED, "target": "x"}, {}, "the row `one` has a key `target`"),
        ({"text": "a", **RATIONALE}, {}, "the row `one` has no prompt"),
        ({"messages": [{"role": "user", "content": "a"}], **RATIONALE}, {}, "the row `one` has no prompt with an answer"),
        (ASKED, {"weight": -1.0}, "the weight is -1.0"),
        (ASKED, {"answer_marker": "x", "rationale_marker": "x"}, "both prompts would be the same"),
    ],
)
def test_errors(record: dict[str, Any], options: dict[str, Any], what: str) -> None:
    with pytest.raises(LuthierError, match=what):
        made(record, **options)
    assert registry.find("morepair", ("row_map",)).card.row == 253


def test_the_error_says_where_the_row_stands() -> None:
    with pytest.raises(LuthierError) as caught:
        made({"prompt": "a", "completion": "b"})
    assert caught.value.where == "rows.jsonl:1" and "`rationale`" in caught.value.fix
