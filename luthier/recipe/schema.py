"""The recipe: one strict, frozen schema for a whole run. An unknown key is an error that offers the nearest name.

The keys of `luthier.registry.KEYS` hold a technique's name, `{name: {option: value}}`, a list of either, or in Python a part itself.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from luthier.errors import LuthierError, explain, nearest, refuse_truth
from luthier.kinds import Combine
from luthier.recipe.model_key import with_model_spread
from luthier.registry import NOTHING, fields_under
from luthier.registry.foreign import find, hint

GIVEN_IN_PYTHON = "given in Python>"
"""How plain data ends that stands for a value no file can hold."""


VALIDATION = "validation"
"""The evaluation set of rows that are held out of the training rows."""


class Strict(BaseModel):
    """Frozen, with no keys but its own."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_truth(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_truth(value, cls.model_fields[str(info.field_name)].annotation)
        return value


def _techniques(section: str, body: dict[str, Any]) -> None:
    """Put the keys of a section that hold techniques into the body of its class, in the place where this is called."""
    for name, key in fields_under(section):
        body["__annotations__"][name] = Any
        body[name] = Field(key.default, description=key.meaning)


def _source_of_rows(value: Any) -> Any:
    """Refuse at its key what rows can never be read from; everything else is told when it is read."""
    several = value if isinstance(value, list | tuple) and value else [value]
    for one in several:
        nothing = isinstance(one, str | list | tuple) and not one
        strange = _of_other_tools(one)
        if strange:
            fix = "write the source itself: a file, a folder, a pattern, `hub:NAME`"
            fix = fix if strange == "path" else hint(strange, "rows")
            raise LuthierError(f"a source of rows has no key `{strange}`", where="rows.train", fix=fix)
        if nothing or isinstance(one, bytes) or not isinstance(one, str | Path | Iterable):
            raise ValueError("rows are read from a file, a folder, `hub:name`, or a list of these")
    return value


def _rows_or_none(value: Any) -> Any:
    return value if value is None else _source_of_rows(value)


def _of_other_tools(one: Any) -> str:
    """The first key by which other tools describe a source, where a mapping does so; empty where it is a row."""
    if not isinstance(one, Mapping) or not {"path", "rows"} & set(one):
        return ""
    strange = [str(key) for key in one if key not in SourceRecipe.model_fields]
    return strange[0] if strange and all(map(find, strange)) else ""


def _metric(value: Any) -> Any:
    """Refuse at its key what names no metric; which there are is told where it is looked up."""
    if value is not None and not isinstance(value, str | Mapping) and not callable(value):
        raise ValueError("a metric is its name, {name: {option: value}}, or a function in Python")
    return value


