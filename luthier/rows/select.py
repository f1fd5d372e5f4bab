"""Choosing rows before training: a score for each, the best of them, and how the choice differs from chance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier import disk, draws, registry
from luthier.errors import LuthierError, Say, silent
from luthier.kinds import RowLikelihood
from luthier.rows.columns import Columns
from luthier.rows.embed import DEFAULT, Embed
from luthier.rows.embed import embedder as make_embedder
from luthier.rows.ids import canonical
from luthier.rows.read import Rows, read, read_as, records
from luthier.rows.shapes import Row, text_keys
from luthier.rows.texts import text_of

Likely = Callable[[str, Sequence[Row]], Sequence[RowLikelihood]]
"""How likely a model, by its name, finds rows: `luthier.runs.measure.likelihood_of_rows`, which knows how to run one."""


class ScoringServices:
    """What one row score sees: the target, embeddings, likelihoods, draws by name."""

    def __init__(self, target: Sequence[Row], embed: Embed, slot: str, seed: int, likely: Likely | None = None) -> None:
        self.target, self._embed, self._slot, self._seed, self._likely = target, embed, slot, seed, likely

    def rng(self, key: str) -> torch.Generator:
        """A generator for this seed and key."""
        return draws.generator(self._seed, self._slot, key)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """What texts are about."""
        return self._embed(texts)

    def likelihood(self, model: str, rows: Sequence[Row]) -> Sequence[RowLikelihood]:
        """How likely a model finds each row's labels."""
        if self._likely is None:
            raise LuthierError(
                f"`{self._slot}` runs models, and nothing here can",
                where="likely",
                fix="give luthier.runs.measure.likelihood_of_rows",
            )
        return self._likely(model, rows)


@dataclass(frozen=True)
class Scored:
    """Rows with their scores.

    Args:
        rows: the rows, in the order they were read.
        scores: one for each row; the highest is chosen first.
        facts: what was done, as plain values.
        records: where scores are to be a column of the rows, the rows as they stood in the source, each with its score.
    """

    rows: Rows
    scores: tuple[float, ...]
    facts: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...] = ()

    def lines(self) -> Sequence[Mapping[str, Any]]:
        """The records, or one `{id, score}` for each row."""
        return self.records or [{"id": row.id, "score": score} for row, score in zip(self.rows, self.scores, strict=True)]


@dataclass(frozen=True)
class Selection:
    """The chosen rows.

    Args:
        records: as they stood in the source, with the same keys; the best first, and equally good ones in the source's order.
        rows: the same, checked.
        scores: theirs.
        facts: what was done and what came of it, as plain values.
    """

    records: tuple[Mapping[str, Any], ...]
    rows: tuple[Row, ...]
    scores: tuple[float, ...]
    facts: Mapping[str, Any]


def score_rows(
    source: str | Path | Rows | Iterable[Mapping[str, Any]],
    by: object,
    *,
    target: str | Path | Rows | Iterable[Mapping[str, Any]] | None = None,
    embedder: str = DEFAULT,
    likely: Likely | None = None,
    shape: str | None = None,
    columns: Columns | None = None,
    seed: int = 0,
    column: str | None = None,
    out: Path | None = None,
    say: Say = silent,
) -> Scored:
    """Score rows.

    Args:
        source: the pool, as for `luthier.rows.read.read`.
        by: a row score's name, `{name: {option: value}}`, or a part.
        target: rows of the task the choice is for; none of those that will measure it.
        embedder: what makes embeddings, where the score asks for them: see `luthier.rows.embed`.
        likely: runs models, where the score asks for them: `luthier.runs.measure.likelihood_of_rows`.
        shape: the pool's shape, where it cannot be recognized.
        columns: by key, the pool's columns, which are also the target's where it has all of them.
        seed: of all draws.
        column: a key that the scores get in the records of the pool; None: they stand alone.
        out: a file for the records, or for one `{id, score}` a line, in the order of the pool.
        say: hears what is being done.

    Raises:
        LuthierError: rows cannot be read, there is no such row score, option or model, a target is needed and not given, a score is
            no number, a record has the key `column` already, or `out` exists or cannot be written.
    """
    part = registry.make(by, ("row_score",), where="by")
    if "target" in part.card.needs and target is None:
        raise LuthierError(f"`{part.name}` needs a target", where="target", fix="name a file with rows of the task")
    check_out(out)
    if column is not None and not isinstance(source, str | Path | Rows):
        source = list(source)
    rows = read(source, shape=shape, columns=columns)
    wanted = read_as(target, None, columns) if target is not None else ()
    found = records_without(column, source) if column is not None else []
    say(f"{rows.name}: scoring {len(rows)} rows by {part.name}")
    embed = make_embedder(embedder, device="cuda" if torch.cuda.is_available() else "cpu", say=say)
    # Rows that are equally good stay so, though another number of threads rounds otherwise.
    services = ScoringServices(wanted, embed, part.name, seed, likely)
    scores = tuple(float(f"{one:.6g}") for one in part.values[0].score(rows.rows, services))
    if len(scores) != len(rows) or not all(map(math.isfinite, scores)):
        finite = sum(map(math.isfinite, scores))
        raise LuthierError(f"`{part.name}` gave {finite} finite scores for {len(rows)} rows", where="by", fix="fix its `score`")
    known = {text_of(row) for row in wanted}
    facts = {
        "by": part.name,
        "options": dict(part.options),
        "embedder": embedder if "embed" in part.card.needs else None,
        "seed": seed,
        "column": column,
        "rows": len(rows),
        "target_rows": len(wanted),
        "also_in_target": sum(text_of(row) in known for row in rows),
        "highest": max(scores),
        "lowest": min(scores),
    }
    scored_records = tuple({**one, column: score} for one, score in zip(found, scores, strict=True)) if column is not None else ()
    scored = Scored(rows, scores, facts, scored_records)
    if out is not None:
        write_lines(out, scored.lines())
    return scored


