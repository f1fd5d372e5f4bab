"""The base and snapshots: exchanged and put back, in the middle of anything, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from luthier.columns.chunked import resolve
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.training.services import view_of
from tests.conftest import split
from tests.toys.helpers import logits_of, model_of, rows_of_eight, toys  # noqa: F401

TUNES = [
    "full",
    "half",
    "some_rows",
    "some_cols",
    "some_entries",
    "keep_entries",
    "lora",
    "svd_start",
    "growing",
    "scale_shift",
    "bottleneck",
    "plain_prefix",
    "plain_prompt",
    ["svd_start", {"some_rows": {"target_modules": ["mlp_down"]}}],
    ["some_entries", "lora", "bottleneck"],
]


def steps(run: Any, now: Now, first: int, count: int) -> None:
    for i in range(first, first + count):
        run.step(split(rows_of_eight(), (5, 3)), now._replace(step=i))


def loss_of(run: Any, now: Now) -> Tensor:
    batch = rows_of_eight()
    units = [(float(batch.supervised),)]
    sums = run.objective.total(run.tune, batch, units, now, first=True, services_of=lambda slot: run.services(slot, now))
    return sums.loss  # type: ignore[no-any-return]


def nll_of(run: Any, now: Now) -> Tensor:
    return run.services("test", now).forward(rows_of_eight(), ["nll"])["nll"]  # type: ignore[no-any-return]


def taken(run: Any) -> dict[str, Tensor]:
    found = {name: one.gradient.clone() for name, one in run.tune.trained.items() if one.gradient is not None}
    run.tune.free_gradients()
    return found


@pytest.mark.parametrize("where", ["base", "early"])
@pytest.mark.parametrize("tune", TUNES, ids=str)
def test_another_point_in_time_may_be_visited_between_forward_and_backward(engine: Any, now: Now, tune: Any, where: str) -> None:
    model = model_of()
    base = logits_of(copy.deepcopy(model), rows_of_eight())
    run = engine(tune, model=model, optimizer="adamw", keep_base=True)
    steps(run, now, 0, 1)
    run.tune.snapshot("early")
    early = nll_of(run, now)
    steps(run, now, 1, 2)
    late = nll_of(run, now)
    loss_of(run, now).backward()
    plain = taken(run)
    loss = loss_of(run, now)
    with run.tune.at(where):
        if where == "base":
            assert torch.equal(logits_of(model, rows_of_eight()), base)
        else:
            assert torch.equal(nll_of(run, now), early)
    loss.backward()
    visited = taken(run)
    assert visited.keys() == plain.keys() and plain
    assert all(torch.equal(visited[name], plain[name]) for name in plain)
    assert torch.equal(nll_of(run, now), late)


@pytest.mark.parametrize("tune", TUNES, ids=str)
def test_snapshots_come_in_any_order_and_one_can_be_gone_back_to(engine: Any, now: Now, tune: Any) -> None:
    run = engine(tune, model=model_of(), optimizer="adamw")
    seen = {}
    for name, first in (("one", 0), ("two", 2), ("three", 4)):
        steps(run, now, first, 2)
        run.tune.snapshot(name)
        seen[name] = nll_of(run, now)
    assert len({float(value.sum()) for value in seen.values()}) == 3
    for name in ("two", "one", "three", "one"):
        with run.tune.at(name):
            assert torch.equal(nll_of(run, now), seen[name])
        assert torch.equal(nll_of(run, now), seen["three"])
    run.tune.go_back("one")
    assert torch.equal(nll_of(run, now), seen["one"])
    steps(run, now, 6, 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tune", TUNES, ids=str)
def test_the_reference_is_a_separate_copy_of_the_base(engine: Any, now: Now, tune: Any, tied: bool) -> None:
    model, batch = model_of(tied=tied), rows_of_eight()
    copied = copy.deepcopy(model)
    run = engine(tune, model=model, optimizer="adamw", keep_base=True)
    steps(run, now, 0, 3)
    view = view_of(run.tune, batch, resolve(["nll", "reference_nll", "kl", "kl_forward"]), now)
    logits_NV = logits_of(copied, batch)[view.row_N, view.position_N - 1]
    expected_N = functional.cross_entropy(logits_NV, view.label_N, reduction="none")
    assert torch.allclose(view["reference_nll"], expected_N, rtol=1e-12, atol=1e-12)
    assert not view["reference_nll"].requires_grad and view["kl"].requires_grad
    assert (view["kl"] > 0).any() and not torch.allclose(view["nll"], expected_N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tune", ["full", "half", "some_rows", "some_entries", "lora", "growing", "scale_shift", "bottleneck"])
def test_the_distance_to_the_base_is_exactly_zero_at_step_zero(engine: Any, now: Now, tune: str, dtype: torch.dtype) -> None:
    run = engine(tune, dtype=dtype, keep_base=True)
    view = view_of(run.tune, rows_of_eight(), resolve(["kl", "kl_forward"]), now)
    assert float(view["kl"].abs().max()) == 0.0 and float(view["kl_forward"].abs().max()) == 0.0


@pytest.mark.parametrize("tune", ["full", "some_rows", "svd_start", "keep_entries"])
def test_a_base_that_was_not_kept_is_an_error_and_not_another_model(engine: Any, now: Now, tune: str) -> None:
    run = engine(tune, optimizer="adamw")
    steps(run, now, 0, 3)
    with pytest.raises(LuthierError, match="not kept"), run.tune.off():
        pass


def test_what_stands_beside_the_weights_needs_no_copy(engine: Any, now: Now) -> None:
    model = model_of()
    base = logits_of(copy.deepcopy(model), rows_of_eight())
    run = engine("lora", model=model)
    steps(run, now, 0, 2)
    with run.tune.off(), run.tune.off():
        assert torch.equal(logits_of(model, rows_of_eight()), base)
    assert not run.tune.altered and all(one.start is None for one in run.tune.trained.values())


@pytest.mark.parametrize("tune", ["plain_prompt", "plain_prefix"])
def test_the_base_has_no_prompt_before_the_first_step_either(engine: Any, now: Now, tune: str) -> None:
    run, plain = engine(tune, model=model_of()), engine("some_rows", model=model_of())
    with run.tune.off():
        assert torch.equal(nll_of(run, now), nll_of(plain, now))
    assert not torch.equal(nll_of(run, now), nll_of(plain, now))


@pytest.mark.parametrize("tune", ["full", "some_rows", "svd_start"])
def test_before_the_first_step_the_base_needs_no_copy(engine: Any, now: Now, tune: str) -> None:
    run, plain = engine(tune, model=model_of()), engine("lora", model=model_of())
    with run.tune.off():
        torch.testing.assert_close(nll_of(run, now), nll_of(plain, now), rtol=1e-10, atol=1e-12)


def test_left_bare_the_weights_stay_as_they_are(engine: Any, now: Now) -> None:
    """What stands beside them is left out, and what trained in them stays."""
    run, alone = engine(["some_rows", "scale_shift"], model=model_of()), engine("some_rows", model=model_of())
    for one in (run, alone):
        one.tune.set({name: values.master + 0.1 for name, values in one.tune.trained.items()})
    with run.tune.bare():
        with run.tune.bare():
            pass
        assert torch.equal(nll_of(run, now), nll_of(alone, now))
    assert not torch.equal(nll_of(run, now), nll_of(alone, now))


def test_a_snapshot_moves_by_a_share(engine: Any) -> None:
    tune = engine("plain_prompt", model=model_of(layers=1)).tune
    ((name, one),) = tune.trained.items()
    begin = one.master.detach().clone()
    tune.snapshot("far", 0.25)
    tune.set({name: begin + 1.0})
    tune.snapshot("far", 0.25)
    tune.snapshot("near")
    found = {when: tune.snapshots[when][f"master|{name}"] for when in ("far", "near")}
    assert torch.allclose(found["far"], begin + 0.25, rtol=1e-14) and torch.equal(found["near"], begin + 1.0)
    assert not any(values.requires_grad for values in found.values())
    leaf = one.leaf
    tune.go_back("far")
    assert one.leaf is leaf and torch.equal(one.master, found["far"])


def test_an_unknown_snapshot_is_an_error(engine: Any) -> None:
    with pytest.raises(LuthierError, match="no snapshot `best`"), engine().tune.at("best"):
        pass


@pytest.mark.parametrize("tune", ["lora", "bottleneck", "plain_prefix", "plain_prompt", "scale_shift"])
def test_detaching_leaves_a_plain_model(engine: Any, now: Now, tune: str) -> None:
    model = model_of()
    base = logits_of(copy.deepcopy(model), rows_of_eight())
    run = engine(tune, model=model)
    steps(run, now, 0, 1)
    run.tune.detach()
    assert torch.equal(logits_of(model, rows_of_eight()), base)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reference_passes_run_without_dropout_and_leave_training_mode_alone(engine: Any, now: Now) -> None:
    model = model_of("gpt2")
    for block in model.transformer.h:
        block.mlp.dropout.p = 0.5
    copied = copy.deepcopy(model).eval()
    run = engine("lora", model=model)
    model.train()
    view = view_of(run.tune, rows_of_eight(), resolve(["reference_nll"]), now)
    logits_NV = logits_of(copied, rows_of_eight())[view.row_N, view.position_N - 1]
    expected_N = functional.cross_entropy(logits_NV, view.label_N, reduction="none")
    assert torch.allclose(view["reference_nll"], expected_N, rtol=1e-12, atol=1e-12)
    assert model.training
