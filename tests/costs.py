"""What the tests cost: processor time by folder and by test, and counts that repeat exactly, held to `tests/budget.json`.

Counted are the processes that tests start, the models that they make and the optimizer steps that they take, while a test itself runs;
what fixtures make does not count, since it depends on how tests are dealt to processes. A run of the whole suite fails where a count is
above the committed figure and what each technique that joined since may add. `LUTHIER_TEST_BUDGET=write` commits the figures of a run.
"""

from __future__ import annotations

import json
import multiprocessing.process
import os
import resource
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BUDGET = Path(__file__).parent / "budget.json"
COUNTED = ("processes", "models", "steps")
ALLOWANCE = {"processes": 0, "models": 80, "steps": 80}
"""What a technique that joins may add to each count."""
SLACK = 0.03
"""Share by which a count may exceed its figure: what is made once in each process of the tests is met by another test in each run."""
SHOWN = 10


class Cost(NamedTuple):
    """Of one test, with its fixtures where they were made for it."""

    test: str
    seconds: float
    """Of processor time, of this process and of those that it waited for."""
    counts: Mapping[str, int]

    @property
    def folder(self) -> str:
        """The folder that the test lies in."""
        return self.test.split("::")[0].rpartition("/")[0]


def counting(owner: type, name: str, tally: Counter[str], what: str) -> None:
    """Count the calls of a method."""
    plain = getattr(owner, name)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        tally[what] += 1
        return plain(self, *arguments, **options)

    setattr(owner, name, call)


def processor_seconds() -> float:
    """Processor time of this process and of those that have ended in it."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


class Costs:
    """The plugin: measures in every process of the tests, and tells in the one that reports."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.tally, self.found = config, Counter[str](), list[Cost]()
        self.began, self.whole = time.perf_counter(), False
        self.calls: Counter[str] = Counter()
        self.over: list[str] = []
        self.watched = False

    def watch(self) -> None:
        """Begin to count; what it counts is imported with the first test, not with pytest."""
        from transformers import PreTrainedModel

        from luthier.training.engine import Engine

        counting(subprocess.Popen, "__init__", self.tally, "processes")
        counting(multiprocessing.process.BaseProcess, "start", self.tally, "processes")
        counting(PreTrainedModel, "__init__", self.tally, "models")
        counting(Engine, "step", self.tally, "steps")
        self.watched = True

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Measure one test."""
        if not self.watched:
            self.watch()
        self.calls = Counter()
        before = processor_seconds()
        yield
        self.found.append(Cost(item.nodeid, processor_seconds() - before, dict(self.calls)))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Count while the test itself runs."""
        before = Counter(self.tally)
        yield
        self.calls = self.tally - before

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hand over what was measured, or hold it to the budget."""
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output["costs"] = [tuple(cost) for cost in self.found]
            return
        chosen = [getattr(self.config.option, name, None) for name in ("keyword", "markexpr", "lf", "last_failed", "maxfail")]
        self.whole = not any(chosen) and self.config.args == self.config.getini("testpaths") and session.testsfailed == 0
        if self.whole:
            self.over = held(total(self.found), techniques())
            if self.over:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a process of the tests measured."""
        self.found += [Cost(*cost) for cost in getattr(node, "workeroutput", {}).get("costs", ())]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Tell what it all cost."""
        if not self.found:
            return
        terminalreporter.section("cost")
        for line in told(self.found, time.perf_counter() - self.began):
            terminalreporter.write_line(line)
        for line in self.over:
            terminalreporter.write_line(line, red=True)


def techniques() -> int:
    """How many there are."""
    from luthier import registry

    return sum(len(registry.names(kind)) for kind in registry.KINDS)


def total(found: Sequence[Cost]) -> dict[str, int]:
    """All tests' counts."""
    return {what: sum(cost.counts.get(what, 0) for cost in found) for what in COUNTED}


def held(counts: Mapping[str, int], standing: int, write: Callable[[str], Any] = BUDGET.write_text) -> list[str]:
    """What is above the budget, in words; with `LUTHIER_TEST_BUDGET=write` the budget becomes these counts."""
    if os.environ.get("LUTHIER_TEST_BUDGET") == "write":
        write(json.dumps({"techniques": standing, **counts}, indent=1) + "\n")
        return []
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    joined = max(0, standing - budget["techniques"])
    over = []
    for what in COUNTED:
        most = int(budget[what] * (1 + SLACK)) + ALLOWANCE[what] * joined
        if counts[what] > most:
            over.append(
                f"the tests make {counts[what]} {what}, and tests/budget.json allows {most}: make them share what they need, or "
                "commit a new figure with its reason"
            )
    return over


def told(found: Sequence[Cost], wall: float) -> list[str]:
    """The cost in lines: all of it, by folder, and the tests that cost most."""
    seconds = sum(cost.seconds for cost in found)
    counts = ", ".join(f"{number} {what}" for what, number in total(found).items())
    lines = [f"{len(found)} tests, {wall:.0f} s, {seconds:.0f} s of processor time; {counts}; load {os.getloadavg()[0]:.1f}"]
    folders: defaultdict[str, float] = defaultdict(float)
    for cost in found:
        folders[cost.folder] += cost.seconds
    lines += [f"{spent:8.1f} s  {folder}" for folder, spent in sorted(folders.items(), key=lambda one: -one[1])]
    lines.append(f"the {SHOWN} that cost most:")
    lines += [f"{cost.seconds:8.1f} s  {cost.test}" for cost in sorted(found, key=lambda cost: -cost.seconds)[:SHOWN]]
    return lines
