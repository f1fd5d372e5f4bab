"""Which number type and which device a run gets, on machines other than this one."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import LuthierError
from luthier.training.precision import native_bf16, pick, pick_device

FEATURES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@pytest.mark.parametrize("number", [0, 1])
def test_a_processor_computes_in_bf16_where_one_of_its_units_does(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for feature in FEATURES:
        monkeypatch.setattr(torch.cpu, feature, lambda: False, raising=False)
    assert not native_bf16(cpu) and pick("auto", cpu)[0] == torch.float32
    monkeypatch.setattr(torch.cpu, FEATURES[number], lambda: True)
    assert native_bf16(cpu) and pick("auto", cpu)[0] == torch.bfloat16
    for feature in FEATURES:
        monkeypatch.delattr(torch.cpu, feature)
    assert not native_bf16(cpu), "a torch that cannot tell was taken to have said yes"


def test_an_emulated_bf16_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for feature in FEATURES:
        monkeypatch.setattr(torch.cpu, feature, lambda: True, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not native_bf16(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert native_bf16(torch.device("cuda"))
    assert native_bf16(torch.device("mps")) and not native_bf16(torch.device("meta"))


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cpu", "cuda", "cuda:1"):
        assert pick_device(name) == torch.device(name)
    for name in ("cuda:2", "mps", "cpu:0", "tpu"):
        with pytest.raises(LuthierError, match=f"there is no device `{name}` on this machine") as caught:
            pick_device(name)
        assert caught.value.fix == "use auto, or one of: cpu, cuda:0, cuda:1"


def test_the_device_of_a_recipe_that_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for available, wanted in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda available=available: available)
        assert pick_device("auto") == torch.device(wanted)
