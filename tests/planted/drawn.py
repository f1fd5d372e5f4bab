"""Faults drawn by chance and planted one at a time: which there are, say `changes.py` and the folders they are drawn from.

What share of them the tests catch says how much the tests hold. A fault that changes no result is no fault: such survivors are listed
with the reason, in `equivalent.json`.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.planted import tested_lines
from tests.planted.changes import SETS, Text

KINDS = {
    "near": ("operator", "sign", "constant", "comparison", "detach", "default"),
    "far": ("operator", "sign", "constant", "comparison", "default"),
    "parts": ("condition", "argument", "function", "assignment", "statement"),
}
"""Of the faults that each set of changes has."""
SECONDS = 45.0
"""Of tests, as they take in the whole suite: the quickest that run a line, up to so many."""
PINNED = "tests/contracts/test_contracts_defaults.py::test_defaults_are_those_that_are_pinned"
PATIENCE = 240
"""Seconds after which a fault counts as caught: it made a loop without an end."""
EQUIVALENT = Path(__file__).with_name("equivalent.json")
"""Drawn faults that change no result, by name, with the reason."""
_CARDS = ("method", "Field", "LuthierError")


class Drawn(NamedTuple):
    """One fault in the text of a file."""

    kind: str
    file: str
    """Under `luthier/`."""
    line: int
    begin: int
    end: int
    """Bytes of the file that become `new`."""
    new: str
    within: tuple[int, int]
    """First and last line of the function around it."""
    place: str
    """Its line and the column there, in words that last as long as the line does."""

    @property
    def does_something(self) -> bool:
        """Whether it changes the file's text."""
        return self.begin < self.end or bool(self.new)

    @property
    def unharmed(self) -> Drawn:
        """The same place with nothing changed."""
        return self._replace(end=self.begin, new="")

    @property
    def name(self) -> str:
        """Tells it from all others."""
        return f"{self.file}: {self.kind} in {self.place} -> {self.new or 'nothing'}"


