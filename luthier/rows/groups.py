"""Rows that belong together, such as the two answers of a pair: encoded as one, so that they stand in one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from luthier.errors import LuthierError
from luthier.kinds import Batch
from luthier.rows.preferences import SIDES
from luthier.rows.shapes import Row

if TYPE_CHECKING:
    from luthier.rows.encode import Encoded

T = TypeVar("T")
PAIR = "prompt+chosen+rejected"
RANKED = "prompt+answers+scores"
"""A shape of which row maps make others."""
TEXTS = ("text", "text+label", "text+tags")
"""Shapes that are a text and no answer to anything."""
TOO_LONG = "the prompt and an answer do not fit together, and answers are not cut"
SAME = "the chosen and the rejected answer are the same, which teaches nothing"


def sides(row: Row) -> list[Row]:
    """A preference as two rows with an answer each, the chosen one first; any other row alone."""
    if row.shape != PAIR:
        return [row]
    rest = {key: value for key, value in row.fields.items() if key not in SIDES}
    return [
        replace(row, id=f"{row.id}/{side}", shape="prompt+completion", fields={**rest, "completion": row.fields[side]})
        for side in SIDES
    ]


def _members(row: Row) -> list[Row]:
    return list(row.fields["members"])


GROUPS: Mapping[str, Callable[[Row], list[Row]]] = {PAIR: sides, "members": _members}
"""Shapes that are several rows, and which."""


def prompt_length(one: Encoded) -> int:
    """Tokens before the first label; all where there is none."""
    return next((place for place, is_target in enumerate(one.supervised) if is_target), len(one))


def common_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def run_tokens(group: Sequence[Encoded]) -> int:
    """Tokens that a group runs where what a row and the first begin with is run once."""
    first, *others = (one.token_ids for one in group)
    return len(first) + sum(len(one) - common_beginning(first, one) for one in others)


def refuse_other_prompts(pair: Sequence[Encoded], decode: Callable[[Sequence[int]], Any]) -> None:
    """Two answers are compared behind the same tokens.

    Raises:
        LuthierError: their prompts differ; it shows where.
    """
    prompts = [one.token_ids[: prompt_length(one)] for one in pair]
    first, second = prompts
    if first == second:
        return
    place = common_beginning(first, second)
    shown = [f"`{decode(one[max(0, place - 5) : place + 5])}`" for one in prompts]
    raise LuthierError(
        f"the prompt of the chosen answer and that of the rejected one differ from token {place} on: {shown[0]} and {shown[1]}",
        where=pair[0].where,
        fix="use a chat template that writes earlier turns alike whatever comes behind them",
    )


def cut_alike(pair: Sequence[Encoded], surplus: int, first: int) -> list[Encoded]:
    """Both answers without so many tokens at the beginning of their prompt; without labels where the prompt has fewer.

    Args:
        pair: two answers to one prompt.
        surplus: how many tokens are too many.
        first: how many at the beginning stay.
    """
    if surplus > prompt_length(pair[0]) - max(1, first):
        return [replace(one, supervised=(False,) * len(one), notes=(*one.notes, TOO_LONG)) for one in pair]
    return [without(one, first, surplus) for one in pair]


def without(one: Encoded, start: int, count: int) -> Encoded:
    """A row without so many tokens from a place on."""

    def kept(values: Sequence[T]) -> tuple[T, ...]:
        return (*values[:start], *values[start + count :])

    return replace(
        one,
        token_ids=kept(one.token_ids),
        supervised=tuple(target and place > 0 for place, target in enumerate(kept(one.supervised))),
        truncated=one.truncated + count,
        token_columns={name: kept(tuple(numbers)) for name, numbers in one.token_columns.items()},
    )


def joined(row: Row, members: Sequence[Encoded]) -> Encoded:
    """Members as one encoded row, the first of them, which carries the others."""
    first, *others = members
    notes = [note for one in members for note in one.notes]
    if row.shape == PAIR and first.token_ids == others[0].token_ids:
        notes.append(SAME)
    mates = tuple(replace(one, notes=(), where=row.where) for one in others)
    return replace(
        first,
        id=row.id,
        columns=row.columns,
        truncated=sum(one.truncated for one in members),
        text_shape=row.shape,
        notes=tuple(dict.fromkeys(notes)),
        mates=mates,
    )


def check_pairs(batch: Batch) -> None:
    """Refuse rows that are no pairs.

    Raises:
        LuthierError: a row has no two answers.
    """
    paired = {place for group in batch.groups if len(group) == 2 for place in group}
    odd = next((row for place, row in enumerate(batch.row_ids) if place not in paired), None)
    if odd is not None:
        raise LuthierError(
            "a loss over pairs needs rows with a chosen and a rejected answer, and this row is none",
            where=f"row {odd}",
            fix="give rows with `prompt`, `chosen` and `rejected`, or use another objective, such as cross_entropy",
        )
