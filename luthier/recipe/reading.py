"""Reading recipes: files, overrides from the command line, and errors that name the place and the nearest key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from luthier.errors import LuthierError, explain, nearest
from luthier.recipe.model_key import ADD_TOKENS, with_model_spread
from luthier.recipe.parts import spelled_out
from luthier.recipe.paths import with_paths
from luthier.recipe.schema import NO_TASKS, EvaluationSet, Recipe, Strict, plain, section_of
from luthier.recipe.yaml_text import parse, read_yaml
from luthier.registry import KEYS, NOTHING, check_names
from luthier.registry.foreign import hint


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides.

    File names in a recipe are looked up from the working folder first, then from the recipe's own folder.

    Raises:
        LuthierError: no such file, broken YAML (with its line), an unknown key, technique or option (with the nearest name), or a
            wrong type.
    """
    path = Path(path)
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise LuthierError("a recipe is a mapping of keys", where=str(path), fix="begin with `model: ...`")
    data.setdefault("name", path.stem)
    where = f"{path} and the command line" if overrides else str(path)
    recipe = make_recipe(apply_overrides(data, overrides), where=where, folder=path.parent)
    for name, key in KEYS.items():
        check_names(key.of(recipe), name)
    return recipe


def same_steps(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two recipes, as plain data, ask for the same steps: into which micro-batches a step is cut changes the rounding alone,
    and how often checkpoints are saved and how many are kept changes nothing."""
    return not differences(one, other)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys by which two recipes, as plain data, ask for different steps, with what each holds; None where one lacks the key."""
    both = [spelled_out(plain) for plain in (one, other)]
    if not all("techniques" in spelled for spelled in both):
        # What cannot be looked up here is compared as it stands, in both.
        both = [dict(one), dict(other)]
    left, right = (flat(_steps(spelled)) for spelled in both)
    keys = [key for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
    return [(key, left.get(key), right.get(key)) for key in keys]


IN_PYTHON = "recipe"
"""Where a recipe stands that is in no file, for errors."""
_OF_THE_MODEL = {"model.name": "model", f"model.{ADD_TOKENS}": ADD_TOKENS}
"""What stands in `model: {name: ..., add_tokens: ...}`, by the keys that are kept."""
_FREE = ("micro_batch_tokens", "save_every", "keep_checkpoints")
"""Keys under `train` that change no step."""


def _steps(plain: Mapping[str, Any]) -> dict[str, Any]:
    train = {key: value for key, value in (plain.get("train") or {}).items() if key not in _FREE}
    # Runs from before there were trackers, quantized bases, other models, new tokens or named templates say nothing of them, and a
    # tracker changes no step.
    rows = {"chat_template": None, "chat_template_options": {}, "thinking": "keep", "stored": None, **(plain.get("rows") or {})}
    if isinstance(rows.get("train"), Sequence) and not isinstance(rows["train"], str):
        rows["train"] = [_set_keys(one) if isinstance(one, Mapping) else one for one in rows["train"]]
    found = {"quantize": "none", "models": {}, ADD_TOKENS: [], **plain, "rows": rows, "train": train, "track": None}
    sets = found.get("evaluate")
    if isinstance(sets, Mapping):
        # Nor do runs from before there were tasks say which options of tasks they leave alone.
        found["evaluate"] = {name: {**NO_TASKS, **one} if isinstance(one, Mapping) else one for name, one in sets.items()}
    return {key: value for key, value in found.items() if key != "techniques"} | _numbered(plain.get("techniques") or {})


def _set_keys(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if value is not None}


def _numbered(techniques: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Techniques by key, where several stand under one with their places: `step[2]`."""
    found: dict[str, Any] = {}
    for key, parts in techniques.items():
        found |= {f"{key}[{place}]" if len(parts) > 1 else key: part for place, part in enumerate(parts, start=1)}
    return found


def flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain data with whole keys: `train.epochs`."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set keys from `key=value` words: `tune=lora`, `train.epochs=2`, `tune.lora.rank=16`. Values are YAML."""
    data = with_model_spread(json.loads(json.dumps(data, default=str)), Recipe.model_fields) if overrides else data
    for word in overrides:
        key, sign, value = word.partition("=")
        key = _OF_THE_MODEL.get(key, key)
        *path, last = key.split(".")
        if not sign or not all([*path, last]):
            raise LuthierError(f"`{word}` is not key=value", where="command line", fix="write e.g. train.epochs=2")
        try:
            parsed = parse(value)
        # Patterns such as `*.jsonl` are no YAML, and dates such as 2026-99-99 none that YAML can hold: both are text.
        except (yaml.YAMLError, ValueError, RecursionError):
            parsed = value
        here = data
        for depth, step in enumerate(path):
            found = here.get(step)
            here_key = ".".join(path[: depth + 1])
            if isinstance(found, str) and here_key in KEYS:
                # `tune.lora.rank=16` on `tune: lora` turns the name into a mapping.
                name = path[depth + 1] if depth + 1 < len(path) else last
                if found not in (name, NOTHING):
                    fix = f"set all of it: {here_key}={{{name}: {{option: value}}}}"
                    raise LuthierError(f"`{key}` cannot be set: `{here_key}` is `{found}`", where="command line", fix=fix)
                here[step] = {name: {}}
            elif found is None:
                here[step] = {}
            elif not isinstance(found, dict):
                what = "a list" if isinstance(found, list) else f"`{found}`"
                raise LuthierError(
                    f"`{key}` cannot be set: `{step}` is {what}, which has no keys",
                    where="command line",
                    fix="set all of it as YAML: " + ".".join(path[: depth + 1]) + "=...",
                )
            here = here[step]
        if key == "model" and isinstance(parsed, Mapping):
            # The whole key is set anew, with the tokens that stood in it.
            data.pop(ADD_TOKENS, None)
        here[last] = with_numbers(parsed)
    return data


def with_numbers(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text; people mean a number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    if isinstance(value, dict):
        return {key: with_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [with_numbers(one) for one in value]
    return value


def make_recipe(data: Mapping[str, Any], *, where: str = IN_PYTHON, folder: Path | None = None) -> Recipe:
    """A recipe from plain data, strictly.

    Raises:
        LuthierError: an unknown key, with the nearest name, or a wrong type.
    """
    data = {
        key: value if key == "name" else with_numbers(value) for key, value in with_model_spread(data, Recipe.model_fields).items()
    }
    if folder is not None:
        data = with_paths(data, folder)
    try:
        return Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(error, where) from None
    except LuthierError as error:
        # What keys are together knows its key, and not the file.
        place = ": ".join(one for one in (where if where != IN_PYTHON else "", error.where) if one)
        raise LuthierError(error.what, where=place, fix=error.fix) from None


def with_keys(recipe: Recipe, keys: Mapping[str, Any]) -> Recipe:
    """A recipe in which some keys hold something else; the keys of a section are set one by one.

    Raises:
        LuthierError: as `make_recipe`.
    """
    if not keys:
        return recipe

    def merged(section: Strict, new: Mapping[str, Any]) -> dict[str, Any]:
        held = {name: getattr(section, name) for name in section.model_fields_set}
        for name, value in new.items():
            inner = getattr(section, name, None)
            held[name] = merged(inner, value) if isinstance(inner, Strict) and isinstance(value, Mapping) else value
        return held

    return make_recipe(merged(recipe, keys))


WHOLE_FILE = 4
"""Keys of other tools in one recipe from which on it is taken for a file of theirs."""


def _explain(error: pydantic.ValidationError, where: str) -> LuthierError:
    every = error.errors()
    # What another tool calls otherwise explains why its counterpart is missing.
    strange = [one for one in every if one["type"] == "extra_forbidden" and _told(one["loc"])]
    first = strange[0] if strange else every[0]
    path = [str(piece) for piece in first["loc"]]
    place = f"{where}: {'.'.join(path)}"
    if first["type"] == "extra_forbidden":
        fix = _told(first["loc"]) or nearest(path[-1], _known_keys(path[:-1]))
        if len(strange) >= WHOLE_FILE:
            fix += " All of it at once: `luthier convert FILE`"
        return LuthierError(f"there is no key `{path[-1]}` here", where=place, fix=fix)
    if first["type"] == "missing":
        return LuthierError(f"the key `{path[-1]}` is missing", where=place, fix=f"add `{path[-1]}: ...`")
    what, fix = explain(first)
    key = ".".join(["evaluate", "NAME", *path[2:]] if path[:1] == ["evaluate"] and len(path) > 2 else path)
    meaning = {known: meaning for known, _, meaning in reference()}.get(key)
    return LuthierError(f"`{path[-1]}` is {what}", where=place, fix=f"{fix} ({meaning})" if meaning else fix)


def _told(place: Sequence[int | str]) -> str:
    """What another tool's key, an earlier name, or a key that stands elsewhere is here; empty for any other."""
    *path, key = map(str, place)
    section = "evaluate.NAME" if path[:1] == ["evaluate"] else ".".join(path)
    every = dict.fromkeys(name for known, _, _ in reference() for name in (known, known.partition(".")[0]))
    elsewhere = [known for known in every if known.rpartition(".")[2] == key]
    top = " at the top of the recipe" if elsewhere == [key] else ""
    return hint(key, section, _known_keys(path)) or (f"write `{elsewhere[0]}`{top}" if len(elsewhere) == 1 else "")


def _known_keys(path: Sequence[str]) -> list[str]:
    schema: Any = Recipe
    for step in path:
        field = schema.model_fields.get(step)
        if field is None:
            schema = EvaluationSet
            continue
        schema = section_of(field.annotation) or EvaluationSet
    return list(schema.model_fields)


def reference() -> list[tuple[str, str, str]]:
    """Every key with its default and meaning, for help and docs."""
    lines: list[tuple[str, str, str]] = []

    def walk(section: type[Strict], before: str) -> None:
        for name, field in section.model_fields.items():
            inner = section_of(field.annotation)
            if inner is not None and not get_args(field.annotation):
                walk(inner, f"{before}{name}.")
                continue
            default = field.get_default(call_default_factory=True)
            shown = "required" if field.is_required() else json.dumps(plain(default))
            lines.append((f"{before}{name}", shown, field.description or ""))
            if name == "evaluate":
                walk(EvaluationSet, "evaluate.NAME.")
            elif inner is not None:
                walk(inner, f"{before}{name}.")

    walk(Recipe, "")
    return lines