def _named_columns(value: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Refuse keys and columns without a name."""
    if value and not all(name.strip() for pair in value.items() for name in pair):
        raise ValueError("a key and a column, such as {prompt: question}")
    return value


def _amount_or_rows(value: Any) -> Any:
    """Refuse what is neither a share, a number of rows, nor rows."""
    if value is None or not isinstance(value, int | float):
        return value if value is None else _source_of_rows(value)
    if isinstance(value, bool) or (value < 1 if isinstance(value, int) else not 0 < value < 1):
        raise ValueError("a share above 0 and below 1, such as 0.1, a whole number of rows, or rows as under rows.train")
    return value


class SourceRecipe(Strict):
    """One of several sources of rows."""

    rows: Any = Field(description="a file, a folder, `hub:name`, or rows in Python")
    weight: float | None = Field(None, gt=0, description="what its share is proportional to; none: 1 where another has one")
    columns: Mapping[str, str] | None = Field(None, description="by key, this source's own columns, instead of rows.columns")

    _check_rows = field_validator("rows", mode="before")(_source_of_rows)
    _check_columns = field_validator("columns", mode="after")(_named_columns)


def _weighted(value: Any) -> Any:
    """A list in which anything has the form `{rows: ..., weight: ...}` is one of sources."""
    keys = set(SourceRecipe.model_fields)
    if not isinstance(value, list | tuple) or not any(
        isinstance(one, Mapping) and "rows" in one and set(one) <= keys for one in value
    ):
        return value
    return [_source(one, f"rows.train, source {number}") for number, one in enumerate(value, start=1)]


def _source(value: Any, where: str) -> SourceRecipe:
    data = value if isinstance(value, Mapping) else {"rows": value}
    for key in data:
        if key not in SourceRecipe.model_fields:
            fix = hint(str(key), "", SourceRecipe.model_fields) or nearest(str(key), SourceRecipe.model_fields)
            raise LuthierError(f"there is no key `{key}` here", where=where, fix=fix)
    try:
        return SourceRecipe.model_validate(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        what, fix = explain(first)
        raise LuthierError(f"`{first['loc'][0]}` is {what}", where=where, fix=fix) from None


class BlocksRecipe(Strict):
    """How documents are split."""

    tokens: int | None = Field(None, ge=4, description="most tokens of a block; none: of a row")
    overlap: int = Field(0, ge=0, description="tokens of the block before that a block begins with, which are read and no labels")
    at: Literal["paragraph", "sentence", "token"] = Field("paragraph", description="the largest part of a text that stays whole")


def _told_date(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a chat template, with dates as text, which is what templates take and recipes keep."""
    told = {str(key): value.isoformat() if isinstance(value, date) else value for key, value in options.items()}
    try:
        datetime.fromisoformat(told.get("date", "2026-01-01"))
        json.dumps(told)
    except (TypeError, ValueError) as problem:
        raise ValueError("text, numbers, lists and mappings, and a date such as 2026-01-31") from problem
    return told


# A method of pydantic's first version, which warns of its own going, has the name of a key.
warnings.filterwarnings("ignore", 'Field name "validate" in "RowsRecipe" shadows', UserWarning)


class RowsRecipe(Strict):
    """What to train on."""

    train: Any = Field(
        description="a file, a folder, `hub:name`, a list of these or of `{rows, weight, columns}`, or rows in Python"
    )
    validate: Any = Field(
        None, description="held out and measured as `validation`: a share of the rows, a number of them, or rows of their own"
    )
    validate_by: str | None = Field(None, min_length=1, description="a column whose rows of one value are held out together")
    temperature: float = Field(1.0, gt=0, description="T: without weights, a source's share is proportional to size^(1/T)")
    mixture_unit: Literal["rows", "tokens"] = Field("rows", description="what shares of sources count")
    streaming: bool = Field(False, description="keep encoded rows in a file instead of in memory")
    workers: int = Field(0, ge=0, description="processes that encode rows when streaming; 0: the run's own")
    columns: Mapping[str, str] | None = Field(
        None, description="by key of a row, the column that holds it, such as `{prompt: question, completion: reply}`"
    )
    format: str | None = Field(None, description="the rows' format, where it cannot be recognized")
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="one of the tokenizer's chat templates, by name, a FILE.jinja, or `chatml`; none: its default",
    )
    thinking: Literal["keep", "last", "drop"] = Field(
        "keep", description="reasoning in assistant turns: keep all, that of the last turn alone, or drop it"
    )
    chat_template_options: Mapping[str, Any] = Field(
        default_factory=dict, description="variables of the chat template; `date: YYYY-MM-DD` is also what its clock says"
    )
    blocks: BlocksRecipe | None = Field(None, description="split rows of `text` into blocks; none: they are left whole")
    _techniques("rows", vars())
    loss_on: Literal["assistant", "last", "all"] = Field("assistant", description="which turns are labels, the tokens with loss")
    max_length: int | None = Field(None, ge=2, description="longest row; none: the model's context")
    too_long: Literal["refuse", "left", "right"] = Field("refuse", description="refuse long rows, or cut this side")
    on_bad_row: Literal["stop", "skip"] = Field("stop", description="stop at a bad row, or skip and count it")
    stored: str | list[str] | None = Field(
        None, description="folders of `luthier rows store`, where they do not lie beside the rows; or of another model on purpose"
    )

    @field_validator("chat_template_options", mode="before")
    @classmethod
    def _check_options(cls, value: Any) -> Any:
        return _told_date(value) if isinstance(value, Mapping) else value

    _check_columns = field_validator("columns", mode="after")(_named_columns)
    _check_validate = field_validator("validate", mode="before")(_amount_or_rows)
    _check_train = field_validator("train", mode="before")(_source_of_rows)
    _check_weights = field_validator("train", mode="after")(_weighted)

    @model_validator(mode="after")
    def _check_together(self) -> RowsRecipe:
        if self.temperature != 1.0 and any(source.weight is not None for source in self.sources()):
            raise LuthierError(
                "the sources have weights, and a temperature makes others",
                where="rows.temperature",
                fix="leave out one of the two",
            )
        if self.validate_by is not None and not isinstance(self.validate, int | float):
            raise LuthierError(
                "no rows are drawn that could stay together",
                where="rows.validate_by",
                fix="leave it out, or hold out a share of the rows: rows.validate: 0.1",
            )
        if self.workers and not self.streaming:
            raise LuthierError(
                "workers encode rows into a file, and nothing is streamed", where="rows.workers", fix="set rows.streaming: true"
            )
        return self

    def stores(self) -> list[str]:
        """The folders of stored outputs that are named."""
        return [self.stored] if isinstance(self.stored, str) else list(self.stored or ())

    def sources(self) -> list[SourceRecipe]:
        """The sources one by one, each with the columns that it is read with."""
        several = isinstance(self.train, list) and self.train and not isinstance(self.train[0], Mapping)
        found = [
            one if isinstance(one, SourceRecipe) else SourceRecipe(rows=one) for one in (self.train if several else [self.train])
        ]
        return [one.model_copy(update={"columns": self.columns}) if one.columns is None else one for one in found]


