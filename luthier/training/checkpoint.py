"""Checkpoints: everything a run needs to go on to the same weights, bit for bit. Written beside and renamed; only safetensors and JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier import disk
from luthier.errors import LuthierError, Say, silent
from luthier.models.sharding import whole
from luthier.training.engine import Engine
from luthier.tune.change import capture, hold_still, put_back

TENSORS, FACTS = "state.safetensors", "state.json"


def _flat(engine: Engine) -> dict[str, Any]:
    """All that changes during a run, by path."""
    values: dict[str, Any] = {**capture(engine.tune)}
    for name, snapshot in engine.tune.snapshots.items():
        values.update({f"snapshot|{name}|{key}": value for key, value in snapshot.items()})
    values.update({f"still|{name}": one.forgotten for name, one in engine.tune.trained.items() if one.still})
    values.update({f"chain|{path}": value for path, value in engine.chain.tensors().items()})
    for kind, states in (("state", engine.states), ("best", engine.best_states)):
        values.update({f"{kind}|{slot}|{key}": value for slot, state in states.items() for key, value in state.items()})
    return values


def save(folder: Path, engine: Engine, facts: Mapping[str, Any], *, moments: bool = True) -> Path:
    """Write a checkpoint.

    Args:
        folder: where it shall stand; it appears there only when complete, and one that stood there stays until then.
        engine: the run; its first process writes, with all numbers of a model that is spread over several.
        facts: plain facts: the step, the recipe's hash, the history.
        moments: with the optimizer's state, without which no further step can be taken.

    Raises:
        LuthierError: the disk is full or cannot be written to; nothing half-written is left, and earlier checkpoints stand.
    """
    values = {key: value for key, value in _flat(engine).items() if moments or not key.startswith("chain|")}
    tensors = {key: whole(value.detach()) for key, value in values.items() if isinstance(value, Tensor)}
    if not engine.world.is_first:
        return folder
    plain = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
    run = folder.parent.parent
    fix = f"keep fewer checkpoints (train.keep_checkpoints), or save more seldom (train.save_every); then train on: --resume {run}"
    with disk.written(folder, fix) as beside:
        beside.mkdir()
        save_file({key: value.contiguous().cpu().clone() for key, value in tensors.items()}, beside / TENSORS)
        told = {"facts": dict(facts), "plain": plain, "sha256": disk.sha256(beside / TENSORS)}
        (beside / FACTS).write_text(json.dumps({**told, "own_sha256": _own_sha256(told)}, indent=1), encoding="utf-8")
    return folder


def _own_sha256(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def check(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain values and facts of a checkpoint whose files are as they were written.

    Raises:
        LuthierError: the folder is no checkpoint, or it is damaged.
    """
    try:
        told = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if told.pop("own_sha256") != _own_sha256(told):
            raise ValueError(f"the checksum differs ({FACTS})")
        if told["sha256"] != disk.sha256(folder / TENSORS):
            raise ValueError(f"the checksum differs ({TENSORS})")
        return told["plain"], told["facts"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(folder, error) from error


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The tensors, plain values and facts of a checkpoint.

    Raises:
        LuthierError: the folder is no checkpoint, or it is damaged.
    """
    plain, facts = check(folder)
    try:
        return load_file(folder / TENSORS), plain, facts
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> LuthierError:
    reason = f"{type(error).__name__} {error}" if isinstance(error, LookupError | TypeError | AttributeError) else str(error)
    return LuthierError(f"this checkpoint cannot be read: {reason}", where=str(folder), fix="resume from an earlier one")


def restore(folder: Path, engine: Engine) -> dict[str, Any]:
    """Bring a freshly attached run to a checkpoint's point. Returns the facts."""
    tensors, plain, facts = read(folder)
    tune = engine.tune
    for name, one in tune.trained.items():
        if f"master|{name}" not in tensors and not one.changes:
            raise LuthierError(f"the checkpoint lacks `{name}`", where=str(folder), fix="resume with the recipe it was made by")
    put_back(tune, tensors)
    device = next(tune.model.parameters()).device
    snapshots: dict[str, dict[str, Tensor]] = {}
    for key, forgotten in plain.items():
        if key.startswith("still|"):
            hold_still(tune, key.removeprefix("still|"), forget=forgotten)
    for key, value in {**tensors, **plain}.items():
        kind, _, rest = key.partition("|")
        if kind == "chain":
            engine.chain.load({rest: value})
        elif kind in ("state", "best"):
            slot, _, name = rest.partition("|")
            states = engine.states if kind == "state" else engine.best_states
            states.setdefault(slot, {})[name] = value.to(device) if isinstance(value, Tensor) else value
        elif kind == "snapshot":
            name, _, path = rest.partition("|")
            snapshots.setdefault(name, {})[path] = value.to(device)
    tune.snapshots.update(snapshots)
    return facts


def stored(folder: Path) -> list[Path]:
    """The checkpoints in a folder, readable or not, the newest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def latest(folder: Path, say: Say = silent) -> Path | None:
    """The newest checkpoint in a run's folder that can be read; none where there is none at all.

    Args:
        folder: holds the checkpoints.
        say: hears of each that was passed over, and why.

    Raises:
        LuthierError: there are checkpoints, and none can be read: what they held would be lost without a word.
    """
    passed: list[str] = []
    for path in stored(folder):
        try:
            check(path)
        except LuthierError as error:
            passed.append(f"{path.name}: {error.what}")
            say(f"passed over {passed[-1]}")
            continue
        return path
    if passed:
        raise LuthierError(
            "none of this run's checkpoints can be read: " + "; ".join(passed),
            where=str(folder),
            fix="bring one back from a copy, or delete them all to begin again at the first step",
        )
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints, and nothing before one of those that stay was read and found whole."""
    found = stored(folder)
    if len(found) > keep and any(_whole(path) for path in found[:keep]):
        for path in found[keep:]:
            disk.remove(path)


def _whole(folder: Path) -> bool:
    try:
        check(folder)
    except LuthierError:
        return False
    return True
