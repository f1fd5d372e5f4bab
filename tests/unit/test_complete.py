"""What the shell offers after a tab, the list of keys, and the version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import luthier
from luthier import registry
from luthier.cli import app
from luthier.recipe import reference


def offered(words: str, shell: str = "zsh") -> list[str]:
    """What is offered for the last of the words, of which nothing may be typed yet."""
    env = {"_LUTHIER_COMPLETE": f"complete_{shell}"}
    if shell == "zsh":
        env["_TYPER_COMPLETE_ARGS"] = words
        # zsh's own form: `"word":"help"`, a colon and quotes escaped.
        return [line.strip().strip('"') for line in _lines(env)]
    split = words.split(" ")
    return _lines({**env, "COMP_WORDS": "\n".join(split), "COMP_CWORD": str(len(split) - 1)})


def _lines(env: dict[str, str]) -> list[str]:
    result = CliRunner().invoke(app, [], prog_name="luthier", env=env)
    text = result.stdout.removeprefix("_arguments '*: :((").removesuffix("\n").removesuffix("))'")
    return [line for line in text.splitlines() if line]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder, name in (("runs", "lora-1"), ("runs", "lora-2"), ("runs", "half-1"), ("elsewhere", "other-1")):
        (tmp_path / folder / name).mkdir(parents=True)
        (tmp_path / folder / name / "run.json").write_text("{}")
    (tmp_path / "runs" / "lora-no-run").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", ["runs", "chat", "compare", "compare lora-1", "export", "eval", "train --resume"])
def test_runs_are_offered(here: Path, command: str) -> None:
    assert offered(f"luthier {command} lo") == ["lora-1", "lora-2"]


def test_runs_of_another_folder(here: Path) -> None:
    assert offered("luthier runs --folder elsewhere ") == ["other-1"]


def test_techniques_are_offered() -> None:
    assert offered("luthier techniques prompt_") == ["prompt_tuning"]
    assert offered("luthier techniques --like dp") == ["dpo"]


def test_keys_and_what_they_take_are_offered() -> None:
    assert offered("luthier train r.yaml train.b") == ["train.batch_tokens=", "train.batch_rows=", "train.best="]
    assert offered("luthier plan r.yaml tune=lora train.epo") == ["train.epochs="]
    assert offered("luthier train r.yaml tune=half") == ["tune=half"]
    assert offered("luthier train r.yaml token_weight=no") == ["token_weight=none"]
    assert offered("luthier sweep r.yaml tune.lora.rank") == ["tune.lora.rank=", "tune.lora.rank_stabilized="]
    assert offered("luthier train r.yaml seed=") == offered("luthier keys rows.load") == ["_files"], "zsh's own word for files"
    assert offered("luthier keys rows.tr") == ["rows.train"]
    # Bash takes `=` for a word of its own.
    assert offered("luthier train r.yaml tune = lora_", "bash") == ["lora_sb", "lora_xs"]
    every = {key for key, _, _ in reference()}
    assert {one.removesuffix("=") for one in offered("luthier train r.yaml ")} == every


def test_skills_are_offered_one_after_the_other() -> None:
    assert offered("luthier rows benchmark rev") == ["reverse"]
    assert offered("luthier eval m --benchmark --skills sort,rev") == ["sort,reverse"]


def test_keys_have_defaults_and_meanings() -> None:
    told = json.loads(CliRunner().invoke(app, ["keys", "--json"]).stdout)
    assert [(one["key"], one["default"], one["meaning"]) for one in told] == reference()
    some = CliRunner().invoke(app, ["keys", "train.e"], env={"COLUMNS": "80"}).stdout.splitlines()
    assert [line.split()[0] for line in some if not line.startswith(" ")] == ["key", "train.epochs", "train.evaluate_every"]
    assert some[1].split()[:3] == ["train.epochs", "3.0", "passes"]
    whole = CliRunner().invoke(app, ["keys"], env={"COLUMNS": "80"}).stdout
    assert max(len(line.rstrip()) for line in whole.splitlines()) <= 80 and "…" not in whole
    for key, _, meaning in reference():
        assert key in whole
        assert registry.KEYS.get(key) is None or meaning
    wrong = CliRunner().invoke(app, ["keys", "train.epocs", "--json"])
    assert wrong.exit_code == 2 and "`train.epochs`" in json.loads(wrong.stdout)["fix"]


def test_the_version() -> None:
    told = CliRunner().invoke(app, ["--version"])
    assert told.exit_code == 0 and told.stdout == f"luthier {luthier.__version__}\n"
    help_text = CliRunner().invoke(app, ["--help"]).stdout
    assert "see what each fine-tune changed" in " ".join(help_text.split()) and "--version" in help_text
