"""Which chat template writes rows, and what day it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from luthier.errors import LuthierError
from luthier.export.model import export_model
from luthier.models import load_tokenizer, map_parts
from luthier.models.hub import _UNWANTED
from luthier.models.tiny import CHAT_TEMPLATE, tiny, tiny_tokenizer
from luthier.planning import load
from luthier.planning.plan import Plan, make_plan
from luthier.recipe import make_recipe
from luthier.rows.encode import encode_prompt
from luthier.rows.read import read
from luthier.runs.rows import look_at_rows
from luthier.runs.train import train
from luthier.tune import Tune

ROWS = [{"prompt": "Where?", "completion": "here"}, {"prompt": "When?", "completion": "now"}]
CLOCK = "{{ '<|im_start|>Today is ' + strftime_now('%Y-%m-%d %H:%M') + '<|im_end|>' }}" + CHAT_TEMPLATE
NAMED = {"chat": "C" + CHAT_TEMPLATE, "tool_use": "T" + CHAT_TEMPLATE}


def on(monkeypatch: pytest.MonkeyPatch, day: date) -> None:
    """Let it be another day, for luthier and for transformers."""

    class Day(date):
        @classmethod
        def today(cls) -> Day:
            return cls(day.year, day.month, day.day)

    class Moment(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Moment:
            return cls(day.year, day.month, day.day, 12, 34)

    monkeypatch.setattr(load, "date", Day, raising=False)
    monkeypatch.setattr(chat_template_utils, "datetime", Moment)


def saved(folder: Path, templates: Any) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = templates
    tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("models") / "clock", CLOCK)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("models") / "named", NAMED)


def planned(model: str, **rows: Any) -> Plan:
    keys = {"rows": {"train": ROWS, **rows}, "train": {"steps": 1}, "evaluate": {"held": {"rows": ROWS, "metric": "loss"}}}
    return make_plan(make_recipe({"model": model, **keys}))


def texts(plan: Plan) -> list[str]:
    return [str(plan.tokenizer.decode(row.token_ids)) for row in plan.rows.rows]


def refusal(do: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as told:
        do()
    return told.value


def test_a_template_that_asks_for_the_day_says_so(clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows were others a day later, or a minute, and nothing said so."""
    on(monkeypatch, date(2031, 7, 8))
    plan = planned(clock)
    assert all("Today is 2031-07-08 00:00" in text for text in texts(plan))
    assert any("writes today's date" in one and "(2 rows, the first: row 1 " in one for one in plan.warnings())
    assert not any("date" in one for one in planned("tiny:llama").warnings())


def test_the_day_that_a_template_is_told_can_be_set(clock: str) -> None:
    """Nobody could ask for the rows of another day."""
    fixed = planned(clock, chat_template_options={"date": date(2026, 1, 2)})
    exact = planned(clock, chat_template_options={"date": "2026-01-02T10:30"})
    assert all("Today is 2026-01-02 00:00" in text for text in texts(fixed))
    assert all("Today is 2026-01-02 10:30" in text for text in texts(exact))
    assert "Today is 2026-01-02 00:00" in fixed.tokenizer.decode(encode_prompt(fixed.sets[0].rows[0], fixed.tokenizer)), "sets, too"
    assert not any("date" in one for one in fixed.warnings())
    assert any("told that it is 2026-01-02T10:30" in line for line in exact.lines())


def test_the_day_is_in_the_key_of_the_cache(clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were encoded on another day were taken from the cache."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    said = []
    for day in (2, 2, 3):
        on(monkeypatch, date(2026, 1, day))
        plan = planned(clock, train=str(path), streaming=True)
        said.append((plan.cache[0].rpartition(" ")[2], f"2026-01-0{day}" in texts(plan)[0]))
    assert said == [("miss", True), ("hit", True), ("miss", True)]


def test_a_run_goes_on_with_the_day_on_which_it_began(clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run did not keep what day its rows were told, and one that was resumed on another day went on with other rows."""
    recipe = {"model": clock, "rows": {"train": ROWS}, "train": {"steps": 2, "batch_rows": 1, "save_every": 1}}
    recipe |= {"out": str(tmp_path), "tune": "lora"}

    def stop(*heard: Any) -> None:
        raise KeyboardInterrupt

    on(monkeypatch, date(2031, 7, 8))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tell=stop)
    monkeypatch.undo()
    run = train(recipe, resume=tmp_path / "run-1")
    assert (run.facts["status"], run.facts["rows"].get("date")) == ("finished", "2031-07-08")
    assert any("told that it is 2031-07-08" in line for line in run.facts["plan"])


def test_one_of_several_templates(named: str) -> None:
    """A tokenizer with named templates and no default was refused by a bare ValueError."""
    none = refusal(lambda: planned(named))
    assert isinstance(none, LuthierError), none
    assert (
        "none is the default: chat, tool_use" in none.what and "`template: chat`" in none.fix and none.where == "rows.chat_template"
    )
    assert [text[0] for text in texts(planned(named, chat_template="chat"))] == ["C", "C"]
    assert [text[0] for text in texts(planned(named, chat_template="tool_use"))] == ["T", "T"]
    with pytest.raises(LuthierError, match="no chat template `chta`") as typed:
        planned(named, chat_template="chta")
    assert "`chat`" in typed.value.fix
    with pytest.raises(LuthierError, match="none is the default"):
        encode_prompt(read(ROWS)[0], load_tokenizer(named))


def test_a_look_at_rows_takes_a_template(named: str, tmp_path: Path) -> None:
    """Rows could not be looked at as such a model reads them."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    assert look_at_rows(str(path), named, template="tool_use").samples[0].pieces[0].text[0] == "T"


def test_a_saved_model_keeps_all_templates(named: str, tmp_path: Path) -> None:
    """The export asked for a template that nobody had named."""
    from luthier.rows.template import choose

    model, tokenizer = tiny("llama"), load_tokenizer(named)
    choose(tokenizer, "chat")
    export_model(Tune(model, map_parts(model)), tokenizer, tmp_path / "model")
    assert load_tokenizer(str(tmp_path / "model")).chat_template == NAMED


def test_named_templates_are_downloaded() -> None:
    """Of a model of the hub the templates in its folder of named ones were left behind."""
    kept = ["additional_chat_templates/chat.jinja", "onnx/config.json"]
    assert [any(fnmatch(name, one) for one in _UNWANTED) for name in kept] == [False, True]


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("tiny:llama", {"enable_thinkin": False}, "reads no `enable_thinkin`"),
        ("tiny:llama", {"date": "2026-01-02"}, "asks for no date"),
        ("tiny:llama", {"tools": []}, "is what luthier itself gives"),
        ("tiny:llama", {"date": "soon"}, "date such as 2026-01-31"),
    ],
)
def test_options_that_no_template_reads(model: str, options: dict[str, Any], said: str) -> None:
    """An option that a template does not read would change nothing."""
    with pytest.raises(LuthierError) as told:
        planned(model, chat_template_options=options)
    assert said in f"{told.value.what} {told.value.fix}" and "rows.chat_template_options" in told.value.where
