"""One row of an evaluation set, measured, and its texts as a person would read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy

from luthier.evaluate.intervals import Numbers
from luthier.rows.beside import asked
from luthier.rows.shapes import Row

NOTHING = "none"
"""What stands for no label and no entity."""


class Item(NamedTuple):
    """One row, measured."""

    id: str
    prompt: str
    expected: str | list[str]
    """The accepted answer or answers; empty where a likelihood is measured, or the answer alone."""
    answer: str
    """What the model said or chose; empty where a likelihood is measured."""
    score: float
    """From 0 to 1; for loss and perplexity the mean nats of a target."""
    weight: float = 1.0
    """What the item counts in the mean: the labels, for loss and perplexity."""
    numbers: tuple[float, ...] = ()
    """What the set's value is made of, where that is no mean of scores."""
    counts: Mapping[str, tuple[int, int, int]] = {}
    """Of classes, labels or entities by name: how often it is there, is named, and both."""
    note: str = ""
    """What was said of the answer, such as a judge's reasons."""


def numbers_of(items: Sequence[Item]) -> Numbers:
    """What a set's value is made of, [N, M]."""
    return numpy.array([item.numbers for item in items], numpy.float64)


def by_class(items: Sequence[Item]) -> dict[str, tuple[int, int, int]]:
    """Of each class, label or entity: how often it is there, is named, and both, over all items; the most frequent first."""
    total: dict[str, tuple[int, int, int]] = {}
    for item in items:
        for name, (there, named, both) in item.counts.items():
            old = total.get(name, (0, 0, 0))
            total[name] = (old[0] + there, old[1] + named, old[2] + both)
    return dict(sorted(total.items(), key=lambda one: (-one[1][0], one[0])))


def is_binary(items: Sequence[Item]) -> bool:
    """Whether every item is right or wrong, with nothing between."""
    return all(item.score in (0.0, 1.0) for item in items)


def weigh_alike(items: Sequence[Item]) -> bool:
    """Whether every item counts the same in the mean."""
    return len({item.weight for item in items}) < 2


def accepted_answers(row: Row) -> list[str]:
    """The texts that answer a row: its accepted answers, its right choice, or what it would teach; maybe none."""
    fields = row.fields
    if row.shape == "prompt+answer":
        return list(fields["answer"])
    if row.shape == "prompt+choices+answer":
        return [fields["choices"][fields["answer"]]]
    if row.shape == "messages":
        last = fields["messages"][-1]
        return [last["content"]] if last["role"] == "assistant" else []
    key = {"prompt+completion": "completion", "instruction": "output", "text+label": "label"}.get(row.shape)
    if key is None:
        return []
    value = fields[key]
    return [", ".join(map(str, value)) or NOTHING] if key == "label" and isinstance(value, list) else [text_of_answer(value)]


def text_of_answer(value: Any) -> str:
    """An answer, text or messages, as a person would read its end."""
    return str(value[-1]["content"]) if isinstance(value, list) else str(value)


def prompt_text(row: Row) -> str:
    """What a row asks, as a person would read it."""
    fields = row.fields
    if row.shape == "instruction":
        return asked(fields)
    if row.shape in ("text", "text+label", "text+tags"):
        return str(fields["text"])
    if row.shape == "members":
        return prompt_text(fields["members"][0])
    conversation = row.shape == "messages"
    messages = fields["messages" if conversation else "prompt"]
    if conversation and accepted_answers(row):
        messages = messages[:-1]
    if isinstance(messages, str):
        return messages
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
