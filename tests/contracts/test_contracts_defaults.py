"""Defaults change on purpose only: what a recipe leaves out stays what it was."""

from __future__ import annotations

import json

from tests.contracts.defaults import PINNED, changes, defaults


def test_defaults_are_those_that_are_pinned() -> None:
    said = changes(json.loads(PINNED.read_text(encoding="utf-8")), defaults())
    assert not said, "\n".join([*said, "if that is wanted: python -m tests.contracts.defaults"])


def test_a_change_is_named_with_its_old_and_new_value() -> None:
    before = {"selective/a": {"options": {"share": 0.5, "gone": 1}, "learning_rate": None}, "term/old": {"options": {}}}
    now = {"selective/a": {"options": {"share": 0.25, "more": [1]}, "learning_rate": 1e-3}, "term/new": {"options": {}}}
    assert changes(before, before) == []
    assert changes(before, now) == [
        "selective/a learning_rate: null became 0.001",
        "selective/a options gone: 1 is gone",
        "selective/a options more: [1] is new",
        "selective/a options share: 0.5 became 0.25",
        'term/new: {"options": {}} is new',
        'term/old: {"options": {}} is gone',
    ]
