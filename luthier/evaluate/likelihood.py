"""Likelihoods of given text, in batches limited by tokens; logits are never kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from luthier import machine
from luthier.columns import chunked
from luthier.errors import LuthierError
from luthier.generation.generate import BATCH_TOKENS, context_of
from luthier.kinds import Now, RowLikelihood
from luthier.kinds.parts import Reads
from luthier.models.head import head_of
from luthier.models.modes import evaluating
from luthier.rows.batches import collate, plan_epoch
from luthier.rows.chat import Form, LossOn, form_of
from luthier.rows.encode import Encoded, encode_each, encode_pair, end_of_turn_ids
from luthier.rows.groups import GROUPS
from luthier.rows.shapes import Row, bad_rows_error
from luthier.training.services import view_of
from luthier.tune import Tune
from luthier.tune.forward import hidden


class Likelihood(NamedTuple):
    """How likely a model finds one row's labels."""

    nats: float
    """The negative log-likelihood of all labels, summed."""
    targets: int


def likelihoods(tune: Tune, rows: Sequence[Encoded], *, batch_tokens: int = BATCH_TOKENS) -> list[Likelihood]:
    """The negative log-likelihood of each row's labels, in the order of the rows.

    Args:
        tune: the model, with what is attached to it.
        rows: encoded rows.
        batch_tokens: the most tokens of one forward pass, padding counted; a longer row is one by itself.

    Raises:
        LuthierError: the model gives numbers that are not finite.
    """
    found: dict[int, Likelihood] = {}
    device = next(tune.model.parameters()).device
    columns = chunked.resolve(["nll"])
    lengths = [len(row) for row in rows]
    # All rows are one step of an epoch: sorted by length and cut so that little is padded.
    plan = plan_epoch(lengths, micro_batch_tokens=batch_tokens, batch_rows=max(1, len(rows)), seed=0, epoch=0)
    with evaluating(tune.model):
        for chosen in (indices for step in plan for indices in step):
            view = view_of(tune, collate([rows[index] for index in chosen]).to(device), columns, Now(), pack=False)
            nats_B = view.sum_rows_wide(view["nll"]).tolist()
            targets_B = view.sum_rows(torch.ones_like(view["nll"])).tolist()
            for index, nats, targets in zip(chosen, nats_B, targets_B, strict=True):
                found[index] = Likelihood(nats, int(targets))
    broken = [rows[index] for index, one in sorted(found.items()) if not math.isfinite(one.nats)]
    if broken:
        raise LuthierError(
            f"the model gives numbers that are not finite for {len(broken)} of {len(rows)} rows",
            where=broken[0].place,
            fix="lower the learning rate, or use precision fp32",
        )
    return [found[index] for index in range(len(rows))]


class Continuation(NamedTuple):
    """How likely a model finds the tokens that follow others."""

    log_likelihood: float
    """Summed, in nats."""
    is_greedy: bool
    """Whether each of them is the most likely one at its place."""


