"""`python -m bench.first_run`: the quickstart over seeds, number types and lengths; what it learns, keeps and takes.

Every setting trains in a process of its own by `recipes/quickstart.yaml`. `--plain` lets libraries leave alone what a processor with
AVX2 and without bf16 does not have. Results are added to `bench/first_run.json`, which holds those of earlier calls; whether a machine
was quiet while it was timed is for who runs this to see to, and `--quiet` says that it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "quickstart.yaml"
MAKEFILE = HERE.parent / "Makefile"


def plain() -> dict[str, str]:
    """What the Makefile sets for a plain processor."""
    joined = MAKEFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    line = re.search(r"^PLAIN = (.*)$", joined, re.MULTILINE)
    assert line is not None
    return dict(one.split("=", 1) for one in line[1].split())


def trained(keys: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The facts of a run of the quickstart with some keys changed."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "luthier", "train", str(RECIPE), f"out={out}", *keys]
        subprocess.run(command, env={**os.environ, **environment}, check=True)
        (file,) = Path(out).glob("*/run.json")
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return facts


def main() -> None:
    """Settings, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_run", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--share", type=float, default=1.0, help="share of the quickstart's four epochs")
    parser.add_argument("--plain", action="store_true", help="as on a processor with AVX2 and without bf16")
    parser.add_argument("--quiet", action="store_true", help="nothing else runs on this machine")
    parser.add_argument("--out", type=Path, default=HERE / "first_run.json")
    chosen = parser.parse_args()
    for seed in chosen.seeds:
        keys = [f"seed={seed}", f"train.precision={chosen.precision}", f"train.epochs={4 * chosen.share:g}"]
        facts = trained(keys, plain() if chosen.plain else {})
        metrics = facts["metrics"]
        result = {
            "precision": chosen.precision,
            "plain": chosen.plain,
            "share": chosen.share,
            "seed": seed,
            "processor": facts["machine"]["processor"],
            "learned": metrics["held_out"]["after"],
            "questions": metrics["held_out"]["n"],
            "retained": metrics["ordinary"]["retained"],
            "prose": [metrics["prose"]["before"], metrics["prose"]["after"]],
            "steps": facts["steps"],
            "tokens": facts["tokens"],
            "peak_memory_bytes": facts["peak_memory_bytes"],
            **({"seconds": facts["seconds"], "total_seconds": facts["total_seconds"]} if chosen.quiet else {}),
        }
        setting = ("precision", "plain", "share", "seed", "processor")
        held = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else []
        others = [one for one in held if any(one[key] != result[key] for key in setting)]
        chosen.out.write_text(json.dumps([*others, result], indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
