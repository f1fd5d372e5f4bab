"""What the model reads while it learns: the one place where input maps stand between a batch and a training pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from luthier import draws
from luthier.errors import LuthierError
from luthier.kinds import Batch, InputMap, Now, Reading, Vocabulary
from luthier.rows.encode import end_of_turn_ids
from luthier.rows.template import choice_of, templates_of, text_of
from luthier.tune.forward import EmbedChange


class Mapped(NamedTuple):
    """One input map under its slot."""

    slot: str
    value: InputMap


@dataclass(frozen=True)
class Inputs:
    """All input maps of a run, in order: each reads what the one before it left.

    Raises:
        LuthierError: a map refuses the vocabulary.
    """

    vocabulary: Vocabulary
    maps: list[Mapped] = field(default_factory=list)

    def __post_init__(self) -> None:
        for one in self.maps:
            if one.value.check is not None:
                one.value.check(self.vocabulary)

    def read(self, batch: Batch, now: Now) -> Batch:
        """The batch as the model reads it in this step: other token ids at most.

        Raises:
            LuthierError: a map returns another shape or type, or ids that the model does not have.
        """
        maps = [(one.slot, one.value.map) for one in self.maps if one.value.map is not None]
        if not maps:
            return batch
        # On the processor, so that every device draws the same.
        batch_here = batch.to("cpu")
        read_BT = batch_here.token_ids_BT
        key_BT = token_keys(batch_here, now)
        for slot, map in maps:
            found_BT = map(_copy(batch_here, read_BT), self._reading(slot, key_BT, now))
            read_BT = self._checked(slot, found_BT, batch_here)
        return batch._replace(token_ids_BT=read_BT.to(batch.token_ids_BT.device))

    def embed(self, batch: Batch, now: Now) -> EmbedChange | None:
        """What becomes of the embeddings [B, T, D] that the model reads in this step; None: they stay.

        Args:
            batch: as the model reads it.
            now: the clock.

        Raises:
            LuthierError: in the function, a map returns another shape.
        """
        maps = [(one.slot, one.value.embed) for one in self.maps if one.value.embed is not None]
        if not maps:
            return None
        key_BT = token_keys(batch, now)

        def change(embeds_BTD: Tensor) -> Tensor:
            shape = embeds_BTD.shape
            for slot, embed in maps:
                embeds_BTD = embed(embeds_BTD, _copy(batch, batch.token_ids_BT), self._reading(slot, key_BT, now)).to(
                    embeds_BTD.dtype
                )
                if embeds_BTD.shape != shape:
                    raise LuthierError(
                        f"`{slot}` returned embeddings of shape {tuple(embeds_BTD.shape)} for {tuple(shape)}", where="objective"
                    )
            return embeds_BTD

        return change

    def _reading(self, slot: str, key_BT: Tensor, now: Now) -> Reading:
        def seed_of(stream: int) -> int:
            return draws.seed_of(slot, now.stage, stream)

        return Reading(
            now,
            self.vocabulary,
            lambda stream: draws.uniform(key_BT, seed_of(stream)),
            lambda stream, width: draws.uniform(draws.features(key_BT, width), seed_of(stream)),
        )

    def _checked(self, slot: str, found_BT: Tensor, batch: Batch) -> Tensor:
        """What a map returned, with padding and virtual ids put back."""
        own_BT = batch.token_ids_BT
        if found_BT.shape != own_BT.shape or found_BT.dtype != own_BT.dtype:
            raise LuthierError(
                f"`{slot}` returned {found_BT.dtype} of shape {tuple(found_BT.shape)} for token ids of shape {tuple(own_BT.shape)}",
                where="objective",
                fix="an input map returns one whole number for each token",
            )
        found_BT = torch.where(batch.attend_BT & (own_BT >= 0), found_BT, own_BT)
        size = len(self.vocabulary.text_V)
        strange = found_BT[(found_BT >= size) | ((found_BT < 0) & (own_BT >= 0))]
        if len(strange):
            raise LuthierError(
                f"`{slot}` put in the token id {int(strange[0])}, and the model has ids from 0 to {size - 1}", where="objective"
            )
        return found_BT


def token_keys(batch: Batch, now: Now) -> Tensor:
    """A key [B, T] for the draws of each token, by seed, step, row and position, on the batch's device."""
    row_B = draws.seeds_of(batch.row_ids, batch.position_BT.device)
    return draws.keys(now.seed, now.step, row_B[:, None], batch.position_BT)


def _copy(batch: Batch, read_BT: Tensor) -> Batch:
    """A batch of its own for a map, which thereby cannot touch the run's."""
    return Batch(
        read_BT.clone(),
        batch.attend_BT.clone(),
        batch.position_BT.clone(),
        batch.label_BT.clone(),
        batch.row_ids,
        {name: column.clone() for name, column in batch.columns.items()},
        batch.texts,
        {name: column.clone() for name, column in batch.token_columns.items()},
        batch.groups,
    )


def bare_vocabulary(size: int) -> Vocabulary:
    """Token ids of which nothing is known: all stand for text, and none says that a token is missing."""
    return Vocabulary(torch.ones(size, dtype=torch.bool))


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """What a tokenizer tells of its ids.

    The mask is the tokenizer's mask token, else its unknown token, else its padding token, but never one that ends a text.

    Args:
        tokenizer: the model's.
        size: ids of the model, V; it may have more than the tokenizer.
    """
    ends = {*end_of_turn_ids(tokenizer), tokenizer.eos_token_id}
    special = [i for i in _special_ids(tokenizer) | ends if i is not None and i < size]
    text_V = torch.arange(size) < len(tokenizer)
    text_V[torch.tensor(special, dtype=torch.int64)] = False
    missing = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    mask = next((i for i in missing if i is not None and i < size and i not in ends), None)
    return Vocabulary(text_V, mask)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are called special, and those that the chat template writes, which some tokenizers do not call so."""
    template = text_of(tokenizer, choice_of(tokenizer).name) if templates_of(tokenizer) else ""
    added = tokenizer.added_tokens_decoder.items()
    called = {i for i, token in added if token.special}
    # Blanks that are tokens of their own stand in every template, and are text.
    written = {i for i, token in added if str(token).strip() and str(token) in template}
    return {*tokenizer.all_special_ids, *called, *written}
