"""The file of a delta: one safetensors file whose metadata say what its tensors are and which base they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier import disk
from luthier.delta.forms import Corrections, Dense, Form, LowRank, Sparse
from luthier.errors import LuthierError
from luthier.machine import versions

FORMAT = "luthier delta 1"
_CORRECTIONS = ("corrections.index", "corrections.before", "corrections.after")


class Base(NamedTuple):
    """What a delta belongs to."""

    name: str = ""
    fingerprint: str = ""
    """As `luthier.models.fingerprint` computes it; empty: unknown."""
    dtype: str = ""
    """Of the weights, e.g. `float32`."""

    def __str__(self) -> str:
        known = self.name or "an unnamed model"
        return f"{known} ({', '.join(part for part in (self.dtype, self.fingerprint[:12]) if part)})"


def save(path: Path, changes: Mapping[str, tuple[Form, ...]], base: Base) -> None:
    """Write a delta beside its place and rename it, so that a reader never sees half a file.

    Raises:
        LuthierError: the disk is full, or the folder cannot be written to.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, list[dict[str, Any]]] = {}
    for name, forms in changes.items():
        described[name] = []
        for number, form in enumerate(forms):
            facts, parts = _describe(form)
            described[name].append(facts)
            tensors.update({f"{name}|{number}|{part}": one for part, one in parts.items()})
    metadata = {
        "format": FORMAT,
        "luthier": versions()["luthier"],
        "base": json.dumps(base._asdict()),
        "changes": json.dumps(described),
    }
    with disk.written(path) as beside:
        save_file(_apart(tensors), beside, metadata)
        _sort_metadata(beside)


def _sort_metadata(path: Path) -> None:
    """Equal deltas shall be equal bytes, and safetensors writes metadata in random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:
            raise ValueError(f"a header of {len(text)} bytes does not fit into {size}")
        file.seek(8)
        file.write(text.ljust(size))


def load(path: Path) -> tuple[dict[str, tuple[Form, ...]], Base]:
    """Read a delta's file.

    Raises:
        LuthierError: there is no such file, it holds no delta, or it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        fix = "name a file that Delta.save wrote" if path.exists() else "check the path"
        raise LuthierError(f"the delta cannot be read: {error}", where=str(path), fix=fix) from error
    if metadata.get("format") != FORMAT:
        raise LuthierError(
            f"this is no delta ({metadata.get('format') or 'without a format'})",
            where=str(path),
            fix="name a file that Delta.save wrote; Delta.between reads whole models",
        )
    try:
        base = Base(**json.loads(metadata["base"]))
        changes = {
            name: tuple(_form(facts, tensors, f"{name}|{number}|") for number, facts in enumerate(forms))
            for name, forms in json.loads(metadata["changes"]).items()
        }
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise LuthierError(
            f"the delta is damaged: {type(error).__name__} {error}", where=str(path), fix="copy or make it again"
        ) from error
    return changes, base


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without shared memory, which a safetensors file cannot express."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if memory in seen else tensor.contiguous()
        seen.add(memory)
    return apart


def _describe(form: Form) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A form as plain facts and tensors."""
    if isinstance(form, LowRank):
        place = {"start": form.start, "stop": form.stop, "transposed": form.transposed}
        facts = {"form": "low-rank", "shape": list(form.shape), "scale": form.scale, **place}
        return facts, {"up": form.up_OR, "down": form.down_RI}
    parts = {"change": form.change}
    if form.corrections is not None:
        exact = form.corrections
        parts |= dict(zip(_CORRECTIONS, (exact.index, exact.before, exact.after), strict=True))
    if isinstance(form, Sparse):
        parts["index"] = form.index
    return {"form": "sparse" if isinstance(form, Sparse) else "dense", "shape": list(form.shape)}, parts


def _form(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Form:
    """A form from its facts and tensors, checked: nothing in a file is taken on trust."""
    parts = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    shape = torch.Size(facts["shape"])
    form: Form
    if facts["form"] == "low-rank":
        up_OR, down_RI = parts["up"], parts["down"]
        form = LowRank(up_OR, down_RI, float(facts["scale"]), shape, facts["start"], facts["stop"], bool(facts["transposed"]))
        _check_low_rank(form)
        return form
    corrections = None
    if _CORRECTIONS[0] in parts:
        corrections = Corrections(*(parts[key] for key in _CORRECTIONS))
        _check_index(corrections.index, shape, corrections.before, corrections.after)
    if facts["form"] == "sparse":
        _check_index(parts["index"], shape, parts["change"])
        return Sparse(parts["index"], parts["change"], shape, corrections)
    if facts["form"] != "dense" or parts["change"].shape != shape:
        raise ValueError(f"a `{facts['form']}` change of shape {tuple(parts['change'].shape)} for {tuple(shape)}")
    return Dense(parts["change"], corrections)


def _check_low_rank(form: LowRank) -> None:
    *experts, outputs, inputs = (*form.shape[:-2], *form.shape[-2:][::-1]) if form.transposed else form.shape
    width = len(range(outputs)[form.start : form.stop])
    found = (*form.up_OR.shape, *form.down_RI.shape)
    rank = form.up_OR.shape[-1]
    if len(experts) > 1 or found != (*experts, width, rank, *experts, rank, inputs):
        raise ValueError(f"factors {found} for {width} outputs of {tuple(form.shape)}")


def _check_index(index: Tensor, shape: torch.Size, *values: Tensor) -> None:
    if index.dtype not in (torch.int32, torch.int64) or index.ndim != 1 or any(one.shape != index.shape for one in values):
        raise ValueError("an index that does not go with its values")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= shape.numel()):
        raise ValueError(f"an index outside {tuple(shape)}")
