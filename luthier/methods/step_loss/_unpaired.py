"""Answers with a verdict, each by itself, or beside the answer to another row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from luthier.errors import LuthierError
from luthier.rows.shapes import Row


def check_verdicts(desirable_weight: float, undesirable_weight: float, name: str) -> None:
    """Refuse weights of liked and disliked answers that count neither, or backwards.

    Raises:
        LuthierError: one is below 0, or both are 0.
    """
    if desirable_weight < 0.0 or undesirable_weight < 0.0 or not desirable_weight + undesirable_weight:
        raise LuthierError(
            f"the weights are {desirable_weight} and {undesirable_weight}",
            where=f"{name}: desirable_weight",
            fix="use 0 or more, and one above 0",
        )


def beside_other_answers(rows: Sequence[Row], column: str, name: str) -> list[Row]:
    """Groups of two rows: each row, and its prompt with the answer of the next one.

    Args:
        rows: checked rows with a prompt, an answer and a number.
        column: the number's key.
        name: the technique's, for errors.

    Raises:
        LuthierError: a row has no prompt, answer or number, or there is one row alone.
    """
    alone = by_themselves(rows, column, name)
    if len(alone) < 2:
        raise LuthierError("there is one row, and no other answer to compare with", where=name, fix="train on two rows or more")
    bare = [row.fields["members"][0] for row in alone]
    return [
        replace(row, fields={"members": [one, _with_answer(one, other)]})
        for row, one, other in zip(alone, bare, [*bare[1:], bare[0]], strict=True)
    ]


def by_themselves(rows: Sequence[Row], column: str, name: str) -> list[Row]:
    """Groups of one row. The arguments are those of `beside_other_answers`.

    Raises:
        LuthierError: a row has no prompt, answer or number.
    """
    asked = [_answered(row, column, name) for row in rows]
    # The verdict is the group's: an answer that is marked as a bad one is not learned like others here.
    bare = [replace(row, columns={name: value for name, value in row.columns.items() if name != column}) for row in asked]
    return [replace(row, shape="members", fields={"members": [one]}) for row, one in zip(asked, bare, strict=True)]


def _answered(row: Row, column: str, name: str) -> Row:
    if not isinstance(row.columns.get(column), int | float):
        raise LuthierError(
            f"the row has no label `{column}`, true where its answer is liked and false where it is not",
            where=row.where,
            fix="add it",
        )
    if row.shape == "prompt+completion":
        return row
    if row.shape == "messages":
        messages = row.fields["messages"]
        if len(messages) > 1 and messages[-1]["role"] == "assistant":
            rest = {key: value for key, value in row.fields.items() if key != "messages"}
            fields = {**rest, "prompt": messages[:-1], "completion": messages[-1:]}
            return replace(row, shape="prompt+completion", fields=fields)
    raise LuthierError(
        f"`{name}` needs rows with a prompt and an answer, and this row is `{row.shape}`",
        where=row.where,
        fix="give `prompt` and `completion`, or `messages` that end with an assistant's",
    )


def _with_answer(row: Row, other: Row) -> Row:
    return replace(row, id=f"{row.id}/other", fields={**row.fields, "completion": other.fields["completion"]})
