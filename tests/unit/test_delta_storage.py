"""The file of a delta: what is read is what was written, and nothing in a file is taken on trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from luthier import __version__
from luthier.delta import Base, Delta, Dense, LowRank, Sparse
from luthier.delta.forms import Corrections, bits
from luthier.errors import LuthierError

BASE = Base("a-model", "f" * 64, "float32")


def every_form() -> Delta:
    corrections = Corrections(torch.tensor([1]), torch.tensor([1.0]), torch.tensor([-0.0]))
    shape = torch.Size([2, 3])
    return Delta(
        {
            "dense": (Dense(torch.arange(6.0).reshape(2, 3), corrections),),
            "sparse": (Sparse(torch.tensor([0, 5], dtype=torch.int32), torch.tensor([1.5, -2.0]), shape, corrections),),
            "both": (
                Dense(torch.ones(2, 3, dtype=torch.bfloat16)),
                LowRank(torch.ones(1, 4), torch.ones(4, 2), 0.1, shape, 1, 2, transposed=True),
            ),
            "nothing": (Sparse(torch.empty(0, dtype=torch.int32), torch.empty(0), shape),),
        },
        BASE,
    )


def test_every_form_survives_the_file(tmp_path: Path) -> None:
    delta = every_form()
    delta.save(tmp_path / "new" / "delta.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["delta.safetensors"]
    found = Delta.load(tmp_path / "new" / "delta.safetensors")
    assert found.base == BASE and list(found) == list(delta)
    for name, forms in delta.changes.items():
        for form, other in zip(forms, found[name], strict=True):
            assert type(form) is type(other) and form.shape == other.shape
            assert form.spread().dtype == other.spread().dtype and torch.equal(form.spread(), other.spread())
            if not isinstance(form, LowRank) and not isinstance(other, LowRank):
                assert (form.corrections is None) == (other.corrections is None)
                if form.corrections is not None and other.corrections is not None:
                    for part in ("index", "before", "after"):
                        assert torch.equal(bits(getattr(form.corrections, part)), bits(getattr(other.corrections, part)))
            elif isinstance(form, LowRank) and isinstance(other, LowRank):
                assert (form.scale, form.start, form.stop, form.transposed) == (
                    other.scale,
                    other.start,
                    other.stop,
                    True,
                )


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    every_form().save(tmp_path / "delta.safetensors")
    with safe_open(tmp_path / "delta.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["luthier"] == __version__ and metadata["format"] == "luthier delta 1"
    assert json.loads(metadata["base"]) == {"name": "a-model", "fingerprint": "f" * 64, "dtype": "float32"}
    assert json.loads(metadata["changes"])["sparse"] == [{"form": "sparse", "shape": [2, 3]}]


def test_a_sparse_file_is_smaller_than_a_dense_one(tmp_path: Path) -> None:
    base, tuned = torch.zeros(10_000), torch.zeros(10_000)
    tuned[:4_900] = 1.0
    Delta.between({"a": base}, {"a": tuned}).save(tmp_path / "sparse")
    tuned[:] = 1.0
    Delta.between({"a": base}, {"a": tuned}).save(tmp_path / "dense")
    assert (tmp_path / "sparse").stat().st_size < (tmp_path / "dense").stat().st_size


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="cannot be read") as error:
        Delta.load(tmp_path / "absent.safetensors")
    assert "absent.safetensors" in error.value.where
    (tmp_path / "text").write_text("not a tensor")
    with pytest.raises(LuthierError, match="cannot be read"):
        Delta.load(tmp_path / "text")
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle")
    with pytest.raises(LuthierError, match="cannot be read"):
        Delta.load(tmp_path / "pickle")
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(LuthierError, match="no delta"):
        Delta.load(tmp_path / "weights.safetensors")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    every_form().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(LuthierError, match="cannot be read"):
        Delta.load(path)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("sparse|0|index", torch.tensor([0, 6], dtype=torch.int32)),
        ("sparse|0|index", torch.tensor([-1, 5], dtype=torch.int32)),
        ("sparse|0|index", torch.tensor([0.0, 5.0])),
        ("sparse|0|index", torch.tensor([0], dtype=torch.int32)),
        ("sparse|0|index", None),
        ("dense|0|change", torch.ones(3, 2)),
        ("dense|0|corrections.index", torch.tensor([99])),
        ("dense|0|corrections.after", None),
        ("both|1|up", torch.ones(2, 4)),
        ("both|1|up", torch.ones(4)),
        ("both|1|down", torch.ones(4, 3)),
        ("both|1|down", torch.ones(3, 2)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, part: str, value: Any) -> None:
    path = tmp_path / "delta.safetensors"
    every_form().save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in {**load_file(path), part: value}.items() if tensor is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(LuthierError, match="damaged"):
        Delta.load(path)


@pytest.mark.parametrize("changes", ["[]", "{", '{"dense": [{"form": "magic", "shape": [2, 3]}]}', '{"dense": [{}]}'])
def test_metadata_that_do_not_fit_are_refused(tmp_path: Path, changes: str) -> None:
    path = tmp_path / "delta.safetensors"
    every_form().save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "changes": changes})
    with pytest.raises(LuthierError, match="damaged"):
        Delta.load(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LuthierError, match="cannot be written"):
        every_form().save(tmp_path / "file" / "delta.safetensors")
