"""Ranking entries: exact counts, one rule for ties, and the same entries found again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from luthier.errors import LuthierError
from luthier.methods.selective._entries import continued, largest, largest_of_rows, matrix
from tests.unit.selective_oracles import PLACE


def test_the_largest_by_hand() -> None:
    score_OI = torch.tensor([[3.0, 5.0, 1.0], [4.0, 4.0, 4.0]])
    assert largest(score_OI, 1).tolist() == [1]
    assert largest(score_OI, 3).tolist() == [1, 3, 4]
    assert largest(score_OI, 6).tolist() == list(range(6))
    assert largest_of_rows(score_OI, 2).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("count", [1, 7, 100, 399, 400])
def test_ties_go_to_the_first_as_in_a_stable_sort(count: int) -> None:
    rng = torch.Generator().manual_seed(count)
    score_OI = torch.randint(0, 5, (20, 20), generator=rng).float()
    assert torch.equal(largest(score_OI, count), score_OI.flatten().argsort(descending=True, stable=True)[:count].sort().values)
    per_row = min(count, 20)
    columns = score_OI.argsort(dim=1, descending=True, stable=True)[:, :per_row].sort(1).values
    assert torch.equal(largest_of_rows(score_OI, per_row), (torch.arange(20)[:, None] * 20 + columns).flatten())


def test_entries_are_followed() -> None:
    assert continued(torch.tensor([2, 5, 9]), torch.tensor([0, 2, 6, 9, 11])).tolist() == [-1, 0, -1, 2, -1]
    assert continued(torch.tensor([4]), torch.tensor([4])).tolist() == [0]


def test_what_cannot_be_ranked_is_refused_by_name() -> None:
    vector, packed = torch.ones(4), torch.ones(4, 4, dtype=torch.uint8)
    broken = torch.ones(4, 4).index_fill(0, torch.tensor([2]), float("nan"))
    for weight, message in ((vector, "none"), (packed, "none"), (broken, "not finite")):
        services = SimpleNamespace(slot="lift", weight=lambda place, weight=weight: weight)
        with pytest.raises(LuthierError, match=message) as error:
            matrix(PLACE, services)  # type: ignore[arg-type]
        assert error.value.where == str(PLACE)
    with pytest.raises(LuthierError, match="not a number"):
        largest(broken, 3)
    narrow = SimpleNamespace(slot="lift", weight=lambda place: torch.ones(2, 2, dtype=torch.bfloat16))
    assert matrix(PLACE, narrow).dtype == torch.float32  # type: ignore[arg-type]
