"""Which tests run which lines of the package, and how long each takes: found by running them, and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

KEPT = Path(".coverage.tests.json")
"""At the root of a checkout; never part of it."""
FOLDER = "LUTHIER_TESTED_LINES"
"""The environment's variable that names the folder for what each process of the tests wrote down."""


class Lines(NamedTuple):
    """What one run of the suite told."""

    tests: list[str]
    seconds: list[float]
    of_lines: dict[str, dict[str, list[int]]]
    """File under `luthier/`, then line, to the places of tests that run it."""

    def covering(self, file: str, lines: range) -> list[str]:
        """The tests that run any of some lines, the quickest first."""
        known = self.of_lines.get(file, {})
        found = {place for line in lines for place in known.get(str(line), ())}
        return [self.tests[place] for place in sorted(found, key=lambda place: self.seconds[place])]


def read(root: Path) -> Lines:
    """What was kept.

    Raises:
        SystemExit: nothing was.
    """
    if not (root / KEPT).exists():
        raise SystemExit("which tests run which lines is not known: python -m tests.planted map")
    return Lines(**json.loads((root / KEPT).read_text(encoding="utf-8")))


def make(root: Path, paths: Sequence[str] = ()) -> None:
    """Run tests and write down which lines each of them runs. What tests run in other processes than the suite's own is not seen.

    Args:
        root: a checkout.
        paths: files of tests that are new or have changed, for what is kept of the others to stand; none: the whole suite.
    """
    before = read(root) if paths else Lines([], [], {})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-q", "-m", "not realmodel", *paths]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), FOLDER: folder}
        subprocess.run([*command, "-p", "tests.planted.recording"], cwd=root, env=environment, check=False)
        told = [json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("*.json")]
    kept = _without(before, paths)
    seconds = {test: taken for one in told for test, (taken, _) in one["tests"].items()}
    tests = [*kept.tests, *sorted(seconds)]
    number = {test: place for place, test in enumerate(tests)}
    of_lines = {file: {line: set(found) for line, found in lines.items()} for file, lines in kept.of_lines.items()}
    for one in told:
        for test, (_, ran) in one["tests"].items():
            for file, first, last in (one["places"][mark] for mark in ran):
                for line in range(first, last + 1):
                    of_lines.setdefault(file, {}).setdefault(str(line), set()).add(number[test])
    by_line = {file: {line: sorted(found) for line, found in lines.items()} for file, lines in of_lines.items()}
    taken = [*kept.seconds, *(seconds[test] for test in sorted(seconds))]
    (root / KEPT).write_text(json.dumps(Lines(tests, taken, by_line)._asdict()), encoding="utf-8")


def _without(known: Lines, paths: Sequence[str]) -> Lines:
    """What is known of all tests but those in some files."""
    stays = [place for place, test in enumerate(known.tests) if test.partition("::")[0] not in paths]
    new = {place: number for number, place in enumerate(stays)}
    of_lines = {
        file: {line: [new[place] for place in found if place in new] for line, found in lines.items()}
        for file, lines in known.of_lines.items()
    }
    return Lines([known.tests[place] for place in stays], [known.seconds[place] for place in stays], of_lines)
