"""Rows whose columns have other names: which of them probably holds what."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MEANS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation", "conversations", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("prompt", "question", "query", "instruction", "request", "input", "user", "customer", "source", "ask"),
    "completion": (
        "completion", "answer", "response", "reply", "output", "assistant", "agent", "target", "solution", "result"
    ),
    "instruction": ("instruction",),
    "output": ("output", "response"),
    "chosen": ("chosen", "preferred", "better", "accepted", "winner", "good", "best"),
    "rejected": ("rejected", "dispreferred", "worse", "loser", "bad", "worst"),
    "answers": ("answers", "responses", "completions", "candidates"),
    "scores": ("scores", "ratings", "rewards", "ranks"),
    "label": ("label", "labels", "class", "category", "sentiment", "topic", "score", "rating", "liked", "thumbs", "stars", "target"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner", "labels", "pos"),
    "text": ("text", "content", "body", "document", "sentence", "article", "review", "comment", "passage", "page", "message"),
    "spans": ("spans", "entities"),
    "query": ("query", "question", "anchor", "search"),
    "positive": ("positive", "passage", "document", "answer", "context", "match"),
}  # fmt: skip
"""Words of a column's name, the surest first."""
_LISTS = frozenset({"messages", "answers", "scores", "tokens", "tags", "spans"})


def propose(records: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> dict[str, str] | None:
    """Which columns hold the keys of a row; None where one of the keys has none.

    Args:
        records: some of the rows as they stand.
        wanted: the keys.
    """
    names = list(dict.fromkeys(str(name) for record in records for name in record))
    found: dict[str, str] = {}
    for key in wanted:
        free = [name for name in names if name not in found.values() and _holds(records, name, _fits(key))]
        column = key if key in free else _nearest(key, free)
        if column is None:
            return None
        found[key] = column
    return found


def _nearest(key: str, names: Sequence[str]) -> str | None:
    for word in _MEANS[key]:
        for name in names:
            if word in _words(name):
                return name
    return None


def _words(name: str) -> list[str]:
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word.lower() for word in re.split(r"[\W_\d]+", parted) if word]


def _fits(key: str) -> Callable[[Any], bool]:
    if key in _LISTS:
        return lambda value: isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))
    if key == "label":
        return lambda value: isinstance(value, str | int | float | list)
    return lambda value: isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _holds(records: Sequence[Mapping[str, Any]], name: str, fits: Callable[[Any], bool]) -> bool:
    values = [record[name] for record in records if record.get(name) not in (None, "")]
    return bool(values) and all(map(fits, values))
