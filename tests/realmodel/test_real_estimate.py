"""The quickstart's plan against what its training uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processor import multiplies_bf16

pytestmark = pytest.mark.realmodel

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
TRAIN = """
import json, sys
import luthier
from luthier.runs import train as runs
from luthier.recipe import read_recipe
told = []
# What is saved afterwards needs a second model in memory, which is no part of training.
runs.keep_what_changed = lambda plan, folder, say: told.append(plan.estimate.total_bytes) or {}
run = luthier.train(read_recipe(sys.argv[1], sys.argv[2:]))
print(json.dumps([told[0], run.facts["peak_memory_bytes"]]))
"""


@pytest.mark.parametrize("tune", ["{half: {embeddings: freeze}}", "lora"])
def test_the_quickstarts_plan_is_within_a_fifth(tmp_path: Path, tune: str) -> None:
    words = [f"tune={tune}", "train.steps=2", "evaluate={}", f"out={tmp_path}"]
    if not multiplies_bf16():
        # Minutes of it; the estimate counts bytes in either type.
        words.append("train.precision=fp32")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(QUICKSTART), *words], capture_output=True, text=True, env=environment, check=True
    )
    estimated, measured = json.loads(done.stdout.splitlines()[-1])
    assert abs(estimated / measured - 1) <= 0.2, (estimated, measured)
