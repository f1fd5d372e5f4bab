"""Other work on the machine is noticed while a run trains, told once, and stands in its report."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import luthier
from luthier import machine
from luthier.machine import CoreTime
from luthier.training import cores, loop
from luthier.training.cores import CoreWatch, waited
from tests.faults import runs

SECOND = 10**9


class Clock:
    """Seconds, and what threads had of the processor by then: of each second, so much was waiting."""

    def __init__(self, waiting: float) -> None:
        self.waiting, self.seconds, self.computed, self.waited = waiting, 0.0, 0, 0

    def pass_time(self, seconds: float) -> None:
        self.seconds += seconds
        self.computed += round(seconds * (1 - self.waiting) * SECOND)
        self.waited += round(seconds * self.waiting * SECOND)

    def times(self) -> dict[str, CoreTime]:
        return {"1": CoreTime(self.computed, self.waited), "2": CoreTime(self.computed, self.waited)}

    def watch(self) -> CoreWatch:
        return CoreWatch(self.times, lambda: self.seconds)


def test_the_share_of_waiting_is_of_the_time_in_which_threads_were_ready() -> None:
    before = {"1": CoreTime(5, 1), "2": CoreTime(7, 0)}
    after = {"1": CoreTime(8, 5), "2": CoreTime(9, 1), "3": CoreTime(0, 50)}
    assert waited(before, after) == 5 / 10
    assert waited(before, before) is None and waited({}, {}) is None


def test_a_busy_machine_is_told_once() -> None:
    clock = Clock(0.45)
    watch = clock.watch()
    clock.pass_time(29)
    assert watch.word() is None
    clock.pass_time(2)
    word = watch.word()
    assert word is not None and "45%" in word
    clock.pass_time(60)
    assert watch.word() is None


def test_work_that_begins_later_is_seen_by_the_last_look_alone() -> None:
    clock = Clock(0.0)
    watch = clock.watch()
    clock.pass_time(600)
    assert watch.word() is None
    clock.waiting = 0.19
    clock.pass_time(31)
    assert watch.word() is None
    clock.waiting = 0.21
    clock.pass_time(31)
    word = watch.word()
    assert word is not None and "21%" in word


def test_a_system_that_does_not_tell_is_no_busy_one(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "schedstat").write_text("12 34 5\n")
    (tmp_path / "8").mkdir()
    assert machine.core_times(tmp_path) == {"7": CoreTime(12, 34)}
    assert machine.core_times(tmp_path / "none") == {}
    watch = CoreWatch(dict, iter((0.0, 100.0, 100.0)).__next__)
    assert watch.word() is None


def _spin() -> None:
    while True:
        pass


@pytest.fixture
def crowd() -> Iterator[None]:
    """One core for this thread and four processes that compute."""
    cores_before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores_before)})
    processes = [multiprocessing.get_context("fork").Process(target=_spin, daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.kill()
        process.join()
    os.sched_setaffinity(0, cores_before)


@pytest.mark.skipif(not machine.core_times(), reason="this system does not tell how long threads wait for a core")
def test_threads_that_wait_for_a_core_are_counted(crowd: None) -> None:
    before, began = machine.core_times(), time.thread_time()
    while time.thread_time() - began < 0.05:
        pass
    share = waited(before, machine.core_times())
    assert share is not None and share > cores.MUCH


def test_the_word_is_said_and_stands_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.5)

    def watch() -> CoreWatch:
        made = clock.watch()
        clock.pass_time(40)
        return made

    monkeypatch.setattr(loop, "CoreWatch", watch)
    said: list[str] = []
    run = luthier.train(runs.recipe(tmp_path, train={"steps": 2}), say=said.append)
    words = [text for text in said if "other work" in text]
    assert len(words) == 1 and words[0] in run.facts["warnings"]
    assert "other work runs on this machine" in run.report.read_text()
