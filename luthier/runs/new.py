"""`luthier new`: a recipe for a job, written after a look at the rows and the machine."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from luthier import disk
from luthier.errors import LuthierError, Say, silent
from luthier.models.known import KNOWN
from luthier.models.load import ModelSource, load_tokenizer, source_reads
from luthier.models.packaged import BUILT, PACKAGED
from luthier.results.start import source_of
from luthier.rows.columns import Columns
from luthier.rows.files import FORMATS
from luthier.rows.look import Look, look
from luthier.rows.read import Rows, read, records
from luthier.rows.shapes import Row, known_shapes
from luthier.runs.fitting import Fit, fit, parameters_of
from luthier.runs.jobs import JOBS, Asked, asked_of, guess, named
from luthier.runs.new_text import Facts, cut_side, recipe_text
from luthier.runs.other_columns import propose

MODEL, SEARCH_MODEL, SMALLEST = "smollm2-135m-instruct", "minilm-l6", "workshop-small"
"""Proposed where none is named: for texts to write, for vectors, and where memory is too small for either."""
WORDY = 2.5
"""Tokens a word from which on a tokenizer was not made for a text; of English with a tokenizer made for it, 1.3 is usual."""
_LOOKED_AT = 1000
"""Rows whose lengths are measured."""
_HEADS = ("text+label", "text+tags")
_SEEN = 200
"""Records whose columns are looked at."""


class Recognized(NamedTuple):
    """What the rows of a source are."""

    rows: Rows
    format: str | None = None
    """Has to be said, since keys fit several."""
    columns: Columns | None = None
    """Where they have other names."""


@dataclass(frozen=True)
class Written:
    """A recipe that was written, and what was found on the way."""

    recipe: str
    job: str
    guessed: bool
    model: str
    rows: int
    formats: Mapping[str, int]
    columns: Mapping[str, str] | None
    lengths: Mapping[str, int]
    memory: str
    metric: str
    data: str
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """What people are told: a word, and what there is to say."""
        counted = ", ".join(f"{count} {shape}" for shape, count in self.formats.items())
        columns = ", ".join(f"`{column}` is `{key}`" for key, column in (self.columns or {}).items())
        lines = [
            ("job", f"{self.job}: {JOBS[self.job].title}" + (" (guessed from the rows)" if self.guessed else "")),
            ("rows", f"{self.data}: {counted}"),
            ("columns", columns),
            ("tokens", ", ".join(f"{name} {count}" for name, count in self.lengths.items())),
            ("model", self.model),
            ("trains", self.memory),
            *(("warning", one) for one in self.warnings),
            ("recipe", self.recipe),
            ("next", f"luthier plan {shlex.quote(self.recipe)}"),
        ]
        return [(word, said) for word, said in lines if said]


def new(
    job: str | None, data: str | None = None, *, out: Path | None = None, model: str | None = None, say: Say = silent
) -> Written:
    """Write a recipe; no file is ever overwritten.

    Args:
        job: one of `JOBS`; none: what such rows are usually for. May also be the rows, where `data` is none.
        data: a file, a folder, or `hub:name`; none: a few rows to begin with are written beside the recipe.
        out: the recipe; none: `JOB.yaml` here.
        model: a model's name; none: the largest known one that fits.
        say: hears what is being done.

    Raises:
        LuthierError: there is no such job, the rows cannot be read or are for another job, or a file exists already.
    """
    if job is not None and job not in JOBS and data is None and _is_source(job):
        job, data = None, job
    if job is not None:
        named(job)
    elif data is None:
        raise LuthierError("neither a job nor rows are named", where="luthier new", fix=f"name one of: {', '.join(JOBS)}")
    if out is not None:
        _refuse_there(out)
    recognized = Recognized(read(list(JOBS[str(job)].example))) if data is None else recognize(data, job)
    rows = recognized.rows
    chosen = job or guess(rows)
    _check_fits(chosen, rows)
    out = out or Path(f"{chosen}.yaml")
    _refuse_there(out)
    asked = asked_of(chosen, [row for row in rows if row.shape in JOBS[chosen].shapes])
    source, fitted = _model(chosen, model, say)
    # Long rows are cut here, so that what remains skipped is unusable at any length.
    looked = look(_as_read(_some(rows)), load_tokenizer(source), n=0, too_long=cut_side(chosen), reads=source_reads(source))
    if not looked.tokens:
        first = next(iter((*looked.skipped, *looked.dropped)))
        raise LuthierError(
            f"{source.name} can learn from none of the rows: {first.reason}",
            where=first.where,
            fix="; ".join(filter(None, (first.fix, "or name another model with --model"))),
        )
    example = None if data is not None else out.with_name(f"{out.stem}.jsonl")
    place = str(example.name) if example is not None else _from(str(data), out.parent)
    warned = warnings_of(asked, source, fitted, looked, rows)
    facts = Facts(
        job=chosen,
        title=JOBS[chosen].title,
        command=shlex.join(["luthier", "new", *([job] if job else []), *([data] if data else [])]),
        model=source.name,
        place=place,
        asked=asked,
        fitted=fitted,
        format=recognized.format,
        columns=recognized.columns,
        rows=len(rows),
        lengths=looked.lengths,
        too_long=looked.too_long,
        context=source_reads(source).context,
        bad=[*rows.skipped, *looked.skipped],
        warnings=warned,
    )
    text = recipe_text(facts)
    if example is not None:
        _write(example, "".join(json.dumps(one) + "\n" for one in JOBS[chosen].example))
    _write(out, text)
    return Written(
        recipe=str(out),
        job=chosen,
        guessed=job is None,
        model=source.name,
        rows=len(rows),
        formats=rows.shape_counts,
        columns=recognized.columns,
        lengths=looked.lengths,
        memory=fitted.said,
        metric=asked.metric,
        data=str(example) if example is not None else str(data),
        warnings=warned,
    )


def recognize(source: str, job: str | None) -> Recognized:
    """Read rows: as they are, as one of several formats that fit, or with columns under other names.

    Args:
        source: the rows.
        job: what they are for, which decides between several; none: not known.

    Raises:
        LuthierError: they are no rows that are read, with the names of their columns.
    """
    wanted = frozenset(JOBS[job].shapes) if job is not None else None
    problem, other = None, None
    for shape in (None, *known_shapes()):
        if shape is not None and problem is None:
            break
        try:
            found = Recognized(read(source, shape=shape, on_bad_row="skip"), shape)
        except LuthierError as error:
            problem = problem or error
            # Another format helps where the keys fit several, and nowhere else.
            if "fit several" not in problem.what:
                break
            continue
        if wanted is None or wanted & set(found.rows.shape_counts):
            return found
        other = other or found
    seen = [one for _, one in islice(records(source), _SEEN) if isinstance(one, Mapping)]
    proposed = _proposed(source, seen, job)
    if proposed is not None:
        return proposed
    if other is not None:
        return other
    assert problem is not None
    if not seen:
        raise problem
    keys = " or ".join("+".join(keys) for keys in (JOBS[job].keys if job is not None else (("prompt", "completion"), ("text",))))
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(str(name) for record in seen for name in record))
    raise LuthierError(
        f"the columns {names} are none that are read, and no name says what they hold",
        where=source,
        fix=f"rename them to {keys}" + ("" if job is not None else ", or say what they are for: luthier new JOB DATA"),
    )


def _proposed(source: str, seen: Sequence[Mapping[str, Any]], job: str | None) -> Recognized | None:
    for name in (job,) if job is not None else JOBS:
        for keys in JOBS[name].keys:
            columns = propose(seen, keys) if seen else None
            moved = {key: column for key, column in (columns or {}).items() if key != column}
            if not moved:
                continue
            try:
                rows = read(source, columns=moved, on_bad_row="skip")
            except LuthierError:
                continue
            if not set(JOBS[name].shapes) & set(rows.shape_counts):
                continue
            return Recognized(rows, columns=moved)
    return None


def warnings_of(asked: Asked, source: ModelSource, fitted: Fit, looked: Look, rows: Rows) -> tuple[str, ...]:
    """What deserves a look before training."""
    said = list(asked.told)
    bad = [*rows.skipped, *looked.skipped]
    if bad:
        total = len(rows) + len(rows.skipped)
        said.append(f"{len(bad)} of {total} rows cannot be used as they are; {bad[0].where}: {bad[0].reason}")
    if looked.dropped:
        said.append(f"{len(looked.dropped)} rows have nothing to learn; {looked.dropped[0].where}: {looked.dropped[0].reason}")
    words = sum(len(str(part).split()) for row in _some(rows) for part in _texts(row.fields))
    rate = looked.tokens / words if words else 0.0
    if source.name in (*PACKAGED, *BUILT) and rate > WORDY:
        said.append(
            f"{source.name} knows a made-up benchmark and next to no English: it needs {rate:.1f} tokens for a word of these rows. "
            f"Try the recipe with it, and train {MODEL} or larger"
        )
    if not fitted.fits:
        said.append("this is not expected to fit into memory: see what `luthier plan` says, or name a smaller model")
    said += [f"{note} ({count} rows)" for note, count in looked.notes.items()]
    return tuple(said)


def _model(job: str, model: str | None, say: Say) -> tuple[ModelSource, Fit]:
    if model is not None:
        source = source_of(model, "runs", say)
        return source, fit(parameters_of(source), encoder=source.kind == "encoder")
    proposed = SEARCH_MODEL if job == "search" else MODEL
    if not fit(KNOWN[proposed].parameters, encoder=proposed == SEARCH_MODEL).fits:
        say(f"{proposed} does not fit into this machine's memory: {SMALLEST} does")
        proposed = SMALLEST
    return _model(job, proposed, say)


def _check_fits(job: str, rows: Rows) -> None:
    if set(rows.shape_counts) & set(JOBS[job].shapes):
        return
    shapes = ", ".join(rows.shape_counts)
    better = [name for name, one in JOBS.items() if set(rows.shape_counts) & set(one.shapes)]
    hint = f"such rows are for {' or '.join(better)}" if better else "see docs/recipes.md"
    wanted = " or ".join("+".join(keys) for keys in JOBS[job].keys)
    raise LuthierError(f"the rows are {shapes}, and {job} needs {wanted}", where=rows.name, fix=hint)


def _some(rows: Rows) -> Rows:
    """Rows from all over the set."""
    step = -(-len(rows) // _LOOKED_AT)
    return Rows(rows.name, rows.rows[::step])


def _as_read(rows: Rows) -> Rows:
    """Rows of which heads read a text alone as that text, and ranked ones with their longest answer: pairs are made only in a run."""

    def one(row: Row) -> Row:
        if row.shape in _HEADS:
            return Row(row.id, "text", {"text": row.fields["text"]}, row.where)
        if row.shape == "prompt+answers+scores":
            longest = max(row.fields["answers"], key=lambda answer: len(str(answer)))
            return Row(row.id, "prompt+completion", {"prompt": row.fields["prompt"], "completion": longest}, row.where)
        return row

    return Rows(rows.name, tuple(map(one, rows)))


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from () if key in ("role", "words", "tags", "label") else _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(getattr(one, "fields", one))


def _is_source(text: str) -> bool:
    return text.startswith("hub:") or Path(text).exists() or text.removesuffix(".gz").endswith(FORMATS) or "/" in text


def _from(data: str, folder: Path) -> str:
    """How a recipe in a folder names rows."""
    if data.startswith("hub:") or Path(data).is_absolute():
        return data
    return Path(os.path.relpath(data, folder)).as_posix()


def _refuse_there(path: Path) -> None:
    if path.exists():
        raise LuthierError("this exists already, and nothing is overwritten", where=str(path), fix="name another with --out")


def _write(path: Path, text: str) -> None:
    _refuse_there(path)
    with disk.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)


def jobs_as_rows() -> list[dict[str, str]]:
    """All jobs, with what they are for and the keys that rows have."""
    return [{"job": name, "for": job.title, "rows": " or ".join("+".join(keys) for keys in job.keys)} for name, job in JOBS.items()]
