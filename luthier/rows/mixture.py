"""Mixtures: how often an epoch takes rows from each of several sources.

Every source is read in passes of its own: all its rows in a random order, then all again in another. An epoch takes the next few
rows of each source, so no row comes twice before its whole source came once, whatever the weights. Which rows an epoch takes is a
pure function of the seed and the epoch's number.

Shares by a temperature T are proportional to size^(1/T), as in multilingual training (Arivazhagan et al. 2019, arXiv:1907.05019):
1 keeps the sources' own proportions, a large T makes all sources equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from luthier.draws import generator
from luthier.errors import LuthierError
from luthier.rows.encode import Sizes

Share = Literal["rows", "tokens"]


class Draw(NamedTuple):
    """One row of an epoch."""

    row: int
    copy: int
    """How many times the row already came in this epoch."""


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Args:
        name: what reports call it.
        weight: what its share is proportional to; None where none was given.
        rows: the places of its rows among all rows.
    """

    name: str
    weight: float | None
    rows: Sequence[int]


@dataclass(frozen=True)
class Mixture:
    """Sources, and how many rows of each an epoch takes.

    Args:
        sources: the sources.
        weights: what the shares are proportional to, one number a source.
        share: what the weights refer to.
        counts: rows of each source in one epoch; together as many as all sources have.
        seed: the run's seed.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    share: Share
    counts: tuple[int, ...]
    seed: int

    def epoch(self, number: int) -> list[Draw]:
        """The rows of one epoch, source by source; the order of training is drawn elsewhere."""
        drawn: list[Draw] = []
        for index in range(len(self.sources)):
            before = -1
            for row in self._drawn(index, number):
                drawn.append(Draw(row, drawn[-1].copy + 1 if row == before else 0))
                before = row
        return drawn

    def facts(self, sizes: Sizes, epochs: int) -> list[dict[str, Any]]:
        """What each source should be and is, over the first epochs: shares of rows, tokens and labels, and passes over it."""
        drawn = [[row for epoch in range(epochs) for row in self._drawn(index, epoch)] for index in range(len(self.sources))]
        of_rows = _normalized([len(rows) for rows in drawn])
        of_tokens = _normalized([sum(sizes.tokens[row] for row in rows) for rows in drawn])
        of_targets = _normalized([sum(sizes.targets[row] for row in rows) for rows in drawn])
        return [
            {
                "name": source.name,
                "weight": self.weights[index],
                "unit": self.share,
                "wanted": _normalized(self.weights)[index],
                "realized": {"rows": of_rows[index], "tokens": of_tokens[index], "labels": of_targets[index]},
                "passes": len(drawn[index]) / len(source.rows),
            }
            for index, source in enumerate(self.sources)
        ]

    def _drawn(self, source: int, epoch: int) -> list[int]:
        """The rows an epoch takes of one source, in the order in which they were read."""
        rows, count = self.sources[source].rows, self.counts[source]
        return sorted(rows[place] for place in _taken(len(rows), count, epoch, self.seed, source))


def make_mixture(sources: Sequence[Source], sizes: Sizes, *, temperature: float, share: Share, seed: int) -> Mixture | None:
    """Decide how many rows of each source an epoch takes.

    Args:
        sources: the sources; a missing weight counts as 1 where another source has one.
        sizes: the sizes of all rows.
        temperature: T in size^(1/T), where no source has a weight.
        share: whether weights, or sizes, count rows or tokens.
        seed: the run's seed.

    Returns:
        The mixture; None where every row should come once an epoch.

    Raises:
        LuthierError: a source has no usable row, or its share is less than one row an epoch.
    """
    weighted = any(source.weight is not None for source in sources)
    if not weighted and temperature == 1.0:
        return None
    for source in sources:
        if not len(source.rows):
            raise LuthierError(f"no row of `{source.name}` can be used", where="rows.train", fix="leave this source out")
    tokens = [sum(sizes.tokens[row] for row in source.rows) for source in sources]
    own = [len(source.rows) for source in sources] if share == "rows" else tokens
    weights = [source.weight or 1.0 for source in sources] if weighted else tempered(own, temperature)
    # A source of short rows needs more of them for the same share of tokens.
    mean = [count / len(source.rows) if share == "tokens" else 1.0 for count, source in zip(tokens, sources, strict=True)]
    rows = sum(len(source.rows) for source in sources)
    counts = apportioned(rows, [weight / length for weight, length in zip(weights, mean, strict=True)])
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise LuthierError(
                f"the share of `{source.name}` is less than one of the {rows} rows of an epoch",
                where="rows.train",
                fix="raise its weight, or leave it out",
            )
    return Mixture(tuple(sources), tuple(weights), share, tuple(counts), seed)


def described_share(facts: Mapping[str, Any]) -> str:
    """One source's share in words."""
    realized = ", ".join(f"{100 * share:.1f} % of {what}" for what, share in facts["realized"].items())
    wanted = f"{100 * facts['wanted']:.1f} % of {facts['unit']}"
    return f"{facts['name']}: {realized}; wanted {wanted}; {facts['passes']:.2f} passes"


def tempered(sizes: Sequence[int], temperature: float) -> list[float]:
    """Sizes to the power of 1/T, the largest being 1."""
    largest = max(sizes)
    return [(size / largest) ** (1 / temperature) for size in sizes]


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total` in proportion to the weights, by largest remainders; ties go to the first."""
    quotas = [total * share for share in _normalized(weights)]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda index: (counts[index] - quotas[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _normalized(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _taken(rows: int, count: int, epoch: int, seed: int, source: int) -> list[int]:
    """The places from `epoch * count` on, `count` of them, in the endless row of a source's passes."""
    first, last = epoch * count, (epoch + 1) * count
    taken: list[int] = []
    for number in range(first // rows, -(-last // rows)):
        start = max(0, first - number * rows)
        order = torch.randperm(rows, generator=generator("pass over a source", seed, source, number))
        taken += order[start : last - number * rows].tolist()
    return taken
