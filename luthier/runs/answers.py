"""Answers to rows, written once and kept with them, and what the best of them by a reward is worth."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier import disk, draws, machine
from luthier.errors import LuthierError, Say, nearest, silent
from luthier.evaluate.best_of import BestOf, best_of
from luthier.evaluate.items import accepted_answers
from luthier.evaluate.metrics import METRICS
from luthier.evaluate.readings import answer_scores, check_read, row_head_of
from luthier.generation.generate import generate
from luthier.results.opened import open_model, open_run
from luthier.results.start import is_run
from luthier.rows.chat import form_of
from luthier.rows.columns import Columns
from luthier.rows.encode import encode
from luthier.rows.read import Rows, read
from luthier.rows.select import check_out, records_without, write_lines
from luthier.rows.shapes import Row
from luthier.runs.train import tuned_fingerprint
from luthier.training.readout import MEAN, Combination

ANSWERS = "answers"
"""The key of rows that holds their answers."""
TOGETHER = 256
"""About how many answers are written between two saves."""


def write_answers(
    source: str | Path,
    model: str,
    out: Path,
    *,
    count: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    shape: str | None = None,
    columns: Columns | None = None,
    column: str = ANSWERS,
    folder: str = "runs",
    say: Say = silent,
) -> dict[str, Any]:
    """Let a model or a run answer each row several times, and write the rows with their answers.

    What is drawn for an answer follows from the seed, the row's id and the answer's number from 0: more rows, another order or more
    answers leave the others as they are, up to rounding. A call that was stopped goes on where it was, from a file beside `out`, and
    ends in the same answers.

    Args:
        source: rows with a prompt, as for `luthier.rows.read.read`.
        model: a model's name, or a run's folder or name.
        out: the JSONL file to write; it must not exist.
        count: answers of each row.
        temperature, top_p, max_new_tokens: as for `luthier.generation.generate.generate`.
        seed: of all draws.
        shape: the rows' shape, where it cannot be recognized.
        columns: by key of a row, the column that holds it.
        column: the key that holds the answers.
        folder: holds the run folders.
        say: hears what is being done.

    Raises:
        LuthierError: rows cannot be read or are too long, have the key already, `out` exists, an option is out of range, or the file beside
            `out` was begun with other rows, another model or other options.
    """
    if count < 1:
        raise LuthierError(f"{count} answers a row", where="count", fix="ask for 1 or more")
    if temperature == 0 and count > 1:
        raise LuthierError(f"at a temperature of 0 all {count} answers are the same", where="temperature", fix="use more than 0")
    check_out(out)
    records = records_without(column, source, known=(ANSWERS,))
    rows = read(source, shape=shape, columns=columns)
    tune, tokenizer = open_model(model, out=folder, say=say)
    form = form_of(tokenizer)
    prompts = [encode(row, tokenizer, purpose="prompt", form=form).token_ids for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        check_read(tune, tokenizer, row, prompt, max_new_tokens)
    options = {"count": count, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    begun = out.with_name(f"{out.name}.begun")
    kept = _Kept(begun, {**options, "rows": rows.fingerprint(), "model": tuned_fingerprint(tune)}, [row.id for row in rows])
    each = max(1, TOGETHER // count)
    # Answers are written in the same batches whether or not a call was stopped: another batch may round otherwise.
    for start in range(kept.start(each), len(rows), each):
        part = range(start, min(start + each, len(rows)))
        asked = [(place, number) for place in part for number in range(count)]
        texts = generate(
            tune,
            tokenizer,
            [prompts[place] for place, _ in asked],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            numbers=[draws.seed_of(seed, "answer", rows[place].id, number) for place, number in asked],
        )
        kept.add([texts[first : first + count] for first in range(0, len(texts), count)])
        say(f"{rows.name}: answered {part.stop} of {len(rows)} rows")
    write_lines(out, ({**record, column: some} for record, some in zip(records, kept.answers, strict=True)))
    disk.remove(begun)
    empty = sum(not answer.strip() for some in kept.answers for answer in some)
    return {"rows": len(rows), "model": model, **options, "empty": empty, "out": str(out)}


class _Kept:
    """Answers so far, each row's a line of a file that survives a kill.

    Raises:
        LuthierError: the file was begun for something else, or is damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], ids: Sequence[str]) -> None:
        self.path, self.header, self.ids = path, header, ids
        self.answers: list[list[str]] = []
        if not path.exists():
            return
        # Behind the last end of a line stands what a kill left of one.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            first, *others = [json.loads(line) for line in lines] or [header]
        except ValueError:
            raise LuthierError("this file of begun answers is damaged", where=str(path), fix="remove it") from None
        if first != header or [one["id"] for one in others] != list(ids[: len(others)]):
            differs = [key for key in header if first.get(key) != header[key]]
            raise LuthierError(
                f"answers were begun here for something else ({', '.join(differs) or 'ids'} differ)",
                where=str(path),
                fix="ask for the same, or remove this file to begin anew",
            )
        self.answers = [one["answers"] for one in others]

    def start(self, each: int) -> int:
        """The row to go on with, at the start of a batch of so many."""
        if len(self.answers) < len(self.ids):
            del self.answers[len(self.answers) // each * each :]
        with disk.written(self.path) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(self.header) + "\n" + self._lines(0))
        return len(self.answers)

    def add(self, answers: Sequence[list[str]]) -> None:
        """Keep the next rows' answers."""
        first = len(self.answers)
        self.answers += answers
        with disk.explained(self.path), self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(self._lines(first))
            file.flush()
            os.fsync(file.fileno())

    def _lines(self, first: int) -> str:
        named = zip(self.ids[first:], self.answers[first:], strict=False)
        return "".join(json.dumps({"id": id, "answers": answers}) + "\n" for id, answers in named)


