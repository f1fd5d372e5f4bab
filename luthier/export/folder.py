"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from luthier import disk
from luthier.errors import LuthierError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, beside its place; it takes its place when the block ends, and is deleted when it fails.

    Raises:
        LuthierError: something stands there already, or the place cannot be written.
    """
    with _new(folder, "folder") as beside:
        beside.mkdir()
        yield beside


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A file to write, beside its place; it takes its place when the block ends, and is deleted when it fails.

    Raises:
        LuthierError: something stands there already, or the place cannot be written.
    """
    with _new(file, "file") as beside:
        yield beside


@contextmanager
def _new(path: Path, kind: str) -> Iterator[Path]:
    if path.exists():
        raise LuthierError(f"the {kind} exists already", where=str(path), fix="name another, or remove it")
    # Its ending stays: readers go by it.
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        disk.as_others(beside)
        beside.rename(path)
    except OSError as error:
        raise LuthierError(f"the {kind} cannot be written: {error}", where=str(path), fix="name a place to write to") from error
    finally:
        with suppress(OSError):
            disk.remove(beside)
