"""Faults planted in a process that has loaded the package and the tests already: what a fault changes takes the place of what was loaded.

Each fault gets a process of its own, a copy of one that is ready to test, so that only its tests take time. A test that fails in such a
copy without a fault sees none: the first failure counts only where the same test passes there.
"""

from __future__ import annotations
import __future__

import ast
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import pytest
from _pytest.runner import runtestprotocol

from tests.planted.drawn import Drawn, changed

Tell = Callable[[Drawn, "str | None"], None]
"""Takes a fault and what failed first: nothing where no test saw it, None where it cannot be planted here."""
FAILED = "FAILED "
_NO_PLACE = 77
"""How a process ends that cannot plant its fault."""


class _Running(NamedTuple):
    fault: Drawn
    items: list[pytest.Item]
    began: float
    said: int


class Planting:
    """A plugin of pytest that runs, instead of all tests once, for each fault the tests that should see it."""

    def __init__(self, root: Path, todo: Sequence[tuple[Drawn, Sequence[str]]], tell: Tell, jobs: int, patience: float) -> None:
        self.root, self.todo, self.tell, self.jobs, self.patience = root, todo, tell, jobs, patience
        self.functions: dict[str, list[FunctionType]] = {}
        self.live: dict[int, _Running] = {}
        self.passes: dict[str, bool] = {}
        """Whether a test passes without a fault, of those that failed with one."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Plant the faults one after the other, some at a time."""
        items = {item.nodeid: item for item in session.items}
        gc.unfreeze()
        for one in gc.get_objects():
            if type(one) is FunctionType and one.__code__.co_filename.startswith(str(self.root / "luthier")):
                self.functions.setdefault(one.__code__.co_filename, []).append(one)
        # Copies of this process then share what they only read.
        gc.freeze()
        for fault, tests in self.todo:
            self._begin(fault, [items[test] for test in tests if test in items])
            while len(self.live) >= self.jobs:
                self._reap()
        while self.live:
            self._reap()
        return True

    def _begin(self, fault: Drawn, items: list[pytest.Item]) -> None:
        reads, writes = os.pipe()
        child = os.fork()
        if child:
            os.close(writes)
            self.live[child] = _Running(fault, items, time.monotonic(), reads)
            return
        code = 1
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            if not fault.does_something or plant(fault, self.root, self.functions):
                # A line: a fault may leave a process of the test's own running, which ends here too and says the same again.
                os.write(writes, f"{first_failure(items)}\n".encode()[:4000])
                code = 0
            else:
                code = _NO_PLACE
        except BaseException as error:
            os.write(writes, f"it broke off: {error!r}".encode()[:300])
        finally:
            os._exit(code)

    def _reap(self) -> None:
        time.sleep(0.02)
        for child, (fault, items, began, reads) in list(self.live.items()):
            if child not in self.live:
                # Seen to while another fault's test was tried without it.
                continue
            done, status = os.waitpid(child, os.WNOHANG)
            late = not done and time.monotonic() - began > self.patience
            if late:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            if done or late:
                said = os.read(reads, 4096).decode(errors="replace").partition("\n")[0]
                os.close(reads)
                del self.live[child]
                code = os.waitstatus_to_exitcode(status)
                self._ended(fault, items, code, "it did not end" if late else said or ("it broke off" if code else ""))

    def _ended(self, fault: Drawn, items: list[pytest.Item], code: int, seen: str) -> None:
        test = seen.removeprefix(FAILED)
        if code == _NO_PLACE:
            self.tell(fault, None)
        elif not fault.does_something:
            self.passes[items[0].nodeid] = not seen
        elif not seen.startswith(FAILED) or all(item.nodeid != test for item in items):
            self.tell(fault, seen)
        else:
            if test not in self.passes:
                self._begin(fault.unharmed, [item for item in items if item.nodeid == test])
                while test not in self.passes:
                    self._reap()
            if self.passes[test]:
                self.tell(fault, seen)
            else:
                self._begin(fault, [item for item in items if item.nodeid != test])


