"""What a head says of evaluation rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.generation.generate import BATCH_TOKENS, context_of
from luthier.kinds import Head
from luthier.models.modes import evaluating
from luthier.rows.batches import collate, plan_epoch
from luthier.rows.chat import form_of
from luthier.rows.encode import Encoded, encode_pair
from luthier.rows.limits import check_ids
from luthier.rows.shapes import Row
from luthier.training.readout import read, states_of, words_of
from luthier.tune import Tune


def row_head_of(tune: Tune) -> Head:
    """The head of a model that reads whole rows.

    Raises:
        LuthierError: it has none.
    """
    if tune.head is None:
        raise LuthierError(
            "this model has no head that reads rows",
            fix="name a run that trained one, with objective: classify, regress or reward_model",
        )
    return tune.head[1]


def readings(tune: Tune, rows: Sequence[Encoded], *, batch_tokens: int = BATCH_TOKENS) -> Tensor:
    """The head's numbers of rows, [rows, K], in fp32 or wider, on the processor; of one that reads words, those of all words of all rows.

    The arguments and errors are those of `readings_by_row`.
    """
    return torch.cat(readings_by_row(tune, rows, batch_tokens=batch_tokens))


def readings_by_row(tune: Tune, rows: Sequence[Encoded], *, batch_tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """The head's numbers of each row, [1, K], or of its words, [N, K], in fp32 or wider, on the processor.

    Args:
        tune: the model, with what is attached to it.
        rows: encoded rows, each by itself.
        batch_tokens: the most tokens of one forward pass, padding counted.

    Raises:
        LuthierError: the model has no head, or the head gives numbers that are not finite.
    """
    head = row_head_of(tune)
    assert tune.head is not None
    own, device = tune.head[0].masters(), next(tune.model.parameters()).device
    found: dict[int, Tensor] = {}
    plan = plan_epoch([len(row) for row in rows], micro_batch_tokens=batch_tokens, batch_rows=max(1, len(rows)), seed=0, epoch=0)
    with evaluating(tune.model):
        for chosen in (places for step in plan for places in step):
            batch = collate([rows[place] for place in chosen]).to(device)
            states = tune.run(partial(states_of, tune, batch))
            numbers = read(head, own, states, batch, causal=tune.parts.causal).cpu()
            sizes = [1] * len(chosen)
            if head.pool == "words":
                sizes = words_of(batch)[0].bincount(minlength=len(chosen)).tolist()
            found |= dict(zip(chosen, numbers.split(sizes), strict=True))
    broken = [place for place in range(len(rows)) if not bool(found[place].isfinite().all())]
    if broken:
        first = rows[broken[0]]
        raise LuthierError(
            f"the head gives numbers that are not finite for {len(broken)} of {len(rows)} rows",
            where=first.place,
            fix="lower the learning rate, or use precision fp32",
        )
    return [found[place] for place in range(len(rows))]


def check_read(tune: Tune, tokenizer: PreTrainedTokenizerBase, row: Row, ids: Sequence[int], new: int = 0) -> None:
    """Refuse token ids that a model cannot read.

    Args:
        tune: the model.
        tokenizer: its tokenizer.
        row: what they were made of.
        ids: the token ids.
        new: how many more it shall write behind them.

    Raises:
        LuthierError: they exceed its context, or an id its vocabulary.
    """
    check_ids(ids, tokenizer, tune.parts.vocabulary, row.place)
    limit = context_of(tune)
    if limit is not None and len(ids) + new > limit:
        answer = f" and an answer of up to {new}" if new else ""
        raise LuthierError(
            f"{len(ids)} tokens{answer} exceed the model's context of {limit}",
            where=row.place,
            fix="shorten or split the row" + (", or lower max_new_tokens" if len(ids) < limit else ""),
        )


def answer_scores(
    tune: Tune, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], answers: Sequence[Sequence[str]]
) -> list[Tensor]:
    """A reward model's scores of given answers, of each row [M answers, K members].

    Args:
        tune: the reward model.
        tokenizer: its tokenizer.
        rows: what is answered.
        answers: of each row.

    Raises:
        LuthierError: the model's head scores no answers, an answer exceeds its context, or scores are not finite.
    """
    head = row_head_of(tune)
    if head.means != "score":
        raise LuthierError(
            f"the head of this model gives each row a {head.means}, and no score", fix="name a run of objective: reward_model"
        )
    form = form_of(tokenizer)
    encoded = [
        encode_pair(row, tokenizer, answer, id=f"{row.id}/{number}", form=form)
        for row, some in zip(rows, answers, strict=True)
        for number, answer in enumerate(some)
    ]
    for row, one in zip((row for row, some in zip(rows, answers, strict=True) for _ in some), encoded, strict=True):
        check_read(tune, tokenizer, row, one.token_ids)
    return list(readings(tune, encoded).split([len(some) for some in answers]))


def places_of(vector_RD: Tensor, sizes: Sequence[int]) -> list[int]:
    """At which place, from 1, each question's text stands among all texts by cosine; of equals the worst.

    Args:
        vector_RD: vectors of groups, each a question, the text that answers it, and maybe others.
        sizes: of the groups.
    """
    unit_RD = torch.nn.functional.normalize(vector_RD, dim=-1)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    texts = [start + place for start, size in zip(starts, sizes, strict=True) for place in range(1, size)]
    cosine_GM = unit_RD[starts] @ unit_RD[texts].t()
    own_G = torch.tensor([texts.index(start + 1) for start in starts])
    own_G1 = cosine_GM.gather(1, own_G[:, None])
    return [int(count) for count in (cosine_GM >= own_G1).sum(-1)]
