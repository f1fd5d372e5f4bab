"""MORepair (Yang et al., 2024): every row has two labels, the answer and the reason for it, and the loss is their weighted mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from luthier.errors import LuthierError
from luthier.kinds import RowMap, Services, TokenWeight
from luthier.methods.token_weight.task_balance import task_balance
from luthier.registry import method
from luthier.rows.chat import prompt_of
from luthier.rows.shapes import Row

TARGET = "target"
"""The free column that says which of the two a row is for."""
ANSWER, RATIONALE = "answer", "rationale"


@method(
    title="MORepair",
    paper="arXiv:2404.12636",
    row=253,
    reduces_to="weight 0: the same run without it",
    departs="the prompt of the rationale says that a rationale is wanted, where the authors' prompts are the same and leave open which "
    "target is; prompts are no labels (rows.loss_on: all makes them so); both losses are means over the step, whose rows need not "
    "be whole pairs: where a step has rows of one target only, the loss is that one's mean; no noise on the embeddings",
)
def morepair(
    *,
    weight: float = 1.0,
    field: str = "rationale",
    answer_marker: str = "",
    rationale_marker: str = "Give the reason for the answer, not the answer itself.\n\n",
) -> tuple[RowMap, TokenWeight]:
    """Learn from every row twice, its answer and the reason for it: L = (L_answer + weight * L_rationale) / (1 + weight).

    A row `ID` becomes two, `ID#answer` and `ID#rationale`, with the same prompt behind a marker of each; each L is the mean over its
    labels in the step. After training, ask as the answers' prompts do. Half of the rows that a step holds are then rationales.

    Args:
        weight: lambda, what a rationale counts; 1 as in the paper, and 0 makes no second row.
        field: the rows' free text column that holds the rationale.
        answer_marker: stands before the prompt of the answer; in a conversation, before the last message of the user. Empty, so that the
            trained model is asked as without this technique.
        rationale_marker: stands there for the rationale.

    Raises:
        LuthierError: the weight is negative or the markers are the same; a row has no rationale, no prompt, or the column `target`.
    """
    if weight < 0.0:
        raise LuthierError(f"the weight is {weight}", where="morepair: weight", fix="use 0 or more")
    if weight and answer_marker == rationale_marker:
        raise LuthierError(
            "both prompts would be the same, and nothing would say which target is wanted",
            where="morepair: rationale_marker",
            fix="use another marker than for the answer",
        )

    def map(rows: Sequence[Row], services: Services) -> list[Row]:
        return [made for row in rows for made in ([answered(row), explained(row)] if weight else [answered(row)])]

    def answered(row: Row) -> Row:
        made = _target(marked(row, answer_marker), ANSWER, field)
        # Draws are keyed by the row's id: where no row is made, none is renamed.
        return made if weight else replace(made, id=row.id)

    def explained(row: Row) -> Row:
        rationale = row.columns.get(field)
        if not isinstance(rationale, str) or not rationale.strip():
            raise LuthierError(
                f"the row `{row.id}` has no text `{field}` to learn as its rationale",
                where=row.where,
                fix=f"add `{field}` to the row, or name the key that the rows have (morepair: field)",
            )
        asked = marked(row, rationale_marker)
        prompt = asked.fields.get("prompt")
        fields: dict[str, Any] = {"prompt": prompt if isinstance(prompt, str) else prompt_of(asked), "completion": rationale}
        if "tools" in row.fields:
            fields["tools"] = row.fields["tools"]
        return _target(replace(asked, shape="prompt+completion", fields=fields), RATIONALE, field)

    return RowMap(map), task_balance(column=TARGET, weights={ANSWER: 1.0, RATIONALE: weight})


def _target(row: Row, target: str, field: str) -> Row:
    # The rationale is read here, and left with neither: it would be said to be no part of a row's text.
    columns = {key: value for key, value in row.columns.items() if key != field}
    return replace(row, id=f"{row.id}#{target}", columns={**columns, TARGET: target})


def marked(row: Row, marker: str) -> Row:
    """A row whose prompt begins with a marker.

    Raises:
        LuthierError: it has no prompt, or a column whose name is taken.
    """
    if TARGET in row.columns:
        raise LuthierError(
            f"the row `{row.id}` has a key `{TARGET}`, which morepair uses itself", where=row.where, fix="rename it in the rows"
        )
    key = next((key for key in ("prompt", "instruction", "messages") if key in row.fields), None)
    given = list(row.fields["messages"]) if key == "messages" else None
    if key is None or (given is not None and (len(given) < 2 or given[-1]["role"] != "assistant")):
        raise LuthierError(
            f"the row `{row.id}` has no prompt with an answer behind it",
            where=row.where,
            fix="use rows such as prompt and completion",
        )
    value = row.fields[key]
    if isinstance(value, str):
        return replace(row, fields={**row.fields, key: marker + value})
    asking = value[:-1] if key == "messages" else value
    place = max((i for i, one in enumerate(asking) if one["role"] == "user"), default=len(asking) - 1)
    turns = [{**one, "content": marker + one["content"]} if i == place else one for i, one in enumerate(value)]
    return replace(row, fields={**row.fields, key: turns})
