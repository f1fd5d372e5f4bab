"""LoRA-XS and LoRA-SB against their algebra: what the frozen bases span, where the core starts, and where its steps lead."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, Place
from luthier.methods.weight_delta._frozen_basis import apply, delta, factors
from luthier.methods.weight_delta.lora_sb import first_step, lora_sb
from luthier.methods.weight_delta.lora_xs import lora_xs
from luthier.models.parts import map_parts
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import calibration, split
from tests.toys.helpers import logits_of, model_of, plain_gradients, rows_of_eight

EXAMPLES = [{"lora_xs": {"rank": 4}}, {"lora_sb": {"rank": 4}}]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(run: Any, place: Place, values: Mapping[str, Tensor]) -> Tensor:
    """A place's part of a plain model's tensors, as [O, I]."""
    found = values[place.parameter]
    found = found.t() if place.module in run.tune.parts.transposed else found
    return found[place.start : place.stop]


def test_factors_and_outputs_are_those_of_the_delta() -> None:
    tensors = {"down": random(2, 5), "core": random(2, 2, seed=1), "up": random(3, 2, seed=2)}
    x = random(4, 5, seed=3)
    down_RI, up_OR = factors(tensors)
    torch.testing.assert_close(up_OR @ down_RI, delta(tensors))
    torch.testing.assert_close(apply(tensors, x), x @ delta(tensors).T)


@pytest.mark.parametrize("tune", EXAMPLES, ids=["lora_xs", "lora_sb"])
def test_only_the_cores_train(engine: Any, now: Now, tune: Any) -> None:
    model = model_of()
    base = {name: one.detach().clone() for name, one in model.named_parameters()}
    run = engine(tune, model=model, optimizer={"adamw": {"weight_decay": 0.1}})
    bases = {own.name: copy.deepcopy(own.frozen) for own in run.tune.owns}
    cores = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    assert len(cores) == 14 and all(one.shape == (4, 4) for one in cores.values())
    for i in range(3):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))
    assert all(torch.equal(one, base[name]) for name, one in model.named_parameters())
    for own in run.tune.owns:
        assert own.frozen.keys() == {"down", "up"}
        assert all(torch.equal(values, bases[own.name][name]) for name, values in own.frozen.items())
    assert all((one.master != cores[name]).all() for name, one in run.tune.trained.items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_xs_spans_the_largest_part_of_each_weight(engine: Any, architecture: str) -> None:
    """With the identity as its core and alpha = R, the delta is the weight's best approximation of rank R."""
    model = model_of(architecture)
    run = engine({"lora_xs": {"rank": 4, "alpha": 12.0}}, model=model)
    for own in run.tune.owns:
        weight_OI = matrix(run, own.place, dict(model.named_parameters())).detach()
        left_OK, size_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
        best_OI = left_OK[:, :4] @ torch.diag(size_K[:4]) @ right_KI[:4]
        identity = {**own.masters(), "core": torch.eye(4, dtype=torch.float64)}
        torch.testing.assert_close(own.value.delta(identity), 12.0 / 4 * best_OI)
        up_OR, down_RI = own.frozen["up"], own.frozen["down"]
        torch.testing.assert_close(up_OR.T @ up_OR, torch.eye(4, dtype=torch.float64))
        # Singular values stand on the side of the input.
        torch.testing.assert_close(down_RI.norm(dim=1), 3.0 * size_K[:4])


def test_lora_xs_starts_small_or_at_the_base(engine: Any) -> None:
    run = engine("lora_xs", model=model_of())
    everything = torch.cat([one.master.detach().flatten() for one in run.tune.trained.values()])
    assert len(everything) == 14 * 16 * 16
    # Four standard errors.
    assert abs(float(everything.std()) / 1e-5 - 1) < 4 / (2 * len(everything)) ** 0.5
    assert abs(float(everything.mean())) < 4 * 1e-5 / len(everything) ** 0.5
    model = model_of()
    wanted = logits_of(model, rows_of_eight())
    engine({"lora_xs": {"deviation": 0.0}}, model=model)
    assert torch.equal(logits_of(model, rows_of_eight()), wanted)


