"""Processes that do the lab's jobs: each with one thread of computation, kept from job to job and from replication to replication."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import active_children, get_context

from luthier import machine
from luthier.errors import LuthierError
from luthier.lab.jobs import Do, Job, RunAll

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def workers(count: int) -> Iterator[RunAll]:
    """Processes that do jobs at the same time; they end with the block, at once where it ends early.

    Args:
        count: of processes, at least 1.
    """
    others = set(active_children())
    with _environment(_ENVIRONMENT), ProcessPoolExecutor(count, get_context("spawn"), _begin) as pool:

        def submit(do: Do, jobs: Iterable[Job]) -> set[Future[LuthierError | None]]:
            with machine.without_interrupts():
                return {pool.submit(do, job) for job in jobs}

        def run_all(do: Do, jobs: Sequence[Job]) -> Iterator[LuthierError | None]:
            # No more wait in the pool than it can begin: whoever stops listening wants no more of them.
            rest = iter(jobs)
            pending = submit(do, islice(rest, count))
            try:
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    results = [one.result() for one in done]
                    pending |= submit(do, islice(rest, len(done)))
                    yield from results
            except BrokenProcessPool:
                raise LuthierError(
                    "a process of the lab ended before its work was done",
                    where="luthier replicate",
                    fix="use fewer --jobs if memory ran out; what is finished is kept",
                ) from None

        try:
            yield run_all
        except BaseException:
            # What is being trained would take minutes to end by itself, and is begun anew anyway.
            for child in set(active_children()) - others:
                child.kill()
            raise


def _begin() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import luthier.runs.train  # noqa: F401

    torch.set_num_threads(1)
    machine.end_with_parent()
    machine.keep_what_stands()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """What processes that begin inside the block find in their environment."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
