"""The one table of keys, and what follows from it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import GradientEstimator, GradientTransform, RowMap, TokenLoss, TokenWeight
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe, read_recipe, reference, same_steps, with_keys
from luthier.recipe.parts import choose_parts
from luthier.recipe.reading import apply_overrides
from luthier.registry import Card, Part
from luthier.results.opened import open_run

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three")]


def recipe_of(**keys: Any) -> Any:
    return make_recipe({"model": "tiny:llama", "rows": {"train": ROWS}, "train": {"steps": 1, "batch_rows": 3}, **keys})


def test_every_kind_has_one_place() -> None:
    assert len(registry.KINDS) == sum(len(key.kinds) for key in registry.KEYS.values()) + len(registry.COMMANDS)
    for kind in registry.KINDS:
        assert bool(registry.key_of(kind)) != (kind in registry.COMMANDS)
    with pytest.raises(LuthierError, match="no key `tunes`") as caught:
        registry.make_all("half", "tunes")
    assert "did you mean `tune`" in caught.value.fix


def test_a_kind_that_only_a_line_of_the_table_knows_is_followed_everywhere(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.unit.new_kind", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "all followed\n", done.stderr


@pytest.mark.parametrize("key", registry.KEYS)
def test_any_technique_can_be_set_option_by_option(key: str) -> None:
    above, name = key.rpartition(".")[::2]
    data: dict[str, Any] = {above: {name: "this"}} if above else {name: "this"}
    changed = apply_overrides(data, [f"{key}.this.size=2"])
    assert (changed[above] if above else changed)[name] == {"this": {"size": 2}}


def test_what_a_technique_brings_is_not_added_to_it() -> None:
    plain = choose_parts(recipe_of())
    assert [[part.name for part in plain[key]] for key in ("tune", "objective", "gradient_estimator")] == [
        ["full"],
        ["cross_entropy"],
        ["backprop"],
    ]
    loss, source = TokenLoss(lambda view: view["nll"]), GradientEstimator(lambda *a: None)
    brings = Part("own", "selective", {}, (*registry.part("full").values, loss, source), Card("own"))
    chosen = choose_parts(recipe_of(tune=brings))
    assert chosen["objective"] == chosen["gradient_estimator"] == []
    # A penalty teaches nothing, whatever key it comes under.
    holds = Part("own", "selective", {}, (*registry.part("full").values, loss._replace(penalty=True)), Card("own"))
    assert [part.name for part in choose_parts(recipe_of(tune=holds))["objective"]] == ["cross_entropy"]


@pytest.mark.parametrize("tune", [{"lt_sft": {"l1": 0.1}}, "adalora", "lofit"], ids=str)
def test_what_a_technique_holds_back_leaves_the_usual_objective(tune: Any) -> None:
    assert [part.name for part in choose_parts(recipe_of(tune=tune))["objective"]] == ["cross_entropy"]


def test_row_maps_act_under_any_key_those_of_the_recipe_first() -> None:
    def adds(letter: str) -> RowMap:
        return RowMap(
            lambda rows, services: [*rows, replace(rows[-1], id=rows[-1].id + letter)], told=lambda a, b: f"{len(a)} to {len(b)}"
        )

    weight = TokenWeight(weigh=lambda view: view["nll"].detach() * 0 + 1, columns=("nll",))
    tuned = Part("mine", "token_weight", {}, (weight, adds("b")), Card("mine"))
    plan = make_plan(recipe_of(token_weight=tuned, rows={"train": ROWS, "map": adds("a")}))
    assert len(plan.rows.rows) == 5 and plan.mapped == ["row_map: 3 to 4", "mine: 4 to 5"]
    assert plan.rows.rows[-1].id.endswith("ab")
    with pytest.raises(LuthierError, match="the row map `mine` needs all rows in memory"):
        make_plan(recipe_of(token_weight=tuned, rows={"train": "no such file", "streaming": True}))


def test_a_run_from_before_names_what_now_joins_by_itself() -> None:
    now = recipe_of().as_plain()
    assert now["objective"] is None and now["gradient_estimator"] is None
    before = {**now, "objective": "cross_entropy", "gradient_estimator": "backprop"}
    assert same_steps(before, now) and not same_steps({**before, "objective": "dft"}, now)


LOSS = TokenLoss(lambda view: view["nll"])


@pytest.mark.parametrize(
    ("key", "part", "fix"),
    [
        ("token_weight", "lora", "put it under `tune`"),
        ("callbacks", "random_rows", "luthier rows select"),
        ("objective", "adamw", "put it under `optimizer`"),
        ("rows.map", "intruder_dimensions", "luthier probe"),
    ],
)
def test_a_part_made_in_python_is_held_to_its_key_as_a_name_is(key: str, part: str, fix: str) -> None:
    with pytest.raises(LuthierError) as caught:
        registry.make_all(registry.part(part), key)
    assert fix in caught.value.fix


RETURNS = {
    "nothing": "None",
    "a_list": "[TokenWeight(weigh=lambda view: view['nll'])]",
    "an_empty_tuple": "()",
    "half_of_it": "(TokenWeight(weigh=lambda view: view['nll']), 'x')",
    "another_kind": "TokenLoss(lambda view: view['nll'])",
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_a_run_could_do_nothing_with_is_refused_where_it_is_returned(name: str, tmp_path: Path) -> None:
    written(tmp_path, name, f"    return {RETURNS[name]}")
    with own_methods(tmp_path), pytest.raises(LuthierError, match=f"`{name}` (returns|lies)") as caught:
        registry.make_all(name, "token_weight")
    assert str(tmp_path) in caught.value.where and caught.value.fix


def test_own_files_that_cannot_be_loaded_say_where(tmp_path: Path) -> None:
    written(tmp_path, "old", "    return None", "from luthier.flow import train\n")
    with own_methods(tmp_path), pytest.raises(LuthierError, match="cannot be loaded as a technique: ModuleNotFoundError") as caught:
        registry.find("old")
    assert caught.value.where.endswith("old.py, line 1")
    written(tmp_path, "astray", "    return TokenWeight()", card='title="A", key="objectives"')
    with own_methods(tmp_path), pytest.raises(LuthierError, match="names the key `objectives`") as caught:
        registry.find("astray")
    assert "did you mean `objective`" in caught.value.fix


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_folders_of_techniques_that_hold_none_are_named(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_METHODS", str(tmp_path / folder))
    with pytest.raises(LuthierError, match="this folder of techniques") as caught:
        registry.names("token_weight")
    assert "LUTHIER_METHODS" in caught.value.where


def written(folder: Path, name: str, body: str, before: str = "", card: str = 'title="A"') -> None:
    """A token weight of one's own."""
    (folder / "token_weight").mkdir(exist_ok=True)
    head = f"{before}from luthier.kinds import TokenLoss, TokenWeight\nfrom luthier.registry import method\n\n@method({card})\n"
    (folder / "token_weight" / f"{name}.py").write_text(f"{head}def {name}():\n{body}\n", encoding="utf-8")


