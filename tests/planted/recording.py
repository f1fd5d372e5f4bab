"""A plugin of pytest that writes down which lines of the package each test runs.

Every statement in a function of the package marks itself when it runs. A tracer, which hears of every call in torch as well, took five
times as long.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

from tests.costs import processor_seconds
from tests.planted.tested_lines import FOLDER

_MARK = "__luthier_ran__"
_PACKAGE = Path(__file__).parents[2] / "luthier"
_BLOCKS = ("body", "orelse", "finalbody")


class _Recording:
    """What has been marked, and where marks stand."""

    def __init__(self) -> None:
        self.ran: set[int] = set()
        self.places: list[tuple[str, int, int]] = []
        """File under `luthier/`, first and last line, by number of the mark."""
        self.tests: dict[str, tuple[float, list[int]]] = {}

    def marked(self, tree: ast.Module, file: str) -> ast.Module:
        """A module whose functions mark the statements that run."""
        for node in [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]:
            self._mark(node, file)
        return ast.fix_missing_locations(tree)

    def _mark(self, within: ast.AST, file: str) -> None:
        for name in _BLOCKS:
            block = getattr(within, name, None)
            if isinstance(block, list):
                setattr(within, name, [new for one in block for new in self._with_mark(one, file)])
        for handler in (*getattr(within, "handlers", ()), *getattr(within, "cases", ())):
            self._mark(handler, file)

    def _with_mark(self, statement: ast.stmt, file: str) -> Iterator[ast.stmt]:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            # A docstring is one only where it stands first.
            yield statement
            return
        inner = next((block for name in _BLOCKS if isinstance(block := getattr(statement, name, None), list) and block), None)
        last = statement.end_lineno or statement.lineno
        if inner is not None and inner[0].lineno > statement.lineno:
            last = inner[0].lineno - 1
        call = ast.Call(ast.Name(_MARK, ast.Load()), [ast.Constant(len(self.places))], [])
        self.places.append((file, statement.lineno, last))
        yield ast.copy_location(ast.Expr(call), statement)
        # A function within a function marks its own statements.
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            self._mark(statement, file)
        yield statement


_RECORDING = _Recording()


def _begin() -> None:
    setattr(builtins, _MARK, _RECORDING.ran.add)
    plain = SourceFileLoader.get_code

    def get_code(loader: Any, name: str) -> Any:
        path = Path(loader.get_filename(name))
        if not path.is_relative_to(_PACKAGE):
            return plain(loader, name)
        # Code that is kept beside the source has no marks.
        tree = ast.parse(loader.get_data(str(path)), filename=str(path))
        return compile(_RECORDING.marked(tree, str(path.relative_to(_PACKAGE))), str(path), "exec", dont_inherit=True)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


_begin()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Write down what one test runs, its fixtures with it, and the processor time it takes."""
    _RECORDING.ran.clear()
    before = processor_seconds()
    yield
    _RECORDING.tests[item.nodeid] = (processor_seconds() - before, sorted(_RECORDING.ran))


def pytest_sessionfinish() -> None:
    """Leave it for the process that asked."""
    written = json.dumps({"places": _RECORDING.places, "tests": _RECORDING.tests})
    (Path(os.environ[FOLDER]) / f"{os.getpid()}.json").write_text(written, encoding="utf-8")
