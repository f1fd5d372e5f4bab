"""Defaults change on purpose only: what a recipe leaves out stays what it was."""

from __future__ import annotations

import json
from inspect import signature

import pytest

from luthier.errors import LuthierError
from luthier.registry import KINDS, find, make, names
from tests.contracts.defaults import PINNED, changes, defaults


def test_defaults_are_those_that_are_pinned() -> None:
    said = changes(json.loads(PINNED.read_text(encoding="utf-8")), defaults())
    assert not said, "\n".join([*said, "if that is wanted: python -m tests.contracts.defaults"])


def test_a_change_is_named_with_its_old_and_new_value() -> None:
    before = {"selective/a": {"options": {"share": 0.5, "gone": 1}, "learning_rate": None}, "loss_term/old": {"options": {}}}
    now = {"selective/a": {"options": {"share": 0.25, "more": [1]}, "learning_rate": 1e-3}, "loss_term/new": {"options": {}}}
    assert changes(before, before) == []
    assert changes(before, now) == [
        'loss_term/new: {"options": {}} is new',
        'loss_term/old: {"options": {}} is gone',
        "selective/a learning_rate: null became 0.001",
        "selective/a options gone: 1 is gone",
        "selective/a options more: [1] is new",
        "selective/a options share: 0.5 became 0.25",
    ]


MEANT = ("dept", "otr", "otr_expected", "absolute_likelihood")
"""Where zero leaves something out, as the card or the docstring says."""


@pytest.mark.parametrize(
    ("kind", "name", "option"),
    [
        (kind, name, option)
        for kind in KINDS
        for name in names(kind)
        for option in ("rank", "beta")
        if option in signature(find(name, (kind,)).factory).parameters
    ],
)
def test_a_rank_or_a_beta_of_zero_is_refused(kind: str, name: str, option: str) -> None:
    if name in MEANT:
        assert make({name: {option: 0}}, (kind,)).options[option] == 0
        return
    with pytest.raises(LuthierError) as refused:
        make({name: {option: 0}}, (kind,))
    assert option in refused.value.where
