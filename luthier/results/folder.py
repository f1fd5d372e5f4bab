"""Run folders: where a run's results lie, never overwritten, and how they are read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from luthier import disk
from luthier.errors import LuthierError, explain, nearest
from luthier.results.lock import holder

FILE = "run.json"
STEPS = "steps.jsonl"
CRASHED = "crashed"
"""The status of a run whose process has died before it could write how it ended."""
_AGAIN = "copy the run's folder again, or train again"


@dataclass
class Run:
    """A finished or stopped run: its folder and everything that was measured.

    `facts` is what `run.json` holds; the attributes read it.
    """

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    model: Any = None
    """The tuned model, when the run was made in this process, in evaluation mode. What its weights do not hold, such as low-rank deltas,
    acts in it and is no part of its `state_dict()`, and a learned prompt stands before rows that luthier encodes alone: `export` writes
    what other tools can use, and `tune.merge()` puts deltas into the weights. Until then `save_pretrained` is refused."""
    tokenizer: Any = None
    tune: Any = None
    """What trained (`luthier.tune.Tune`), when the run was made in this process."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Before and after, by evaluation set."""
        return dict(self.facts.get("metrics") or {})

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    def fact(self, *keys: str) -> Any:
        """One of the facts, by its path of keys.

        Raises:
            LuthierError: the run does not hold it.
        """
        found: Any = self.facts
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is None:
            raise LuthierError(f"this run does not hold its `{'.'.join(keys)}`", where=str(self.folder / FILE), fix=_AGAIN)
        return found

    def export(
        self,
        target: str | Path,
        *,
        form: str = "model",
        dtype: str = "auto",
        quantize: str | None = None,
        weights_only: bool = False,
    ) -> dict[str, Any]:
        """Write the result for other tools: the tuned model as it is kept in the run's folder, whatever stands beside its weights.

        Args:
            target: what to write; it must not exist.
            form: `model`, a plain Hugging Face folder with everything merged, `gguf`, one file of the same, `ollama`, a folder
                with that file and a Modelfile, or `peft`, a folder with an adapter.
            dtype: of the weights, of a GGUF file's matrices, or of an adapter's tensors: fp32, bf16, fp16, or auto, which keeps
                what was trained.
            quantize: of a GGUF file, also of that for Ollama, its matrices in fewer bits: q8_0, or q2_k to q6_k, for which
                `llama-cpp-python` is needed.
            weights_only: leave out prompts, prefixes and edits, which weights cannot hold.

        Returns:
            What was written and how well it reads back, as `luthier export` prints it.

        Raises:
            LuthierError: the target exists, the run has not finished, or its result cannot be held in this form.
        """
        # A run is also read where no model is opened, and this opens one.
        from luthier.results.written import Asked, write_result

        return write_result(self, Asked(Path(target), form, dtype, quantize), weights_only=weights_only)

    def save(self, target: str | Path) -> dict[str, Any]:
        """Write the tuned model as a plain Hugging Face folder, everything merged: `export` as it does by itself."""
        return self.export(target)

    def as_json(self) -> dict[str, Any]:
        """What scripts get: all facts but the long ones."""
        long = ("history", "plan", "recipe_text", "delta")
        facts = {key: value for key, value in self.facts.items() if key not in long}
        facts["metrics"] = {
            name: {key: value for key, value in (one or {}).items() if key != "items"} for name, one in self.metrics.items()
        }
        return facts