class TrainRecipe(Strict):
    """How to step."""

    epochs: float = Field(3.0, gt=0, description="passes over the rows; ignored when `steps` is given")
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    batch_tokens: int = Field(2048, ge=1, description="most real tokens of one optimizer step, over all processes")
    batch_rows: int | None = Field(None, ge=1, description="rows of one optimizer step, instead of batch_tokens")
    micro_batch_tokens: int = Field(2048, ge=1, description="most tokens of one forward pass, with padding if any")
    learning_rate: float | None = Field(None, gt=0, description="none: what the technique under `tune` recommends")
    schedule: str = Field("cosine", description="constant, linear, cosine or warmup_stable_decay")
    warmup: float = Field(0.03, ge=0, description="warm-up: a share of the steps below 1, or a number of steps")
    precision: Literal["auto", "bf16", "fp32", "fp64"] = Field("auto", description="type of weights and computation")
    master_weights: Literal["fp32", "none"] = Field("fp32", description="fp32 master weights of trained parameters, or none")
    device: str = Field("auto", description="cuda, mps, cpu or auto")
    threads: int | None = Field(None, ge=1, description="processor threads; none: torch's choice")
    sharding: Literal["none", "full"] = Field("none", description="spread the model over the processes (FSDP2), or not")
    packing: bool | Literal["auto"] = Field("auto", description="run rows without padding; auto: where the model can")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory, more time")
    compile: bool = Field(False, description="compile the blocks with torch.compile")
    save_every: int | None = Field(None, ge=1, description="optimizer steps between checkpoints; none: only when stopped")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept")
    evaluate_every: int | None = Field(None, ge=1, description="optimizer steps between evaluations")
    best: str | None = Field(None, description="keep the weights at which this evaluation set was best")
    patience: int | None = Field(None, ge=1, description="stop after so many evaluations without a better one")