@contextmanager
def own_methods(folder: Path) -> Iterator[None]:
    registry.add_folder(folder)
    yield
    registry.remove_folder(folder)


def test_what_a_technique_frees_is_all_that_its_transform_touches_whatever_its_key() -> None:
    def scale(gradient: Any, state: Any, trained: Any, now: Any) -> Any:
        return gradient * 0

    stops = GradientTransform(lambda trained: {}, scale)
    brings = Part("brings", "token_loss", {}, (LOSS, *registry.part("lora").values, stops), Card("brings"))
    chain = make_plan(recipe_of(objective=brings)).engine.chain
    assert [link.slot for link in chain.links] == ["brings", "clip", "adamw"]
    assert {name.split("/")[0] for name in chain.taken(chain.links[0])} == {"brings"}


@pytest.mark.parametrize("tune", ["half", "lora", "ia3"])
def test_a_run_with_a_loss_given_in_python_is_opened(tune: str, tmp_path: Path) -> None:
    keys = {"tune": tune, "objective": LOSS, "out": str(tmp_path)}
    run = luthier.train(recipe_of(**keys))
    found = dict(luthier.open_run(run)[0].model.named_parameters())
    assert found.keys() >= dict(run.model.named_parameters()).keys()
    luthier.open_run(run)
    tune_of, _ = open_run(luthier.read_run(run.folder), merged=False)
    assert bool(tune_of.owns) == (tune != "half")


def test_a_result_whose_technique_is_gone_says_so(tmp_path: Path) -> None:
    run = luthier.train(
        recipe_of(
            tune=[Part("mine", "representation_edit", {}, registry.part("ia3").values, Card("mine")), "lora"], out=str(tmp_path)
        )
    )
    with pytest.raises(LuthierError, match="numbers of `mine`") as caught:
        luthier.open_run(luthier.read_run(run.folder))
    assert "LUTHIER_METHODS" in caught.value.fix


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"objective": "cross_entropy", "gradient_estimator": "backprop"}),
        ({}, {"objective": [{"cross_entropy": {}}], "token_weight": "none", "optimizer": [{"clip": {}}, "adamw"]}),
        ({"objective": "kl"}, {"objective": ["kl", "cross_entropy"]}),
        ({"rows": {"train": ROWS}}, {"rows": {"train": ROWS, "map": "none"}}),
    ],
)
def test_the_same_in_other_words_is_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    plain, spelled = (recipe_of(**keys).as_plain() for keys in (one, other))
    assert same_steps(plain, spelled)
    assert not same_steps(plain, recipe_of(**other | {"tune": "half"}).as_plain())


def test_keys_beside_a_recipe_are_set_in_it(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: tiny:llama\nrows: {train: rows.jsonl}\ntrain: {steps: 9, batch_rows: 3}\n", encoding="utf-8")
    both = with_keys(read_recipe(file), {"tune": "half", "train": {"steps": 2}, "rows": {"train": ROWS}})
    assert (both.tune, both.train.steps, both.train.batch_rows, both.rows.train, both.name) == ("half", 2, 3, ROWS, "r")
    with pytest.raises(LuthierError, match="no key `tuen`"):
        with_keys(both, {"tuen": 1})


@pytest.mark.parametrize(
    ("data", "word", "what"),
    [
        ({"freeze": "none"}, "freeze.mine.share=1", {"freeze": {"mine": {"share": 1}}}),
        ({"tune": "half"}, "tune.lora.rank=4", "`tune` is `half`"),
    ],
)
def test_options_of_another_technique_than_the_recipes(data: dict[str, Any], word: str, what: Any) -> None:
    if isinstance(what, dict):
        assert apply_overrides(data, [word]) == what
        return
    with pytest.raises(LuthierError, match=what) as caught:
        apply_overrides(data, [word])
    assert "tune={lora: {option: value}}" in caught.value.fix


def test_defaults_of_keys_stand_in_the_schema() -> None:
    known = {key: default for key, default, _ in reference()}
    assert known["tune"] == '"full"' and known["optimizer"] == '["clip", "adamw"]'
    schema = type(recipe_of()).model_json_schema()["properties"]
    assert schema["tune"]["default"] == "full" and schema["optimizer"]["default"] == ["clip", "adamw"]
    # A list that is a default is nobody's to change.
    recipe_of().optimizer.append("sgd")
    assert recipe_of().optimizer == ["clip", "adamw"]
