"""`python -m bench.busy`: seconds a step on a machine that does other work too, by how OpenMP's threads wait.

Steps of the quickstart in fp32, each setting in a process of its own, on a quiet machine and beside four processes that do nothing but
compute. `--plain` lets libraries leave alone what a processor with AVX2 and without bf16 does not have. Results go to `bench/busy.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.first_run import HERE, RECIPE, plain
from luthier import machine
from luthier.results.folder import read_run

SETTINGS: dict[str, tuple[dict[str, str], list[str]]] = {
    "libgomp's own waiting": ({"GOMP_SPINCOUNT": "300000"}, []),
    "luthier's": ({}, []),
    "passive": ({"OMP_WAIT_POLICY": "passive"}, []),
    "luthier's, one thread": ({}, ["train.threads=1"]),
}
BUSY = 4


@contextmanager
def crowd(processes: int) -> Iterator[None]:
    """So many processes beside, each of which keeps one core busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def seconds_a_step(environment: dict[str, str], keys: list[str], steps: int) -> list[float]:
    """Of every step but the first."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "luthier", "train", str(RECIPE), f"out={out}", f"train.steps={steps}", *keys]
        command += ["train.precision=fp32", "evaluate={}"]
        known = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        subprocess.run(command, env={**known, **environment}, check=True)
        (folder,) = (path.parent for path in Path(out).glob("*/run.json"))
        return [line["seconds"] for line in read_run(folder).facts["history"]][1:]


def main() -> None:
    """All settings, quiet and busy."""
    parser = argparse.ArgumentParser(prog="python -m bench.busy", description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--plain", action="store_true", help="as on a processor with AVX2 and without bf16")
    parser.add_argument("--out", type=Path, default=HERE / "busy.json")
    chosen = parser.parse_args()
    results = []
    for name, (environment, keys) in SETTINGS.items():
        found: dict[str, float] = {}
        for load, processes in (("quiet", 0), ("busy", BUSY)):
            with crowd(processes):
                taken = seconds_a_step({**environment, **(plain() if chosen.plain else {})}, keys, chosen.steps)
            found[load] = statistics.mean(taken)
            found[f"{load}, longest"] = max(taken)
        results.append({"setting": name, **found})
        print(json.dumps(results[-1]), flush=True)
    told = {
        "plain": chosen.plain,
        "steps": chosen.steps,
        "cores": os.cpu_count(),
        "versions": machine.versions(),
        "results": results,
    }
    chosen.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
