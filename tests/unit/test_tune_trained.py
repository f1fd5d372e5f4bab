"""Numbers that train, one tensor at a time: what is read and written, which selections fit, and how entries move along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Form, Place, Select
from luthier.tune.trained import Trained, check_select, decays, migrate, read, write

WEIGHT, BIAS = Place("mlp", "weight", "mlp_down", 0), Place("mlp", "bias", "mlp_down", 0)


def numbers(*shape: int) -> Tensor:
    """0, 1, 2 ... in a shape."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


@pytest.mark.parametrize(
    ("shape", "form", "index", "found"),
    [
        ((3, 4), "rows", [2, 0], [[8, 9, 10, 11], [0, 1, 2, 3]]),
        ((3, 4), "cols", [3, 0], [[3, 0], [7, 4], [11, 8]]),
        ((3, 4), "flat", [0, 11, 6], [0, 11, 6]),
        ((5,), "rows", [0, 4], [0, 4]),
        ((5,), "flat", [4, 0], [4, 0]),
    ],
)
def test_what_is_selected_is_read_and_written_and_nothing_else(
    shape: tuple[int, ...], form: Form, index: list[int], found: Any
) -> None:
    values, at = numbers(*shape), torch.tensor(index)
    selected = read(values, form, at)
    assert selected.tolist() == found
    write(values, form, at, -1.0 - selected)
    changed = numbers(*shape)
    chosen = torch.isin(changed, selected)
    assert torch.equal(values, torch.where(chosen, -1.0 - changed, changed)) and int(chosen.sum()) == selected.numel()


@pytest.mark.parametrize(("form", "last"), [("rows", 2), ("cols", 4), ("flat", 14)])
def test_indices_go_from_the_first_number_to_the_last(form: Form, last: int) -> None:
    values = torch.zeros(3, 5)
    for index in ([0], [last], [last, 0]):
        check_select(WEIGHT, Select(form, torch.tensor(index)), values)
    for index in ([last + 1], [0, -1], []):
        with pytest.raises(LuthierError, match=f"must lie in 0 to {last} and not be empty"):
            check_select(WEIGHT, Select(form, torch.tensor(index, dtype=torch.int64)), values)
    with pytest.raises(LuthierError, match="names a number twice"):
        check_select(WEIGHT, Select(form, torch.tensor([1, 0, 1])), values)


@pytest.mark.parametrize("index", [None, torch.tensor([[0, 1]]), torch.tensor([1], dtype=torch.int32), torch.tensor([True])])
def test_an_index_is_a_list_of_whole_numbers(index: Tensor | None) -> None:
    with pytest.raises(LuthierError, match="`rows` needs an index of whole numbers"):
        check_select(WEIGHT, Select("rows", index), torch.zeros(3, 5))


def test_a_vector_has_rows_and_no_columns() -> None:
    for form in ("rows", "flat"):
        check_select(BIAS, Select(form, torch.tensor([0, 3])), torch.zeros(4))  # type: ignore[arg-type]
        with pytest.raises(LuthierError, match="0 to 3"):
            check_select(BIAS, Select(form, torch.tensor([4])), torch.zeros(4))  # type: ignore[arg-type]
    with pytest.raises(LuthierError, match="a vector has no columns"):
        check_select(BIAS, Select("cols", torch.tensor([0])), torch.zeros(4))


def test_weight_decay_is_for_matrices_alone() -> None:
    norm = Place("norm", "weight", "mlp_norm", 0)
    assert decays(WEIGHT, torch.zeros(2, 2)) and decays(None, torch.zeros(2, 2))
    assert not any(decays(place, torch.zeros(4)) for place in (WEIGHT, BIAS, norm, None))
    # Also where a vector is kept as a matrix.
    assert not decays(BIAS, torch.zeros(1, 4)) and not decays(norm, torch.zeros(1, 4))


def test_entries_move_along_their_axis_and_new_ones_are_zero() -> None:
    values, take = 1.0 + numbers(2, 3), torch.tensor([2, -1, 0, 1])
    assert migrate(values, 1, take, 3).tolist() == [[3, 0, 1, 2], [6, 0, 4, 5]]
    assert migrate(values, 0, torch.tensor([1, -1, 0]), 2).tolist() == [[4, 5, 6], [0, 0, 0], [1, 2, 3]]
    assert migrate(1.0 + numbers(3), 0, take, 3).tolist() == [3, 0, 1, 2]
    # What has no such axis, or is as long as something else, belongs to no entry.
    vector = numbers(3)
    assert migrate(vector, 1, take, 3) is vector and migrate(values, 0, take, 3) is values


def test_gradients_add_up_in_fp32_without_a_graph() -> None:
    master = torch.zeros(2, dtype=torch.bfloat16)
    one = Trained("half/mlp", "half", WEIGHT, "rows", torch.tensor([0, 1]), master, master)
    weight = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    for factor in (256.0, 1.0):
        one.arrive(factor * weight)
        assert one.gradient is not None and one.gradient.dtype == torch.float32 and not one.gradient.requires_grad
    assert one.gradient.tolist() == [257.0, 514.0]
