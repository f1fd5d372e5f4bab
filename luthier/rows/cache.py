"""Encoded rows are kept between runs, under a key made of everything they depend on.

A file counts by its path, its size, its times, and its first and last MiB. Its whole content would be safer by little and costs as much
time as reading it, at every start. The time of its last change can be kept when another file is copied over it; the time at which the
system last touched it cannot. Where only a time differs the rows are encoded again, which costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import tokenizers
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

import luthier
from luthier.errors import LuthierError, Say, silent
from luthier.models.wheel import cache_folder
from luthier.rows import annotate, stored
from luthier.rows.chunks import Encoding, cut, encode_chunks
from luthier.rows.encode import EncodedRows
from luthier.rows.ids import canonical, digest, numbered, parted, same_id
from luthier.rows.read import OnBadRow, files_of
from luthier.rows.shapes import BadRow, bad_rows_error
from luthier.rows.sources import Streamed
from luthier.rows.stored import Chunk, Stored, StoredRows
from luthier.rows.template import asks_clock

_CODE = (
    "annotate",
    "beside",
    "blocks",
    "borders",
    "cache",
    "chat",
    "chunks",
    "columns",
    "encode",
    "files",
    "groups",
    "held_out",
    "ids",
    "labels",
    "lazy",
    "limits",
    "messages",
    "preferences",
    "read",
    "saved",
    "separated",
    "shapes",
    "sources",
    "spans",
    "stored",
    "template",
    "texts",
    "thinking",
    "unwritten",
)
"""Modules of this folder that read and encode rows."""
_END_BYTES = 2**20


class Kept(NamedTuple):
    """The rows of several sources, on disk or in memory."""

    rows: EncodedRows
    places: tuple[range, ...]
    """Of each source's rows among them; empty in memory, where ids tell."""
    skipped: tuple[BadRow, ...]
    said: tuple[str, ...]
    """Of each source, whether it was in the cache; empty in memory."""


def keep(
    sources: Sequence[Streamed],
    encoding: Encoding,
    *,
    on_bad_row: OnBadRow = "stop",
    workers: int = 0,
    say: Say = silent,
) -> Kept:
    """Encode sources that may be larger than memory, or find them encoded in the cache.

    Args:
        sources: the sources.
        encoding: how rows become tokens.
        on_bad_row: as for `luthier.rows.read.read`; a stop names the bad rows of the first thousand rows or so that hold one.
        workers: processes that encode; 0: this one.
        say: hears what is being done.

    Raises:
        LuthierError: a row cannot be used, no row can, two sources share an id, or the cache cannot be written.
    """
    found = [_kept(source, encoding, on_bad_row, workers, say) for source in sources]
    parts = [part for part, _ in found]
    rows = StoredRows(batch for part in parts for batch in part.batches)
    dropped = tuple(one for part in parts for one in part.dropped)
    if not rows:
        raise bad_rows_error(dropped, len(dropped))
    if len(parts) > 1:
        rows = _apart(rows, parts)
    notes: dict[str, int] = {}
    first: dict[str, str] = {}
    for part in parts:
        first = {**part.first_noted, **first}
        for note, number in part.notes.items():
            notes[note] = notes.get(note, 0) + number
    ends = list(accumulate(map(len, parts)))
    return Kept(
        EncodedRows(rows, rows.sizes(), sum(part.truncated for part in parts), dropped, notes, first),
        tuple(range(end - len(part), end) for end, part in zip(ends, parts, strict=True)),
        tuple(one for part in parts for one in part.skipped),
        tuple(f"{source.name}: {said}" for source, (_, said) in zip(sources, found, strict=True)),
    )


