"""New tokens: a tokenizer learns them, and a model gets a row for each, which begins at the mean of what was read for it before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.models.quiet import quiet

WHERE = "model.add_tokens"
_CONTROL = re.compile(r"<\|.+\|>")
"""How tokens are written that steer a conversation and are no part of what is said."""


def ids_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """The ids of tokens that a tokenizer has."""
    known = tokenizer.get_vocab()
    return [known[one] for one in tokens]


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Let a tokenizer read texts as one token each. Decoding shows them like any other word, but for those of the form `<|...|>`, which
    are special.

    Returns:
        Their ids, in order.

    Raises:
        LuthierError: a text is a token already, or cannot be one.
    """
    known = tokenizer.get_vocab()
    there = [one for one in tokens if one in known]
    if there:
        listed = ", ".join(f"`{one}` (id {known[one]})" for one in there)
        raise LuthierError(
            f"the tokenizer has {listed} already",
            where=WHERE,
            fix="leave out what it has: its rows are trained by `tune: full`, or by another technique that reaches the embedding",
        )
    tokenizer.add_tokens([AddedToken(one, normalized=False, special=_CONTROL.fullmatch(one) is not None) for one in tokens])
    ids = ids_of(tokenizer, tokens)
    for token, number in zip(tokens, ids, strict=True):
        if tokenizer.encode(token, add_special_tokens=False) != [number]:
            raise LuthierError(f"the tokenizer does not read `{token}` as one token", where=WHERE, fix="choose another text")
    return ids


def extend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer and to its model.

    The row of a token, in the embedding and in a head of its own, is the mean of the rows of the tokens that were read for its text before.
    Rows that no token had yet, which pad the matrices of some models, are used before any is added.

    Args:
        model: read with its weights, before anything is attached.
        tokenizer: of the model as it is; knows the tokens afterwards.
        tokens: texts.

    Raises:
        LuthierError: as `extend_tokenizer`; or nothing was read for a text before.
    """
    before = [list(tokenizer.encode(one, add_special_tokens=False)) for one in tokens]
    ids = extend_tokenizer(tokenizer, tokens)
    empty = [one for one, read in zip(tokens, before, strict=True) if not read]
    if empty:
        raise LuthierError(f"the tokenizer reads nothing for `{empty[0]}`", where=WHERE, fix="choose a text of visible characters")
    model_: Any = model
    rows = len(model_.get_input_embeddings().weight)
    if max(ids) >= rows:
        with quiet():
            model_.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for matrix in _matrices(model_):
        # All means are of the rows as they were.
        means = [_mean(matrix[read]) for read in before]
        for number, mean in zip(ids, means, strict=True):
            matrix[number] = mean


def _matrices(model: Any) -> list[Tensor]:
    """What has an entry for each token: the embedding, and weight and bias of a head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    held = [embedding.weight, *([] if head is None else [head.weight, getattr(head, "bias", None)])]
    return [one.data for one in {id(one): one for one in held if one is not None}.values()]


def _mean(rows: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide).mean(dim=0).to(rows.dtype)
