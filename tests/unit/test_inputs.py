"""What input maps may return, and what they know of a tokenizer's ids."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Batch, InputMap, Now, Reading
from luthier.training import inputs
from luthier.training.inputs import Inputs, Mapped, bare_vocabulary, vocabulary_of
from tests.conftest import make_batch

IDS_BT = torch.tensor([[-1, 0, 1, 4], [-1, 2, 0, 0]])
"""A virtual id, own ones of which 0 is one, and in the second row two of padding."""


def read(found_BT: Tensor, size: int = 5) -> list[list[int]]:
    """What the model reads where a map returns some ids, of a model that has so many."""
    batch = make_batch([(4, 0), (2, 0)])._replace(token_ids_BT=IDS_BT)
    one = Mapped("map", InputMap(lambda batch, reading: found_BT))
    return Inputs(bare_vocabulary(size), [one]).read(batch, Now()).token_ids_BT.tolist()


def test_a_map_changes_own_tokens_alone() -> None:
    """Virtual ids and padding stay; every other id may become any that the model has, and 0 is one as the rest are."""
    assert read(torch.full((2, 4), 4)) == [[-1, 4, 4, 4], [-1, 4, 0, 0]]
    assert read(torch.zeros(2, 4, dtype=torch.long)) == [[-1, 0, 0, 0], [-1, 0, 0, 0]]
    assert read(IDS_BT) == IDS_BT.tolist()


@pytest.mark.parametrize(("place", "number"), [(1, 5), (1, -1), (2, -1), (3, 6)])
def test_ids_that_the_model_does_not_have_are_refused(place: int, number: int) -> None:
    found_BT = IDS_BT.clone()
    found_BT[0, place] = number
    with pytest.raises(LuthierError, match=f"`map` put in the token id {number}, and the model has ids from 0 to 4"):
        read(found_BT)


@pytest.mark.parametrize("found_BT", [IDS_BT[:, :3], IDS_BT.int(), IDS_BT.float()], ids=["shape", "int32", "fp32"])
def test_a_map_returns_one_whole_number_for_each_token(found_BT: Tensor) -> None:
    with pytest.raises(LuthierError, match="for token ids of shape"):
        read(found_BT)


def test_embeddings_keep_their_shape() -> None:
    def half(embeds_BTD: Tensor, batch: Batch, reading: Reading) -> Tensor:
        return embeds_BTD[..., :1]

    batch = make_batch([(4, 0), (2, 0)])
    one = Inputs(bare_vocabulary(5), [Mapped("map", InputMap(embed=half))]).embed(batch, Now())
    assert one is not None and one(torch.ones(2, 4, 1)).shape == (2, 4, 1)
    with pytest.raises(LuthierError, match="`map` returned embeddings of shape"):
        one(torch.ones(2, 4, 2))


class Tokenizer:
    """Six ids, of which 1 and 5 are special and 5 ends a turn."""

    eos_token_id, unk_token_id, pad_token_id = 5, 1, None

    def __init__(self, mask: int | None) -> None:
        self.mask_token_id = mask

    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize(
    ("size", "mask", "text", "found"),
    [
        (8, 3, [0, 2, 3, 4], 3),
        (5, 4, [0, 2, 3, 4], 4),
        (6, 5, [0, 2, 3, 4], 1),
        (5, 5, [0, 2, 3, 4], 1),
        (4, 4, [0, 2, 3], 1),
        (1, None, [0], None),
    ],
)
def test_what_a_tokenizer_tells_of_its_ids(
    size: int, mask: int | None, text: list[int], found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model may have more ids than the tokenizer or fewer; what ends a text is no mask."""
    monkeypatch.setattr(inputs, "_special_ids", lambda tokenizer: {1})
    monkeypatch.setattr(inputs, "end_of_turn_ids", lambda tokenizer: (5,))
    tokenizer: Any = Tokenizer(mask)
    told = vocabulary_of(tokenizer, size)
    assert len(told.text_V) == size and told.text_V.nonzero()[:, 0].tolist() == text and told.mask == found


def test_the_maps_of_a_run_cannot_be_exchanged() -> None:
    one: Any = Inputs(bare_vocabulary(5))
    with pytest.raises(FrozenInstanceError):
        one.maps = []
