"""What a training run shows meanwhile: a bar in a terminal, lines in a log. Step, loss, tokens a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from luthier.planning.plan import Plan
from luthier.report.words import duration
from luthier.training.engine import StepResult
from luthier.training.loop import Progress as At

LINES = 20
"""About so many lines a log gets of a run."""
LONGEST = 60.0
"""Seconds after which a log gets another line."""


class Bar:
    """Shows a run's progress on a console; `say` and `step` are what `luthier.runs.train.train` calls."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.progress = Progress(
            TextColumn("[bold]training[/bold]"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=quiet,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """One line about what is being done."""
        if not self.quiet:
            self.console.print(f"[dim]{escape(text)}[/dim]", highlight=False)

    def step(self, plan: Plan, at: At, result: StepResult) -> None:
        """One more step is taken."""
        if self.quiet:
            return
        if self.task is None:
            self.progress.start()
            self.task = self.progress.add_task("training", total=plan.clock.steps, loss=losses(result), speed=0.0)
        speed = at.tokens / at.seconds if at.seconds else 0.0
        self.progress.update(self.task, completed=at.step, loss=losses(result), speed=speed)
        if at.step == plan.clock.steps:
            self.progress.stop()


class Lines:
    """Writes a run's progress into a log, a line at sensible steps: the first, each twentieth part of the run, the last, and at the
    first step behind each minute.

    Args:
        console: the log.
        quiet: write nothing.
        now: the time in seconds.
    """

    def __init__(self, console: Console, *, quiet: bool, now: Callable[[], float] = time.monotonic) -> None:
        self.console, self.quiet, self.now = console, quiet, now
        self.told_at: float | None = None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def say(self, text: str) -> None:
        """One line about what is being done."""
        if not self.quiet:
            self.console.print(escape(text), highlight=False, soft_wrap=True)

    def step(self, plan: Plan, at: At, result: StepResult) -> None:
        """One more step is taken."""
        steps, now = plan.clock.steps, self.now()
        due = self.told_at is None or at.step % max(1, steps // LINES) == 0 or at.step == steps
        if self.told_at is not None and not due and now - self.told_at < LONGEST:
            return
        self.told_at = now
        rate = plan.clock.learning_rate * plan.clock.factor(at.step - 1)
        speed = at.tokens / at.seconds if at.seconds else 0.0
        # Plain spaces, for those who search a log.
        left = duration(at.seconds / at.step * (steps - at.step)).replace("\u00a0", " ")
        self.say(
            f"step {at.step:,} of {steps:,}, {losses(result)}, learning rate {rate:.3g}, {speed:,.0f} tokens/s, "
            + (f"{left} left" if at.step < steps else "done")
        )


def shown(console: Console, *, quiet: bool) -> Bar | Lines:
    """What shows a run on a console: a bar that moves, or lines where nothing can move."""
    return Bar(console, quiet=quiet) if console.is_terminal else Lines(console, quiet=quiet)


def losses(result: StepResult) -> str:
    """What is minimized, and beside a weighted loss, which says little by itself, the plain cross-entropy."""
    beside = f", cross-entropy {result.nll:.3f}" if result.weights is not None else ""
    return f"loss {result.loss:.3f}{beside}"
