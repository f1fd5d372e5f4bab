"""Encoding rows chunk by chunk, in this process or in others, with the same result in the same order."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

from luthier import machine
from luthier.errors import LuthierError
from luthier.kinds import Annotation
from luthier.kinds.parts import Reads
from luthier.rows.chat import Form, LossOn
from luthier.rows.encode import Purpose, encode_each
from luthier.rows.limits import ANYTHING, TooLong
from luthier.rows.shapes import BadRow, Row
from luthier.rows.stored import Chunk, batch_of

MOST_ROWS = 1024
MOST_CHARACTERS = 2**18
"""Of the rows of a chunk; a single longer row is one by itself."""


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens.

    Args:
        form: how the tokenizer writes conversations.
        loss_on, max_length, too_long: as for `luthier.rows.encode.encode`.
        annotations: what gives the rows' tokens numbers.
        reads: what the model can read.
        purpose: `train`, or `read` where a head reads the rows.
    """

    form: Form
    loss_on: LossOn
    max_length: int | None
    too_long: TooLong
    annotations: tuple[Annotation, ...] = ()
    reads: Reads = ANYTHING
    purpose: Purpose = "train"


class Records(NamedTuple):
    """Some records in the order they were read."""

    rows: list[Row]
    skipped: list[BadRow]


def cut(records: Iterable[Row | BadRow]) -> Iterator[Records]:
    """Cut records into chunks small enough to hold in memory many times."""
    chunk, characters = Records([], []), 0
    for one in records:
        if isinstance(one, BadRow):
            chunk.skipped.append(one)
        else:
            chunk.rows.append(one)
            characters += len(repr(one.fields))
        if characters >= MOST_CHARACTERS or len(chunk.rows) + len(chunk.skipped) >= MOST_ROWS:
            yield chunk
            chunk, characters = Records([], []), 0
    if chunk.rows or chunk.skipped:
        yield chunk


def encode_chunk(records: Records, encoding: Encoding) -> Chunk:
    """Encode one chunk."""
    found, bad = encode_each(
        records.rows,
        encoding.form.tokenizer,
        purpose=encoding.purpose,
        loss_on=encoding.loss_on,
        max_length=encoding.max_length,
        too_long=encoding.too_long,
        form=encoding.form,
        annotations=encoding.annotations,
        reads=encoding.reads,
    )
    derived = {row.id for row in records.rows if row.derived}
    batch = batch_of(found, derived)
    return Chunk(batch, found.truncated, records.skipped, bad, list(found.dropped), found.notes, found.first_noted)


def encode_chunks(chunks: Iterable[Records], encoding: Encoding, workers: int) -> Generator[Chunk, None, None]:
    """Encode chunks in order.

    Args:
        chunks: the chunks; those being encoded are read ahead, at most two a worker.
        encoding: how.
        workers: processes that encode; 0: this one. They end with the iteration, however it ends.

    Raises:
        LuthierError: a worker was killed.
    """
    if not workers:
        yield from (encode_chunk(chunk, encoding) for chunk in chunks)
        return
    # A fork would copy locks that threads of torch may hold at that moment; a spawned process starts clean.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(encoding,))
    pending: deque[Future[Chunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_here, chunk))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise LuthierError(
            "a process that encodes rows ended before its work was done",
            where="rows.workers",
            fix="use fewer workers if memory ran out; a script that uses workers needs `if __name__ == '__main__':`",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoding: Encoding
"""Of a worker."""


def _begin(encoding: Encoding) -> None:
    global _encoding
    _encoding = encoding
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # An interrupt reaches every process of a terminal; the one that began the others ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    machine.end_with_parent()


def _encode_here(chunk: Records) -> Chunk:
    return encode_chunk(chunk, _encoding)