def new_folder(out: str | Path, name: str) -> Path:
    """Make `out/name-1`, or the next free number."""
    root = Path(out)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LuthierError(
            f"the folder of the runs cannot be made: {error}", where=f"out: {root}", fix="name a folder that can be written to"
        ) from None
    numbers = [int(path.name.rpartition("-")[2]) for path in root.glob(f"{name}-*") if path.name.rpartition("-")[2].isdigit()]
    number = max(numbers, default=0)
    while True:
        number += 1
        folder = root / f"{name}-{number}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise LuthierError(
                f"no run folder can be made here: {error}", where=f"out: {root}", fix="name a folder that can be written to"
            ) from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write beside and rename, so that a reader never sees half a file.

    Raises:
        LuthierError: the disk is full or cannot be written to; the file is as it was.
    """
    with disk.written(path) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str), encoding="utf-8")


def read_run(path: str | Path, out: str | Path = "runs") -> Run:
    """A run from its folder, or from its name under `out`.

    Raises:
        LuthierError: there is no such run, or its file is damaged.
    """
    for folder in (Path(path), Path(out) / path):
        if _true((folder / FILE).is_file):
            return Run(folder, _read_facts(folder / FILE))
    known = [run.folder.name for run in list_runs(out)]
    if _true(Path(path).exists):
        raise LuthierError(f"this is no run's folder: it holds no {FILE}", where=str(path), fix="name a folder that a run made")
    raise LuthierError(f"there is no run `{path}`", where=str(out), fix=nearest(Path(path).name, known) or "see `luthier runs`")


def list_runs(out: str | Path = "runs") -> list[Run]:
    """All runs under a folder, the oldest first."""
    found = []
    for path in sorted(Path(out).glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime):
        try:
            found.append(Run(path.parent, _read_facts(path)))
        except LuthierError:
            found.append(Run(path.parent, {"name": path.parent.name, "status": "damaged"}))
    return found


def _true(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except (OSError, ValueError):
        # No file can have such a name.
        return False


def _read_facts(path: Path) -> dict[str, Any]:
    """What a `run.json` holds, checked: a file may come from anywhere, and every view takes its facts on trust.

    Raises:
        LuthierError: the file cannot be read, or holds what no run writes.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and facts.get("status") == "running":
            facts |= _under_way(path.parent)
        _Facts.model_validate(facts)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(piece) for piece in first["loc"])
        what, _ = explain(first)
        raise LuthierError(f"this run is damaged: {what}", where=f"{path}: {place}" if place else str(path), fix=_AGAIN) from None
    except (OSError, ValueError, RecursionError) as error:
        raise LuthierError(f"this run cannot be read: {error}", where=str(path), fix=_AGAIN) from None
    checked: dict[str, Any] = facts
    return checked


def _under_way(folder: Path) -> dict[str, Any]:
    """What a run does not write into its facts while it trains: whether its process still lives, and the steps it has taken."""
    status = CRASHED if holder(folder) is None else "running"
    try:
        lines = (folder / STEPS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return {"status": status, "history": [step for line in lines if (step := _step(line)) is not None]}


def _step(line: str) -> dict[str, Any] | None:
    """A line of the log of steps; None for half a line, as a kill leaves it."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


class _Checked(BaseModel):
    """A part of `run.json` as every view expects it; keys that no view reads may hold anything."""

    model_config = ConfigDict(strict=True, protected_namespaces=())


_Interval = Annotated[list[float | None], Field(min_length=2, max_length=2)] | None


class _Item(_Checked):
    before_score: float | None = None
    after_score: float | None = None


class _Metric(_Checked):
    metric: str | None = None
    n: int | None = None
    before: float | None = None
    before_interval: _Interval = None
    after: float | None = None
    after_interval: _Interval = None
    difference: float | None = None
    difference_interval: _Interval = None
    kept: float | None = None
    items: list[_Item] | None = None


class _Line(_Checked):
    step: int
    loss: float | None = None


class _Evaluated(_Checked):
    max_new_tokens: int | None = None


class _Recipe(_Checked):
    evaluate: dict[str, _Evaluated | None] | None = None
    train: dict[str, Any] | None = None


class _Seen(_Checked):
    id: str
    tokens: int
    labels: int
    pieces: list[Annotated[list[str | bool], Field(min_length=2, max_length=2)]]
    left_out: int


class _Rows(_Checked):
    overlap: dict[str, int] | None = None
    seen: list[_Seen] | None = None


class _Batch(_Checked):
    rows: float | None = None
    tokens: float | None = None
    micro_batch_tokens: int | None = None


class _Delta(_Checked):
    relative: float | None = None
    changed_share: float | None = None


class _Facts(_Checked):
    recipe: _Recipe | None = None
    rows: _Rows | None = None
    metrics: dict[str, _Metric | None] | None = None
    noise: dict[str, float | None] | None = None
    history: list[_Line] | None = None
    delta: _Delta | None = None
    warnings: list[str] | None = None
    kept: float | None = None
    inputs: dict[str, str] | None = None
    planned_steps: int | None = None
    trained_parameters: int | None = None
    total_parameters: int | None = None
    learning_rate: float | None = None
    learning_rate_from: str | None = None
    batch: _Batch | None = None
    ranks: dict[str, int] | None = None
    measuring_seconds: float | None = None
    seconds: float | None = None
    supervised_tokens: int | None = None
    supervised_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    final_loss: float | None = None
