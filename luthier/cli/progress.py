"""The progress bar of a training run: step, loss, tokens a second, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from luthier.planning.plan import Plan
from luthier.training.engine import StepResult
from luthier.training.loop import Progress as At


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


def losses(result: StepResult) -> str:
    """What is minimized, and beside a weighted loss, which says little by itself, the plain cross-entropy."""
    beside = f", cross-entropy {result.nll:.3f}" if result.weights is not None else ""
    return f"loss {result.loss:.3f}{beside}"
