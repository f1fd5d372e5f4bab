"""Memory and time of a plan in words."""

from __future__ import annotations

import pytest

from luthier.planning.amounts import memory, time, unit_of


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0 MiB"),
        (586 * 2**20, "586 MiB"),
        (10 * 2**30 - 2**20, "10,239 MiB"),
        (10 * 2**30, "10.0 GiB"),
        (909634846720, "847.2 GiB"),
    ],
)
def test_memory(number: int, said: str) -> None:
    """A plan spoke of 867,495 MiB."""
    assert memory(number) == said and memory(number, unit_of(number)) == said.split()[0]


def test_numbers_that_stand_beside_each_other_have_one_unit() -> None:
    assert memory(512 * 2**20, "GiB") == "0.5" and memory(20 * 2**30, "MiB") == "20,480"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (1.4, "1 seconds"),
        (119, "119 seconds"),
        (120, "2.0 minutes"),
        (7199, "120.0 minutes"),
        (7200, "2.0 hours"),
        (221226, "2.6 days"),
    ],
)
def test_time(seconds: float, said: str) -> None:
    """A plan spoke of 3687.1 minutes."""
    assert time(seconds) == said
