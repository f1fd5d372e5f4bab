"""A process in which luthier has one kind more, known to nothing but one line of the table of keys; run by `test_keys.py`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

FILE = Path(__file__).parents[2] / "luthier" / "registry" / "keys.py"
LINE = '        Key("witness", "who watches", {"witness": Witness}),\n'
BEFORE = '        Key("callbacks", '


class Witness(NamedTuple):
    """Who watches? `see(step)` is told of every step."""

    see: Callable[[int], None]
    every: int


class Longer(SourceFileLoader):
    """The table with a line more."""

    def get_code(self, fullname: str) -> CodeType:
        text = FILE.read_text(encoding="utf-8")
        assert text.count(BEFORE) == 1
        text = text.replace(BEFORE, LINE + BEFORE)
        text = text.replace("from luthier.kinds import (", f"from {__spec__.name} import Witness\nfrom luthier.kinds import (")
        return compile(text, str(FILE), "exec")


class Finder(MetaPathFinder):
    """Finds that table."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "luthier.registry.keys":
            return None
        return importlib.util.spec_from_file_location(name, FILE, loader=Longer(name, str(FILE)))


TECHNIQUES = {
    "witness/watcher.py": '''
from dataclasses import replace
from luthier.kinds import RowMap, TokenWeight
from luthier.registry import method
from tests.unit.new_kind import Witness
import torch

@method(title="Watcher")
def watcher(*, every: int = 1, calibration_source: str = ""):
    """Watches, doubles the rows, and halves what their tokens count."""
    seen = []
    return (
        Witness(seen.append, every),
        RowMap(lambda rows, services: [*rows, *(replace(row, id=row.id + "x") for row in rows)]),
        TokenWeight(weigh=lambda view: torch.full_like(view.label_N, 0.5, dtype=torch.float32)),
    )
''',
    "token_weight/sleeper.py": '''
from luthier.kinds import TokenWeight
from luthier.registry import method
import torch

@method(title="Sleeper", key="witness")
def sleeper():
    """A token weight that people look for among witnesses."""
    return TokenWeight(weigh=lambda view: torch.ones(len(view.label_N)))
''',
}


def main(folder: Path) -> None:
    """All that should follow from the table does."""
    for name, text in TECHNIQUES.items():
        path = folder / "methods" / name
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    sys.meta_path.insert(0, Finder())
    from luthier import registry
    from luthier.errors import LuthierError
    from luthier.lab.cache import stage_key, technique_names
    from luthier.lab.jobs import merged
    from luthier.planning.plan import make_plan
    from luthier.recipe import make_recipe, read_recipe, reference
    from luthier.recipe.parts import choose_parts
    from luthier.registry import values_of
    from tests.unit.new_kind import Witness

    registry.add_folder(folder / "methods")
    (folder / "known.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        "model: tiny:llama\nrows: {train: known.jsonl}\nwitness: watcher\ntrain: {steps: 1, batch_rows: 2, learning_rate: 0.1}\n",
        encoding="utf-8",
    )
    assert ("witness", "null", "who watches") in reference()
    asked = ["witness.watcher.every=3", "witness.watcher.calibration_source=known.jsonl"]
    recipe = read_recipe(folder / "recipe.yaml", asked)
    assert recipe.witness == {"watcher": {"every": 3, "calibration_source": str(folder / "known.jsonl")}}
    assert list(recipe.as_plain()).index("witness") == list(recipe.as_plain()).index("callbacks") - 1
    try:
        make_recipe({**recipe.as_plain(), "witnes": "watcher"})
    except LuthierError as error:
        assert "did you mean `witness`" in error.fix
    else:
        raise AssertionError("an unknown key passed")
    assert merged({"witness": {"watcher": {"every": 1}}}, {"witness": {"sleeper": {}}}) == {"witness": {"sleeper": {}}}
    assert "watcher" in technique_names(recipe)
    other = read_recipe(folder / "recipe.yaml", ["witness.watcher.every=4"])
    assert stage_key(recipe, "start", "cpu") != stage_key(other, "start", "cpu")
    assert [part.name for part in choose_parts(make_recipe({**recipe.as_plain(), "witness": "sleeper"}))["witness"]] == ["sleeper"]
    try:
        choose_parts(make_recipe({**recipe.as_plain(), "token_weight": "sleeper"}))
    except LuthierError as error:
        assert "put it under `witness`" in error.fix
    else:
        raise AssertionError("a technique passed under the key of its kind, where nobody looks for it")
    plan = make_plan(recipe)
    assert any("witness" in line and "watcher (every 3" in line for line in plan.lines())
    assert len(plan.rows.rows) == 2 and [one.slot for one in plan.engine.objective.weights] == ["watcher"]
    ((slot, witness),) = values_of(plan.engine.chosen, Witness)
    assert (slot, witness.every) == ("watcher", 3) and plan.engine.states[slot] == {}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    print("all followed")
