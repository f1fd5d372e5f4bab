"""Experiment trackers: where a run's numbers are also shown while it runs. The run's own folder and report never depend on one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from luthier.errors import LuthierError, nearest

Numbers = Mapping[str, float]


class Tracker(Protocol):
    """One tracker, during one run."""

    def start(self, name: str, recipe_facts: Mapping[str, Any]) -> None:
        """The run begins: its name, and its recipe as plain data."""

    def log(self, step: int, numbers: Numbers) -> None:
        """Finite numbers after an optimizer step."""

    def finish(self, facts: Numbers) -> None:
        """The run ended, well or not, with these numbers for the whole of it."""


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    module = "torch.utils.tensorboard"

    def __init__(self, folder: Path) -> None:
        self._writer = _extra(self.module).SummaryWriter(str(folder / "tensorboard"))

    def start(self, name: str, recipe_facts: Mapping[str, Any]) -> None:
        """The recipe is shown as text."""
        lines = [f"    {key}: {value}" for key, value in recipe_facts.items()]
        self._writer.add_text("recipe", "\n".join([f"    {name}", *lines]))

    def log(self, step: int, numbers: Numbers) -> None:
        """One point of each curve."""
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, facts: Numbers) -> None:
        """Points at step 0 under `run/`."""
        self.log(0, {f"run/{key}": value for key, value in facts.items()})
        self._writer.close()


class Trackio:
    """Trackio's local store: `trackio show --project luthier`."""

    module = "trackio"

    def __init__(self, folder: Path) -> None:
        self._module = _extra(self.module)

    def start(self, name: str, recipe_facts: Mapping[str, Any]) -> None:
        """A run of the project `luthier`."""
        self._module.init(project="luthier", name=name, config=dict(recipe_facts))

    def log(self, step: int, numbers: Numbers) -> None:
        """One point of each curve."""
        self._module.log(dict(numbers), step=step)

    def finish(self, facts: Numbers) -> None:
        """A last point with the numbers of the run."""
        self._module.log({f"run/{key}": value for key, value in facts.items()})
        self._module.finish()


class Wandb:
    """Weights & Biases: written to the run's folder only, unless WANDB_MODE says `online`; `wandb sync` uploads later."""

    module = "wandb"

    def __init__(self, folder: Path) -> None:
        self._module, self._folder = _extra(self.module), folder

    def start(self, name: str, recipe_facts: Mapping[str, Any]) -> None:
        """A run of the project WANDB_PROJECT, or `luthier`."""
        self._run = self._module.init(
            project=os.environ.get("WANDB_PROJECT", "luthier"),
            name=name,
            config=dict(recipe_facts),
            dir=str(self._folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def log(self, step: int, numbers: Numbers) -> None:
        """One point of each curve."""
        self._run.log(dict(numbers), step=step)

    def finish(self, facts: Numbers) -> None:
        """The numbers of the run go into its summary."""
        self._run.summary.update(dict(facts))
        self._run.finish()


TRACKERS: Mapping[str, type[TensorBoard] | type[Trackio] | type[Wandb]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}
"""By the names a recipe gives under `track`."""


def check_trackers(names: str | Sequence[str] | None) -> list[str]:
    """The trackers' names as a list.

    Raises:
        LuthierError: there is no such tracker, or its package is not installed.
    """
    listed = [names] if isinstance(names, str) else list(names or ())
    for name in listed:
        if name not in TRACKERS:
            raise LuthierError(f"there is no tracker `{name}`", where="track", fix=nearest(name, TRACKERS))
        _extra(TRACKERS[name].module)
    return listed


def make_trackers(names: str | Sequence[str] | None, folder: Path) -> list[Tracker]:
    """Trackers by name, not started.

    Args:
        names: one or several of `TRACKERS`, or None.
        folder: the run's.

    Raises:
        LuthierError: as `check_trackers`.
    """
    return [TRACKERS[name](folder) for name in check_trackers(names)]


class Trackers:
    """The trackers of a run, as one. One that fails is left out from then on, with a warning: it must not cost a run."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        self.warnings: list[str] = []

    def start(self, name: str, recipe_facts: Mapping[str, Any]) -> None:
        """The run begins."""
        self._each(lambda one: one.start(name, recipe_facts))

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """What was measured after a step; whatever is no finite number is left out."""
        finite = _finite(numbers)
        self._each(lambda one: one.log(step, finite))

    def finish(self, facts: Mapping[str, Any]) -> None:
        """The run ended. Further calls do nothing."""
        finite = _finite(facts)
        self._each(lambda one: one.finish(finite))
        self._trackers = []

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            # Trackers reach for disks, services and networks: anything may be raised.
            except Exception as error:
                self._trackers.remove(tracker)
                self.warnings.append(f"the tracker {type(tracker).__name__} failed and was left out: {error}")


def start_trackers(names: str | Sequence[str] | None, folder: Path, name: str, recipe_facts: Mapping[str, Any]) -> Trackers:
    """Make and start the trackers of a run; on several processes, the first one's business.

    Raises:
        LuthierError: as `check_trackers`.
    """
    trackers = Trackers(make_trackers(names, folder))
    trackers.start(name, recipe_facts)
    return trackers


def run_numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a whole run: what training took, and each evaluation set before and after."""
    keys = ("seconds", "steps", "tokens", "tokens_per_second", "peak_memory_bytes", "final_loss", "retained")
    numbers = {key: facts[key] for key in keys if key in facts}
    for name, metric in facts.get("metrics", {}).items():
        numbers |= {f"{name}/{when}": metric[when] for when in ("before", "after") if when in metric}
    return _finite(numbers)


def _finite(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in numbers.items() if isinstance(value, int | float) and math.isfinite(value)}


def _extra(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise LuthierError(
            f"{module.rpartition('.')[2]} is not installed ({error})", where="track", fix='pip install "luthier[tracking]"'
        ) from error
