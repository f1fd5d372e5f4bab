"""Checkpoints: everything a run needs to go on to the same weights, bit for bit. Written beside and renamed; only safetensors and JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.errors import LuthierError
from luthier.training.engine import Engine
from luthier.tune.change import capture, put_back

TENSORS, FACTS = "state.safetensors", "state.json"


def _flat(engine: Engine) -> dict[str, Any]:
    """All that changes during a run, by path."""
    values: dict[str, Any] = {**capture(engine.tune)}
    for name, snapshot in engine.tune.snapshots.items():
        values.update({f"snapshot|{name}|{key}": value for key, value in snapshot.items()})
    values.update({f"chain|{path}": value for path, value in engine.chain.tensors().items()})
    for slot, state in engine.states.items():
        values.update({f"state|{slot}|{key}": value for key, value in state.items()})
    return values


def save(folder: Path, engine: Engine, facts: Mapping[str, Any]) -> Path:
    """Write a checkpoint.

    Args:
        folder: where it shall stand; it appears there only when complete.
        engine: the run.
        facts: plain facts: the step, the recipe's hash, the history.
    """
    values = _flat(engine)
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({key: value.detach().contiguous().cpu().clone() for key, value in tensors.items()}, beside / TENSORS)
    digest = hashlib.sha256((beside / TENSORS).read_bytes()).hexdigest()
    (beside / FACTS).write_text(json.dumps({"facts": dict(facts), "plain": plain, "sha256": digest}, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
    return folder


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The tensors, plain values and facts of a checkpoint.

    Raises:
        LuthierError: the folder is no checkpoint, or it is damaged.
    """
    try:
        written = json.loads((folder / FACTS).read_text())
        digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        if digest != written["sha256"]:
            raise ValueError("the checksum differs")
        return load_file(folder / TENSORS), written["plain"], written["facts"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LuthierError(
            f"this checkpoint cannot be read: {error}", where=str(folder), mend="resume from an earlier one"
        ) from error


def restore(folder: Path, engine: Engine) -> dict[str, Any]:
    """Bring a freshly attached run to a checkpoint's point. Returns the facts."""
    tensors, plain, facts = read(folder)
    tune = engine.tune
    for name in tune.trained:
        if f"master|{name}" not in tensors:
            raise LuthierError(f"the checkpoint lacks `{name}`", where=str(folder), mend="resume with the recipe it was made by")
    put_back(tune, tensors)
    device = next(tune.model.parameters()).device
    for key, value in {**tensors, **plain}.items():
        kind, _, rest = key.partition("|")
        if kind == "chain":
            engine.chain.load({rest: value})
        elif kind == "state":
            slot, _, name = rest.partition("|")
            engine.states.setdefault(slot, {})[name] = value.to(device) if isinstance(value, Tensor) else value
        elif kind == "snapshot":
            name, _, path = rest.partition("|")
            tune.snapshots.setdefault(name, {})[path] = value.to(device)
    return facts


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder that can be read."""
    found = sorted(folder.glob("step-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        try:
            read(path)
        except LuthierError:
            continue
        return path
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints."""
    found = sorted(folder.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in found[: max(0, len(found) - keep)]:
        shutil.rmtree(path)