def faults_in(root: Path, file: str, changes: str = "near") -> Iterator[Drawn]:
    """All faults of one set of changes that a file has room for.

    Cards, fields of recipes and errors hold words, and are left out; so is what only watches over lists of one length, `strict` of `zip`.
    """
    text = (root / "luthier" / file).read_text(encoding="utf-8")
    tree, where = ast.parse(text), Text(text)
    skipped = {id(inner) for node in ast.walk(tree) if _holds_words(node) for inner in ast.walk(node)}
    skipped |= {id(inner) for node in ast.walk(tree) for one in _annotations(node) for inner in ast.walk(one)}
    skipped |= {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Subscript) for inner in _of_types(node)}
    around: dict[int, tuple[int, int]] = {}
    defaults: dict[int, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            span = (node.lineno, node.end_lineno or node.lineno)
            for inner in ast.walk(node):
                if id(inner) not in around or span[0] >= around[id(inner)][0]:
                    around[id(inner)] = span
            if isinstance(node, ast.FunctionDef):
                values = [*node.args.defaults, *(one for one in node.args.kw_defaults if one is not None)]
                defaults |= {id(value): value for value in values}
    for node in ast.walk(tree):
        if id(node) in skipped or not hasattr(node, "lineno"):
            continue
        span = around.get(id(node), (node.lineno, node.end_lineno or node.lineno))
        for kind, begin, end, new in SETS[changes](node, where, defaults):
            yield Drawn(kind, file, node.lineno, begin, end, new, span, where.place(begin))


def _holds_words(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        return name in _CARDS
    return isinstance(node, ast.JoinedStr | ast.AnnAssign) or (isinstance(node, ast.keyword) and node.arg == "strict")


def _annotations(node: ast.AST) -> list[ast.expr]:
    """The types that a function says it takes and gives."""
    if isinstance(node, ast.arg):
        return [node.annotation] if node.annotation is not None else []
    return [node.returns] if isinstance(node, ast.FunctionDef) and node.returns is not None else []


def _of_types(node: ast.Subscript) -> Iterator[ast.AST]:
    """What stands in the brackets of a type."""
    if isinstance(node.value, ast.Name) and node.value.id in (
        "Literal",
        "tuple",
        "dict",
        "list",
        "Callable",
        "Mapping",
        "Sequence",
    ):
        yield from ast.walk(node)


def changed(text: bytes, fault: Drawn) -> bytes:
    """A file's text with the fault."""
    return text[: fault.begin] + fault.new.encode() + text[fault.end :]


def draw(root: Path, folders: Sequence[str], count: int, seed: int, changes: str = "near") -> list[Drawn]:
    """As many faults of each kind as there are, in turn, until there are enough."""
    files = sorted(path for folder in folders for path in (root / "luthier" / folder).rglob("*.py"))
    found = [one for path in files for one in faults_in(root, str(path.relative_to(root / "luthier")), changes)]
    rng = random.Random(seed)
    by_kind = {kind: [one for one in found if one.kind == kind] for kind in KINDS[changes]}
    for some in by_kind.values():
        rng.shuffle(some)
    drawn: list[Drawn] = []
    while len(drawn) < count and any(by_kind.values()):
        drawn += [some.pop() for some in by_kind.values() if some]
    return drawn[:count]


def tests_for(fault: Drawn, known: tested_lines.Lines) -> list[str]:
    """The quickest tests that run its line; where only loading does, those that run the function around it, else the file."""
    for lines in (range(fault.line, fault.line + 1), range(fault.within[0], fault.within[1] + 1), range(1, 10_000)):
        found = known.covering(fault.file, lines)
        if found:
            break
    seconds = dict(zip(known.tests, known.seconds, strict=True))
    left, chosen = SECONDS, []
    for test in found:
        left -= seconds[test]
        if chosen and left < 0:
            break
        chosen.append(test)
    # Defaults are pinned by a test that runs no line of theirs.
    return [*chosen, PINNED] if fault.kind == "default" else chosen


class Copy:
    """A copy of a checkout in which faults are planted one after the other."""

    def __init__(self, root: Path, folder: Path) -> None:
        ignored = shutil.ignore_patterns(
            ".git", ".venv", "runs", "site", ".coverage*", ".mypy_cache", ".ruff_cache", ".pytest_cache"
        )
        everywhere = shutil.ignore_patterns("__pycache__")

        def left_out(where: str, names: list[str]) -> set[str]:
            return everywhere(where, names) | (ignored(where, names) if Path(where) == root else set())

        self.root = Path(shutil.copytree(root, folder, ignore=left_out, symlinks=True))

    def seen(self, fault: Drawn, tests: Sequence[str]) -> str:
        """What failed first; empty where nothing did."""
        file = self.root / "luthier" / fault.file
        before = file.read_bytes()
        file.write_bytes(changed(before, fault))
        try:
            return _first_failure(self.root, tests)
        finally:
            file.write_bytes(before)


def _first_failure(folder: Path, tests: Sequence[str]) -> str:
    """Run tests in a process that has loaded what does not change already."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            _become_pytest(folder, tests, said.fileno())
        began = time.monotonic()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() - began > PATIENCE:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "it did not end"
            time.sleep(0.1)
        said.seek(0)
        told = said.read().decode(errors="replace")
    if status == 0:
        return ""
    failed = [line for line in told.splitlines() if line.startswith(("FAILED", "SUBFAILED", "ERROR"))]
    return (failed or [told[-300:] or "it broke off"])[0]


def _become_pytest(folder: Path, tests: Sequence[str], said: int) -> None:
    os.setsid()
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(folder)
    os.environ.update(PYTHONPATH=str(folder), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("luthier", "tests")]:
        del sys.modules[name]
    import pytest

    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-n0", *tests])))


def run(root: Path, folders: Sequence[str], count: int, seed: int, jobs: int, out: Path | None, *, changes: str = "near") -> None:
    """Plant faults that were drawn and tell which were caught."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from tests.planted.in_place import try_all

    torch.set_num_threads(1)
    known = tested_lines.read(root)
    told: dict[str, str] = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else {}
    todo = [(one, tests_for(one, known)) for one in draw(root, folders, count, seed, changes) if one.name not in told]
    left: list[tuple[Drawn, Sequence[str]]] = []

    def tell(fault: Drawn, seen: str | None) -> None:
        if seen is None:
            left.append((fault, tests_for(fault, known)))
        else:
            told[fault.name] = seen
            print(f"{'caught' if seen else 'SURVIVED'} {fault.name}{f' ({seen[:110]})' if seen else ''}", flush=True)
            if out is not None:
                out.write_text(json.dumps(told, indent=1), encoding="utf-8")

    try_all(root, todo, tell, jobs=jobs, patience=PATIENCE)
    with tempfile.TemporaryDirectory() as where:
        copy = Copy(root, Path(where) / "copy")
        for fault, tests in left:
            tell(fault, copy.seen(fault, tests))
    survivors = [name for name, seen in told.items() if not seen]
    equal = set(survivors) & set(json.loads(EQUIVALENT.read_text(encoding="utf-8")))
    print(f"{len(told)} planted, {len(survivors)} survived, {len(equal)} of them change no result")
