"""CorDA against its algebra: the covariance, its damping, which components are cut out, and what they train like."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, Place
from luthier.methods.weight_delta._covariance import RESCALES, covariances, damped, oriented, single_rows
from luthier.methods.weight_delta.corda import corda
from luthier.models.parts import map_parts
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import calibration, split
from tests.toys.helpers import gap, gradients, model_of, plain_gradients, rows_of_eight

PLACE = Place("hand", "weight", "mlp_up", 0)
EYE = torch.eye(2, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Reads:
    """Services for one place that reads given inputs."""

    def __init__(self, x_NI: Tensor) -> None:
        self.x_NI, self.parts = x_NI, SimpleNamespace(select=lambda target_modules: [PLACE])

    def batches(self, rows: int, source: str) -> list[Batch]:
        """One batch, whose tokens no one looks at."""
        return calibration(1, source)

    def inputs(self, batches: Any, places: Any, take: Any) -> None:
        """The same inputs for each batch."""
        for _ in batches:
            take(PLACE, self.x_NI)


def started(weight_OI: Tensor, x_NI: Tensor, **options: Any) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = corda(**options).start(PLACE, weight_OI, Reads(x_NI))  # type: ignore[arg-type]
    return found


def test_the_largest_component_for_a_context() -> None:
    """W = diag(3, 1) and C' = diag(1, 4): W C' = diag(3, 4). By W or by the root of C' the other axis would be the largest."""
    weight_OI, metric_II = torch.diag(torch.tensor([3.0, 1.0])).double(), torch.diag(torch.tensor([1.0, 4.0])).double()
    left_OK, size_K, right_KI = oriented(weight_OI, metric_II, metric_II.inverse())
    torch.testing.assert_close(size_K, torch.tensor([4.0, 3.0], dtype=torch.float64))
    first = left_OK[:, :1] * size_K[:1].sqrt(), size_K[:1].sqrt()[:, None] * right_KI[:1]
    torch.testing.assert_close(first[0].abs(), torch.tensor([[0.0], [2.0]], dtype=torch.float64))
    torch.testing.assert_close(first[1].abs(), torch.tensor([[0.0, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(first[0] @ first[1], torch.diag(torch.tensor([0.0, 1.0])).double())
    rest = (left_OK[:, 1:] * size_K[1:]) @ right_KI[1:]
    torch.testing.assert_close(rest, torch.diag(torch.tensor([3.0, 0.0])).double())


@pytest.mark.parametrize(("mode", "kept"), [("instruction_previewed", [0.0, 1.0]), ("knowledge_preserved", [3.0, 0.0])])
def test_the_mode_chooses_the_end_of_the_spectrum(mode: Any, kept: list[float]) -> None:
    # The inputs' covariance is diag(1, 4).
    tensors = started(torch.diag(torch.tensor([3.0, 1.0])).double(), torch.diag(torch.tensor([1.0, 2.0])).double(), rank=1,
                      mode=mode, damping=1e-12, rescale="none")  # fmt: skip
    torch.testing.assert_close(tensors["up_start"] @ tensors["down_start"], torch.diag(torch.tensor(kept)).double())


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_without_a_preference_it_is_the_cut_singular_value_decomposition(shape: tuple[int, int]) -> None:
    """With C = I the product is W's largest part; 1 % of damping makes B sqrt(1.01) times as large, and A as much smaller."""
    weight_OI = random(*shape)
    left_OK, size_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    for mode, chosen in (("instruction_previewed", slice(2)), ("knowledge_preserved", slice(2, 4))):
        options: Any = {"rank": 2, "mode": mode, "rescale": "none"}
        tensors = started(weight_OI, torch.eye(shape[1], dtype=torch.float64), **options)
        part_OI = left_OK[:, chosen] @ torch.diag(size_K[chosen]) @ right_KI[chosen]
        torch.testing.assert_close(tensors["up_start"] @ tensors["down_start"], part_OI)
        torch.testing.assert_close(tensors["up_start"].norm(dim=0), (1.01 * size_K[chosen]).sqrt())
        torch.testing.assert_close(tensors["down_start"].norm(dim=1), (size_K[chosen] / 1.01).sqrt())


def test_the_cut_is_the_best_one_for_the_context() -> None:
    weight_OI, x_NI = random(6, 5), random(40, 5, seed=1) * torch.tensor([0.1, 3.0, 1.0, 0.3, 2.0])
    metric_II, inverse_II = damped(x_NI.T @ x_NI / 40, 0.01)
    left_OK, size_K, right_KI = oriented(weight_OI, metric_II, inverse_II)
    torch.testing.assert_close((left_OK * size_K) @ right_KI, weight_OI)
    cut_OI = (left_OK[:, :2] * size_K[:2]) @ right_KI[:2]
    error = ((weight_OI - cut_OI) @ metric_II).square().sum()
    torch.testing.assert_close(error, size_K[2:].square().sum())
    plain_OK, plain_K, plain_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    plain_OI = (plain_OK[:, :2] * plain_K[:2]) @ plain_KI[:2]
    assert float(error) < 0.9 * float(((weight_OI - plain_OI) @ metric_II).square().sum())


def test_damping_adds_the_mean_of_the_diagonal() -> None:
    metric_II, inverse_II = damped(torch.diag(torch.tensor([1.0, 3.0])).double(), 0.01)
    torch.testing.assert_close(metric_II, torch.diag(torch.tensor([1.02, 3.02])).double())
    torch.testing.assert_close(inverse_II @ metric_II, EYE)


def test_damping_is_doubled_until_the_inverse_is_right() -> None:
    """In fp32 a damping of 1e-9 vanishes beside a covariance of rank 1."""
    covariance_II = torch.ones(3, 3)
    metric_II, inverse_II = damped(covariance_II, 1e-9)
    added = float(metric_II[0, 0] - 1)
    assert added > 1e-8 and float((metric_II @ inverse_II - torch.eye(3)).norm()) < 0.05
    with pytest.raises(LuthierError, match="cannot be inverted"):
        damped(torch.zeros(3, 3), 0.01)


@pytest.mark.parametrize("tries", [1, 29])
def test_damping_is_doubled_and_no_more_than_29_times(tries: int) -> None:
    """The mean of the diagonal is 2, so a damping of 0.5 adds 1, 2, 4 ...: the first tries leave a zero on the diagonal each."""

    def singular_at_first(count: int) -> Tensor:
        holes = [-(2.0**k) for k in range(count)]
        return torch.diag(torch.tensor([2.0 * (count + 1) - sum(holes), *holes], dtype=torch.float64))

    covariance_II = singular_at_first(tries)
    metric_II, inverse_II = damped(covariance_II, 0.5)
    assert torch.equal(metric_II, covariance_II + 2.0**tries * torch.eye(tries + 1))
    torch.testing.assert_close(inverse_II.diagonal(), 1 / metric_II.diagonal())
    with pytest.raises(LuthierError, match="cannot be inverted"):
        damped(singular_at_first(30), 0.5)


def test_tiny_inputs_are_not_blown_up() -> None:
    """Inputs of 1e-12 are divided by their size, smaller ones by no less than 1e-12; batches count alike."""
    found = []
    for size in (1e-11, 1e-12, 1e-13):
        reads = Reads(torch.tensor([[size, 0.0]], dtype=torch.float64))
        (covariance_II,) = covariances(reads, calibration(4, ""), [PLACE], RESCALES["magnitude"]).values()  # type: ignore[arg-type]
        found.append(float(covariance_II[0, 0]))
    assert found == pytest.approx([1.0, 1.0, 0.01], rel=1e-12)


def test_alpha_changes_neither_the_start_nor_what_is_cut_out() -> None:
    weight_OI, x_NI = random(6, 5), random(40, 5, seed=1)
    plain = started(weight_OI, x_NI, rank=2)
    scaled = started(weight_OI, x_NI, rank=2, alpha=8.0)
    torch.testing.assert_close(4.0 * scaled["up_start"] @ scaled["down_start"], plain["up_start"] @ plain["down_start"])
    torch.testing.assert_close(2.0 * scaled["up_start"], plain["up_start"])
    value = corda(rank=2, alpha=8.0)
    moved = {**scaled, "up_change": random(6, 2, seed=2), "down_change": random(2, 5, seed=3)}
    up_OR, down_RI = (scaled[f"{name}_start"] + moved[f"{name}_change"] for name in ("up", "down"))
    wanted_OI = 4.0 * (up_OR @ down_RI - scaled["up_start"] @ scaled["down_start"])
    torch.testing.assert_close(value.delta(moved), wanted_OI)
    torch.testing.assert_close(value.apply(moved, x_NI), x_NI @ wanted_OI.T)
    assert value.factors is not None
    longer_RI, wider_OR = value.factors(moved)
    assert longer_RI.shape == (4, 5)
    torch.testing.assert_close(wider_OR @ longer_RI, wanted_OI)


def test_small_changes_are_not_lost_in_bf16() -> None:
    """The difference of the two products would round away changes a thousand times smaller than the factors."""
    weight_OI, x_NI = random(48, 32).float(), random(64, 32, seed=1).float()
    tensors = dict(started(weight_OI, x_NI, rank=8))
    for seed, name in enumerate(("up", "down")):
        noise = random(*tensors[f"{name}_start"].shape, seed=seed + 2).float()
        tensors[f"{name}_change"] = 1e-3 * noise * tensors[f"{name}_start"].std()
    value = corda(rank=8)
    exact_NO = x_NI @ value.delta(tensors).T
    narrow = {name: one.bfloat16() for name, one in tensors.items()}
    found_NO = value.apply(narrow, x_NI.bfloat16()).float()
    assert float((found_NO - exact_NO).norm() / exact_NO.norm()) < 0.01
    now, then = (
        x_NI.bfloat16() @ (tensors["down_start"] + k * tensors["down_change"]).bfloat16().T
        @ (tensors["up_start"] + k * tensors["up_change"]).bfloat16().T for k in (1, 0)
    )  # fmt: skip
    assert float((now.float() - then.float() - exact_NO).norm() / exact_NO.norm()) > 1.0


def test_what_a_row_is_divided_by() -> None:
    x_NI = torch.tensor([[1.0, -4.0], [2.0, 0.0]])
    assert {name: float(size(x_NI)) for name, size in RESCALES.items()} == {"magnitude": 4.0, "maximum": 2.0, "none": 1.0}


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_covariances_are_those_of_every_row_by_itself(architecture: str, rescale: str) -> None:
    """However the rows are batched and padded: each is run alone and without padding in the reference."""
    model = model_of(architecture)
    parts = map_parts(model)
    services = RunServices(Tune(model, parts), "corda", Now(), calibration)
    places = parts.select(target_modules=("linear",))
    found = covariances(services, list(single_rows(services.batches(8))), places, RESCALES[rescale])
    sums: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def look(module: Any, arguments: Any) -> None:
            x_NI = arguments[0][0]
            x_NI = x_NI / {"magnitude": x_NI.abs().max(), "maximum": x_NI.max().abs(), "none": 1.0}[rescale]
            sums[name] = sums.get(name, 0.0) + x_NI.T @ x_NI / 8

        return look

    names = {place.module for place in places}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    rows = 0
    with torch.no_grad():
        for batch in calibration(8, ""):
            for ids_T, attend_T in zip(batch.token_ids_BT, batch.attend_BT, strict=True):
                model(input_ids=ids_T[attend_T][None])
                rows += 1
    assert rows == 8 and found.keys() == sums.keys() == names
    assert gap(found, sums) < 1e-9


def test_factors_do_not_follow_from_how_calibration_rows_are_batched(engine: Any) -> None:
    """Each row is divided by its own largest input, whatever rows stand beside it."""
    found = []
    for sizes in ((1,) * 8, (8,), (3, 3, 2)):
        batches = split(rows_of_eight(), sizes)
        made = corda(calibration_rows=8)
        run = engine(made, model=model_of(layers=1), calibration=lambda count, source, batches=batches: batches)
        # The product alone: singular vectors have no sign of their own.
        found.append({own.name: own.masters()["up_start"] @ own.masters()["down_start"] for own in run.tune.owns})
    for other in found[1:]:
        assert gap(other, found[0]) < 1e-9


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_trains_like_factors_cut_out_of_the_weight(engine: Any, now: Now, architecture: str) -> None:
    """Beside W - s B0 A0, the gradient of B is s G A^T and that of A is s B^T G, with G the weight's."""
    model, batch = model_of(architecture), rows_of_eight()
    base = {name: one.detach().clone() for name, one in model.named_parameters()}
    plain = plain_gradients(model, batch)
    run = engine({"corda": {"rank": 3, "alpha": 6.0}}, model=model, optimizer="adamw")
    wanted = {}
    for own in run.tune.owns:
        gradient_OI = plain[own.place.parameter]
        gradient_OI = gradient_OI.t() if own.place.module in run.tune.parts.transposed else gradient_OI
        gradient_OI, tensors = gradient_OI[own.place.start : own.place.stop], own.masters()
        assert sum(one.numel for one in own.trained.values()) == 3 * sum(gradient_OI.shape)
        wanted[own.trained["up_change"].name] = 2.0 * gradient_OI @ tensors["down_start"].T
        wanted[own.trained["down_change"].name] = 2.0 * tensors["up_start"].T @ gradient_OI
    assert gap(gradients(run, [batch], now), wanted) < 1e-9
    starts = {own.name: {name: values.clone() for name, values in own.frozen.items()} for own in run.tune.owns}
    for i in range(3):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))
    assert all(torch.equal(one, base[name]) for name, one in model.named_parameters())
    for own in run.tune.owns:
        assert all(torch.equal(values, starts[own.name][name]) for name, values in own.frozen.items())
        assert own.value.delta(own.masters()).any()


def test_a_source_s_rows_make_other_factors(engine: Any) -> None:
    found = [
        engine({"corda": {"rank": 2, "calibration_source": source}}, model=model_of()).tune.owns[0].masters()["up_start"]
        for source in ("", "", "questions")
    ]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_what_cannot_start_is_refused_by_name(engine: Any) -> None:
    with pytest.raises(LuthierError, match="a 16 x 32 matrix has fewer than 20 singular vectors"):
        engine({"corda": {"rank": 20}}, model=model_of())
    with pytest.raises(LuthierError, match="the alpha is 0"):
        corda(alpha=0.0)
    with pytest.raises(LuthierError, match="the damping is -1"):
        corda(damping=-1.0)
    with pytest.raises(LuthierError, match="show no finite input here"):
        started(EYE, torch.tensor([[1.0, float("inf")]], dtype=torch.float64), rank=1)
    with pytest.raises(LuthierError, match="show no finite input here"):
        # The head is not run while inputs are looked at.
        engine({"corda": {"rank": 2, "target_modules": ("head",)}}, model=model_of())
    with pytest.raises(LuthierError, match="show no finite input here"):
        started(EYE, torch.zeros(0, 2, dtype=torch.float64), rank=1)
