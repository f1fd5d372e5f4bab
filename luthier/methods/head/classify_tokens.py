"""A head that gives every word a tag, with cross-entropy: names of people and places, parts of speech."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Batch, Head, LossTerm, View
from luthier.methods.head import _layer
from luthier.registry import method
from luthier.rows.spans import OUTSIDE, TAGS, WORD


@method(
    title="Token classification",
    departs="the linear map starts at zero, so that every tag is as likely at step 0, where transformers draws it",
    learning_rate=1e-4,
)
def classify_tokens(
    *, labels: tuple[str, ...], scheme: Literal["bio", "plain"] = "bio", head_learning_rate_factor: float = 1.0, weight: float = 1.0
) -> tuple[Head, LossTerm]:
    """Learn the tag of each word, from the last hidden state of its first token. Other tokens of a word, and special ones, have none.

    Rows are `tokens` and `tags`, or `text` and `spans` of characters, with `start`, `stop` and `label`. The head is saved with the run, and
    is that of `AutoModelForTokenClassification`. A causal model sees what stands before a word alone, an encoder all of it.

    Args:
        labels: with `bio` the names of entities, of which the tags `O`, `B-name` and `I-name` are made; with `plain` the tags themselves.
        scheme: how tags are made of labels.
        head_learning_rate_factor: multiplies the learning rate of the head.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: there are too few labels, or one comes twice or looks like a tag.
    """
    where, fewest = "classify_tokens: labels", 1 if scheme == "bio" else 2
    if len(labels) < fewest or len(set(labels)) < len(labels):
        raise LuthierError(f"the labels are {list(labels)}", where=where, fix=f"name {fewest} or more, each once")
    marked = [one for one in labels if one == OUTSIDE or one[:2] in ("B-", "I-")] if scheme == "bio" else []
    if marked:
        fix = "name entities alone, such as person for B-person and I-person, or use scheme: plain"
        raise LuthierError(f"the label `{marked[0]}` is a tag", where=where, fix=fix)
    tags = (OUTSIDE, *(f"{mark}-{one}" for one in labels for mark in "BI")) if scheme == "bio" else labels
    number_of = {tag: number for number, tag in enumerate(tags)}

    def total(view: View, own: dict[str, Tensor]) -> Tensor:
        logits_NK = view.outputs_BK
        word_N = _words(view.batch)
        rows = [text.split("\n") for text in view.batch.texts.get(TAGS, ())]
        tag_N = torch.tensor([number_of[rows[row][word - 1]] for row, word in word_N], dtype=torch.int64, device=logits_NK.device)
        view.note_groups("accuracy", (logits_NK.argmax(1) == tag_N).to(logits_NK.dtype))
        return functional.cross_entropy(logits_NK, tag_N, reduction="sum")

    def check(batch: Batch) -> None:
        texts = batch.texts.get(TAGS, ("",) * len(batch.row_ids))
        for row, text in zip(batch.row_ids, texts, strict=True):
            if not text:
                fix = "give rows with `tokens` and `tags`, or `text` and `spans`"
                raise LuthierError("the row's words have no labels", where=f"row {row}", fix=fix)
            unknown = next((tag for tag in text.split("\n") if tag not in number_of), None)
            if unknown is not None:
                what = f"a word's tag is `{unknown}`, and the tags are {', '.join(tags)}"
                raise LuthierError(what, where=f"row {row}", fix="add its label, or fix the row")

    means: Literal["entities", "tags"] = "entities" if scheme == "bio" else "tags"
    return (
        Head(
            partial(_layer.start_tokens, len(tags)), _layer.read, means, "words", names=tuple(tags), rate=head_learning_rate_factor
        ),
        LossTerm(total, unit="row", count=lambda batch: float(len(_words(batch))), columns=(), weight=weight, check=check),
    )


def _words(batch: Batch) -> list[tuple[int, int]]:
    """Row and number of each word that begins at a token, in the order in which a head reads them."""
    word_BT = batch.token_columns.get(WORD)
    if word_BT is None:
        return []
    row_N, time_N = ((word_BT > 0) & batch.attend_BT).nonzero(as_tuple=True)
    return list(zip(row_N.tolist(), word_BT[row_N, time_N].long().tolist(), strict=True))
