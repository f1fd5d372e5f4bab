"""Who works in a run's folder: a file that the process keeps there while it trains, so that no second one writes into it.

A kill leaves the file behind. On the machine where it was written the processes themselves tell whether that one still lives. From
elsewhere, where the folder is on a shared disk, the file's time tells it: whoever holds the folder touches the file again and again.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from filelock import FileLock

from luthier import disk
from luthier.errors import LuthierError

FILE = "process.json"
TOUCHED_SECONDS = 15.0
"""How often a holder touches its file."""
SILENT_SECONDS = 120.0
"""After so long without a touch, a holder on another machine is taken for dead: clocks of machines differ by less."""


class Holder(NamedTuple):
    """A process that works in a folder."""

    process: int
    host: str
    place: str
    """The start of the machine and the space of its process numbers, a container's for one; empty where the system does not tell."""
    began: str
    """When the process began, by the machine's count: a later process may get the same number."""

    def described(self) -> str:
        """In words for errors."""
        return f"process {self.process} on {self.host}"


def holder(folder: Path) -> Holder | None:
    """The process that works in a run's folder; None where none does, or the one that did has died."""
    path = folder / FILE
    try:
        found = Holder(**json.loads(path.read_text(encoding="utf-8")))
        touched = path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return None
    host, place = _here()
    if (found.host, found.place) != (host, place):
        return found if time.time() - touched < SILENT_SECONDS else None
    return found if _lives(found) else None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Work in a run's folder, alone.

    Raises:
        LuthierError: another process does, or the folder cannot be written to.
    """
    _take(folder)
    done = threading.Event()
    threading.Thread(target=_touch, args=(folder / FILE, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        with suppress(OSError):
            (folder / FILE).unlink()


def _take(folder: Path) -> None:
    with disk.explained(folder), _alone(folder):
        other = holder(folder)
        if other is not None:
            raise LuthierError(
                f"this run is still running: {other.described()}",
                where=str(folder),
                fix=f"wait for it, or stop it first (kill -INT {other.process} saves what it has)",
            )
        host, place = _here()
        with disk.written(folder / FILE) as beside:
            me = Holder(os.getpid(), host, place, _began(os.getpid()))
            beside.write_text(json.dumps(me._asdict()), encoding="utf-8")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of two processes that come at the same time, one after the other; not every shared disk knows this."""
    if sys.platform == "win32":
        # Folders cannot be opened there, and a lock within one would hinder whoever removes it.
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        with FileLock(Path(tempfile.gettempdir()) / f"luthier-{name}.lock"):
            yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _touch(path: Path, done: threading.Event) -> None:
    while not done.wait(TOUCHED_SECONDS):
        with suppress(OSError):
            os.utime(path)


def _here() -> tuple[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return socket.gethostname(), f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname(), ""


def _lives(one: Holder) -> bool:
    if one.began:
        return _began(one.process) == one.began
    try:
        return bool(psutil.Process(one.process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _began(process: int) -> str:
    """When a living process began; empty for one that is dead, or where the system does not tell."""
    try:
        # The name in brackets may hold anything, spaces and brackets too.
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""
