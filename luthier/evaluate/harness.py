"""Tasks of the language model evaluation harness (lm-eval): which there are, their data, and what a model reaches on each of their items.

A task asks its questions in its own words, with its own examples before them, and judges answers by its own rule. The model is luthier's,
in memory, with whatever is attached to it: see `luthier.evaluate.harness_model`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from luthier import machine
from luthier.errors import LuthierError, nearest
from luthier.evaluate.harness_items import Main, asked_of, items_of, main_of, row_of, values_of
from luthier.models.head import head_of
from luthier.models.modes import evaluating
from luthier.recipe import EvaluationSet
from luthier.rows.shapes import Row
from luthier.tune import Tune

if TYPE_CHECKING:
    from luthier.evaluate.items import Item

SEEDS = (0, 1234, 1234, 1234)
"""Of Python, NumPy, torch and the examples before a question, as the harness sets them."""
_EXTRAS = 'install it: pip install "lm-eval[ifeval,math]" has what many tasks need'


class Benchmark(NamedTuple):
    """One task of the harness, or a group of tasks with a value of its own, ready to be asked."""

    name: str
    tasks: Mapping[str, Any]
    """The harness's tasks, by name."""
    group: Any
    """The harness's group; None for a task."""
    main: Main
    rows: Sequence[Row]
    """What is asked, without the examples before it, and the right answer."""
    options: Mapping[str, Any]
    """What the recipe asks for, with the harness's defaults where it is silent."""

    def check(self, tune: Tune, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find what would stop `measured`, without running the model.

        Raises:
            LuthierError: the model predicts no tokens, there is no chat template where one is asked for, or answers leave no room.
        """
        from luthier.evaluate.harness_model import HarnessModel, decoding_of

        head_of(tune.model, tune.parts)
        if self.options["apply_chat_template"] and not tokenizer.chat_template:
            raise LuthierError(
                "the tokenizer has no chat template",
                where="apply_chat_template",
                fix="leave apply_chat_template out, or use a chat model",
            )
        longest = HarnessModel(tune, tokenizer, batch_tokens=1, chat=False).max_length
        for name, task in self.tasks.items():
            if _output(task) == "generate_until":
                decoding = decoding_of(task.get_config("generation_kwargs") or {}, name)
                if decoding.max_new_tokens >= longest:
                    what = f"answers of up to {decoding.max_new_tokens} tokens leave no room in the model's context of {longest}"
                    raise LuthierError(what, where=name, fix="set gen_kwargs: {max_gen_toks: NUMBER}")

    def measured(
        self, tune: Tune, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, batch_tokens: int
    ) -> tuple[list[Item], Any, dict[str, Any]]:
        """The items of some of the rows, what was asked, and what reports tell beside them.

        Raises:
            LuthierError: the task cannot be run on this model.
        """
        from luthier.evaluate.harness_model import HarnessModel

        chat = bool(self.options["apply_chat_template"])
        model = HarnessModel(tune, tokenizer, batch_tokens=batch_tokens, chat=chat)
        wanted: dict[str, list[int]] = {}
        for row in rows:
            task, _, number = row.id.rpartition("/")
            wanted.setdefault(task, []).append(int(number))
        tasks = {name: self.tasks[name] for name in wanted}
        part = {"limit": self.options["limit"]} if len(rows) == len(self.rows) else {"samples": wanted}
        with _quiet(), evaluating(tune.model), _seeded():
            for task in tasks.values():
                task.set_fewshot_seed(SEEDS[3])
            try:
                found = _installed().evaluator.evaluate(
                    lm=model,
                    task_dict={"tasks": tasks, "groups": {} if self.group is None else {self.group.name: self.group}},
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=bool(self.options["fewshot_as_multiturn"]),
                    **part,
                )
            except LuthierError:
                raise
            # A task's own code raises whatever it stumbles over.
            except Exception as error:
                what = f"the harness cannot run this: {type(error).__name__}: {error}"
                raise LuthierError(what, where=self.name, fix="check the task's file, and its data") from error
        samples = {name: [one for one in found["samples"][name] if one["filter"] == self.main.filter] for name in tasks}
        items = items_of(self.main, {name: (_output(task), task) for name, task in tasks.items()}, samples, self._equal)
        values = values_of(found["results"], [*([] if self.group is None else [self.group.name]), *tasks])
        self.main.check(items, values[next(iter(values))])
        told = {"benchmark": {**self.told(), "values": values, "notes": dict(model.notes)}}
        return items, asked_of(samples), told if self.main.higher_is_better else {**told, "higher_is_better": False}

    @property
    def _equal(self) -> bool:
        """Whether each task counts the same in a group's value, whatever its size."""
        if self.group is None:
            return False
        return not next(one for one in self.group.aggregate_metric_list if one.metric == self.main.metric).weight_by_size

    def told(self) -> dict[str, Any]:
        """What decides the questions and the scores, as plain data."""
        tasks = {
            name: {
                "version": _plain(task.VERSION),
                "dataset_path": task.DATASET_PATH,
                "dataset_name": task.DATASET_NAME,
                "output_type": _output(task),
                "num_fewshot": task.get_config("num_fewshot") or 0,
                "generation_kwargs": _plain(task.get_config("generation_kwargs")) if _output(task) == "generate_until" else None,
                "repeats": task.get_config("repeats") or 1,
                "items": sum(row.id.rpartition("/")[0] == name for row in self.rows),
            }
            for name, task in self.tasks.items()
        }
        version = metadata.version("lm_eval")
        return {
            "name": self.name,
            "harness": version,
            "metric": self.main.key,
            "chosen": self.main.chosen,
            **self.options,
            "tasks": tasks,
        }

    @property
    def identity(self) -> str:
        """All of that and the tasks' files as text, with the code that they name."""
        files = {name: _plain(task.dump_config()) for name, task in self.tasks.items()}
        for one in files.values():
            # Where it lies changes nothing.
            (one.get("metadata") or {}).pop("config_source", None)
        return json.dumps([self.told(), files], sort_keys=True, default=str)

    @property
    def described(self) -> str:
        """In a line."""
        told = self.told()["tasks"].values()
        shots = "/".join(dict.fromkeys(f"{one['num_fewshot']}-shot" for one in told))
        versions = "/".join(dict.fromkeys(f"version {one['version']}" for one in told))
        tasks = f"{len(self.tasks)} tasks, " if self.group is not None else ""
        chat = ", with the chat template" if self.options["apply_chat_template"] else ""
        return f"{self.name}: {tasks}{len(self.rows):,} items, {self.main.key}, {shots}, {versions}{chat}"


def benchmarks(sets: Mapping[str, EvaluationSet]) -> dict[str, Benchmark]:
    """The tasks that evaluation sets name, with their data.

    A group that says how its tasks' values become one is one set; a tag, or a group that does not, is one for each task.

    Args:
        sets: by name, each with one task, group or tag.

    Returns:
        By the name of a set, or by `NAME/TASK` where one becomes several.

    Raises:
        LuthierError: the harness is not installed, there is no such task, its data is not on this machine and cannot be fetched, or an
            option is not for it.
    """
    found: dict[str, Benchmark] = {}
    missing: dict[str, list[str]] = {}
    reason = ""
    for name, one in sets.items():
        ((task,), where) = one.tasks, f"evaluate.{name}"
        manager = _manager(one.include_path)
        _check_known(task, manager.all_tasks, one.include_path, f"{where}.tasks")
        try:
            with _quiet(), _seeded():
                loaded = manager.load([task])
        except ImportError as error:
            raise LuthierError(f"the task `{task}` needs a package: {error}", where=f"{where}.tasks", fix=_EXTRAS) from error
        except Exception as error:
            if not _is_of_data(error):
                what = f"the harness cannot load the task `{task}`: {type(error).__name__}: {error}"
                raise LuthierError(what, where=f"{where}.tasks", fix="check the task's file, and its data") from error
            reason = reason or " ".join(f"{type(error).__name__}: {error}".split())[:200]
            missing[task] = _datasets(manager, task)
            continue
        found |= _of_set(name, one, task, loaded, where)
    if missing:
        names = list(dict.fromkeys(name for each in missing.values() for name in each))
        raise LuthierError(
            f"the data of {', '.join(missing)} is not on this machine and cannot be fetched ({reason})",
            where="evaluate",
            fix=f"fetch these data sets from the hub once, with a connection: {', '.join(names)}; then they are found without one",
        )
    return found


def _of_set(name: str, one: EvaluationSet, task: str, loaded: Mapping[str, Any], where: str) -> dict[str, Benchmark]:
    tasks: dict[str, Any] = dict(loaded["tasks"])
    group = (loaded.get("groups") or {}).get(task)
    for task_name, each in tasks.items():
        _check_safe(task_name, each, where)
    _set_options(tasks, one, where)
    options = {
        "num_fewshot": one.num_fewshot,
        "apply_chat_template": bool(one.apply_chat_template),
        # The harness's own default.
        "fewshot_as_multiturn": bool(one.apply_chat_template) if one.fewshot_as_multiturn is None else one.fewshot_as_multiturn,
        "gen_kwargs": dict(one.gen_kwargs),
        "limit": one.limit,
        "include_path": one.include_path,
    }
    whole = group is not None and group.has_aggregation
    parts = {task: (tasks, group)} if whole else {each: ({each: tasks[each]}, None) for each in tasks}
    made = {}
    for part, (mine, its_group) in parts.items():
        main = main_of(mine, its_group, one.metric, where)
        rows = [row_of(each, mine[each], number, doc) for each in mine for number, doc in mine[each].doc_iterator(limit=one.limit)]
        made[name if len(parts) == 1 else f"{name}/{part}"] = Benchmark(part, mine, its_group, main, rows, options)
    return made


def _set_options(tasks: Mapping[str, Any], one: EvaluationSet, where: str) -> None:
    """Change the tasks as a recipe says. What would do nothing is refused by name."""
    for name, task in tasks.items():
        own, output = task.get_config("num_fewshot"), _output(task)
        if one.num_fewshot is not None and own == 0 != one.num_fewshot:
            what = f"`{name}` says that nothing stands before its questions (num_fewshot: 0), and takes no other number"
            raise LuthierError(what, where=f"{where}.num_fewshot", fix="leave num_fewshot out")
        if output == "loglikelihood_rolling":
            for key, value in (("num_fewshot", one.num_fewshot), ("apply_chat_template", one.apply_chat_template)):
                if value:
                    what = f"`{name}` measures the likelihood of whole texts, and `{key}` is not for it"
                    raise LuthierError(what, where=f"{where}.{key}", fix="leave it out")
        task.set_config(key="num_fewshot", value=(own or 0) if one.num_fewshot is None else one.num_fewshot)
        if one.gen_kwargs and output == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(one.gen_kwargs), update=True)
    if one.gen_kwargs and not any(_output(task) == "generate_until" for task in tasks.values()):
        what = f"{', '.join(tasks)}: nothing is generated, and `gen_kwargs` are of generation"
        raise LuthierError(what, where=f"{where}.gen_kwargs", fix="leave gen_kwargs out")