_OF_ROWS = ("columns", "max_new_tokens", "combine", "deviations")
_OF_TASKS = ("num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "gen_kwargs", "include_path")


class EvaluationSet(Strict):
    """One set that is measured before and after: rows, or tasks of the LM Evaluation Harness."""

    rows: Any = Field(None, description="a file, or rows in Python; or else `tasks`")
    tasks: tuple[str, ...] = Field((), description="tasks of the LM Evaluation Harness, instead of rows, such as [gsm8k, ifeval]")
    columns: Mapping[str, str] | None = Field(
        None, description="by key, the set's own columns; none: those of rows.columns, where the set has all of them"
    )
    metric: Any = Field(
        None,
        description="a metric, `{metric: {option: value}}`, or a function in Python; none: chosen by the rows' format. Of tasks: one of "
        "their own, such as `exact_match,strict-match`; none: the first that is a mean over items",
    )
    role: Literal["target", "retention"] = Field("target", description="what training should teach, or should leave alone")
    max_new_tokens: int = Field(48, ge=1, description="longest answer generated")
    limit: int | None = Field(None, ge=1, description="most rows used, from the start; of tasks: of each")
    num_fewshot: int | None = Field(None, ge=0, description="of tasks: examples before each question; none: the task's own number")
    apply_chat_template: bool | None = Field(None, description="of tasks: write prompts with the chat template; none: as text")
    fewshot_as_multiturn: bool | None = Field(
        None, description="of tasks with the chat template: each example is a turn of its own, or not; none: it is"
    )
    gen_kwargs: Mapping[str, Any] = Field(
        default_factory=dict, description="of tasks: options of generation over the task's own, such as {max_gen_toks: 512}"
    )
    include_path: str | None = Field(None, min_length=1, description="of tasks: a folder with YAML files of more of them")
    combine: Combine | None = Field(None, description="of a reward model's members: how their scores become one; none: mean")
    deviations: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="with mean_minus_deviation: how many deviations are subtracted; none: 1"
    )

    _check_columns = field_validator("columns", mode="after")(_named_columns)
    _check_rows = field_validator("rows", mode="before")(_rows_or_none)
    _check_metric = field_validator("metric", mode="before")(_metric)

    def check(self, place: str) -> None:
        """Refuse keys that do not go together.

        Args:
            place: the set's own key, for errors.

        Raises:
            LuthierError: it has neither rows nor tasks or both, or a key of the other kind.
        """
        if (self.rows is None) == (not self.tasks):
            what = "a set has either rows or tasks" + ("" if self.rows is None else ", and this one has both")
            fix = "write rows and a file, or tasks: [NAME] of the LM Evaluation Harness"
            raise LuthierError(what, where=f"{place}.rows", fix=fix)
        given = self.model_fields_set
        lost = [key for key in (_OF_ROWS if self.tasks else _OF_TASKS) if key in given and getattr(self, key) != _default_of(key)]
        if lost:
            what = f"`{lost[0]}` is for {'rows' if self.tasks else 'tasks'}, and this set has {'tasks' if self.tasks else 'rows'}"
            fix = "write gen_kwargs: {max_gen_toks: NUMBER}" if lost[0] == "max_new_tokens" else "leave it out"
            raise LuthierError(what, where=f"{place}.{lost[0]}", fix=fix)
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            what = "examples are turns of their own only where prompts are written with the chat template"
            fix = "add apply_chat_template: true, or leave it out"
            raise LuthierError(what, where=f"{place}.fewshot_as_multiturn", fix=fix)


def _default_of(key: str) -> Any:
    return EvaluationSet.model_fields[key].get_default(call_default_factory=True)


def by_task(sets: Mapping[str, EvaluationSet]) -> dict[str, EvaluationSet]:
    """Evaluation sets, those of several tasks one for each: `NAME/TASK`."""
    found: dict[str, EvaluationSet] = {}
    for name, one in sets.items():
        several = {f"{name}/{task}": one.model_copy(update={"tasks": (task,)}) for task in one.tasks}
        found |= several if len(several) > 1 else {name: one}
    return found


