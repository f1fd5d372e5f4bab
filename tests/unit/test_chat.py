"""Talking to a run: system turns, commands, and the same draws for the same seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.cli.talk import converse
from luthier.errors import LuthierError
from luthier.rows.shapes import Row
from luthier.rows.system_turns import share_with_system
from luthier.runs.chat import Chat, system_warning


def row(**fields: Any) -> Row:
    return Row("a", "any", fields, "here")


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}


def test_the_share_of_rows_with_a_system_turn() -> None:
    rows = [
        row(messages=[SYSTEM, USER]),
        row(prompt=[{**SYSTEM, "role": "developer"}, USER]),
        row(prompt="Hi"),
        row(messages=[USER, SYSTEM]),
    ]
    assert share_with_system(rows) == 0.5
    assert share_with_system([*rows, row(text="plain"), row(prompt="")]) == 0.5, "plain text asks nothing"
    assert share_with_system([row(text="plain")]) is None and share_with_system([]) is None


@pytest.mark.parametrize(
    ("share", "given", "wanted"),
    [
        (0.9, False, "90% of the rows of this run had a system turn, and it is asked without one"),
        (0.9, True, ""),
        (0.1, True, "10% of the rows of this run had a system turn, and it is asked with one"),
        (0.1, False, ""),
        (0.5, True, ""),
        (0.5, False, ""),
        (None, True, ""),
    ],
)
def test_asking_otherwise_than_in_the_rows_is_warned_of(share: float | None, given: bool, wanted: str) -> None:
    said = system_warning(share, given)
    assert said.startswith(wanted) and bool(said) == bool(wanted)


class Told:
    """A model that says what it is asked."""

    def __init__(self, share: float | None) -> None:
        self.system, self.turns, self.share = "", [], share  # type: ignore[var-annotated]

    def say_turn(self, text: str) -> str:
        self.turns.append(text)
        return f"[b]{self.system}|{'|'.join(self.turns)}"

    def ask_base(self, text: str) -> str:
        return f"base of {text}"

    def reset(self) -> None:
        self.turns.clear()

    def warning(self) -> str:
        return system_warning(self.share, bool(self.system))


def talk(lines: list[str], share: float | None = None, base: bool = False) -> list[str]:
    typed, shown = iter(lines), []

    def ask(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    chat: Any = Told(share)
    converse(chat, ask, shown.append, base=base)
    return shown[1:]


def test_commands_of_a_conversation() -> None:
    assert talk(["one", "two", "/reset", "three", "/quit", "never"]) == [
        "\\[b]|one",
        "\\[b]|one|two",
        "[dim]a new conversation[/dim]",
        "\\[b]|three",
    ]
    assert talk(["one", "/system Be brief. ", "two", "/system", "three", "", "never"]) == [
        "\\[b]|one",
        "[dim]a new conversation, with this system turn[/dim]",
        "\\[b]Be brief.|two",
        "[dim]a new conversation, without a system turn[/dim]",
        "\\[b]|three",
    ]
    (said,) = talk(["/rest"])
    assert said.startswith("[dim]there is no command /rest: /reset begins anew")
    assert talk(["/etc/hosts is what?"]) == ["\\[b]|/etc/hosts is what?"], "a path is no command"
    assert talk(["one"], base=True)[0] == "[dim]base: base of one[/dim]"


def test_a_conversation_warns_once_of_a_system_turn() -> None:
    shown = talk(["one", "two"], share=1.0)
    assert [line.startswith("[yellow]warning: 100%") for line in shown] == [True, False, False]
    assert not any("warning" in line for line in talk(["one"], share=0.0))
    assert sum("warning" in line for line in talk(["one", "/system Be brief.", "/system Be long."], share=0.0)) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose rows all had a system turn."""
    out = tmp_path_factory.mktemp("runs")
    rows = [{"messages": [SYSTEM, USER, {"role": "assistant", "content": f"Ho {number}"}]} for number in range(4)]
    train = {"steps": 1, "batch_rows": 4, "precision": "fp32"}
    yield luthier.train(luthier.Recipe(model="tiny:llama", rows={"train": rows}, train=train, tune="lora", out=str(out))).folder


def test_a_run_knows_its_system_turns(run: Path) -> None:
    assert json.loads((run / "run.json").read_text())["rows"]["system_turns"] == 1.0
    plain, with_system = Chat(str(run), max_new_tokens=4), Chat(str(run), max_new_tokens=4, system="Be brief.")
    assert "asked without one" in plain.warning() and with_system.warning() == ""
    assert Chat("tiny:llama").warning() == "", "of a model nothing is known"
    asked = ["chat", str(run), "--prompt", "Hi", "--max-new-tokens", "4", "--json"]
    told = json.loads(CliRunner().invoke(app, asked).stdout)
    assert "asked without one" in told["warning"] and told["answer"] == plain.ask("Hi")
    told = json.loads(CliRunner().invoke(app, [*asked, "--system", "Be brief."]).stdout)
    assert "warning" not in told and told["answer"] == with_system.ask("Hi")


def test_a_system_turn_is_what_the_model_reads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def generate(tune: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[str]:
        seen.append((tokenizer.decode(prompts[0]), options))
        return ["yes"]

    monkeypatch.setattr("luthier.runs.chat.generate", generate)
    chat = Chat(str(run), system="Be brief.", temperature=0.5, top_p=0.25, seed=3)
    chat.say_turn("first")
    chat.say_turn("second")
    chat.reset()
    chat.say_turn("third")
    texts = [text for text, _ in seen]
    assert all(text.count("Be brief.") == 1 for text in texts)
    assert "first" in texts[1] and "yes" in texts[1] and "first" not in texts[2]
    assert (seen[0][1]["temperature"], seen[0][1]["top_p"]) == (0.5, 0.25)
    other = Chat(str(run), system="Be brief.", temperature=0.5, seed=4)
    other.say_turn("first")
    assert seen[0][1]["seed"] != seen[3][1]["seed"], "another seed draws otherwise"
    with pytest.raises(LuthierError, match="not valid UTF-8"):
        Chat(str(run), system="\ud800").ask("Hi")
