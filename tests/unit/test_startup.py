"""What loads torch, and what does not need to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier import registry
from luthier.errors import LuthierError
from luthier.recipe import make_recipe, read_recipe
from luthier.recipe.parts import choose_parts
from luthier.registry.outline import outline
from luthier.threads import SPINS, let_wait

HEAVY = ("torch", "transformers", "datasets", "matplotlib")
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from luthier.cli import app
told = []
for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, words)
    told.append([result.exit_code, result.output, [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(told))
"""


def test_help_and_mistakes_in_recipes_need_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("model: workshop\nrows: {train: rows.jsonl}\n")
    mistakes = {
        "tuned=full": "did you mean `tune`?",
        "train.epochs=many": "write a number",
        "tune=lorra": "did you mean `lora`",
        "tune.lora.rnk=3": "did you mean `rank`?",
        "objective=lora": "put it under `tune`",
    }
    commands = [["--help"], ["train", "--help"], ["papers", "--done"], ["replicate", "--list"]]
    commands += [[command, str(path), word] for command in ("train", "plan") for word in mistakes]
    # One process for all: what one command loaded would show in every later one.
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands), json.dumps(HEAVY)], capture_output=True, text=True, check=True
    )
    told = json.loads(ran.stdout)
    for words, (code, said, loaded) in zip(commands, told, strict=True):
        assert loaded == [], f"{words} loads {loaded}"
        wanted = mistakes.get(words[-1], "")
        assert code == (2 if wanted else 0) and wanted in " ".join(said.replace("│", " ").split()), said


@pytest.mark.parametrize("spec", ["lorra", {"lora": {"rnk": 3}}, ["lora", "none"], {"lora": 3}, {"lora": {}, "half": {}}, "dpo", 3])
def test_a_name_is_refused_early_as_it_would_be_later(spec: Any) -> None:
    told = []
    for look in (registry.check_names, registry.make_all):
        with pytest.raises(LuthierError) as refused:
            look(spec, "tune")
        told.append(str(refused.value))
    assert told[0] == told[1]


def test_a_required_option_is_missed_early(tmp_path: Path) -> None:
    folder = tmp_path / "token_weight"
    folder.mkdir()
    (folder / "sure.py").write_text(
        "from luthier.kinds import TokenWeight\nfrom luthier.registry import method\n\n"
        '@method(title="Sure")\ndef sure(*, power: float, floor: float = 0.0) -> TokenWeight:\n    """Raise."""\n'
    )
    registry.add_folder(tmp_path)
    try:
        with pytest.raises(LuthierError, match="`sure` needs the option `power`"):
            registry.check_names({"sure": {"floor": 1.0}}, "token_weight")
        registry.check_names({"sure": {"power": "not looked at yet"}}, "token_weight")
    finally:
        registry.remove_folder(tmp_path)


def test_every_outline_says_what_the_technique_says() -> None:
    for kind, name, found in registry.outlines():
        technique = registry.find(name, (kind,))
        schema = registry.options_model(technique.factory, name).model_json_schema()
        assert found is not None, name
        assert list(found.options) == list(schema.get("properties", {})), name
        assert sorted(found.required) == sorted(schema.get("required", [])), name
        assert found.summary == technique.card.summary
        for field, value in found.card.items():
            told = getattr(technique.card, field)
            assert (set(value) if isinstance(told, frozenset) else value) == (technique.card.key if field == "key" else told)


def test_what_no_text_tells_is_left_to_the_loading(tmp_path: Path) -> None:
    for text in (
        "def broken(:\n",
        "broken = 3\n",
        "@method(title='x')\n@other\ndef broken(*, a=1): ...\n",
        "def broken(**all): ...\n",
    ):
        (tmp_path / "broken.py").write_text(text)
        assert outline(tmp_path / "broken.py") is None
    assert outline(tmp_path / "gone.py") is None


def test_parts_given_in_python_are_not_looked_up_by_name(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("model: workshop\nrows: {train: rows.jsonl}\ntune: {lora: {rank: 2}}\nobjective: [dpo]\n")
    assert choose_parts(read_recipe(path))["tune"][0].options["rank"] == 2
    recipe = make_recipe({"model": "workshop", "rows": {"train": "rows.jsonl"}, "tune": registry.part("lora", rank=3)})
    assert choose_parts(recipe)["tune"][0].options["rank"] == 3


@pytest.mark.parametrize(
    ("environment", "loaded", "wanted"),
    [
        ({}, {}, {"GOMP_SPINCOUNT": SPINS}),
        ({"OMP_WAIT_POLICY": "active"}, {}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "5"}, {}, {"GOMP_SPINCOUNT": "5"}),
        ({}, {"torch": object()}, {}),
    ],
)
def test_threads_sleep_soon_unless_told_otherwise(
    environment: dict[str, str], loaded: dict[str, object], wanted: dict[str, str]
) -> None:
    let_wait(environment, loaded)
    assert environment == wanted


def test_importing_the_package_says_it_before_torch() -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    script = "import luthier, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=plain)
    assert ran.stdout.split() == [SPINS, "False"]
