"""`luthier new`: the recipe that it writes can be planned, for rows of every format; what it says of rows, columns and memory is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import luthier
from luthier.errors import LuthierError
from luthier.models.load import resolve
from luthier.planning.plan import make_plan
from luthier.rows.read import read
from luthier.rows.shapes import known_shapes
from luthier.runs import fitting
from luthier.runs.fitting import BESIDE, fit, parameters_of
from luthier.runs.jobs import JOBS, asked_of, guess
from luthier.runs.new import new
from luthier.runs.other_columns import propose

ASKED = "What is it?"
TALK = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "It."}]
# By format: two rows, the job they are for, and the metric that fits.
FORMATS: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "messages": ([{"messages": TALK}, {"messages": TALK}], "chat", "exact_match"),
    "conversations": (
        [{"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "It."}]}] * 2,
        "chat",
        "exact_match",
    ),
    "prompt+completion": ([{"prompt": ASKED, "completion": "It is " + "long " * 20}] * 2, "instructions", "rouge_l"),
    "instruction+output": ([{"instruction": ASKED, "output": '{"a": 1}'}] * 2, "instructions", "json_match"),
    "text": ([{"text": "A day."}] * 2, "documents", "perplexity"),
    "text+label": ([{"text": "A day.", "label": "good"}, {"text": "A night.", "label": "bad"}], "classify", "accuracy"),
    "tokens+tags": ([{"tokens": ["Ask", "Ada"], "tags": ["O", "B-person"]}] * 2, "names", "entity_f1"),
    "text+spans": ([{"text": "Ask Ada", "spans": [{"start": 4, "end": 7, "label": "person"}]}] * 2, "names", "entity_f1"),
    "prompt+chosen+rejected": ([{"prompt": ASKED, "chosen": "It.", "rejected": "No."}] * 2, "preferences", "preference_accuracy"),
    "conversations+chosen+rejected": (
        [
            {
                "conversations": [{"from": "human", "value": ASKED}],
                "chosen": {"from": "gpt", "value": "It."},
                "rejected": {"from": "gpt", "value": "No."},
            }
        ]
        * 2,
        "preferences",
        "preference_accuracy",
    ),
    "chosen+rejected": (
        [{"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "No."}]}] * 2,
        "preferences",
        "preference_accuracy",
    ),
    "prompt+answers+scores": (
        [{"prompt": ASKED, "answers": ["It.", "No."], "scores": [2, 1]}] * 2,
        "ranked",
        "preference_accuracy",
    ),
    "members": ([{"members": [{"text": "a"}, {"text": "b"}]}] * 2, "search", "recall_at_1"),
    "query+positive": ([{"query": "a?", "positive": "b"}, {"query": "c?", "positive": "d"}], "search", "recall_at_1"),
    "prompt+answer": ([{"prompt": ASKED, "answer": "It."}] * 2, "instructions", "exact_match"),
    "question+answer": ([{"question": ASKED, "answer": ["It.", "That."]}] * 2, "instructions", "exact_match"),
    "prompt+choices+answer": ([{"prompt": ASKED, "choices": ["It.", "No."], "answer": 0}] * 2, "instructions", "loss"),
    "question+choices+answer": ([{"question": ASKED, "choices": ["It.", "No."], "answer": 0}] * 2, "instructions", "loss"),
}


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def plain(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_format_has_a_case() -> None:
    # Prompts alone and rows of a leaderboard are measured, and nothing is trained on them.
    assert {*FORMATS, "prompt", "question+function+ground_truth"} == set(known_shapes())
    assert {name for _, name, _ in FORMATS.values()} == JOBS.keys() - {"tools", "feedback", "reward", "regress"}


@pytest.mark.parametrize("shape", FORMATS)
def test_what_is_written_for_a_format_can_be_planned(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, job, metric = FORMATS[shape]
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a" / "mine.yaml"
    written(tmp_path / "rows.jsonl", rows)
    found = new(None, "rows.jsonl", out=out, model="tiny:llama")
    assert (found.job, found.guessed, found.metric, found.rows, found.columns) == (job, True, metric, 2, None)
    assert "on_bad_row" not in plain(out)["rows"] and found.lengths["longest"] > 0
    assert plain(out)["rows"]["train"] == "../rows.jsonl" and max(map(len, out.read_text().splitlines())) <= 80
    monkeypatch.chdir(tmp_path / "a")
    plan = make_plan(luthier.read_recipe("mine.yaml"))
    assert plan.rows.sizes.lengths and plan.recipe.train.learning_rate is None


@pytest.mark.parametrize("job", JOBS)
def test_a_job_without_rows_brings_some(job: str, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    assert new(job, out=out, model="tiny:llama").data == str(tmp_path / "mine.jsonl")
    recipe = luthier.read_recipe(out)
    assert recipe.rows.train == str(tmp_path / "mine.jsonl") and len(read(recipe.rows.train)) == 2
    assert recipe.objective == luthier.read_recipe(out).objective and make_plan(recipe).clock.steps > 0


@pytest.mark.parametrize("job", JOBS)
def test_of_twenty_rows_some_are_held_out(job: str, tmp_path: Path) -> None:
    each = [
        json.loads(json.dumps(one).replace("the", f"the {place}th").replace("Is it", f"Is {place}"))
        for place in range(10)
        for one in JOBS[job].example
    ]
    each = [{**one, "id": str(place)} for place, one in enumerate(each)]
    out = tmp_path / "mine.yaml"
    assert new(job, written(tmp_path / "rows.jsonl", each), out=out, model="tiny:llama").rows == 20
    plan = make_plan(luthier.read_recipe(out))
    assert [one.name for one in plan.sets] == ["validation"]
    new(job, written(tmp_path / "few.jsonl", each[1:]), out=tmp_path / "few.yaml", model="tiny:llama")
    assert "validate" not in plain(tmp_path / "few.yaml")["rows"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    with pytest.raises(LuthierError, match="exists already"):
        new("chat", out=out, model="tiny:llama")
    other = tmp_path / "other.yaml"
    (tmp_path / "other.jsonl").write_text("mine")
    with pytest.raises(LuthierError, match="exists already"):
        new("chat", out=other, model="tiny:llama")
    assert out.read_text() == (tmp_path / "other.jsonl").read_text() == "mine" and not other.exists()


def test_what_rows_are_for_is_told_by_more_than_their_keys() -> None:
    one = {"prompt": ASKED, "completion": "It."}
    assert guess(read([{**one, "label": True}, {**one, "label": False, "id": "b"}])) == "feedback"
    assert guess(read([{**one, "kto_tag": 1}, {**one, "label": 3, "id": "b"}])) == "instructions"
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "wake", "arguments": {}}}]}
    assert guess(read([{"messages": [TALK[0], call]}])) == "tools"
    assert guess(read([{"text": "a", "label": 0.5}])) == "regress"
    assert guess(read([{"text": "a", "label": 2}])) == "classify"
    with pytest.raises(LuthierError, match="without answers") as caught:
        guess(read([{"prompt": ASKED}]))
    assert "luthier rows answers" in caught.value.fix


def test_classes_are_those_of_the_rows() -> None:
    def asked(*labels: Any) -> Any:
        return asked_of("classify", read([{"text": f"text {place}", "label": one} for place, one in enumerate(labels)]).rows)

    assert asked("b", "a", "b").keys == {"objective": {"classify": {"labels": ["a", "b"]}}}
    assert asked("b", "a", "b").metric == asked(*"abbb").metric == "accuracy" and asked(*"abbbb").metric == "macro_f1"
    assert asked(["b"], ["c", "a"], []).keys == {"objective": {"multi_label": {"labels": ["a", "b", "c"]}}}
    assert asked(["b"], ["a"]).metric == "macro_f1"
    assert asked(0, 2).keys == {"objective": {"classify": {"labels": ["class 0", "class 1", "class 2"]}}}
    assert any("`a` has one row" in one for one in asked("a", "b", "b").told)
    for labels, what in (((0.5, 1), "no classes"), ((-1, 0), "below 0"), (("a", "a"), "all rows have")):
        with pytest.raises(LuthierError, match=what):
            asked(*labels)


def test_feedback_names_its_column_and_tells_how_it_is_shared() -> None:
    rows = [{"prompt": ASKED, "completion": f"{place}", "kto_tag": place < 1} for place in range(3)]
    asked = asked_of("feedback", read(rows).rows)
    assert asked.keys == {"objective": {"kto": {"column": "kto_tag"}}} and asked.told == ("1 of 3 answers were liked",)
    labelled = [{"prompt": ASKED, "completion": f"{place}", "label": True} for place in range(2)]
    asked = asked_of("feedback", read(labelled).rows)
    assert asked.keys == {"objective": "kto"} and "little to learn" in asked.told[0]
    with pytest.raises(LuthierError, match="true or false"):
        asked_of("feedback", read([{"prompt": ASKED, "completion": "a"}]).rows)


@pytest.mark.parametrize(
    ("record", "keys", "columns"),
    [
        (
            {"agent_reply": "b", "customer_question": "a", "n": 3},
            ("prompt", "completion"),
            {"prompt": "customer_question", "completion": "agent_reply"},
        ),
        (
            {"customerQuestion": "a", "Answer": "b"},
            ("prompt", "completion"),
            {"prompt": "customerQuestion", "completion": "Answer"},
        ),
        ({"prompt": "a", "reply": "b"}, ("prompt", "completion"), {"prompt": "prompt", "completion": "reply"}),
        ({"review": "a", "stars": 4}, ("text", "label"), {"text": "review", "label": "stars"}),
        # No list is a text, and no column stands for two keys.
        ({"question": "a", "answers": ["b"]}, ("prompt", "completion"), None),
        ({"review_sentiment": "a"}, ("text", "label"), None),
        ({"input": "a"}, ("prompt", "completion"), None),
        ({"alpha": "a", "beta": "b"}, ("prompt", "completion"), None),
    ],
)
def test_columns_under_other_names(record: dict[str, Any], keys: tuple[str, ...], columns: dict[str, str] | None) -> None:
    assert propose([record], keys) == columns


def test_a_column_holds_a_key_in_every_row_that_has_it() -> None:
    rows: list[dict[str, Any]] = [{"question": "a", "reply": "b"}, {"question": "c", "reply": None}]
    assert propose(rows, ("prompt", "completion")) == {"prompt": "question", "completion": "reply"}
    assert propose([*rows, {"question": "d", "reply": 3}], ("prompt", "completion")) is None


def test_what_a_row_says_ends_no_comment(tmp_path: Path) -> None:
    data = tmp_path / "odd\x1b\x85name.jsonl"
    new("documents", written(data, [{"text": "A day."}]), out=tmp_path / "mine.yaml", model="tiny:llama")
    comments = [line for line in (tmp_path / "mine.yaml").read_text().split("\n") if line.lstrip().startswith("#")]
    assert all(one.isprintable() for one in comments) and luthier.read_recipe(tmp_path / "mine.yaml").rows.train == str(data)


def test_odd_columns_are_mapped_or_named(tmp_path: Path) -> None:
    data = written(tmp_path / "odd.jsonl", [{"customer_question": ASKED, "agent_reply": "It.", "ticket": 7}])
    out = tmp_path / "mine.yaml"
    columns = {"prompt": "customer_question", "completion": "agent_reply"}
    assert new("instructions", data, out=out, model="tiny:llama").columns == columns == plain(out)["rows"]["columns"]
    assert make_plan(luthier.read_recipe(out)).rows.rows[0].columns["ticket"] == 7
    with pytest.raises(LuthierError, match="`alpha`, `beta`") as caught:
        new("chat", written(tmp_path / "odder.jsonl", [{"alpha": 1, "beta": 2}]), out=tmp_path / "b.yaml", model="tiny:llama")
    assert "messages" in caught.value.fix


def test_a_job_for_other_rows_is_refused_with_the_jobs_that_fit(tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", [{"text": "A day."}])
    with pytest.raises(LuthierError, match="the rows are text, and chat needs messages") as caught:
        new("chat", data, out=tmp_path / "a.yaml", model="tiny:llama")
    assert caught.value.fix == "such rows are for documents"
    with pytest.raises(LuthierError, match="no job `instruction`") as caught:
        new("instruction", data)
    assert "`instructions`" in caught.value.fix


def test_a_format_is_said_where_keys_fit_several(tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", [{"prompt": ASKED, "completion": "It.", "text": "A day."}])
    new("documents", data, out=tmp_path / "a.yaml", model="tiny:llama")
    assert plain(tmp_path / "a.yaml")["rows"]["format"] == "text"
    new("instructions", data, out=tmp_path / "b.yaml", model="tiny:llama")
    assert plain(tmp_path / "b.yaml")["rows"]["format"] == "prompt+completion"


def test_bad_and_long_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": ASKED, "completion": "It."},
        {"prompt": ASKED, "completion": 3},
        {"prompt": "long " * 900, "completion": "It."},
    ]
    out = tmp_path / "mine.yaml"
    found = new("instructions", written(tmp_path / "rows.jsonl", rows), out=out, model="tiny:llama")
    recipe = luthier.read_recipe(out)
    assert recipe.rows.on_bad_row == "skip" and recipe.rows.too_long == "right"
    assert recipe.rows.blocks is None
    assert "1 of 3 rows cannot be used" in " ".join(out.read_text().replace("#", "").split()) and "rows.jsonl:2" in out.read_text()
    assert any("rows.jsonl:2" in one for one in found.warnings)
    assert "on_bad_row" not in plain_of_good(tmp_path) and "too_long" not in plain_of_good(tmp_path)


def test_rows_that_a_model_cannot_learn_from_end_in_an_error(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "wake", "arguments": {"room": 1}}}]}
    data = written(tmp_path / "calls.jsonl", [{"messages": [TALK[0], call]}])
    with pytest.raises(LuthierError, match="workshop-small can learn from none of the rows") as caught:
        new("tools", data, out=tmp_path / "a.yaml", model="workshop-small")
    assert "--model" in caught.value.fix and "calls.jsonl:1" in caught.value.where and not (tmp_path / "a.yaml").exists()


def test_long_documents_are_split_and_long_conversations_keep_their_end(tmp_path: Path) -> None:
    long = "long " * 900
    new(None, written(tmp_path / "a.jsonl", [{"text": long}]), out=tmp_path / "a.yaml", model="tiny:llama")
    assert plain(tmp_path / "a.yaml")["rows"]["blocks"] == {"tokens": 512}
    talk = [{"role": "user", "content": long}, TALK[1]]
    new(None, written(tmp_path / "b.jsonl", [{"messages": talk}]), out=tmp_path / "b.yaml", model="tiny:llama")
    assert plain(tmp_path / "b.yaml")["rows"]["too_long"] == "left"


def plain_of_good(tmp_path: Path) -> Any:
    out = tmp_path / "good.yaml"
    out.unlink(missing_ok=True)
    new("instructions", written(tmp_path / "good.jsonl", [{"prompt": ASKED, "completion": "It."}]), out=out, model="tiny:llama")
    return plain(out)["rows"]


def test_english_and_a_model_that_knows_none(tmp_path: Path) -> None:
    english = [{"text": "Whoever understands jurisprudence negotiates extraordinary arrangements throughout bureaucracies."}]
    known = [{"text": "Translate: the old king sees the bird"}]
    warned = [
        [
            one
            for one in new(
                None, written(tmp_path / f"{place}.jsonl", rows), out=tmp_path / f"{place}.yaml", model="workshop-small"
            ).warnings
            if "next to no English" in one
        ]
        for place, rows in enumerate((english, known))
    ]
    assert len(warned[0]) == 1 and not warned[1]
    assert plain(tmp_path / "0.yaml")["train"]["learning_rate"] == 3e-3


def test_the_widest_tune_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "native_bf16", lambda device: False)
    for free, keys in (
        (BESIDE + 16_000, {"tune": "full"}),
        (BESIDE + 15_999, {"tune": "lora"}),
        (BESIDE + 4_400, {"tune": "lora"}),
        (BESIDE + 4_399, {"tune": "lora", "quantize": "nf4"}),
        (None, {"tune": "full"}),
    ):
        found = fit(1000, available=free)
        assert found.keys == keys and found.fits, free
    assert not fit(1000, available=BESIDE + 699).fits and fit(1000, available=BESIDE + 700).fits
    assert fit(1000, encoder=True, available=BESIDE + 4_399).keys == {"tune": "lora"}
    monkeypatch.setattr(fitting, "native_bf16", lambda device: True)
    assert fit(1000, available=BESIDE + 2_200).keys == {"tune": "lora"}


def test_parameters_are_counted_without_the_weights() -> None:
    config = resolve("workshop-small").path
    assert config is not None
    from safetensors import safe_open

    with safe_open(config / "model.safetensors", "pt") as file:
        held = sum(torch.tensor(file.get_slice(key).get_shape()).prod().item() for key in file.keys())  # noqa: SIM118
    assert parameters_of(resolve("workshop-small")) == held