def select_rows(
    source: str | Path | Iterable[Mapping[str, Any]],
    by: object,
    *,
    count: int | None = None,
    share: float | None = None,
    out: Path | None = None,
    shape: str | None = None,
    columns: Columns | None = None,
    seed: int = 0,
    **more: Any,
) -> Selection:
    """Choose the rows with the highest scores.

    Of rows that are equal but for their ids the first is taken, and the next best other row instead of the rest: they leave the choice,
    never the pool, because how often a row stands there says something.

    Args:
        source: the pool.
        by: as for `score_rows`.
        count: how many rows, or
        share: how many of them, from above 0 to 1, rounded.
        out: a file for the chosen records, one a line.
        shape: the pool's shape, where it cannot be recognized.
        columns: as for `score_rows`; the records keep their own.
        seed: of all draws.
        more: `target`, `embedder`, `likely` and `say`, as for `score_rows`.

    Raises:
        LuthierError: as `score_rows`; or there are not so many rows that differ.
    """
    check_out(out)
    source = source if isinstance(source, str | Path) else list(source)
    rows = read(source, shape=shape, columns=columns)
    wanted = how_many(len(rows), count, share)
    scored = score_rows(rows, by, columns=columns, seed=seed, **more)
    picked, again = _best(scored, wanted)
    chosen = tuple(rows[place] for place in picked)
    scores = tuple(scored.scores[place] for place in picked)
    places = {row.where for row in chosen}
    found = {where: record for where, record in records(source) if where in places and isinstance(record, Mapping)}
    facts = {
        **scored.facts,
        "picked": wanted,
        "duplicates_passed_over": again,
        "highest_picked": scores[0],
        "lowest_picked": scores[-1],
        "shared_with_random": _shared_with_random(picked, len(rows), seed),
        "shared_by_chance": wanted * wanted / len(rows),
    }
    selection = Selection(tuple(found[row.where] for row in chosen), chosen, scores, facts)
    if out is not None:
        write_lines(out, selection.records)
    return selection


def how_many(rows: int, count: int | None, share: float | None) -> int:
    """The number of rows to choose, from a count or a share of them, of which one is given.

    Raises:
        LuthierError: neither or both are given, or they are no part of the rows.
    """
    if (count is None) == (share is None):
        what = "how many rows is not said" if count is None else "both a count and a share"
        raise LuthierError(what, where="count, share", fix="give one of them")
    if count is not None:
        if not 1 <= count <= rows:
            raise LuthierError(f"{count} of {rows} rows", where="count", fix=f"ask for 1 to {rows}")
        return count
    assert share is not None
    if not 0.0 < share <= 1.0:
        raise LuthierError(f"a share of {share:g}", where="share", fix="use more than 0 and at most 1")
    return max(1, math.floor(share * rows + 0.5))


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, keys in their order; what JSON has no form for, such as dates, becomes text.

    Raises:
        LuthierError: the file cannot be written.
    """
    with disk.written(path) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, default=lambda value: json.loads(canonical(value))) + "\n")


def check_out(path: Path | None) -> None:
    """Refuse a place that cannot or should not be written to, before anything is scored."""
    if path is None:
        return
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise LuthierError(f"`{path.name}` is not named as JSON lines", where="out", fix="name it .jsonl")
    if path.exists():
        raise LuthierError("this exists already", where=str(path), fix="name another, or remove it")


def records_without(
    column: str, source: str | Path | Rows | Iterable[Mapping[str, Any]], *, known: Collection[str] = ()
) -> list[Mapping[str, Any]]:
    """The records of a source, none of which has a key of this name.

    Args:
        column: the key.
        source: the records.
        known: keys of rows' shapes that may be added.
    """
    if isinstance(source, Rows):
        raise LuthierError("rows that were read already are no records", where="source", fix="give their file, or the records")
    if column in (text_keys() | {"label", ""}) - {*known}:
        raise LuthierError(f"`{column}` is no name for a free column", where="column", fix="use one that no shape of rows has")
    found = [(where, record) for where, record in records(source) if isinstance(record, Mapping)]
    taken = [where for where, record in found if column in record]
    if taken:
        what = f"{len(taken)} of {len(found)} rows have a key `{column}` already"
        raise LuthierError(what, where=taken[0], fix="name another column, or remove the key")
    return [record for _, record in found]


def _best(scored: Scored, count: int) -> tuple[list[int], int]:
    """The places of the best rows, and how many equal ones were passed over on the way."""
    picked: list[int] = []
    seen: set[str] = set()
    again = 0
    for place in sorted(range(len(scored.rows)), key=lambda place: -scored.scores[place]):
        if len(picked) == count:
            break
        row = scored.rows[place]
        content = canonical([row.shape, row.fields, row.columns])
        if content in seen:
            again += 1
        else:
            seen.add(content)
            picked.append(place)
    if len(picked) < count:
        what = f"{count} rows are asked for, but only {len(picked)} of {len(scored.rows)} differ from each other"
        raise LuthierError(what, where=scored.rows.name, fix=f"ask for at most {len(picked)}")
    return picked, again


def _shared_with_random(picked: Sequence[int], rows: int, seed: int) -> int:
    """How many of the picked rows a random choice of the same size holds too."""
    drawn = torch.randperm(rows, generator=draws.generator(seed, "shared with random"))[: len(picked)]
    return len(set(drawn.tolist()) & set(picked))
