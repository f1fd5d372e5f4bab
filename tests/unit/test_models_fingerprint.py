"""A model's fingerprint: hand-worked, and sensitive to everything that is saved."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from luthier.models.fingerprint import fingerprint
from luthier.models.load import load_model
from luthier.models.tiny import tiny


class Small(nn.Module):
    """Two parameters, one buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        self.bias = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))
        self.register_buffer("steps", torch.tensor([3], dtype=torch.int64))
        self.register_buffer("scratch", torch.tensor([9.0]), persistent=False)


def test_the_hash_is_the_documented_one() -> None:
    expected = hashlib.sha256()
    expected.update(b"bias\ntorch.bfloat16\n()\n" + struct.pack("<H", 0x3F00))
    expected.update(b"steps\ntorch.int64\n(1,)\n" + struct.pack("<q", 3))
    expected.update(b"weight\ntorch.float32\n(1, 2)\n" + struct.pack("<ff", 1.0, -2.0))
    assert fingerprint(Small()) == expected.hexdigest()


def test_everything_that_is_saved_counts() -> None:
    base = fingerprint(Small())
    changed = Small()
    changed.weight.data = torch.nextafter(changed.weight.data, torch.tensor(9.0))
    reshaped = Small()
    reshaped.weight.data = reshaped.weight.data.T
    recast = Small().double()
    stepped = Small()
    stepped.get_buffer("steps").add_(1)
    prints = [fingerprint(model) for model in (changed, reshaped, recast, stepped)]
    assert len({base, *prints}) == 5

    scratched = Small()
    scratched.get_buffer("scratch").add_(1)
    scratched.weight.requires_grad_(False)
    assert fingerprint(scratched) == base


def test_the_layout_in_memory_does_not_count() -> None:
    plain, strided = nn.Linear(3, 4), nn.Linear(3, 4)
    strided.load_state_dict(plain.state_dict())
    strided.weight.data = strided.weight.data.T.contiguous().T
    assert not strided.weight.is_contiguous()
    assert fingerprint(strided) == fingerprint(plain)


def test_a_tied_tensor_counts_once() -> None:
    tied = tiny("llama", tied=True)
    copied = tiny("llama", tied=False)
    copied.load_state_dict(tied.state_dict())
    assert fingerprint(tied) != fingerprint(copied)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "bert", "mixtral"])
def test_saving_and_loading_keeps_the_fingerprint(architecture: str, tmp_path: Path) -> None:
    """Fault 22: ties, and with them the fingerprint, survive a save and a reload."""
    model = tiny(architecture)
    model.save_pretrained(tmp_path)
    assert fingerprint(load_model(str(tmp_path))) == fingerprint(model)
