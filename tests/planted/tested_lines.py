"""Which tests run which lines of the package, and how long each takes: found by one run of the whole suite, and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
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


def make(root: Path) -> None:
    """Run the suite and write down which lines each test runs. What tests run in other processes than the suite's own is not seen."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-q", "-m", "not realmodel"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), FOLDER: folder}
        subprocess.run([*command, "-p", "tests.planted.recording"], cwd=root, env=environment, check=False)
        told = [json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("*.json")]
    seconds = {test: taken for one in told for test, (taken, _) in one["tests"].items()}
    tests = sorted(seconds)
    number = {test: place for place, test in enumerate(tests)}
    of_lines: dict[str, dict[str, set[int]]] = {}
    for one in told:
        for test, (_, ran) in one["tests"].items():
            for file, first, last in (one["places"][mark] for mark in ran):
                for line in range(first, last + 1):
                    of_lines.setdefault(file, {}).setdefault(str(line), set()).add(number[test])
    kept = {file: {line: sorted(found) for line, found in lines.items()} for file, lines in of_lines.items()}
    (root / KEPT).write_text(json.dumps(Lines(tests, [seconds[test] for test in tests], kept)._asdict()), encoding="utf-8")
