"""The faults that are planted to try the tests have a place to stand, and those that are drawn change what they are to change."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.planted.changes import SETS
from tests.planted.drawn import EQUIVALENT, KINDS, draw, faults_in
from tests.planted.fault import ROOT, places
from tests.planted.in_place import plant
from tests.planted.listed import FAULTS
from tests.planted.mended import MENDED, by_value


def test_every_fault_has_one_place_and_tests() -> None:
    """A fault whose place has changed is caught by nobody, and says nothing."""
    for fault in (*FAULTS, *MENDED):
        assert places(fault) == 1, f"{fault.file} has {places(fault)} places for: {fault.what}"
        assert fault.old != fault.new
        for test in fault.tests:
            file, _, name = test.partition("::")
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not name or f"def {name.partition('[')[0]}(" in text, test


def test_drawn_faults_are_drawn_alike_and_can_be_read(tmp_path: Path) -> None:
    inside = tmp_path / "luthier" / "methods"
    inside.mkdir(parents=True)
    (inside / "one.py").write_text(
        '''"""A page, 3 lines - all words."""
LIMIT = 3
@method(title="a", learning_rate=1e-3)
def one(*, share: float = 0.5, on: bool = True) -> tuple[int, ...]:
    if not 0 < share:
        raise LuthierError(f"the share is {share - 1}", where="one")
    size = abs(-(x.detach() * (share + 2))) // 4  # a - b
    return size if size == 7 else x[..., 1]
''',
        encoding="utf-8",
    )
    text = (inside / "one.py").read_bytes()
    found = {}
    for fault in faults_in(tmp_path, "methods/one.py"):
        changed = text[: fault.begin] + fault.new.encode() + text[fault.end :]
        ast.parse(changed)
        found[fault.kind, changed.decode().splitlines()[fault.line - 1].strip()] = fault
    assert set(found) == {
        ("constant", "LIMIT = 4"),
        ("default", "def one(*, share: float = 1.0, on: bool = True) -> tuple[int, ...]:"),
        ("default", "def one(*, share: float = 0.5, on: bool = False) -> tuple[int, ...]:"),
        ("constant", "if not 1 < share:"),
        ("comparison", "if not 0 <= share:"),
        ("operator", "size = abs(-(x.detach() * (share + 2))) * 4  # a - b"),
        ("operator", "size = abs(-(x.detach() / (share + 2))) // 4  # a - b"),
        ("operator", "size = abs(-(x.detach() * (share - 2))) // 4  # a - b"),
        ("sign", "size = abs((x.detach() * (share + 2))) // 4  # a - b"),
        ("detach", "size = abs(-(x * (share + 2))) // 4  # a - b"),
        ("constant", "size = abs(-(x.detach() * (share + 3))) // 4  # a - b"),
        ("constant", "size = abs(-(x.detach() * (share + 2))) // 5  # a - b"),
        ("comparison", "return size if size != 7 else x[..., 1]"),
        ("constant", "return size if size == 8 else x[..., 1]"),
        ("constant", "return size if size == 7 else x[..., 2]"),
    }
    far = {}
    for fault in faults_in(tmp_path, "methods/one.py", "far"):
        changed = text[: fault.begin] + fault.new.encode() + text[fault.end :]
        ast.parse(changed)
        far[fault.kind, changed.decode().splitlines()[fault.line - 1].strip()] = fault
    assert set(far) == {
        ("constant", "LIMIT = 2"),
        ("default", "def one(*, share: float = 0.25, on: bool = True) -> tuple[int, ...]:"),
        ("constant", "if not -1 < share:"),
        ("comparison", "if not 0 > share:"),
        ("operator", "size = abs(-(x.detach() * (share + 2))) + 4  # a - b"),
        ("operator", "size = abs(-(x.detach() + (share + 2))) // 4  # a - b"),
        ("sign", "size = abs(-(-x.detach() * (share + 2))) // 4  # a - b"),
        ("operator", "size = abs(-(x.detach() * (share * 2))) // 4  # a - b"),
        ("constant", "size = abs(-(x.detach() * (share + 1))) // 4  # a - b"),
        ("constant", "size = abs(-(x.detach() * (share + 2))) // 3  # a - b"),
        ("constant", "return size if size == 6 else x[..., 1]"),
        ("constant", "return size if size == 7 else x[..., 0]"),
    }
    drawn = draw(tmp_path, ["methods"], 6, 0)
    assert drawn == draw(tmp_path, ["methods"], 6, 0) != draw(tmp_path, ["methods"], 6, 1)
    assert {fault.kind for fault in drawn} == set(KINDS["near"])


def test_other_parts_of_the_language_are_drawn_from_too(tmp_path: Path) -> None:
    inside = tmp_path / "luthier"
    inside.mkdir()
    (inside / "one.py").write_text(
        """def one(x, y, *, low=None):
    total = max(x, y, key=abs)
    total += x
    if x and y or low is None:
        log(total)
    return sum([total])