def _check_safe(name: str, task: Any, where: str) -> None:
    """Refuse tasks that run what a model wrote, or need more than text."""
    if getattr(task, "UNSAFE_CODE", False):
        what = f"`{name}` runs code that the model writes, on this machine"
        raise LuthierError(what, where=f"{where}.tasks", fix="export the model, and run this task where nothing can be harmed")
    if getattr(task, "MULTIMODAL", False):
        raise LuthierError(f"`{name}` shows pictures or sounds", where=f"{where}.tasks", fix="name tasks of text alone")


def _output(task: Any) -> str:
    return str(task.get_config("output_type") or task.OUTPUT_TYPE)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _installed() -> ModuleType:
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise LuthierError(
            f"the evaluation harness is not installed ({error})", where="harness", fix='pip install "luthier[lm-eval]"'
        ) from error
    module: ModuleType = lm_eval
    return module


def _manager(folder: str | None) -> Any:
    """Which tasks there are: the harness's own, and those of a folder."""
    module = _installed()
    # Reading the thousands of files takes seconds.
    manager = _manager_of(module)
    if folder is None:
        return manager
    with _quiet():
        mine = module.tasks.TaskManager(include_path=folder, include_defaults=False)
    mine._index = {**manager.task_index, **mine.task_index}
    mine._all_tasks = sorted(mine._index)
    return mine


