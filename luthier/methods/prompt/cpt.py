"""Context-aware Prompt Tuning (Blau et al., 2024): a few-shot context as a prompt, whose embeddings move within small balls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from luthier import machine
from luthier.errors import LuthierError
from luthier.kinds import Batch, Callback, Prompt, Services, State, Tensors, TokenWeight, View
from luthier.methods.prompt._virtual import stand_before
from luthier.registry import method
from luthier.rows.batches import NOT_A_TARGET

REFERENCE_WIDTH = 2048
"""The width at which a radius is itself: balls grow with the root of the width."""


@method(
    title="Context-aware Prompt Tuning",
    paper="arXiv:2410.17222",
    row=27,
    reduces_to="radius towards 0: the few-shot context as it is written",
    departs="one radius for all tokens but labels, where the paper has one for inputs and one for the template: rows do not tell these "
    "apart; every training row stands behind the same context, in which it may stand itself, as in the paper where the context is all "
    "the rows there are; offsets are projected after every step, where the authors' code waits for the next forward pass; objectives "
    "that are a mean over rows learn the rows' own labels alone, and other token weights leave those of the context as they are",
    step0="on purpose not the base",
    merges="never",
    learning_rate=1e-3,
)
def cpt(*, examples: int = 4, radius: float = 0.1, decay: float = 0.95) -> tuple[Prompt, TokenWeight, Callback]:
    """Put training rows before every row as a few-shot context, and train small offsets of its embeddings, labels excepted.

    The context's own labels are learned too, the less the farther they stand before the row. The loss is divided by the number of
    labels, not by the sum of their weights.

    Args:
        examples: N, training rows that form the context, drawn by the seed; the paper has 2 to 6 for each class.
        radius: epsilon, the longest an offset may be in a model of width 2048, in units of the embeddings; it grows with the root of the
            width. The paper searches 0.001 to 1; the authors' code has 0.1.
        decay: gamma, the weight of the last example's labels; one example before has gamma squared, and so on. The paper has 0.95 and
            above.

    Raises:
        LuthierError: an option is out of range.
    """
    if examples < 1:
        raise LuthierError(f"the context has {examples} examples", where="cpt: examples", fix="use at least 1")
    if radius <= 0.0:
        raise LuthierError(f"the radius is {radius}", where="cpt: radius", fix="use more than 0, e.g. 0.1")
    if not 0.0 <= decay <= 1.0:
        raise LuthierError(f"the decay is {decay}", where="cpt: decay", fix="use 0 to 1")

    def context(services: Services) -> Context:
        return context_of(services.batches(examples), examples)

    def start(table_VD: Tensor, services: Services) -> Tensors:
        found = context(services)
        context_PD = table_VD[found.token_ids_P.to(table_VD.device)].clone()
        moves_P1 = (found.label_P < 0)[:, None].to(table_VD.device)
        return {"context_PD": context_PD, "moves_P1": moves_P1, "offset_PD": torch.zeros_like(context_PD)}

    def apply(tensors: Tensors, token_ids_BT: Tensor, embeds_BTD: Tensor) -> Tensor:
        prompt_PD = tensors["context_PD"] + tensors["offset_PD"] * tensors["moves_P1"]
        return stand_before(prompt_PD.to(embeds_BTD.dtype), token_ids_BT, embeds_BTD)

    def remember(services: Services) -> State:
        found = context(services)
        before_P = 1 + found.example_P.max() - found.example_P
        return {"moves_P": found.label_P < 0, "weight_P": decay ** machine.widened(before_P)}

    def keep_small(state: State, services: Services) -> None:
        for one in services.trained():
            if one.slot == services.slot:
                services.write(one, project(one.master, state["moves_P"] * at_width(radius, one.master.shape[1])))

    def weigh(view: View) -> Tensor:
        weight_P = view.state["weight_P"].to(view["nll"])
        virtual_N = -1 - view.batch.token_ids_BT[view.row_N, view.position_N]
        return torch.where(virtual_N >= 0, weight_P[virtual_N.clamp(min=0)], 1.0)

    prompt = Prompt(
        start,
        apply,
        labels=lambda services: context(services).label_P,
        frozen=frozenset({"context_PD", "moves_P1"}),
        # An offset is small beside its embedding: only their sum is rounded.
        wide=frozenset({"context_PD", "offset_PD"}),
    )
    return (
        prompt,
        TokenWeight(weigh, ("nll",), virtual=True),
        Callback(after_step=keep_small, start=remember),
    )


class Context(NamedTuple):
    """Rows one behind the other."""

    token_ids_P: Tensor
    label_P: Tensor
    """The token id where it is a target, -100 elsewhere."""
    example_P: Tensor
    """The row each token is from, counted from 0."""


def context_of(batches: Sequence[Batch], examples: int) -> Context:
    """The first rows of some batches as one context, without padding, on the processor."""
    encoded = [
        (batch.token_ids_BT[b, real_T].cpu(), batch.label_BT[b, real_T].cpu())
        for batch in batches
        for b, real_T in enumerate(batch.attend_BT)
    ][:examples]
    token_ids_P = torch.cat([token_ids_T for token_ids_T, _ in encoded])
    # As in a row of its own, an example's first token is no target.
    label_P = torch.cat([functional.pad(label_T[1:], (1, 0), value=NOT_A_TARGET) for _, label_T in encoded])
    example_P = torch.repeat_interleave(torch.tensor([len(token_ids_T) for token_ids_T, _ in encoded]))
    return Context(token_ids_P, label_P, example_P)


def at_width(radius: float, width: int) -> float:
    """The longest an offset may be in a model whose embeddings are so wide."""
    return radius * math.sqrt(width / REFERENCE_WIDTH)


def project(offset_PD: Tensor, radius_P: Tensor) -> Tensor:
    """Offsets no longer than their radius: those that are longer are scaled to it, others stay as they are."""
    norm_P = offset_PD.norm(dim=1)
    radius_P = radius_P.to(norm_P)
    scale_P = torch.where(norm_P > radius_P, radius_P / norm_P, 1.0)
    return offset_PD * scale_P[:, None]