"""
    )
    text = (inside / "one.py").read_bytes()
    found = set()
    for fault in faults_in(tmp_path, "one.py", "parts"):
        changed = text[: fault.begin] + fault.new.encode() + text[fault.end :]
        ast.parse(changed)
        found.add((fault.kind, changed.decode().splitlines()[fault.line - 1].strip()))
    assert found == {
        ("argument", "total = max(x, y)"),
        ("argument", "total = max(y, x, key=abs)"),
        ("function", "total = min(x, y, key=abs)"),
        ("assignment", "total -= x"),
        ("condition", "if x or y or low is None:"),
        ("condition", "if x and y and low is None:"),
        ("condition", "if not (x and y or low is None):"),
        ("statement", "pass"),
        ("function", "exp(total)"),
        ("function", "return mean([total])"),
    }


def test_what_changes_no_result_still_stands_there() -> None:
    names = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    files = sorted({name.partition(": ")[0] for name in names})
    assert set(names) <= {fault.name for file in files for changes in SETS for fault in faults_in(ROOT, file, changes)}
    assert all(len(reason.split()) > 3 for reason in names.values())


def test_a_fault_is_planted_in_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "luthier" / "methods" / "one.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        """from __future__ import annotations
LIMIT, MOST = 3, 9.0
class Held:
    size = 5
def one(x: float, *, share: float = 0.5) -> float:
    def inner(y: float) -> float:
        return y - share
    return inner(x) * LIMIT
"""
    )
    spec = importlib.util.spec_from_file_location("luthier.methods.one", file)
    assert spec is not None and spec.loader is not None
    seen = {}
    for fault in faults_in(tmp_path, "methods/one.py"):
        module, other = importlib.util.module_from_spec(spec), ModuleType("other")
        spec.loader.exec_module(module)
        vars(other).update(LIMIT=module.LIMIT)
        monkeypatch.setitem(sys.modules, "luthier.methods.one", module)
        monkeypatch.setitem(sys.modules, "other", other)
        stood = plant(fault, tmp_path, {str(file): [module.one]})
        seen[fault.kind, fault.new] = (module.one(7.0), vars(other)["LIMIT"]) if stood else None
    assert seen == {
        ("constant", "4"): (26.0, 4),
        ("constant", "18.0"): (19.5, 3),
        # A class that is loaded has no place for it: such a fault is planted in a file.
        ("constant", "6"): None,
        ("default", "1.0"): (18.0, 3),
        ("operator", "+"): (22.5, 3),
        ("operator", "/"): (6.5 / 3, 3),
    }


def test_a_failure_by_a_missing_name_is_told_from_one_by_a_value() -> None:
    assert by_value("FAILED tests/a.py::b - AssertionError: left") and by_value("FAILED tests/a.py::b - Failed: DID NOT RAISE X")
    assert not by_value("FAILED tests/a.py::b - ImportError: cannot import") and not by_value(
        "FAILED tests/a.py::b - KeyError: 'x'"
    )
    # A fault that was a crash or a wrong refusal is seen by that one alone.
    assert by_value("FAILED tests/a.py::b - OverflowError: int too large", "OverflowError")
    assert not by_value("FAILED tests/a.py::b[OverflowError] - KeyError: 'x'", "OverflowError")
    assert not by_value("FAILED tests/a.py::b - ImportError: cannot import", "OverflowError")
