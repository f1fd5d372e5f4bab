"""The one table of keys, and what follows from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import RowMap, Source, TokenLoss, TokenWeight
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe, same_steps
from luthier.recipe.parts import choose_parts
from luthier.recipe.reading import apply_overrides
from luthier.registry import Card, Part

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
    assert "did you mean `tune`" in caught.value.mend


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
    assert [[part.name for part in plain[key]] for key in ("tune", "objective", "source")] == [
        ["full"],
        ["cross_entropy"],
        ["backprop"],
    ]
    loss, source = TokenLoss(lambda view: view["nll"]), Source(lambda *a: None)
    brings = Part("own", "selective", {}, (*registry.part("full").values, loss, source), Card("own"))
    chosen = choose_parts(recipe_of(tune=brings))
    assert chosen["objective"] == chosen["source"] == []
    # A penalty teaches nothing, whatever key it comes under.
    holds = Part("own", "selective", {}, (*registry.part("full").values, loss._replace(penalty=True)), Card("own"))
    assert [part.name for part in choose_parts(recipe_of(tune=holds))["objective"]] == ["cross_entropy"]


def test_row_maps_act_under_any_key_those_of_the_recipe_first(tmp_path: Path) -> None:
    def adds(letter: str) -> RowMap:
        return RowMap(
            lambda rows, services: [*rows, replace(rows[-1], id=rows[-1].id + letter)], told=lambda a, b: f"{len(a)} to {len(b)}"
        )

    weight = TokenWeight(weigh=lambda view: view["nll"].detach() * 0 + 1, columns=("nll",))
    tuned = Part("mine", "token_weight", {}, (weight, adds("b")), Card("mine"))
    plan = make_plan(recipe_of(token_weight=tuned, rows={"train": ROWS, "map": adds("a")}))
    assert len(plan.rows.rows) == 5 and plan.mapped == ["row_map: 3 to 4", "mine: 4 to 5"]
    assert plan.rows.rows[-1].id.endswith("ab")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    with pytest.raises(LuthierError, match="the row map `mine` needs all rows in memory"):
        make_plan(recipe_of(token_weight=tuned, rows={"train": str(file), "streaming": True}))


def test_a_run_from_before_names_what_now_joins_by_itself() -> None:
    now = recipe_of().as_plain()
    assert now["objective"] is None and now["source"] is None
    before = {**now, "objective": "cross_entropy", "source": "backprop"}
    assert same_steps(before, now) and not same_steps({**before, "objective": "dft"}, now)
