"""What objectives read of whole distributions fits into little memory, however large the vocabulary."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
POSITIONS, LIMIT = 4096, 1.5e9
PROGRAM = """
import re, sys
import torch
from luthier import registry
from luthier.columns import chunked
from luthier.kinds import BASE

def said(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(1)
names = ["otr", "label_smoothing"]
wanted = ["nll", "entropy", "kl"]
wanted += [column for name in names for value in registry.part(name).values for column in value.columns]
columns, vocabulary, count = chunked.resolve(wanted), 150_000, int(sys.argv[1])
rng = torch.Generator().manual_seed(0)
weight_VD, base_VD = (torch.randn(vocabulary, 64, generator=rng).bfloat16() for _ in range(2))
hidden_ND = (0.1 * torch.randn(count, 64, generator=rng)).bfloat16()
others = {BASE.name: chunked.Other(hidden_ND.clone(), lambda hidden: hidden @ base_VD.T)}
weight_VD.requires_grad_(True), hidden_ND.requires_grad_(True)
before = said("VmRSS")
found = chunked.compute(
    hidden_ND, torch.randint(0, vocabulary, (count,), generator=rng), lambda hidden: hidden @ weight_VD.T, columns,
    key_N=torch.arange(count), others=others, vocabulary=vocabulary,
)
sum(found[one.name].sum() for one in columns if one.gradient).backward()
assert hidden_ND.grad.isfinite().all() and weight_VD.grad.isfinite().all() and hidden_ND.grad.abs().max() > 0
print(said("VmHWM") - before)
"""


@pytest.mark.skipif(
    not STATUS.exists() or "VmHWM" not in STATUS.read_text(), reason="the system does not tell a process's peak memory"
)
def test_whole_distributions_stay_small() -> None:
    """With 150,000 words and 4,096 targets, forward and backward of sampled tokens, a divergence to the base and a mean over the vocabulary
    at once take less than 1.5 GB; the logits alone would take 2.5 in fp32, and as much for the base and for each gradient."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", PROGRAM, str(POSITIONS)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert 0.3e9 < int(ran.stdout) < LIMIT