class Scored(NamedTuple):
    """Scores of rows' answers by members of a reward: of each row, [M answers, K members]."""

    score_RMK: list[Tensor]
    centered: bool


def best_of_answers(
    source: str | Path,
    reward: Sequence[str],
    *,
    gold: str | None = None,
    how: Combination = MEAN,
    standardize: bool = False,
    sizes: Sequence[int] | None = None,
    shape: str | None = None,
    columns: Columns | None = None,
    column: str = ANSWERS,
    folder: str = "runs",
    say: Say = silent,
) -> BestOf:
    """Pick the best of n answers by a reward, for growing n, and tell what the picked ones are worth.

    Args:
        source: rows with a list of answers, as `write_answers` writes them.
        reward: runs that trained a reward model; several are members of one, and are opened one after the other. Instead of a run, a key
            of the rows that holds a number for each answer.
        gold: what answers are worth: a metric of answers, such as `exact_match`, another run, or a key of numbers.
        how: how the members' scores become one.
        standardize: divide each member's distance from its mean by its deviation, both over all answers here: for members that were trained
            without centering.
        sizes: n; None: 1, 2, 4 ... and as many as every row has.
        shape: the rows' shape, where it cannot be recognized.
        columns: by key of a row, the column that holds it.
        column: the key that holds the answers.
        folder: holds the run folders.
        say: hears what is being done.

    Raises:
        LuthierError: rows have no answers, there is no such run, metric or key, or the members' scores cannot be compared.
    """
    if not reward:
        raise LuthierError("nothing scores the answers", where="reward", fix="name a run of objective: reward_model")
    rows = read(source, shape=shape, columns=columns)
    answers = [_listed(row, column, str) for row in rows]
    scored = [_scores(name, rows, answers, folder, say) for name in reward]
    score_RMK = [torch.cat(some, -1) for some in zip(*(one.score_RMK for one in scored), strict=True)]
    members = score_RMK[0].shape[-1]
    if standardize:
        all_NK = torch.cat(score_RMK)
        mean_K, deviation_K = all_NK.mean(0), all_NK.std(0, correction=0)
        # A member that scores all alike stays at 0.
        score_RMK = [(one - mean_K) / deviation_K.where(deviation_K > 0, 1.0) for one in score_RMK]
    else:
        how.check(members, all(one.centered for one in scored))
    gold_RM = None if gold is None else _gold(gold, rows, answers, folder, say)
    deviation_RM = [one.std(-1, correction=0).tolist() for one in score_RMK] if members > 1 else None
    picked = best_of([how.of(one).tolist() for one in score_RMK], gold_RM, deviation_RM, sizes=sizes)
    return BestOf(len(rows), min(map(len, answers)), members, how.how, gold, tuple(picked))


def _scores(name: str, rows: Rows, answers: Sequence[Sequence[str]], folder: str, say: Say) -> Scored:
    """Scores by a run, or from a key of the rows."""
    if not is_run(name, folder):
        if not any(name in row.fields for row in rows):
            raise LuthierError(
                f"`{name}` is neither a run nor a key of the rows", where="reward or gold", fix=nearest(name, rows[0].fields)
            )
        return Scored([_numbers(row, name, len(some)) for row, some in zip(rows, answers, strict=True)], False)
    tune, tokenizer = open_run(name, out=folder, say=say)
    say(f"{name}: scoring {sum(map(len, answers))} answers")
    found = Scored(answer_scores(tune, tokenizer, rows.rows, answers), row_head_of(tune).centered)
    # One model is held at a time.
    del tune
    machine.free_what_is_gone()
    return found


def _gold(name: str, rows: Rows, answers: Sequence[Sequence[str]], folder: str, say: Say) -> list[list[float]]:
    """What answers are worth: by a metric, a run (the mean of its members) or a key of the rows."""
    score = METRICS[name].score if name in METRICS else None
    if score is None:
        return [one.mean(-1).tolist() for one in _scores(name, rows, answers, folder, say).score_RMK]
    for row in rows:
        if METRICS[name].compares and not accepted_answers(row):
            raise LuthierError(
                f"`{name}` compares with an accepted answer, and this row has none", where=row.place, fix="add `answer`"
            )
    return [[score(one, accepted_answers(row)) for one in some] for row, some in zip(rows, answers, strict=True)]


def _numbers(row: Row, key: str, count: int) -> Tensor:
    numbers = _listed(row, key, int | float)
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        finite = sum(map(math.isfinite, numbers))
        raise LuthierError(f"`{key}` holds {finite} finite numbers for {count} answers", where=row.place, fix="give one for each")
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def _listed(row: Row, key: str, kind: Any) -> list[Any]:
    found = row.fields.get(key)
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(one, kind) and one is not True and one is not False for one in found)
    ):
        what = "texts" if kind is str else "numbers"
        raise LuthierError(
            f"the row has no list of {what} under `{key}`",
            where=row.place,
            fix="write answers first: luthier rows answers ROWS --model MODEL" if kind is str else f"add `{key}` to every row",
        )
    return found
