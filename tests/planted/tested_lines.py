"""Which tests run which lines of the package, and how long each takes: found by one run of the whole suite, and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

KEPT = Path(".coverage.tests.json")
"""At the root of a checkout; never part of it."""


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
    """Run the suite with every line's tests recorded. Tests in other processes than the suite's own are not seen."""
    from coverage import CoverageData

    report = root / ".coverage.durations.xml"
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-q", "--cov", "--cov-context=test"]
    command += ["--cov-report=", f"--junitxml={report}", "-m", "not realmodel"]
    subprocess.run(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    data = CoverageData(str(root / ".coverage"))
    data.read()
    seconds = _seconds(report)
    tests = sorted({context.partition("|")[0] for context in data.measured_contexts() if context})
    number = {test: place for place, test in enumerate(tests)}
    of_lines: dict[str, dict[str, list[int]]] = {}
    for file in data.measured_files():
        inside = str(Path(file).relative_to(root / "luthier"))
        of_lines[inside] = {
            str(line): sorted({number[one.partition("|")[0]] for one in contexts if one})
            for line, contexts in data.contexts_by_lineno(file).items()
        }
    kept = Lines(tests, [seconds.get(test, 1.0) for test in tests], of_lines)
    (root / KEPT).write_text(json.dumps(kept._asdict()), encoding="utf-8")
    report.unlink()


def _seconds(report: Path) -> dict[str, float]:
    from xml.etree import ElementTree

    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = str(case.get("classname", "")).replace(".", "/") + ".py"
        found[f"{file}::{case.get('name')}"] = float(case.get("time") or 0.0)
    return found