def test_the_first_step_of_a_matrix_of_rank_1() -> None:
    tensors = first_step(torch.tensor([[3.0, -1.0], [3.0, -1.0]], dtype=torch.float64), 0.1, 1)
    torch.testing.assert_close(tensors["core"], torch.tensor([[0.2]], dtype=torch.float64))
    torch.testing.assert_close(delta(tensors), torch.tensor([[-0.1, 0.1], [-0.1, 0.1]], dtype=torch.float64))


def test_the_first_step_goes_by_the_sign() -> None:
    """G = [[4, 1], [1, 0]]: the singular value of -0.1 sign(G) is 0.16180, that of -0.1 G would be 0.42361."""
    gradient_OI = torch.tensor([[4.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    tensors = first_step(gradient_OI, 0.1, 1)
    near = {"rtol": 0, "atol": 5e-5}
    torch.testing.assert_close(tensors["core"], torch.tensor([[0.16180]], dtype=torch.float64), **near)
    for vector in (tensors["up"].flatten(), tensors["down"].flatten()):
        torch.testing.assert_close(vector.abs(), torch.tensor([0.8507, 0.5257], dtype=torch.float64), **near)
    wanted = -torch.tensor([[0.1171, 0.0724], [0.0724, 0.0447]], dtype=torch.float64)
    torch.testing.assert_close(delta(tensors), wanted, **near)
    assert abs(float((gradient_OI * delta(tensors)).sum()) + 0.613) < 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_sb_starts_at_the_best_approximation_of_the_first_step(engine: Any, architecture: str) -> None:
    model, rank = model_of(architecture), 6
    plain = plain_gradients(model, _one(calibration(5, "")))
    run = engine({"lora_sb": {"rank": rank, "first_learning_rate": 0.02, "calibration_rows": 5}}, model=model)
    identity = torch.eye(rank, dtype=torch.float64)
    for own in run.tune.owns:
        tensors = own.masters()
        torch.testing.assert_close(tensors["up"].T @ tensors["up"], identity)
        torch.testing.assert_close(tensors["down"] @ tensors["down"].T, identity)
        size_R = tensors["core"].diagonal()
        assert torch.equal(tensors["core"], torch.diag(size_R)) and (size_R.diff() <= 0).all() and (size_R >= 0).all()
        step_OI = -0.02 * matrix(run, own.place, plain).sign()
        gone = torch.linalg.svdvals(step_OI)[rank:].square().sum()
        torch.testing.assert_close((step_OI - own.value.delta(tensors)).square().sum(), gone)


def _one(batches: Sequence[Batch]) -> Batch:
    """Some batches as one."""
    longest = max(batch.token_ids_BT.shape[1] for batch in batches)

    def joined(name: str, fill: int) -> Tensor:
        padded = [
            torch.nn.functional.pad(getattr(batch, name), (0, longest - batch.token_ids_BT.shape[1]), value=fill)
            for batch in batches
        ]
        return torch.cat(padded)

    return Batch(
        joined("token_ids_BT", 0),
        joined("attend_BT", False),
        joined("position_BT", 0),
        joined("label_BT", -100),
        tuple(row for batch in batches for row in batch.row_ids),
    )


def test_a_rate_of_zero_keeps_the_bases_and_starts_at_the_base(engine: Any, now: Now) -> None:
    model = model_of()
    wanted = logits_of(model, rows_of_eight())
    still = engine({"lora_sb": {"rank": 4, "first_learning_rate": 0.0}}, model=model)
    assert torch.equal(logits_of(model, rows_of_eight()), wanted)
    # The run's learning rate is 0.1 at its first step.
    moved = engine({"lora_sb": {"rank": 4}}, model=model_of())
    same = engine({"lora_sb": {"rank": 4, "first_learning_rate": 0.1}}, model=model_of())
    for here, there, third in zip(still.tune.owns, moved.tune.owns, same.tune.owns, strict=True):
        assert torch.equal(here.frozen["up"], there.frozen["up"]) and torch.equal(here.frozen["down"], there.frozen["down"])
        assert there.masters()["core"].any() and torch.equal(there.masters()["core"], third.masters()["core"])
        assert not here.masters()["core"].any()


@pytest.mark.parametrize("rank", [4, 32])
def test_a_step_of_the_core_is_the_projected_step_of_the_weight(engine: Any, now: Now, rank: int) -> None:
    """One step of SGD changes W by -eta B B^T g A^T A; at full rank that is -eta g, full fine-tuning's from the same start."""
    roles = ("attention_query", "attention_output")
    run = engine({"lora_sb": {"rank": rank, "target_modules": roles}}, model=model_of(), optimizer="sgd")
    merged, batch = model_of(), rows_of_eight()
    before = {own.name: own.value.delta(own.masters()) for own in run.tune.owns}
    for own in run.tune.owns:
        merged.get_parameter(own.place.parameter).data += before[own.name]
    plain = plain_gradients(merged, batch)
    run.step([batch], now._replace(learning_rate=0.3))
    assert len(run.tune.owns) == 4
    for own in run.tune.owns:
        tensors, gradient_OI = own.masters(), plain[own.place.parameter]
        projected_OI = tensors["up"] @ tensors["up"].T @ gradient_OI @ tensors["down"].T @ tensors["down"]
        torch.testing.assert_close(own.value.delta(tensors) - before[own.name], -0.3 * projected_OI)
        assert (rank == 32) == torch.allclose(projected_OI, gradient_OI, rtol=1e-9)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_the_core_s_gradient_is_the_best_step_between_its_bases(orthonormal: bool) -> None:
    """The X with B X A closest to g is (B^T B)^-1 (B^T g A^T) (A A^T)^-1; for orthonormal bases the core's gradient itself."""
    up_OR, down_RI, gradient_OI = random(5, 2), random(2, 4, seed=1), random(5, 4, seed=2)
    if orthonormal:
        up_OR, down_RI = torch.linalg.qr(up_OR)[0], torch.linalg.qr(down_RI.T)[0].T
    core_RR = random(2, 2, seed=3).requires_grad_(True)
    outputs = apply({"down": down_RI, "core": core_RR, "up": up_OR}, torch.eye(4, dtype=torch.float64))
    (outputs * gradient_OI.T).sum().backward()
    assert core_RR.grad is not None
    best = torch.linalg.lstsq(torch.kron(up_OR.contiguous(), down_RI.T.contiguous()), gradient_OI.reshape(-1, 1)).solution.reshape(
        2, 2
    )
    solved = torch.linalg.inv(up_OR.T @ up_OR) @ core_RR.grad @ torch.linalg.inv(down_RI @ down_RI.T)
    torch.testing.assert_close(solved, best)
    assert torch.allclose(core_RR.grad, best) == orthonormal


class Counting(RunServices):
    """Counts the passes over the calibration rows."""

    passes = 0

    def gradients(self, batches: Any, places: Any, moved: Any = None) -> dict[Place, Tensor]:
        """As in a run."""
        self.passes += 1
        return super().gradients(batches, places, moved)


def test_all_places_start_from_one_look_at_the_base() -> None:
    """The first places change the model on purpose: the gradients of later ones must not notice."""
    model = model_of()
    tune = Tune(model, map_parts(model))
    services = Counting(tune, "lora_sb", Now(learning_rate=0.1), calibration)
    plain = plain_gradients(model, _one(calibration(8, "")))
    tune.add("lora_sb", lora_sb(rank=2), services, {})
    assert services.passes == 1
    for own in tune.owns:
        assert own.place is not None
        expected = first_step(plain[own.place.parameter], 0.1, 2)
        torch.testing.assert_close(delta(own.masters()), delta(expected))


def test_what_cannot_start_is_refused_by_name(engine: Any) -> None:
    for technique in ("lora_xs", "lora_sb"):
        with pytest.raises(LuthierError, match="a 16 x 32 matrix has fewer than 20 singular vectors"):
            engine({technique: {"rank": 20}}, model=model_of())
    model = model_of()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with pytest.raises(LuthierError, match="no gradient of the calibration rows reaches this weight"):
        engine("lora_sb", model=model)
    with pytest.raises(LuthierError, match="the first rate is -1"):
        lora_sb(first_learning_rate=-1.0)
    with pytest.raises(LuthierError, match="`calibration_rows` is 0"):
        lora_sb(calibration_rows=0)
    with pytest.raises(LuthierError, match="the deviation is -1"):
        lora_xs(deviation=-1.0)
