"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import LuthierError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, beside its place; it takes its place when the block ends, and is deleted when it fails.

    Raises:
        LuthierError: something stands there already, or the place cannot be written.
    """
    if folder.exists():
        raise LuthierError("the folder exists already", where=str(folder), mend="name another, or remove it")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.rename(folder)
    except OSError as error:
        raise LuthierError(f"the folder cannot be written: {error}", where=str(folder), mend="name a place to write to") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A file to write, beside its place; it takes its place when the block ends, and is deleted when it fails.

    Raises:
        LuthierError: something stands there already, or the place cannot be written.
    """
    if file.exists():
        raise LuthierError("the file exists already", where=str(file), mend="name another, or remove it")
    beside = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.rename(file)
    except OSError as error:
        raise LuthierError(f"the file cannot be written: {error}", where=str(file), mend="name a place to write to") from error
    finally:
        beside.unlink(missing_ok=True)
