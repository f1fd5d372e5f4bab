"""Devices without fp64, such as Apple's: no technique asks them for it. The processor plays such a device, and the one owner of fp64,
`luthier.machine`, another processor beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import luthier
from luthier import draws, machine
from luthier.evaluate.likelihood import likelihoods
from luthier.generation.generate import _nucleus
from luthier.rows.encode import Encoded
from luthier.training.dryrun import _tensors
from tests.conftest import split
from tests.contracts.fixtures import MODELS, NOW, RUNS, end_stage, engine_of, rows_for, run_of
from tests.toys.helpers import model_of, toys  # noqa: F401

WIDENS = ("widened", "computed_wide", "total", "norm")
"""What of the owner goes to the processor."""


class WithoutFp64(TorchDispatchMode):
    """Refuses to make fp64 numbers of others, and to compute with both: on such a device the first is an error, and the second would be
    one of two devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elsewhere = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = _tensors((*args, *(kwargs or {}).values()))
        wide = any(one.dtype == torch.float64 for one in given)
        narrow = any(one.is_floating_point() and one.dtype != torch.float64 and one.ndim for one in given)
        makes = any(one.dtype == torch.float64 for one in _tensors((made,)))
        if not self.elsewhere and given and makes and (narrow or not wide):
            raise AssertionError(f"{func} makes fp64 numbers of {[one.dtype for one in given]}")
        return made


@contextmanager
def without_fp64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the processor have no fp64, but for the owner's."""
    mode = WithoutFp64()

    def on_processor(own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def call(*args: Any) -> Any:
            mode.elsewhere += 1
            try:
                return own(*args)
            finally:
                mode.elsewhere -= 1

        return call

    with monkeypatch.context() as patch:
        patch.setattr(machine, "WITHOUT_FP64", frozenset({"cpu"}))
        for name in WIDENS:
            patch.setattr(machine, name, on_processor(getattr(machine, name)))
        with mode:
            yield


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_no_technique_asks_a_device_for_fp64_that_has_none(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    """Every step summed its losses in fp64 on the device, and some techniques computed in it."""
    model, batch = model_of(MODELS.get(name, "llama"), layers=1).float(), rows_for([kind])
    with without_fp64(monkeypatch):
        batches = split(batch.to("cpu"), (5, 3))
        run = run_of(kind, name, model=model, dtype=torch.float32)
        run.tune.model.train()
        results = [run.step(batches, NOW._replace(step=step, learning_rate=0.01)) for step in range(4)]
        end_stage(run, NOW)
    assert all(result.loss == result.loss for result in results)


def test_answers_are_drawn_and_rows_measured_without_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    wanted_B = _nucleus(0.8, 0.9, 1)(logits_BV, torch.arange(6), 3)
    run = engine_of(model=model_of(layers=1).float(), dtype=torch.float32)
    rows = [Encoded("row", tuple(range(5, 12)), tuple(i >= 3 for i in range(7)), "", {}, 0, "text")]
    plain = likelihoods(run.tune, rows)
    with without_fp64(monkeypatch):
        assert torch.equal(_nucleus(0.8, 0.9, 1)(logits_BV, torch.arange(6), 3), wanted_B)
        found = likelihoods(run.tune, rows)
    assert found[0].nats == pytest.approx(plain[0].nats, rel=1e-6)


def test_draws_in_fp32_are_those_in_fp64_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    key_N = draws.keys(0, 1, draws.seeds_of([f"row{i}" for i in range(2000)]), torch.arange(2000))
    exact_N, normal_N = draws.uniform(key_N), draws.normal(key_N)
    with without_fp64(monkeypatch):
        cut_N, rough_N = draws.uniform(key_N), draws.normal(key_N)
    assert cut_N.dtype == torch.float32 and float(cut_N.max()) < 1.0
    assert torch.equal(cut_N.double(), (exact_N * 2**24).floor() / 2**24)
    assert rough_N.dtype == torch.float32 and float((rough_N - normal_N).abs().max()) < 1e-3


def test_what_is_refused_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(3)
    for wrong in (Tensor.double, lambda one: one.sum(dtype=torch.float64), lambda one: one * torch.ones(3, dtype=torch.float64)):
        with without_fp64(monkeypatch), pytest.raises(AssertionError, match="makes fp64 numbers"):
            wrong(values)
    with without_fp64(monkeypatch):
        assert machine.total(values) == 3.0 and machine.widened(values).dtype == torch.float64
        assert machine.widest(values).dtype == machine.computed_wide(torch.exp, values).dtype == torch.float32


def test_nobody_else_widens_to_fp64() -> None:
    """By text: paths that no test walks are held to it as well."""
    widens = re.compile(r"\.double\(|\.(to|sum|mean|norm|cumsum)\([^()]*float64")
    package = Path(luthier.__file__).parent
    found = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        if path.name != "machine.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if widens.search(line)
    ]
    assert not found
