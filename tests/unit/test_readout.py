"""Which state a head reads, of which tokens, and when scores of several members may be compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.kinds import Head
from luthier.rows.spans import WORD
from luthier.training.readout import Combination, combination, pooled, read, words_of
from tests.conftest import make_batch

HIDDEN_BTD = torch.arange(12.0, dtype=torch.float64).reshape(2, 3, 2)


def head(pool: Any) -> Head:
    return Head(lambda services: {}, lambda tensors, state_BD: state_BD, "score", pool)


def test_the_mean_of_a_single_token_is_that_token() -> None:
    own_BT = torch.tensor([[False, True, False], [True, False, True]])
    assert pooled(HIDDEN_BTD, own_BT, "mean").tolist() == [[2.0, 3.0], [8.0, 9.0]]
    assert not pooled(HIDDEN_BTD, own_BT & False, "mean").any()
    assert pooled(HIDDEN_BTD, own_BT, "first").tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert pooled(HIDDEN_BTD, own_BT, "last").tolist() == [[2.0, 3.0], [10.0, 11.0]]


def test_what_is_read_unless_a_head_says_otherwise() -> None:
    """The last token of a causal model, which is what a model is taken for, and the first of an encoder. Token id 0 is a token."""
    batch = make_batch([(3, 0), (2, 0)])
    ids_BT = torch.tensor([[-1, 7, 0], [0, 7, 0]])
    batch = batch._replace(token_ids_BT=ids_BT)
    assert read(head("auto"), {}, HIDDEN_BTD, batch).tolist() == [[4.0, 5.0], [8.0, 9.0]]
    assert read(head("auto"), {}, HIDDEN_BTD, batch, causal=False).tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert read(head("first"), {}, HIDDEN_BTD, batch).tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert read(head("mean"), {}, HIDDEN_BTD, batch).tolist() == [[3.0, 4.0], [7.0, 8.0]]


def test_words_are_numbered_from_1_and_stand_where_no_padding_is() -> None:
    batch = make_batch([(3, 0), (2, 0)])
    assert [len(one) for one in words_of(batch)] == [0, 0]
    batch = batch._replace(token_columns={WORD: torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]])})
    assert [one.tolist() for one in words_of(batch)] == [[0, 0, 1], [0, 2, 1]]
    assert read(head("words"), {}, HIDDEN_BTD, batch).tolist() == [[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]]


def test_two_members_that_were_never_centred_are_not_compared() -> None:
    for how in ("min", "median", "mean_minus_deviation"):
        one = combination(how)
        one.check(1, centered=False)
        one.check(2, centered=True)
        with pytest.raises(LuthierError, match="compares members whose scores are known up to a constant"):
            one.check(2, centered=False)
    combination().check(2, centered=False)


def test_a_part_of_a_deviation_may_be_subtracted() -> None:
    assert combination("mean_minus_deviation", 0.25) == Combination("mean_minus_deviation", 0.25)
    assert combination("mean_minus_deviation") == Combination("mean_minus_deviation", 1.0)
    assert combination(None) == Combination("mean", 1.0)
    for deviations in (-0.25, float("inf"), float("nan")):
        with pytest.raises(LuthierError, match="use 0 or more"):
            combination("mean_minus_deviation", deviations)
    with pytest.raises(LuthierError, match=r"`deviations` is 1, and the median subtracts none"):
        combination("median", 1.0)
