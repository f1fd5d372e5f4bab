"""Which rows each step takes, how many there are, and what two measured steps say of the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luthier.kinds import Now
from luthier.rows.batches import padding_share
from luthier.rows.encode import Encoded, EncodedRows, Sizes
from luthier.rows.mixture import Mixture, Source
from luthier.training import trial
from luthier.training.feed import Feed
from luthier.training.loop import Clock
from luthier.training.schedule import linear
from luthier.training.trial import largest_step, measure, size_of
from luthier.training.world import World

LENGTHS = (3, 9, 4, 5, 8, 2)


def rows_of(lengths: Sequence[int] = LENGTHS) -> EncodedRows:
    """Rows of so many tokens, all of them but the first two targets."""
    return EncodedRows.of(
        Encoded(f"r{i}", tuple(range(n)), (False,) * 2 + (True,) * (n - 2), "here", {}, 0, "text") for i, n in enumerate(lengths)
    )


def feed_of(rows: EncodedRows | None = None, **options: Any) -> Feed:
    return Feed(rows or rows_of(), **{"seed": 0, "micro_batch_tokens": 16, "batch_rows": 2, **options})


def ids_of(feed: Feed, step: int) -> list[str]:
    return [id for batch in feed.at(step)[1] for id in batch.row_ids]


@pytest.mark.parametrize(
    ("epochs", "batch_rows", "steps"), [(1.0, 2, 3), (2.5, 2, 8), (2.25, 2, 7), (0.1, 2, 1), (0.5, 6, 1), (3.0, 6, 3), (1.75, 6, 2)]
)
def test_steps_of_so_many_epochs(epochs: float, batch_rows: int, steps: int) -> None:
    assert feed_of(epochs=epochs, batch_rows=batch_rows).total() == steps


def test_every_epoch_has_every_row_once() -> None:
    feed = feed_of()
    assert feed.total() == 3, "one epoch is what a feed has"
    assert [feed.at(step)[0] for step in range(8)] == pytest.approx([step / 3 for step in range(8)])
    for first in (0, 3, 6):
        assert sorted(id for step in range(first, first + 3) for id in ids_of(feed, step)) == [f"r{i}" for i in range(6)]


def taken(feed: Feed, steps: int, lengths: Sequence[int] = LENGTHS) -> tuple[int, int]:
    """Tokens and targets of the first steps."""
    sizes = [lengths[int(id[1])] for step in range(steps) for id in ids_of(feed, step)]
    return sum(sizes), sum(size - 2 for size in sizes)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 7},
        {"steps": 3, "batch_rows": 6},
        {"steps": 1},
        {"epochs": 1.0},
        {"epochs": 2.5},
        {"epochs": 0.25},
        {"steps": 4, "world": World(2, 1)},
    ],
    ids=str,
)
def test_tokens_of_the_whole_run(options: dict[str, Any]) -> None:
    alone = feed_of(**{**options, "world": World()})
    assert feed_of(**options).tokens() == taken(alone, alone.total())


def test_tokens_where_epochs_have_unequally_many_steps() -> None:
    """As if all had as many as the first."""
    feed = next(one for seed in range(50) for one in [feed_of(seed=seed, batch_rows=None, batch_tokens=11)] if differs(one))
    first = len(feed.epoch(0))
    feed.steps = 2 * first + 1
    tokens, targets = taken(feed, first)
    lengths = [LENGTHS[row] for group in feed.epoch(2)[0] for row in group]
    assert feed.tokens() == (2 * tokens + sum(lengths), 2 * targets + sum(lengths) - 2 * len(lengths))


def differs(feed: Feed) -> bool:
    return len(feed.epoch(0)) != len(feed.epoch(1))


def test_padding_is_that_of_the_first_epoch() -> None:
    feed = next(one for seed in range(50) for one in [feed_of(seed=seed)] if shares_of(one)[0] != shares_of(one)[1])
    assert feed.padding() == shares_of(feed)[0] > 0.0
    feed.pack()
    assert feed.padding() == 0.0 and feed.packed and not feed.shared
    feed.pack(shared=True)
    assert feed.packed and feed.shared


def shares_of(feed: Feed) -> list[float]:
    return [padding_share(feed.epoch(number), LENGTHS) for number in (0, 1)]


def mixed(epochs: float) -> Feed:
    """An epoch takes four rows of the first two, and two of the other four."""
    sources = (Source("few", 2.0, [0, 1]), Source("many", 1.0, [2, 3, 4, 5]))
    return feed_of(epochs=epochs, mixture=Mixture(sources, (2.0, 1.0), "rows", (4, 2), 0))


@pytest.mark.parametrize(("epochs", "begun"), [(1.0, 1), (2.0, 2), (2.25, 3)])
def test_what_a_mixture_takes(epochs: float, begun: int) -> None:
    feed = mixed(epochs)
    assert feed.mixture is not None and feed.shares() == feed.mixture.facts(feed.rows.sizes, begun)
    assert not feed_of().shares()
    ids = [id for step in range(3) for id in ids_of(feed, step)]
    assert sorted(id for id in ids if id[1] in "01") == ["r0", "r0#2", "r1", "r1#2"]
    whole, left = divmod(feed.total(), 3)
    first, part = (
        taken(feed, 3),
        sum(LENGTHS[int(id[1])] for step in range(3 * whole, 3 * whole + left) for id in ids_of(feed, step)),
    )
    assert feed.tokens()[0] == whole * first[0] + part
    assert sum(LENGTHS[int(id[1])] for step in (3, 4, 5) for id in ids_of(feed, step)) != first[0]


PAIRED = Sizes((10, 4, 30), (1, 1, 1), longest=(7, 3, 20), members=(2, 2, 2), run=(8, 4, 25))


def sized(sizes: Sizes, plan: Any, total: int, *, packed: bool = False, shared: bool = False) -> Any:
    run = Feed.run
    feed = SimpleNamespace(
        rows=SimpleNamespace(sizes=sizes), packed=packed, shared=shared, epoch=lambda number: plan[number], total=lambda: total
    )
    feed.run = lambda some: run(feed, some)  # type: ignore[arg-type]
    return feed


def test_what_a_micro_batch_computes() -> None:
    assert size_of(sized(PAIRED, [], 0), [0, 1]) == 4 * 7
    assert size_of(sized(PAIRED, [], 0, packed=True), [0, 2]) == 40
    assert size_of(sized(PAIRED, [], 0, packed=True, shared=True), [0, 2]) == 33
    assert size_of(sized(Sizes((5, 2, 3), (1, 1, 1)), [], 0), [0, 1, 2]) == 3 * 5


def test_the_step_with_the_largest_micro_batch_of_those_that_are_taken() -> None:
    sizes = Sizes((1, 6, 4), (1, 1, 1))
    plan = [[[[0]], [[2], [1]], [[0, 1]]], [[[0]], [[0]], [[0]]]]
    assert largest_step(sized(sizes, plan, 3)) == 2 and largest_step(sized(sizes, plan, 2)) == 1
    # A process may have no row in a step, and no step is smaller.
    assert largest_step(sized(sizes, [[[], [[]], [[0]]]], 3)) == 2


@pytest.mark.parametrize("tokens", [1, 8])
def test_the_second_of_two_steps_is_what_a_step_takes(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that runs twice as fast with every look: 1, 2, 4 and 8 seconds."""
    ticks = count()
    monkeypatch.setattr(trial.time, "perf_counter", lambda: 2.0 ** next(ticks))
    monkeypatch.setattr(trial.machine, "peak_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(trial.machine, "reset_peak", lambda device: None)
    feed = sized(Sizes((tokens,), (1,)), [[[[0]]]], 1)
    feed.device, feed.tokens = torch.device("cpu"), lambda: (10 * tokens, 3)
    feed.at = lambda step: (0.0, [SimpleNamespace(tokens=tokens, step=step)])
    taken: list[Now] = []
    engine: Any = SimpleNamespace(
        tune=SimpleNamespace(model=torch.nn.Linear(1, 1)), step=lambda batches, now: taken.append(now) or batches
    )
    found = measure(engine, feed, Clock(5, 0.5, linear, 0, 7))
    assert len(taken) == 2 and taken[0] == taken[1] == Now(0, 5, 0.0, 0, 1, 1.0, 0.5, 7)
    assert (found.peak_memory_bytes, found.seconds_per_step, found.tokens, found.seconds) == (1 << 20, 4.0, tokens, 40.0)
    assert not engine.tune.model.training
    with pytest.raises(FrozenInstanceError):
        found.tokens = 0  # type: ignore[misc]
