"""Planted faults: what the tests must catch.

    python -m tests.planted [numbers] [--at DIR]      each of the listed ones, with the tests that should see it
    python -m tests.planted mended [numbers]          each mended fault again, which must fail by a wrong value
    python -m tests.planted map [--tests FILES]       which tests run which lines, for the next; FILES: only these anew
    python -m tests.planted drawn --over methods --count 300 --seed 0

A fault that no test catches shows what the tests do not hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.planted import drawn, tested_lines
from tests.planted.changes import SETS
from tests.planted.fault import ROOT, Fault, caught
from tests.planted.listed import FAULTS
from tests.planted.mended import MENDED, by_value


def _each(faults: tuple[Fault, ...], numbers: list[int], root: Path, tests: list[str] | None, *, values: bool) -> None:
    numbers = numbers or list(range(1, len(faults) + 1))
    found = 0
    for number in numbers:
        fault = faults[number - 1]
        seen = caught([fault], root, tests or [f"tests/{test}" for test in fault.tests])
        right = bool(seen) and (not values or by_value(seen, fault.raises))
        found += right
        word = "caught" if right else "NOT BY A VALUE" if seen else "NOT CAUGHT"
        print(f"{number:2} {word}: {fault.what}{f' ({seen[:150]})' if seen else ''}", flush=True)
    print(f"{found} of {len(numbers)} caught")


def main() -> None:
    """Plant faults and say which were caught."""
    reading = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reading.add_argument("words", nargs="*", help="`mended`, `map` or `drawn`; numbers of faults, from 1; none: all of the listed")
    reading.add_argument("--at", type=Path, default=ROOT, help="the checkout to take package and tests from")
    reading.add_argument("--tests", nargs="*", help="map: files of tests; else other tests than those that should catch it")
    reading.add_argument("--over", default="methods", help="drawn: folders of the package, with commas between")
    reading.add_argument("--count", type=int, default=300, help="drawn: how many")
    reading.add_argument("--seed", type=int, default=0, help="drawn: which")
    reading.add_argument("--changes", choices=sorted(SETS), default="near", help="drawn: from which set")
    reading.add_argument("--jobs", type=int, default=2, help="drawn: at the same time")
    reading.add_argument("--out", type=Path, help="drawn: a file that keeps what was found, and is gone on with")
    given = reading.parse_args()
    what = given.words[0] if given.words and not given.words[0].isdigit() else "listed"
    numbers = [int(word) for word in given.words if word.isdigit()]
    if what == "map":
        tested_lines.make(given.at, given.tests or ())
    elif what == "drawn":
        drawn.run(given.at, given.over.split(","), given.count, given.seed, given.jobs, given.out, changes=given.changes)
    elif what == "mended":
        _each(MENDED, numbers, given.at, given.tests, values=True)
    else:
        _each(FAULTS, numbers, given.at, given.tests, values=False)


if __name__ == "__main__":
    main()