def continuations(
    tune: Tune, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_tokens: int = BATCH_TOKENS
) -> list[Continuation]:
    """The log-likelihood of tokens behind others, in the order of the pairs.

    Args:
        tune: the model, with what is attached to it; trained prompts stand before each row.
        pairs: token ids: what is read, at least one, and what follows. The model runs over all of them but the last, so they may be
            one more than its context.
        batch_tokens: the most tokens of one forward pass, padding counted; a longer row is one by itself.

    Raises:
        LuthierError: the model gives numbers that are not finite.
    """
    found: dict[int, Continuation] = {}
    device = next(tune.model.parameters()).device
    columns = chunked.resolve(["nll", "right"])
    lengths = [len(read) + len(follows) - 1 for read, follows in pairs]
    plan = plan_epoch(lengths, micro_batch_tokens=batch_tokens, batch_rows=max(1, len(pairs)), seed=0, epoch=0)
    with evaluating(tune.model), torch.no_grad():
        head = head_of(tune.model, tune.parts)
        for chosen in (indices for step in plan for indices in step):
            ids = [[*pairs[index][0], *pairs[index][1]] for index in chosen]
            rows = [Encoded(str(n), tuple(row[:-1]), (False,) * (len(row) - 1), "", {}, 0, "text") for n, row in enumerate(ids)]
            where = [(n, time) for n, index in enumerate(chosen) for time in range(len(pairs[index][0]) - 1, len(ids[n]) - 1)]
            row_N, source_N = torch.tensor(where, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
            label_N = torch.tensor([ids[n][time + 1] for n, time in where], dtype=torch.int64, device=device)
            hidden_ND = hidden(tune, collate(rows).to(device), share=False).at(row_N, source_N)
            made = chunked.compute(hidden_ND, label_N, head, columns, vocabulary=tune.parts.vocabulary)
            nats_B = torch.zeros(len(chosen), dtype=torch.float64).index_add_(0, row_N.cpu(), machine.widened(made["nll"]).cpu())
            wrong_B = torch.zeros(len(chosen)).index_add_(0, row_N.cpu(), 1 - made["right"].float().cpu())
            for index, nats, wrong in zip(chosen, nats_B.tolist(), wrong_B.tolist(), strict=True):
                found[index] = Continuation(-nats, wrong == 0)
    if not all(math.isfinite(one.log_likelihood) for one in found.values()):
        raise LuthierError("the model gives numbers that are not finite", fix="lower the learning rate, or use precision fp32")
    return [found[index] for index in range(len(pairs))]


def row_likelihoods(
    tune: Tune, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, loss_on: LossOn = "assistant"
) -> list[RowLikelihood]:
    """How likely a model finds what each row teaches, in the order of the rows: the labels a run on them would have.

    Args:
        tune: the model, with what is attached to it.
        tokenizer: its tokenizer.
        rows: checked rows.
        loss_on: which turns are labels, as under `rows` in a recipe.

    Raises:
        LuthierError: a row cannot be written as the model reads it, is longer than its context or has no target; or the model gives
            numbers that are not finite.
    """
    several = [row for row in rows if row.shape in GROUPS]
    if several:
        raise LuthierError(
            f"a row of the shape `{several[0].shape}` has no one answer to learn, whose likelihood could be told",
            where=several[0].place,
            fix="remove these rows, or give one answer each, such as the chosen one as `completion`",
        )
    encoded, bad = encode_each(rows, tokenizer, loss_on=loss_on, reads=Reads(context_of(tune), tune.parts.vocabulary))
    bad += encoded.dropped
    if bad:
        problem = bad_rows_error(bad, len(rows))
        raise LuthierError(
            problem.what, where=problem.where, fix="fix or remove these rows: without a target none has a likelihood"
        )
    found = []
    for row, one in zip(encoded.rows, likelihoods(tune, encoded.rows), strict=True):
        targets = [token for token, is_target in zip(row.token_ids, row.supervised, strict=True) if is_target]
        text = str(tokenizer.decode(targets, skip_special_tokens=True))
        found.append(RowLikelihood(-one.nats, one.targets, max(1, len(text))))
    return found


def encode_choices(row: Row, tokenizer: PreTrainedTokenizerBase, form: Form | None = None) -> list[Encoded]:
    """A row's prompt with each of its choices. Only the choice is scored, not the token that ends a turn: the sums are
    those of the LM Evaluation Harness."""
    form = form or form_of(tokenizer)
    ends = end_of_turn_ids(tokenizer, form)
    return [
        _without_end(encode_pair(row, tokenizer, choice, id=f"{row.id}#{number}", form=form), ends)
        for number, choice in enumerate(row.fields["choices"])
    ]


def _without_end(encoded: Encoded, ends: Sequence[int]) -> Encoded:
    last = max((index for index, is_target in enumerate(encoded.supervised) if is_target), default=-1)
    if last < 0 or encoded.token_ids[last] not in ends:
        return encoded
    return replace(encoded, supervised=(*encoded.supervised[:last], False, *encoded.supervised[last + 1 :]))


def most_likely(choices: Sequence[str], likelihood: Sequence[Likelihood], *, per_byte: bool) -> int:
    """The index of the choice with the highest log-likelihood, summed or per UTF-8 byte; the first of equals."""
    sizes = [len(choice.encode()) if per_byte else 1 for choice in choices]
    cost = [one.nats / size for one, size in zip(likelihood, sizes, strict=True)]
    return cost.index(min(cost))