def inputs_of(source: Streamed, encoding: Encoding, on_bad_row: OnBadRow) -> dict[str, Any]:
    """Everything the encoded rows of a source depend on. Weights are no part of it: another mixture uses the same rows."""
    return {
        "source": str(source.source),
        "files": [_stamp(file) for file in files_of(source.source)],
        "shape": source.shape,
        "columns": dict(source.columns or {}),
        "blocks": None if source.splitter is None else [source.splitter.tokens, source.splitter.overlap, source.splitter.at],
        "without": None if source.without is None else asdict(source.without),
        "on_bad_row": on_bad_row,
        "loss_on": encoding.loss_on,
        "purpose": encoding.purpose,
        "max_length": encoding.max_length,
        "too_long": encoding.too_long,
        "reads": encoding.reads._asdict(),
        "annotations": annotate.fingerprint(encoding.annotations),
        "tokenizer": tokenizer_fingerprint(encoding.form.tokenizer),
        "template": encoding.form.tokenizer.chat_template,
        "template_name": encoding.form.choice.name,
        "chat_template_options": dict(encoding.form.options),
        "thinking": encoding.form.choice.thinking,
        "date": encoding.form.choice.clock.isoformat() if asks_clock(encoding.form.tokenizer, encoding.form.choice.name) else None,
        "luthier": luthier.__version__,
        "code": code_fingerprint(),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def key_of(inputs: Mapping[str, Any]) -> str:
    """Names the inputs: 24 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(canonical(inputs).encode()).hexdigest()[:24]


def folder_of(inputs: Mapping[str, Any]) -> Path:
    """Where encoded rows are kept: `rows/KEY` in luthier's cache folder (`LUTHIER_CACHE`, or `~/.cache/luthier`)."""
    return cache_folder() / "rows" / key_of(inputs)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies what a tokenizer does: its serialized form, or its vocabulary where it has none, and its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # How the last caller padded and cut stays in the tokenizer; rows are encoded with neither.
    what = {key: value for key, value in written.items() if key not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(canonical([type(tokenizer).__name__, what, special]).encode()).hexdigest()


def code_fingerprint() -> str:
    """Identifies the code that reads and encodes rows, so that no change to it can be forgotten."""
    modules = (import_module(f"luthier.rows.{name}") for name in _CODE)
    return hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()


def _stamp(file: Path) -> list[str | int]:
    about = file.stat()
    with file.open("rb") as content:
        found = hashlib.sha256(content.read(_END_BYTES))
        content.seek(max(0, about.st_size - _END_BYTES), os.SEEK_SET)
        found.update(content.read(_END_BYTES))
    return [str(file), about.st_size, about.st_mtime_ns, about.st_ctime_ns, found.hexdigest()]


def _kept(source: Streamed, encoding: Encoding, on_bad_row: OnBadRow, workers: int, say: Say) -> tuple[Stored, str]:
    inputs = inputs_of(source, encoding, on_bad_row)
    folder = folder_of(inputs)
    try:
        found, said = _found(folder)
        if found is not None:
            return found, said
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            # Another process may have written it meanwhile: the others of this run, or another run.
            found, _ = _found(folder)
            if found is None:
                say(f"{source.name}: {said}; encoding into {folder}")
                with closing(encode_chunks(cut(source.records()), encoding, workers)) as encoded:
                    stored.write(folder, _judged(encoded, source.name, on_bad_row), inputs)
        return found if found is not None else stored.read(folder), said
    except (OSError, pyarrow.ArrowException) as problem:
        fix = "make room there, or set LUTHIER_CACHE to another folder"
        raise LuthierError(f"the encoded rows cannot be kept: {problem}", where=str(folder), fix=fix) from problem


def _found(folder: Path) -> tuple[Stored | None, str]:
    """The rows, if they are there and whole, and what to say about them."""
    if not folder.exists():
        return None, "rows cache: miss"
    try:
        return stored.read(folder), "rows cache: hit"
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return None, f"rows cache: damaged ({problem}), written again"


def _judged(encoded: Iterable[Chunk], name: str, on_bad_row: OnBadRow) -> Iterator[Chunk]:
    """Stop at bad rows as soon as they are found: the rest may take hours."""
    read_rows = records = 0
    skipped: list[BadRow] = []
    for chunk in encoded:
        rows = chunk.batch.num_rows + len(chunk.bad) + len(chunk.dropped)
        read_rows, records = read_rows + rows, records + rows + len(chunk.skipped)
        if on_bad_row == "stop" and (chunk.skipped or chunk.bad):
            raise bad_rows_error(chunk.skipped or chunk.bad, records)
        skipped += chunk.skipped
        yield chunk
    if skipped and not read_rows:
        raise bad_rows_error(skipped, records)
    if not records:
        raise LuthierError("there are no rows", where=name, fix="check that this is the right file")


def _apart(rows: StoredRows, parts: Sequence[Stored]) -> StoredRows:
    """The rows with ids that no two of them share, as `luthier.rows.sources.apart` gives them in memory."""
    batches = [batch for part in parts for batch in part.batches]

    def column(name: str) -> Any:
        return numpy.concatenate([batch[name].to_numpy() for batch in batches])

    content, occurrence, digests = column("content"), column("occurrence"), column("digest").copy()
    of_part = numpy.repeat(numpy.arange(len(parts)), [len(part) for part in parts])
    renamed: dict[int, str] = {}
    # By content, how many rows have it in the sources before, and in this one.
    counts: dict[int, tuple[int, int, int]] = {}
    for place in _repeated(content).tolist():
        if not occurrence[place]:
            continue
        key, part, number = int(content[place]), int(of_part[place]), int(occurrence[place])
        before, here, last = counts.get(key, (0, 0, part))
        if part != last:
            before, here = before + here, 0
        counts[key] = (before, max(here, number), part)
        if before:
            renamed[place] = numbered(parted(rows.id_of(place))[0], before + number)
            digests[place] = digest(renamed[place])
    rows = StoredRows(batches, renamed)
    again = _repeated(digests)
    if again.size:
        order = again[numpy.argsort(digests[again], kind="stable")]
        later = order[1:][digests[order][1:] == digests[order][:-1]].min()
        first = again[digests[again] == digests[later]][0]
        one, other = rows[int(first)], rows[int(later)]
        raise same_id(other.id, one.where, other.where)
    return rows


def _repeated(values: Any) -> Any:
    """The places in order at which a value stands that also stands elsewhere."""
    order = numpy.argsort(values, kind="stable")
    same = values[order][1:] == values[order][:-1]
    among = numpy.zeros(len(values), dtype=bool)
    among[order[1:][same]] = among[order[:-1][same]] = True
    return numpy.flatnonzero(among)
