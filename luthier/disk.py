"""Writing that neither a kill nor a full disk can spoil: beside the place, forced to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from luthier.errors import LuthierError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEFT_OVER = re.compile(r"\.(.+)\.(\d+|old|mode)")
_CHUNK_BYTES = 1 << 22


@contextmanager
def explained(path: Path, fix: str = "") -> Iterator[None]:
    """Turn a failure to write `path` into an error that says what to do.

    Args:
        path: what is being written.
        fix: what helps besides making room.

    Raises:
        LuthierError: the disk is full, or the place cannot be written to.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = _number(error) in _FULL
        what = "the disk is full" if full else "this cannot be written"
        first = f"make room in {path.parent}" if full else f"make {path.parent} a place that can be written to"
        raise LuthierError(f"{what}: {error}", where=str(path), fix="; ".join(filter(None, (first, fix)))) from error


@contextmanager
def written(path: Path, fix: str = "") -> Iterator[Path]:
    """Give a place beside `path` for a file or a folder, which takes the name `path` when the block has ended well.

    What stood there before stands until the new one is complete. On any failure the half-written one is removed.

    Args:
        path: where it shall stand.
        fix: what helps besides making room.

    Raises:
        LuthierError: the disk is full, or the place cannot be written to.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(path, fix):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(beside)
        try:
            yield beside
            as_others(beside)
            force(beside)
            _take_place(beside, path)
        finally:
            remove(beside)


def _take_place(beside: Path, path: Path) -> None:
    if not path.is_dir():
        beside.replace(path)
    else:
        # A folder cannot be replaced in one go: `sweep` brings the old one back if a kill falls in between.
        old = path.with_name(f".{path.name}.old")
        remove(old)
        path.rename(old)
        try:
            beside.rename(path)
        except OSError:
            old.rename(path)
            raise
        remove(old)
    force(path.parent)


def sweep(folder: Path) -> None:
    """Clear away what a kill left half-done in a folder, and bring back what it was about to replace."""
    for path in list(folder.glob(".*")):
        found = _LEFT_OVER.fullmatch(path.name)
        if found is None:
            continue
        if found[2] == "old" and not (folder / found[1]).exists():
            path.rename(folder / found[1])
        else:
            remove(path)


def as_others(path: Path) -> None:
    """Let a file, or those in a folder, be read by whoever may read what is written here: safetensors writes for the user alone."""
    # The mask of the process cannot be asked without setting it, for all threads; what a new file gets tells it.
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    probe.touch()
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    for one in path.rglob("*") if path.is_dir() else (path,):
        if one.is_file() and not one.is_symlink():
            one.chmod(one.stat().st_mode & ~0o666 | mode)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def force(path: Path) -> None:
    """Wait until a file, or a folder with the files in it, is on the disk and not only on its way."""
    if path.is_dir():
        for one in path.iterdir():
            if one.is_file():
                force(one)
        if not hasattr(os, "O_DIRECTORY"):
            # Windows cannot open folders, and keeps their entries itself.
            return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The checksum of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _number(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors tells the system's number in words alone.
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