def try_all(root: Path, todo: Sequence[tuple[Drawn, Sequence[str]]], tell: Tell, *, jobs: int, patience: float) -> None:
    """Plant faults in copies of this process, which loads the package and the tests from `root`.

    Args:
        root: a checkout, whose package is not loaded yet.
        todo: faults, and the tests for each, by name, in order.
        tell: hears of each.
        jobs: how many at the same time.
        patience: seconds after which a fault counts as seen: it made a loop without an end.
    """
    os.environ.update(PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    files = sorted({str(root / test.partition("::")[0]) for _, tests in todo for test in tests})
    options = ["-q", "-n0", "-p", "no:cacheprovider", f"--rootdir={root}", *files]
    pytest.main(options, plugins=[Planting(root, todo, tell, jobs, patience)])


def first_failure(items: Sequence[pytest.Item]) -> str:
    """The first of some tests that fails; empty where none does."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            return f"{FAILED}{item.nodeid}"
    return ""


def plant(fault: Drawn, root: Path, functions: Mapping[str, Sequence[FunctionType]]) -> bool:
    """Put a fault into what is loaded. Returns whether there was a place for it.

    Args:
        fault: in a file that is loaded as it stands.
        root: the checkout.
        functions: those that are loaded, by file.
    """
    path = root / "luthier" / fault.file
    module = sys.modules.get(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
    if module is None:
        return False
    before = path.read_bytes()
    text = changed(before, fault)
    old, new = (list(_codes(compile(one, str(path), "exec", dont_inherit=True))) for one in (before, text))
    if len(old) != len(new) or any(one.co_freevars != other.co_freevars for one, other in zip(old, new, strict=True)):
        # A function inside another one went away, or needs other names of it: what is loaded cannot become that.
        return False
    codes = {one: other for one, other in zip(old, new, strict=True) if one != other}
    mine = functions.get(str(path), ())
    swapped = [one for one in mine if one.__code__ in codes]
    for one in swapped:
        one.__code__ = codes[one.__code__]
    return _given(fault, text, vars(module), mine) or bool(swapped)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _codes(one)


def _given(fault: Drawn, text: bytes, space: dict[str, object], functions: Sequence[FunctionType]) -> bool:
    """Values that were worked out when the file was loaded: of its names, and defaults of its functions."""
    tree = ast.parse(text)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.lineno <= fault.line <= (node.end_lineno or 0):
            return _renew_names(node, space)
    for inner in ast.walk(tree):
        if isinstance(inner, ast.FunctionDef):
            defaults = [one for one in (*inner.args.defaults, *inner.args.kw_defaults) if one is not None]
            if any(one.lineno <= fault.line <= (one.end_lineno or 0) for one in defaults):
                return _renew_defaults(inner, space, functions)
    return False


def _renew_names(node: ast.Assign | ast.AnnAssign, space: dict[str, object]) -> bool:
    new = _run(node, space)
    changed = [name for name, value in new.items() if name in space and value is not space[name]]
    for name in changed:
        # Other files hold the value under the same name.
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", {})
            if names.get(name) is space[name] and names is not space:
                names[name] = new[name]
        space[name] = new[name]
    return bool(changed)


def _renew_defaults(node: ast.FunctionDef, space: dict[str, object], functions: Sequence[FunctionType]) -> bool:
    bare = ast.FunctionDef(node.name, node.args, [ast.Pass()], [], None, None)
    made = _run(ast.fix_missing_locations(ast.copy_location(bare, node)), space)[node.name]
    assert isinstance(made, FunctionType)
    mine = [one for one in functions if one.__code__.co_name == node.name and one.__code__.co_firstlineno <= node.lineno]
    mine = [one for one in mine if node.lineno - one.__code__.co_firstlineno <= len(ast.unparse(node).splitlines())]
    for one in mine:
        one.__defaults__, one.__kwdefaults__ = made.__defaults__, made.__kwdefaults__
    return bool(mine)


def _run(node: ast.stmt, space: Mapping[str, object]) -> dict[str, object]:
    made = dict(space)
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module([node], []), "<fault>", "exec", flags=flags, dont_inherit=True), made)
    return made
