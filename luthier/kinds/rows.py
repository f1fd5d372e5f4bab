"""Which rows, and what else to learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from luthier.kinds.base import Services

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class RowLikelihood(NamedTuple):
    """How likely a model finds a row's labels."""

    log_likelihood: float
    """Of all of them, in nats."""
    tokens: int
    """Labels, as the model's own tokenizer cuts them."""
    characters: int
    """Of the labels' text, without special tokens such as the one that ends a turn; at least 1."""


class RowServices(Protocol):
    """All that a row score may ask for. It works before a run: there is no clock yet, and nothing trains."""

    target: Sequence[Any]
    """Rows (`luthier.rows.shapes.Row`) of the task the choice is for; there are some where the card needs `target`."""

    def rng(self, key: str) -> torch.Generator:
        """A generator for this seed and key; the same at every call."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """What texts are about: embedding_BD in fp32, each of length 1; texts that are alike lie close."""

    def likelihood(self, model: str, rows: Sequence[Any]) -> Sequence[RowLikelihood]:
        """How likely a model finds each row's labels: those a run would train on, in its own chat template. Loads the model anew."""


class RowScore(NamedTuple):
    """Which rows, before training? `score(rows, services)` returns one finite number for each row; the highest is chosen first."""

    score: Callable[[Sequence[Any], RowServices], Sequence[float]]


class RowMap(NamedTuple):
    """Rows in, rows out, before training. `map(rows, services)` returns a list of `luthier.rows.shapes.Row`.

    `told(before, after)` says in a few words, for the plan and the report, what became of the rows.
    """

    map: Callable[[Sequence[Any], Services], list[Any]]
    told: Callable[[Sequence[Any], Sequence[Any]], str] | None = None
