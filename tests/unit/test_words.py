"""Words on the command line: what was meant is found, and what there is not is not promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from luthier import registry
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.kinds import Prefix
from luthier.planning.plan import LABEL, SHORT, make_plan
from luthier.recipe import make_recipe
from luthier.registry import make_all, part

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(4)]


def shown(*words: str) -> str:
    return " ".join(CliRunner().invoke(app, words).output.split())


@pytest.mark.parametrize("name", ["LoRA", "Prompt-Tuning", "S2FT"])
def test_a_technique_is_found_as_papers_write_it(name: str) -> None:
    """`LoRA` gave eighty names and not `lora`."""
    told = json.loads(CliRunner().invoke(app, ["techniques", name, "--json"]).stdout)
    assert told.get("name") == name.lower().replace("-", "_")
    with pytest.raises(LuthierError) as caught:
        make_all(name, "tune")
    assert caught.value.fix.startswith(f"did you mean `{name.lower().replace('-', '_')}`")


def test_several_techniques_are_a_list() -> None:
    """A sweep's way to name variants was taken for one technique's name, and nothing said how several are written."""
    with pytest.raises(LuthierError) as caught:
        make_all("lora,half", "tune")
    assert caught.value.fix == "several are written as a list: tune=[lora,half]"


def test_what_is_not_there_is_not_shown_as_an_empty_table() -> None:
    """A kind without techniques and an area without papers were bare column heads."""
    assert "no technique of this kind yet" in shown("techniques", "--kind", "callback")
    command = CliRunner().invoke(app, ["papers", "--area", "sft", "--json"])
    assert command.exit_code == 2
    told = json.loads(command.stdout)
    assert "no area" in told["error"] and "objectives/supervised" in told["fix"]
    with pytest.raises(LuthierError, match="no technique `ema`") as caught:
        make_all("ema", "callbacks")
    assert "none of this kind is known" in caught.value.fix


def test_concepts_promise_no_technique_of_an_empty_kind() -> None:
    """The table of kinds gave examples of kinds that nothing stands for."""
    lines = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").splitlines()
    for kind in registry.KINDS:
        if not registry.names(kind):
            assert any(line.startswith(f"| {kind.replace('_', ' ')} |") and "none yet" in line for line in lines), kind


def plan_lines(**keys: object) -> list[str]:
    train = {"steps": 2, "batch_rows": 2, "precision": "fp32", **keys.pop("train", {})}  # type: ignore[dict-item]
    return make_plan(make_recipe({"model": "tiny:llama", "rows": {"train": ROWS}, "train": train, **keys})).lines()


def test_a_plan_names_no_option_that_asks_for_nothing() -> None:
    """`token_ids ` without a value and `blocks None` stood in the plan."""
    (line,) = (line for line in plan_lines(tune=["prompt_tuning", "s2ft"]) if line.startswith("tune "))
    assert "token_ids" not in line and "None" not in line and "prompt_tuning (length 20, init vocabulary), then s2ft (" in line


def test_a_set_that_chooses_and_reports_is_warned_of() -> None:
    """The best of several looks was reported like any other value."""
    sets = {"acc": {"rows": [{"prompt": "What is 1?", "answer": "It is 1."}]}}
    warned = [line for line in plan_lines(evaluate=sets, train={"best": "acc", "evaluate_every": 1}) if line.startswith("warning")]
    assert any("`train.best` chooses the weights by acc" in line for line in warned)
    assert not any("train.best" in line for line in plan_lines(evaluate=sets))


def test_a_value_that_no_folder_can_hold_is_told_before_it_trains() -> None:
    """A prefix that was given in Python trained, and its result could neither be opened nor exported."""
    (value,) = part("prefix_tuning").values
    assert isinstance(value, Prefix)
    assert any("was given in Python" in line and "neither opened again nor exported" in line for line in plan_lines(tune=value))
    assert not any("was given in Python" in line for line in plan_lines(tune="prefix_tuning"))


def test_a_plan_stands_in_two_columns() -> None:
    """`learning rate` and `gradient_estimator` stood in the column of what is said."""
    sets = {"acc": {"rows": [{"prompt": "What is 1?", "answer": "It is 1."}]}}
    lines = plan_lines(evaluate=sets, gradient_estimator="per_layer", optimizer="adamw", tune="lora")
    labels = [line[:LABEL].strip() for line in lines]
    assert {"learning rate", "gradients", "optimizer", "trains", "steps", "memory"} <= set(labels)
    for line in lines:
        assert line[LABEL] == " " and line[LABEL + 1] != " ", line
        assert not line[0].isspace() or not line[:LABEL].strip()
    assert max(map(len, [*labels, *(SHORT.get(key, key) for key in registry.KEYS)])) <= LABEL