class Recipe(Strict):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="names the run's folder")
    model: str = Field(min_length=1, description="a hub name, a folder, a GGUF file or a short name")
    revision: str | None = Field(None, description="a revision of a hub model")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    add_tokens: tuple[str, ...] = Field(
        (), description="texts that become one token each, whose rows train; also `model: {name: MODEL, add_tokens: [...]}`"
    )
    quantize: Literal["none", "int8", "nf4"] = Field("none", description="hold the frozen matrices of the blocks in 8 or 4 bits")
    models: Mapping[str, str] = Field(
        default_factory=dict, description="other models or runs that techniques ask for, by name, such as `teacher`"
    )
    seed: int = Field(0, ge=0, description="every random draw of the run follows from it")
    rows: RowsRecipe
    _techniques("", vars())
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    evaluate: Mapping[str, EvaluationSet] = Field(default_factory=dict, description="sets measured before and after")
    repeat_baseline: bool = Field(True, description="measure the base, or a part of it, again: what repeating alone changes")
    track: list[str] | str | None = Field(None, description="also show the run in tensorboard, trackio or wandb")
    out: str = Field("runs", min_length=1, description="folder that holds the run folders")
    baseline_run: str | None = Field(None, description="a run to compare this one with, or a recipe: its newest finished run")

    @model_validator(mode="before")
    @classmethod
    def _spread_model(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = with_model_spread(data, cls.model_fields)
        # Rows of new tokens train beside whatever is named, and alone where nothing is.
        return {"tune": NOTHING, **data} if data.get("add_tokens") else data

    @field_validator("add_tokens", mode="before")
    @classmethod
    def _check_tokens(cls, value: Any) -> Any:
        tokens = [value] if isinstance(value, str) else value
        if not isinstance(tokens, list | tuple) or not all(isinstance(one, str) and one.strip() for one in tokens):
            raise ValueError("a list of texts that are to be tokens, such as [<think>, </think>]")
        twice = [one for one in dict.fromkeys(tokens) if tokens.count(one) > 1]
        if twice:
            raise ValueError(f"texts that differ: `{twice[0]}` stands here twice")
        return tuple(tokens)

    @field_validator("models", mode="after")
    @classmethod
    def _check_models(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name, model in value.items():
            if not name.isidentifier() or not model:
                raise LuthierError(
                    f"`{name}: {model}` names no model",
                    where="models",
                    fix="write a name of letters, digits and _ and what it stands for, e.g. models: {teacher: runs/large-1}",
                )
        return value

    @model_validator(mode="after")
    def _check_quantize(self) -> Recipe:
        if self.quantize != "none" and self.train.sharding != "none":
            raise LuthierError(
                "codes of quantized weights are not spread over processes",
                where="quantize",
                fix="use train.sharding: none, where each process holds them, or quantize: none",
            )
        return self

    @model_validator(mode="after")
    def _check_sets(self) -> Recipe:
        for name, one in self.evaluate.items():
            one.check(f"evaluate.{name}")
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> Recipe:
        if self.rows.validate is not None and VALIDATION in self.evaluate:
            raise LuthierError(
                f"rows.validate makes an evaluation set `{VALIDATION}`, and there is another of this name",
                where=f"evaluate.{VALIDATION}",
                fix="give it another name, or leave rows.validate out",
            )
        return self

    def measured(self) -> dict[str, EvaluationSet]:
        """The sets that a run measures, by name: that of held-out rows first, then those under `evaluate`."""
        own = {} if self.rows.validate is None else {VALIDATION: EvaluationSet(rows=VALIDATION)}
        return {**own, **by_task(self.evaluate)}

    def as_plain(self) -> dict[str, Any]:
        """The recipe as plain data; parts given in Python appear by name and options."""
        found: dict[str, Any] = plain(self)
        return found

    def hash(self) -> str:
        """Identifies what the recipe asks for: equal for recipes that differ only in spelling."""
        return hashlib.sha256(json.dumps(self.as_plain(), sort_keys=True).encode()).hexdigest()[:12]

    def as_yaml(self) -> str:
        """The whole recipe with all defaults, as YAML."""
        return yaml.safe_dump(self.as_plain(), sort_keys=False, allow_unicode=True, width=100)


def plain(value: Any) -> Any:
    """A value as plain data; parts given in Python appear by name and options."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "options") and hasattr(value, "kind"):
        return {value.name: plain(value.options)}
    if hasattr(value, "_fields"):
        return f"<{type(value).__name__} {GIVEN_IN_PYTHON}"
    if isinstance(value, Sequence):
        if len(value) > 100:
            return f"<{len(value)} rows {GIVEN_IN_PYTHON}"
        return [plain(one) for one in value]
    return f"<{type(value).__name__} {GIVEN_IN_PYTHON}"


NO_TASKS: Mapping[str, Any] = {key: plain(_default_of(key)) for key in ("tasks", *_OF_TASKS)}
"""What a set of rows says of tasks, as plain data."""


def section_of(annotation: Any) -> type[Strict] | None:
    """Which of the recipe's own sections an annotation is, maybe one that can be left out; None where it is none."""
    # Before Python 3.11 `list[str]` counts as a type, and as none that could be a subclass.
    plain_kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and get_origin(kind) is None]
    kinds = [kind for kind in plain_kinds if issubclass(kind, Strict)]
    return kinds[0] if len(kinds) == 1 else None
