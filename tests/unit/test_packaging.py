"""What pyproject.toml promises and what constraints.txt pins agree, on every Python that luthier supports."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def pins(python: str) -> dict[str, str]:
    """Package to the version that constraints.txt pins on one Python; two pins of one package are an error."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            (version,) = pin.specifier
            assert version.operator == "==", line
            assert canonicalize_name(pin.name) not in found, f"{pin.name} is pinned twice on Python {python}"
            found[canonicalize_name(pin.name)] = version.version
    return found


def imported(path: Path) -> set[str]:
    """The packages a file imports anywhere, by their first name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_range_admits_its_pin(python: str) -> None:
    tested = ("test", "lint", "docs", "peft", "bench")
    extras = project()["optional-dependencies"]
    listed = [Requirement(one) for one in [*project()["dependencies"], *(one for name in tested for one in extras[name])]]
    needed = [one for one in listed if one.marker is None or one.marker.evaluate({"python_version": python})]
    pinned = pins(python)
    assert {canonicalize_name(one.name) for one in needed} <= set(pinned)
    wrong = [str(one) for one in needed if pinned[canonicalize_name(one.name)] not in one.specifier]
    assert not wrong


def test_supported_pythons_are_those_checked_here() -> None:
    supported = SpecifierSet(project()["requires-python"])
    assert [python for python in ("3.9", *PYTHONS, "3.14") if python in supported] == PYTHONS
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", one) for one in project()["classifiers"]]
    assert [one[1] for one in named if one] == PYTHONS


def test_every_extra_is_used_by_something() -> None:
    """Extras installed packages that no line of luthier ever imported."""
    modules = {"POT": "ot", "lm-eval": "lm_eval", "tensorboard": "torch.utils.tensorboard"}
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "luthier").rglob("*.py"))
    for extra, needed in project()["optional-dependencies"].items():
        for one in () if extra in ("bench", "test", "lint", "docs", "dev") else map(Requirement, needed):
            module = re.escape(modules.get(one.name, one.name))
            assert re.search(rf"^\s*(?:import|from) {module}\b|\"{module}\"", code, re.MULTILINE), f"{extra}: {one.name}"


def test_what_luthier_imports_is_declared() -> None:
    """A package that only comes along with another one may go away with it."""
    declared = [
        *project()["dependencies"],
        *(one for extra in project()["optional-dependencies"].values() for one in extra),
    ]
    names = {canonicalize_name(Requirement(one).name) for one in declared} - {"luthier"}
    owners = metadata.packages_distributions()
    undeclared = {
        module: str(path.relative_to(ROOT))
        for path in (ROOT / "luthier").rglob("*.py")
        for module in imported(path) & set(owners) - {"luthier"}
        if not names & {canonicalize_name(owner) for owner in owners[module]}
    }
    assert not undeclared
