"""Who works in a run's folder: known across processes, forgotten after a kill."""

from __future__ import annotations

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import luthier
from luthier import machine
from luthier.errors import LuthierError
from luthier.results import lock
from luthier.results.folder import read_run

SLEEPER = """
import sys, time
from pathlib import Path
from luthier.results.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_that_dies(tmp_path: Path) -> None:
    """A second process went on with a run that was under way; a kill, which removes no file, must not lock it for ever."""
    (tmp_path / "run.json").write_text('{"status": "running"}', encoding="utf-8")
    other = subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(LuthierError) as caught, lock.held(tmp_path):
            pass
        assert f"still running: process {other.pid} on {socket.gethostname()}" in caught.value.what
        assert read_run(tmp_path).facts["status"] == "running"
    finally:
        other.kill()
        other.wait()
    assert read_run(tmp_path).facts["status"] == "crashed"
    with lock.held(tmp_path):
        assert read_run(tmp_path).facts["status"] == "running"


@pytest.mark.parametrize(("silent_for", "there"), [(5.0, True), (500.0, False)])
def test_a_process_on_another_machine_is_known_by_its_touch(silent_for: float, there: bool, tmp_path: Path) -> None:
    """On a shared disk nobody can ask whether a process elsewhere lives: a file that was touched a moment ago says so."""
    (tmp_path / lock.FILE).write_text(json.dumps(lock.Holder(os.getpid(), "elsewhere", "", "1")._asdict()), encoding="utf-8")
    then = time.time() - silent_for
    os.utime(tmp_path / lock.FILE, (then, then))
    assert (lock.holder(tmp_path) is not None) == there


def test_a_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    """The number of a dead process comes back sooner or later, and its bearer holds nothing."""
    with lock.held(tmp_path):
        held = lock.holder(tmp_path)
        assert held is not None and held.process == os.getpid()
        (tmp_path / lock.FILE).write_text(json.dumps(held._replace(began="1")._asdict()), encoding="utf-8")
        assert lock.holder(tmp_path) is None
    assert not (tmp_path / lock.FILE).exists()


def test_windows_which_opens_no_folders_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders were opened and locked as POSIX does, and processes asked by a signal that ends them on Windows."""
    monkeypatch.setattr(lock, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(lock, "_here", lambda: (socket.gethostname(), ""))
    monkeypatch.setattr(lock, "_began", lambda process: "")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with lock.held(tmp_path):
        held = lock.holder(tmp_path)
        assert held is not None and held.process == os.getpid()
        with pytest.raises(LuthierError, match="still running"), lock.held(tmp_path):
            pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / lock.FILE).write_text(json.dumps(lock.Holder(dead.pid, socket.gethostname(), "", "")._asdict()))
    assert lock.holder(tmp_path) is None


def test_nothing_of_one_system_alone_is_imported_with_a_module() -> None:
    """`import luthier.machine` failed on Windows, which has no `resource`."""
    alone = {"fcntl", "grp", "msvcrt", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty", "winreg"}
    for path in Path(luthier.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not alone & set(names), path


def test_a_process_without_groups_and_masks_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps and replications asked for groups of processes and masks of signals, which Windows does not have."""
    monkeypatch.delattr(os, "setpgrp")
    monkeypatch.delattr(signal, "pthread_sigmask")
    with machine.without_interrupts():
        machine.leave_group()
        machine.hear_interrupts()
