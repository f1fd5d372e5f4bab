"""What the model of a finished run makes of each target of some rows: what right and wrong answers do not tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from luthier import machine
from luthier.columns import chunked
from luthier.columns.targets import find_targets
from luthier.kinds import BASE, Batch, Column, Now
from luthier.lab import benchmark
from luthier.lab.skill import Split
from luthier.models.attention import use_attention
from luthier.models.head import head_of
from luthier.models.modes import evaluating
from luthier.results.folder import Run
from luthier.results.opened import open_base, open_run
from luthier.rows.batches import collate
from luthier.rows.chat import form_of
from luthier.rows.encode import encode
from luthier.rows.read import read
from luthier.training.services import view_of
from luthier.tune import Tune
from luthier.tune.forward import hidden

BATCH_ROWS = 64
TOP = Column("top", lambda chunk: chunk.log_probabilities.amax(-1).exp(), gradient=False)
"""The probability of the most likely token."""


@dataclass(frozen=True)
class Targets:
    """The labels of some rows, row by row. Shapes: N labels, R rows."""

    columns: Mapping[str, Tensor]
    """By name, [N] in fp64."""
    row_N: Tensor
    """Which row each is in, from 0."""
    text_N: tuple[str, ...]
    """What each is, as text."""

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def mean(self, name: str) -> float:
        """Of a column, over all labels."""
        return float(self[name].mean())

    def sum_rows(self, name: str) -> Tensor:
        """A column's sum within each row, [R]."""
        return torch.zeros(int(self.row_N.max()) + 1, dtype=torch.float64).index_add(0, self.row_N, self[name])

    def least(self, name: str) -> Tensor:
        """A column's least value within each row, [R]: of `right`, whether greedy decoding would write the whole row."""
        rows = int(self.row_N.max()) + 1
        return torch.full((rows,), float("inf"), dtype=torch.float64).scatter_reduce(0, self.row_N, self[name], "amin")

    def coverage(self, samples: int) -> float:
        """The chance that at least one of so many sampled answers is the right one, a mean over rows; needs the column `nll`."""
        missed_R = 1.0 - (-self.sum_rows("nll")).exp()
        return float((1.0 - missed_R**samples).mean())


def targets_of(run: Run, rows: Sequence[Mapping[str, Any]], columns: Sequence[str | Column]) -> Targets:
    """Columns of every target of some rows, under a run's model.

    Args:
        run: a finished run.
        rows: with what a model should write, such as `prompt` and `completion`.
        columns: those of `luthier.columns.chunked.COLUMNS` by name, others by value; none that compare with the base, see `drift`.
    """
    tune, tokenizer = open_run(run)
    wanted = chunked.resolve(columns)
    assert not chunked.passes_of(wanted), "no run's model knows its base"
    use_attention(tune.model)
    views = []
    with evaluating(tune.model):
        for batch in _batches(tune, tokenizer, rows):
            views.append(view_of(tune, batch, wanted, Now()))
    first = accumulate((len(view.batch.row_ids) for view in views), initial=0)
    return Targets(
        {one.name: torch.cat([machine.widened(view[one.name]).cpu() for view in views]) for one in wanted},
        torch.cat([view.row_N.cpu() + before for view, before in zip(views, first, strict=False)]),
        tuple(tokenizer.convert_ids_to_tokens(torch.cat([view.label_N for view in views]).tolist())),
    )


def drift(run: Run, rows: Sequence[Mapping[str, Any]]) -> float:
    """How far a run took the model's distributions from the base's: KL(model || base) in nats, a mean over the rows' labels."""
    (tune, tokenizer), (base, _) = open_run(run), open_base(run)
    total = count = 0.0
    with evaluating(tune.model), evaluating(base.model):
        for batch in _batches(tune, tokenizer, rows):
            where = find_targets(batch)
            states_ND, base_ND = (hidden(one, batch).at(where.row_N, where.source_N) for one in (tune, base))
            others = {BASE.name: chunked.Other(base_ND, head_of(base.model, base.parts))}
            head = head_of(tune.model, tune.parts)
            wanted = chunked.resolve(["kl"])
            found = chunked.compute(states_ND, where.label_N, head, wanted, others=others, vocabulary=tune.parts.vocabulary)
            total, count = total + machine.total(found["kl"]), count + len(where.label_N)
    return total / count


def with_answers(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items with their right answers as what a model should write."""
    return [{"id": row["id"], "prompt": row["prompt"], "completion": row["answer"]} for row in items]


def answered(skills: Sequence[str], *, split: Split = "held_out", count: int = 60, difficulty: int = 1) -> list[dict[str, Any]]:
    """Such items of skills of the synthetic benchmark, in which the answer is all that is written."""
    return with_answers([row for skill in skills for row in benchmark.rows(skill, split, count, difficulty=difficulty)])


def _batches(tune: Tune, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> Iterator[Batch]:
    form = form_of(tokenizer)
    encoded = [encode(row, tokenizer, form=form) for row in read(list(rows)).rows]
    device = next(tune.model.parameters()).device
    for first in range(0, len(encoded), BATCH_ROWS):
        yield collate(encoded[first : first + BATCH_ROWS]).to(device)
