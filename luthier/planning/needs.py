"""What techniques read of rows beside their text, looked for in all rows before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from luthier.errors import LuthierError
from luthier.kinds import Batch
from luthier.rows.batches import collate
from luthier.rows.encode import Encoded, EncodedRows
from luthier.rows.numbered import bare
from luthier.training.loop import Clock
from luthier.training.objective import Objective
from luthier.tune import Tune

_ROWS = 1024
"""Looked at together."""


def check_needs(objective: Objective, rows: EncodedRows) -> None:
    """Refuse rows that lack what an objective or a token weight reads.

    Raises:
        LuthierError: as the technique says it, with the place of the first such row.
    """
    of_terms, of_weights = [one.term.check for one in objective.terms], [one.weight.check for one in objective.weights]
    if rows.sizes.members and not any(one.term.unit == "group" and not one.term.penalty for one in objective.terms):
        raise _uncompared(rows)
    of_tokens = [one.slot for one in objective.terms if one.term.columns]
    if objective.head is not None and of_tokens and not rows.supervised_tokens:
        raise LuthierError(
            f"`{of_tokens[0]}` learns from labels, and the texts that `{objective.head[0]}` reads have none",
            where="objective",
            fix=f"leave `{of_tokens[0]}` out",
        )
    checks = [check for check in (*of_terms, *of_weights) if check is not None]
    if not checks:
        return
    each = bare(rows.rows)
    while some := list(islice(each, _ROWS)):
        for check in checks:
            _ask(check, some)


def _uncompared(rows: EncodedRows) -> LuthierError:
    place = next(place for place, members in enumerate(rows.sizes.members) if members > 1)
    first = rows.rows[place]
    return LuthierError(
        "the rows hold answers to compare, a chosen and a rejected one, and nothing in the objective compares them",
        where=first.place,
        fix="use a loss over pairs, such as objective: dpo, or learn the chosen answers alone with rows.map: chosen_answers",
    )


def check_phases(tune: Tune, clock: Clock) -> None:
    """Refuse a run of which a whole phase would move nothing.

    Raises:
        LuthierError: nothing trains from some step on until another phase begins.
    """
    borders = [0, *tune.turns.borders(clock.steps)]
    for first, behind in zip(borders, [*borders[1:], clock.steps], strict=True):
        if first < behind and not tune.moves_at(clock.at(first, 0.0)):
            raise LuthierError(
                f"nothing trains in steps {first + 1} to {behind}: what trains before them stands still there, and nothing else is named",
                where="tune",
                fix="name what else trains beside it, such as full or lora, or give all of the run to it, such as share: 1",
            )


def _ask(check: Callable[[Batch], None], rows: Sequence[Encoded]) -> None:
    try:
        check(collate(rows))
    except LuthierError as problem:
        first = next((one for one in rows if _is_refused(check, one)), rows[0])
        # Of rows given in Python the id says more than their number.
        where = problem.where if first.where.startswith("row ") else first.place
        raise LuthierError(problem.what, where=where, fix=problem.fix) from problem


def _is_refused(check: Callable[[Batch], None], row: Encoded) -> bool:
    try:
        check(collate([row]))
    except LuthierError:
        return True
    return False
