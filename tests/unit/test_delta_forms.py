"""Forms of a change: hand-worked, and exact to the bit for whatever numbers weights can hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.delta.forms import Dense, LowRank, Sparse, bits, combine, compress, difference

HOSTILE = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e30, 3e-45, float("inf"), float("-inf"), float("nan"), 1 / 3, 2.0**-126]


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(bits(left), bits(right))


def round_trips(base: Tensor, tuned: Tensor, form: Dense | Sparse) -> bool:
    values = base.clone()
    form.add_to(values, 1)
    forth = same(values, tuned)
    form.add_to(values, -1)
    return forth and same(values, base)


def test_a_sparse_difference_by_hand() -> None:
    form = difference(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.0, 6.5]]), torch.float32)
    assert isinstance(form, Sparse)
    assert form.index.tolist() == [3] and form.index.dtype == torch.int32
    assert form.change.tolist() == [2.5] and form.corrections is None
    assert form.spread().tolist() == [[0.0, 0.0], [0.0, 2.5]]


@pytest.mark.parametrize(("changed", "kind"), [(0, None), (1, Sparse), (4, Sparse), (5, Dense), (10, Dense)])
def test_half_of_the_entries_decide_between_sparse_and_dense(changed: int, kind: type | None) -> None:
    base, tuned = torch.ones(10), torch.ones(10)
    tuned[:changed] = 2.0
    form = difference(base, tuned, torch.float32)
    assert (form is None) if kind is None else isinstance(form, kind)


def test_a_difference_that_rounds_wrong_is_corrected() -> None:
    # 1e-12 - 1 rounds to -1 in float32, and 1 + -1 is 0.
    base, tuned = torch.tensor([1.0, 5.0]), torch.tensor([1e-12, 5.0])
    form = difference(base, tuned, torch.float32)
    assert form is not None and form.corrections is not None
    assert form.corrections.index.tolist() == [0]
    assert round_trips(base, tuned, form)


def test_within_a_factor_of_two_nothing_needs_correcting() -> None:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(10_000, generator=rng)
    tuned = base * (torch.rand(10_000, generator=rng) * 1.4 + 0.55)
    form = difference(base, tuned, torch.float32)
    assert form is not None and form.corrections is None
    assert round_trips(base, tuned, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_apply_and_remove_are_exact_for_any_numbers(dtype: torch.dtype, stored: torch.dtype, share: float) -> None:
    rng = torch.Generator().manual_seed(1)
    scale = 10.0 ** torch.randint(-6, 5, (64, 40), generator=rng)
    base = (torch.randn(64, 40, generator=rng) * scale).to(dtype)
    tuned = torch.where(torch.rand(64, 40, generator=rng) < share, torch.randn(64, 40, generator=rng), base.float())
    tuned = torch.where(tuned == base.float(), base, tuned.to(dtype))
    numbers = torch.tensor(HOSTILE).to(dtype)
    base[0, : len(numbers)], tuned[0, : len(numbers)] = numbers, numbers.flip(0)
    base[1, :2], tuned[1, :2] = torch.tensor([-0.0, 0.0]), torch.tensor([-0.0, -0.0])
    form = difference(base, tuned, stored)
    assert isinstance(form, Sparse if share < 0.5 else Dense)
    assert round_trips(base, tuned, form)


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.5), (1.0, 1e-12)])
def test_a_single_number_is_a_parameter_too(before: float, after: float) -> None:
    base, tuned = torch.tensor(before), torch.tensor(after)
    form = difference(base, tuned, torch.float32)
    assert form is not None and round_trips(base, tuned, form)
    other = torch.tensor(3.0)
    form.add_to(other, 1)
    assert float(other) == pytest.approx(3.0 + after - before)


def test_corrections_leave_other_numbers_alone() -> None:
    form = difference(torch.tensor([1.0]), torch.tensor([1e-12]), torch.float32)
    assert form is not None
    other = torch.tensor([3.0])
    form.add_to(other, 1)
    assert other.tolist() == [2.0]


def test_scaling_drops_corrections() -> None:
    form = difference(torch.tensor([1.0]), torch.tensor([1e-12]), torch.float32)
    assert form is not None and form.times(0.5).corrections is None
    assert form.times(0.5).spread().tolist() == [-0.5]


def test_low_rank_by_hand() -> None:
    form = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]]), 0.5, torch.Size([2, 3]))
    assert form.spread().tolist() == [[1.5, 2.0, 2.5], [3.0, 4.0, 5.0]]
    assert form.times(2.0).spread().tolist() == [[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]]
    assert form.times(torch.tensor([[0.0], [1.0]])).spread().tolist() == [[0.0, 0.0, 0.0], [3.0, 4.0, 5.0]]


def test_low_rank_of_some_outputs_stored_transposed() -> None:
    form = LowRank(torch.tensor([[1.0]]), torch.tensor([[3.0, 4.0]]), 1.0, torch.Size([2, 3]), 1, 2, transposed=True)
    assert form.spread().tolist() == [[0.0, 3.0, 0.0], [0.0, 4.0, 0.0]]
    values = torch.ones(2, 3)
    form.add_to(values, -1)
    assert values.tolist() == [[1.0, -2.0, 1.0], [1.0, -3.0, 1.0]]
    by_output = torch.tensor([[7.0, 10.0, 7.0]])
    assert form.times(by_output).spread().tolist() == [[0.0, 30.0, 0.0], [0.0, 40.0, 0.0]]


def test_the_sum_of_low_ranks_is_the_sum_of_their_products() -> None:
    rng = torch.Generator().manual_seed(2)

    def low(rank: int, scale: float) -> LowRank:
        up_OR = torch.randn(6, rank, generator=rng, dtype=torch.float64)
        return LowRank(up_OR, torch.randn(rank, 5, generator=rng, dtype=torch.float64), scale, torch.Size([6, 5]))

    first, second = low(2, 0.5), low(3, -1.5)
    (total,) = combine([first, second])
    assert isinstance(total, LowRank) and total.down_RI.shape == (5, 5)
    torch.testing.assert_close(total.spread(), first.spread() + second.spread(), rtol=1e-12, atol=1e-12)
    # Adding factors instead, as averaging adapters naively does, gives something else.
    naive = (first.up_OR[:, :2] + second.up_OR[:, :2]) @ (first.down_RI[:2] + second.down_RI[:2])
    assert not torch.allclose(total.spread(), naive)


def test_entries_of_one_parameter_add_up() -> None:
    shape = torch.Size([4])
    left = Sparse(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]), shape)
    right = Sparse(torch.tensor([1, 3]), torch.tensor([-2.0, 5.0]), shape)
    (total,) = combine([left, right])
    assert total.spread().tolist() == [1.0, 0.0, 0.0, 5.0]
    (total,) = combine([left, Dense(torch.ones(4))])
    assert total.spread().tolist() == [2.0, 3.0, 1.0, 1.0]
    (total,) = combine([left, left.times(-1.0)])
    assert isinstance(total, Sparse) and len(total.index) == 0 and total.shape == shape


def test_compress_drops_zeros() -> None:
    nothing = compress(torch.zeros(3))
    assert isinstance(nothing, Sparse) and len(nothing.index) == 0
    assert isinstance(compress(torch.tensor([0.0, 0.0, 1.0])), Sparse)
    assert isinstance(compress(torch.tensor([0.0, 1.0])), Dense)