@functools.cache
def _manager_of(module: ModuleType) -> Any:
    with _quiet():
        return module.tasks.TaskManager()


def _check_known(task: str, known: Sequence[str], folder: str | None, where: str) -> None:
    if task not in known:
        beside = "" if folder is None else f" nor in {folder}"
        fix = nearest(task, known) or "name a task of the harness, or the folder of one of your own: include_path: FOLDER"
        raise LuthierError(f"there is no task `{task}` in the harness{beside}", where=where, fix=fix)


def _datasets(manager: Any, name: str) -> list[str]:
    """The data sets of a task, or of all tasks of a group or a tag, as the hub names them."""
    entry = manager.task_index.get(name)
    if entry is None:
        return []
    config = entry.cfg or {}
    inner = sorted(entry.tags) if config == {} else config.get("task")
    if isinstance(inner, list):
        found = [_datasets(manager, one if isinstance(one, str) else str(one.get("task") or one.get("group"))) for one in inner]
        return list(dict.fromkeys(one for each in found for one in each))
    path, subset = config.get("dataset_path"), config.get("dataset_name")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if path is None:
        return [f"the data of {name}"]
    return [f"{path} ({subset})" if subset else f"{path} of {files}" if files else str(path)]


_OF_DATA = (
    "ConnectionError",
    "OfflineModeIsEnabled",
    "DatasetNotFoundError",
    "LocalEntryNotFoundError",
    "HfHubHTTPError",
    "HTTPError",
)


def _is_of_data(error: BaseException | None) -> bool:
    """Whether data could not be had, by an error or one that it came from."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & set(_OF_DATA) or isinstance(error, ConnectionError | FileNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """With the harness's seeds; the caller's generators then go on as if nothing had been."""
    import torch

    python, numbers = random.getstate(), np.random.get_state()
    try:
        with machine.as_found():
            random.seed(SEEDS[0])
            np.random.seed(SEEDS[1])
            torch.manual_seed(SEEDS[2])
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log lines and progress bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
