"""Where the runs of a sweep are made: each in a process of its own, so that its peak memory is its own, here or on Ray."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

from luthier import machine
from luthier.errors import LuthierError
from luthier.sweep.runs import Job, RunAll, keep_crash, train_here


def local(count: int) -> RunAll:
    """Runs on this machine.

    An interrupt is passed on to the runs, which finish their step and save; a second one ends them at once.

    Args:
        count: of runs at a time. Where they are several, each computes with one thread.
    """

    def run_all(jobs: Sequence[Job]) -> Generator[Job, None, None]:
        rest = iter(jobs)
        running: dict[int, tuple[SpawnProcess, Job]] = {}
        try:
            while True:
                while len(running) < count and (job := next(rest, None)) is not None:
                    process = _begin(job, threads=1 if count > 1 else None)
                    running[process.sentinel] = process, job
                if not running:
                    return
                ended = wait(list(running))
                for sentinel in [one for one in running if one in ended]:
                    process, job = running.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        keep_crash(job, f"exit code {process.exitcode}")
                    yield job
        except BaseException:
            _stop([process for process, _ in running.values()])
            raise

    return run_all


def _begin(job: Job, threads: int | None) -> SpawnProcess:
    process = get_context("spawn").Process(target=_work, args=(job, threads))
    with machine.without_interrupts():
        process.start()
    return process


def _work(job: Job, threads: int | None) -> None:
    # In a group of its own: a terminal's interrupt reaches the sweep alone, which passes it on once.
    machine.leave_group()
    machine.end_with_parent()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    machine.hear_interrupts()
    train_here(job)


def _stop(running: Sequence[SpawnProcess]) -> None:
    try:
        for process in running:
            if process.pid is not None and process.is_alive():
                machine.interrupt(process.pid)
        for process in running:
            process.join()
    finally:
        for process in running:
            process.kill()


def on_ray(jobs: Sequence[Job]) -> Generator[Job, None, None]:
    """Runs as Ray's tasks, as many at a time as the cluster has processors, or GPUs where it has any.

    The sweep's folder and the files that the recipe names must be where every machine of the cluster finds them.

    Raises:
        LuthierError: Ray is not installed.
    """
    ray = find_ray()
    # Standard output is the command's own; what runs say is in their logs.
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        # One call for each process: peak memory would otherwise hold that of the run before.
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=0)(train_here)
        pending = {task.remote(job): job for job in jobs}
        while pending:
            ended, _ = ray.wait(list(pending), num_returns=1)
            for reference in ended:
                job = pending.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    keep_crash(job, str(error).strip().splitlines()[-1])
                yield job
    finally:
        ray.shutdown()


def find_ray() -> Any:
    """The module.

    Raises:
        LuthierError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise LuthierError(f"Ray is not installed ({error})", where="--ray", fix='pip install "luthier[ray]"') from error
    return ray
