"""Deltas with frozen bases, calibrated starts or scores: killed and resumed, they go on bit for bit, whatever their start would be now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kinds import Batch, Now
from luthier.training.checkpoint import restore, save
from tests.conftest import calibration, split
from tests.toys.helpers import model_of, rows_of_eight
from tests.unit.test_kinds_resume import assert_equal, everything

STEPS, SAVED = 12, (3, 7, 11)
TECHNIQUES: dict[str, Any] = {
    "adalora": {"initial_rank": 3, "target_rank": 2, "warmup": 0.1, "final": 0.5},
    "corda": {"rank": 2},
    "lora_xs": {"rank": 3},
    "lora_sb": {"rank": 3},
    "svfit": {"rank": 4},
}


def other_rows(rows: int, source: str) -> list[Batch]:
    """Calibration that has changed since."""
    return calibration(rows, f"{source} changed")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_fault_27_killed_and_resumed(engine: Any, now: Now, tmp_path: Path, name: str, architecture: str) -> None:
    """Fault 27: resuming equals the uninterrupted run bit for bit, though the rows for calibration are others by then."""

    def build(rows: Any = calibration) -> Any:
        return engine({name: TECHNIQUES[name]}, model=model_of(architecture), optimizer="adamw", calibration=rows)

    def go(run: Any, first: int) -> None:
        for i in range(first, STEPS):
            if first == 0 and i in SAVED:
                save(tmp_path / f"step-{i}", run, {"step": i})
            run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))

    run = build()
    go(run, 0)
    wanted = everything(run)
    for k in SAVED:
        fresh = build(other_rows)
        restore(tmp_path / f"step-{k}", fresh)
        go(fresh, k)
        assert_equal(everything(fresh), wanted)


@pytest.mark.parametrize("name", ["corda", "lora_sb"])
def test_other_rows_would_start_elsewhere(engine: Any, name: str) -> None:
    """What makes the test above one of the checkpoint."""
    found: list[list[Tensor]] = []
    for rows in (calibration, other_rows):
        run = engine({name: TECHNIQUES[name]}, model=model_of(), calibration=rows)
        found.append([one for own in run.tune.owns for one in own.frozen.values()])
    assert not any(torch.allclose(one, other) for one, other in zip(*found, strict=True))
