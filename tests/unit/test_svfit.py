"""SVFit against its algebra: only singular values move, between vectors that stand still, and weight decay leaves them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Now, Place, Services, WeightDelta
from luthier.methods.weight_delta.svfit import svfit
from luthier.models.parts import map_parts
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import split
from tests.toys.helpers import gap, gradients, model_of, plain_gradients, rows_of_eight

PLACE = Place("hand", "weight", "mlp_up", 0)


def services_of(model: Any) -> Services:
    return RunServices(Tune(model, map_parts(model)), "svfit", Now())


def started(weight_OI: Tensor, rank: int | None) -> tuple[WeightDelta, dict[str, Tensor]]:
    value = svfit(rank=rank)
    return value, value.start(PLACE, weight_OI, services_of(model_of()))


@pytest.mark.parametrize(
    ("weight", "merged"),
    [([[3.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 1.0]]), ([[0.0, 3.0], [1.0, 0.0]], [[0.0, 4.0], [1.0, 0.0]])],
)
def test_the_largest_singular_value_goes_from_3_to_4(weight: list[list[float]], merged: list[list[float]]) -> None:
    weight_OI = torch.tensor(weight, dtype=torch.float64)
    value, tensors = started(weight_OI, 1)
    assert torch.equal(value.delta(tensors), torch.zeros_like(weight_OI))
    tensors["change"] = torch.tensor([1.0], dtype=torch.float64)
    torch.testing.assert_close(weight_OI + value.delta(tensors), torch.tensor(merged, dtype=torch.float64))


def test_the_gradient_pairs_left_vectors_with_outputs() -> None:
    """With W = [[0, 3], [1, 0]] and the weight's gradient [[1, 2], [5, 7]], sigma's is 2; with u and v exchanged it would be 5."""
    value, tensors = started(torch.tensor([[0.0, 3.0], [1.0, 0.0]], dtype=torch.float64), 1)
    change = tensors["change"].requires_grad_(True)
    (value.delta(tensors) * torch.tensor([[1.0, 2.0], [5.0, 7.0]], dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(change.grad, torch.tensor([2.0], dtype=torch.float64))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_are_those_of_the_weight_between_the_vectors(engine: Any, now: Now, architecture: str) -> None:
    model, batch = model_of(architecture), rows_of_eight()
    plain = plain_gradients(model, batch)
    run = engine({"svfit": {"rank": 5}}, model=model)
    wanted = {}
    for own in run.tune.owns:
        gradient_OI = plain[own.place.parameter]
        gradient_OI = gradient_OI.t() if own.place.module in run.tune.parts.transposed else gradient_OI
        frozen = own.masters()
        core_RR = frozen["left"].T @ gradient_OI[own.place.start : own.place.stop] @ frozen["right"].T
        wanted[own.trained["change"].name] = core_RR.diagonal()
    assert gap(gradients(run, [batch], now), wanted) < 1e-9


def test_only_the_chosen_singular_values_change(engine: Any, now: Now) -> None:
    model = model_of()
    base = {name: one.detach().clone() for name, one in model.named_parameters()}
    run = engine({"svfit": {"rank": 5}}, model=model, optimizer="adamw")
    vectors = {own.name: own.masters() for own in run.tune.owns}
    assert all(one.numel == 5 for one in run.tune.trained.values()) and len(run.tune.trained) == 14
    for i in range(3):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))
    for own in run.tune.owns:
        tensors = own.masters()
        delta_OI = own.value.delta(tensors)
        core_RR = tensors["left"].T @ delta_OI @ tensors["right"].T
        torch.testing.assert_close(core_RR, torch.diag(tensors["change"]))
        assert int(torch.linalg.matrix_rank(delta_OI)) == 5
        assert all(torch.equal(tensors[name], vectors[own.name][name]) for name in ("left", "right"))
        assert tensors["change"].all()
    assert all(torch.equal(one, base[name]) for name, one in model.named_parameters())


def test_weight_decay_moves_nothing(engine: Any, now: Now) -> None:
    """Decay of sigma itself would shrink the base's weight; what trains is its change, a vector."""
    run = engine("svfit", model=model_of(), optimizer={"adamw": {"weight_decay": 0.5}})
    for one in run.tune.trained.values():
        run.tune.set({one.name: torch.ones_like(one.master)})
        one.gradient = torch.zeros_like(one.master)
    run.chain.step(now)
    assert all(torch.equal(one.master, torch.ones_like(one.master)) for one in run.tune.trained.values())


def test_all_singular_values_are_the_weight() -> None:
    weight_OI = model_of().model.layers[0].mlp.up_proj.weight.detach().float()
    value, tensors = started(weight_OI, None)
    assert tensors["change"].shape == (32,)
    size_K = torch.linalg.svdvals(weight_OI)
    torch.testing.assert_close(value.delta({**tensors, "change": size_K}), weight_OI, rtol=0, atol=1e-5)


def test_exchanged_left_vectors_cannot_be_fitted() -> None:
    """With u1 and u2 exchanged, the best sigma leaves sqrt(S1^2 + S2^2), though the change has rank 1."""
    rng = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(6, 4, generator=rng, dtype=torch.float64)
    left_OK, size_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    target_OI = left_OK[:, [1, 0, 2, 3]] @ torch.diag(size_K) @ right_KI
    wanted_OI = target_OI - weight_OI
    # The rounding of the two weights is no rank.
    assert int(torch.linalg.matrix_rank(wanted_OI, atol=1e-9)) == 1
    value, tensors = started(weight_OI, None)
    columns = [value.delta({**tensors, "change": one}).flatten() for one in torch.eye(4, dtype=torch.float64)]
    best = torch.linalg.lstsq(torch.stack(columns, 1), wanted_OI.flatten()[:, None]).solution[:, 0]
    left_over = (wanted_OI - value.delta({**tensors, "change": best})).norm()
    torch.testing.assert_close(left_over, (size_K[0] ** 2 + size_K[1] ** 2).sqrt())


def test_too_large_a_rank_is_refused_by_name(engine: Any) -> None:
    # Keys and values are narrower than the model.
    with pytest.raises(LuthierError, match="a 16 x 32 matrix has fewer than 20 singular vectors"):
        engine({"svfit": {"rank": 20}}, model=model_of())
    with pytest.raises(LuthierError, match="`rank` is 0"):
        svfit(rank=0)
