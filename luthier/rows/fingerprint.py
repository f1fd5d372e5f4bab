"""Identifies rows by all that training or measuring reads of them, and not by where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import singledispatch

import numpy

from luthier.rows.encode import Encoded
from luthier.rows.ids import canonical
from luthier.rows.numbered import NumberedRows
from luthier.rows.shapes import Row
from luthier.rows.stored import StoredRows

_READ = ("id", "token_ids", "supervised", "columns", "token_columns")
"""What steps read of a stored row."""


def of_rows(rows: Iterable[Row]) -> str:
    """The SHA-256 of rows as they were read: ids, fields and free columns, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical([row.id, row.shape, row.fields, row.columns]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@singledispatch
def of_encoded(rows: Sequence[Encoded]) -> str:
    """The SHA-256 of encoded rows: ids, tokens, labels and columns, in their order. It costs as much as reading them once."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical([row.id, len(row), row.columns, row.token_columns]).encode("utf-8", "surrogatepass"))
        digest.update(numpy.asarray(row.token_ids, dtype=numpy.int64).tobytes())
        digest.update(numpy.asarray(row.supervised, dtype=numpy.bool_).tobytes())
    return digest.hexdigest()


@of_encoded.register
def _(rows: NumberedRows) -> str:
    # Stores have fingerprints of their own.
    return of_encoded(rows.rows)


@of_encoded.register
def _(rows: StoredRows) -> str:
    # As they lie on the disk: made one by one, millions of rows would take minutes. Rows are cut into batches in the same way each time.
    digest = hashlib.sha256(canonical(sorted(rows.renamed.items())).encode())
    for batch in rows.batches:
        for name in _READ:
            for buffer in batch[name].buffers():
                digest.update(b"nothing" if buffer is None else buffer)
    return digest.hexdigest()
