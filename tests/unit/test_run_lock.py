"""Who works in a run's folder: known across processes, forgotten after a kill."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
