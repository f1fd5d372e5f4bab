"""The folder is the registry: `luthier/methods/<kind>/<name>.py` holds the technique `<name>`.

Looking a technique up imports one module; listing walks the folder. A technique is a keyword-only function from hyper-parameters
to one value of a kind, or a tuple of values; its signature is the schema of its options, its card stands on the function.
Folders outside the package join through `LUTHIER_METHODS` (paths separated like PATH) or `add_folder`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

import pydantic

from luthier.errors import LuthierError, cut_short, explain, nearest, refuse_truth
from luthier.registry.cards import Card, Part, Technique
from luthier.registry.foreign import hint
from luthier.registry.keys import COMMANDS, KEYS, KINDS, key_of, kind_of, kinds_under
from luthier.registry.outline import Outline, outline

Made = TypeVar("Made")

NOTHING = "none"
"""What a recipe's key for techniques holds where none is used."""
METRIC = "metric"
"""The folder of metrics of your own, beside those of kinds of techniques; `luthier.evaluate.own` reads it."""


_added: list[Path] = []


def add_folder(folder: str | Path) -> None:
    """Let techniques in `folder/<kind>/<name>.py` be found too. Their code runs when they are looked up."""
    path = Path(folder).resolve()
    if not path.is_dir():
        raise LuthierError("there is no such folder of techniques", where=str(folder), fix="give an existing folder")
    if path not in _added:
        _added.append(path)


def remove_folder(folder: str | Path) -> None:
    """Take a folder out again that `add_folder` let in."""
    _added.remove(Path(folder).resolve())


def _folders(kind: str) -> list[Path]:
    roots = [Path(__file__).parents[1] / "methods", *_named(os.environ.get("LUTHIER_METHODS", "")), *_added]
    return [root / kind for root in roots if (root / kind).is_dir()]


@cache
def _named(paths: str) -> tuple[Path, ...]:
    """The folders of techniques that the environment names.

    Raises:
        LuthierError: one does not exist, or holds no folder of a kind, so that nothing in it would be found.
    """
    found = tuple(Path(path) for path in paths.split(os.pathsep) if path)
    for path in found:
        if not any((path / kind).is_dir() for kind in (*KINDS, METRIC)):
            what = "holds no folder of a kind" if path.is_dir() else "does not exist"
            fix = "name the folder above `token_weight/`, `weight_delta/` and the like"
            raise LuthierError(f"this folder of techniques {what}", where=f"LUTHIER_METHODS: {path}", fix=fix)
    return found


def _files(kind: str) -> dict[str, Path]:
    """Technique name to file; the package's own come first and cannot be replaced."""
    files: dict[str, Path] = {}
    for folder in _folders(kind):
        for path in sorted(folder.glob("*.py")):
            if not path.stem.startswith("_"):
                files.setdefault(path.stem, path)
    return files


def own_files(folder: str) -> dict[str, Path]:
    """What lies in a folder of this name beside your own techniques, name to file."""
    return _files(folder)


def names(kind: str) -> list[str]:
    """The techniques of one kind."""
    if kind not in KINDS:
        raise LuthierError(f"`{kind}` is no kind", fix=nearest(kind, KINDS))
    return sorted(_files(kind))


def _module(kind: str, name: str, path: Path) -> ModuleType:
    if path.parent.parent == Path(__file__).parents[1] / "methods":
        return importlib.import_module(f"luthier.methods.{kind}.{name}")
    return module_at(path, f"luthier_methods.{kind}.{name}", "a technique")


def module_at(path: Path, key: str, what: str) -> ModuleType:
    """The module in a file outside the package, which is run when it is first asked for.

    Args:
        path: the file.
        key: its name in `sys.modules`.
        what: what the file should hold, for errors.

    Raises:
        LuthierError: the file is no Python file.
    """
    known = sys.modules.get(key)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise LuthierError(f"this file cannot be read as {what}", where=str(path), fix="it must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        # The next look-up must meet the same mistake, not half a module.
        del sys.modules[key]
        if isinstance(error, LuthierError) or not isinstance(error, Exception):
            raise
        line = next(
            (frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == str(path)), None
        )
        place = f"{path}, line {line or getattr(error, 'lineno', None) or 1}"
        raise LuthierError(
            f"this file cannot be loaded as {what}: {type(error).__name__}: {error}", where=place, fix="fix the file"
        ) from error
    return module


def find(name: str, kinds: Iterable[str] | None = None, *, where: str = "") -> Technique:
    """Look a technique up by name among some kinds, or all.

    Raises:
        LuthierError: no kind has it (with the nearest names), or its file lacks a function of its name with a card.
    """
    kinds = tuple(KINDS if kinds is None else kinds)
    for kind in kinds:
        if name in _files(kind):
            return _load(kind, name)
    raise _unknown(name, kinds, where)


def find_under(name: str, key: str, *, where: str = "") -> Technique:
    """Look up a technique that belongs under a recipe's key: one of its kinds, or one whose card names the key.

    Raises:
        LuthierError: as `find`, or the technique belongs under another key.
    """
    kinds = kinds_under(key)
    for kind in (*kinds, *(other for other in KINDS if other not in kinds)):
        if name in _files(kind) and (found := _load(kind, name)).card.key == key:
            return found
    raise _unknown(name, kinds, where, key)


def _load(kind: str, name: str) -> Technique:
    path = _files(kind)[name]
    factory = getattr(_module(kind, name, path), name, None)
    card = getattr(factory, "card", None)
    if factory is None or card is None:
        raise LuthierError(
            f"`{path.name}` must define a function `{name}` with a card",
            where=str(path),
            fix="name the function like its file and put @method(...) on it",
        )
    if card.key and card.key not in KEYS:
        raise LuthierError(
            f"the card of `{name}` names the key `{card.key}`, which holds no techniques",
            where=str(path),
            fix=nearest(card.key, KEYS),
        )
    return Technique(name, kind, factory, replace(card, name=name, kind=kind, key=card.key or key_of(kind)))


def _unknown(name: str, kinds: tuple[str, ...], where: str, key: str = "") -> LuthierError:
    known = [other for kind in kinds for other in names(kind)]
    elsewhere = [kind for kind in KINDS if name in _files(kind) and (key or kind not in kinds)]
    fix = nearest(name, known) or (
        f"known: {', '.join(known)}" if known else "none of this kind is known to this version yet; leave it out"
    )
    if "," in name:
        fix = f"several are written as a list: {where or 'tune'}=[{name}]"
    if elsewhere:
        fix = f"its kind is {elsewhere[0]}: {_place_of(elsewhere[0], name)}"
    return LuthierError(f"there is no technique `{name}` among {', '.join(kinds)}", where=where, fix=fix)


def _place_of(kind: str, name: str) -> str:
    """Where a technique of a kind belongs, as an instruction."""
    found = outline(_files(kind)[name])
    key = _load(kind, name).card.key if found is None else str(found.card.get("key") or key_of(kind))
    return _instruction(key, kind, name)


def _instruction(key: str, kind: str, name: str) -> str:
    return f"put it under `{key}`" if key else f"it takes no part in training; use `{COMMANDS[kind][0]} {name}`"


def cards(kinds: Iterable[str] | None = None) -> list[Card]:
    """The cards of all techniques, by kind and name. Imports every technique."""
    return [find(name, (kind,)).card for kind in (KINDS if kinds is None else kinds) for name in names(kind)]


def options_model(factory: Callable[..., Any], name: str = "") -> type[pydantic.BaseModel]:
    """The schema of a technique's options, read from its signature: unknown options are refused, types are checked."""
    hints = get_type_hints(factory)
    fields: dict[str, Any] = {}
    for option, parameter in inspect.signature(factory).parameters.items():
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[option] = (hints.get(option, Any), default)

    def check(cls: type[pydantic.BaseModel], value: Any, info: pydantic.ValidationInfo) -> Any:
        refuse_truth(value, hints.get(str(info.field_name), Any))
        return value

    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True, allow_inf_nan=False)
    checks: dict[str, Any] = {"check": pydantic.field_validator("*", mode="before")(check)} if fields else {}
    name = name or getattr(factory, "__name__", "options")
    return pydantic.create_model(name, __config__=config, __validators__=checks, **fields)


def make(spec: object, kinds: Iterable[str], *, where: str = "") -> Part:
    """A part of one of some kinds from what a recipe says: `name`, `{name: {option: value}}`, or a kind's value given in Python.

    Raises:
        LuthierError: unknown technique or option (with the nearest name), or an option of the wrong type.
    """
    kinds = tuple(kinds)
    return _make(spec, kinds, lambda name, options: _build(find(name, kinds, where=where), options, where), where)


def _make(
    spec: object, kinds: tuple[str, ...], build: Callable[[str, dict[str, Any]], Made], where: str, key: str = ""
) -> Made | Part:
    if isinstance(spec, Part):
        return _placed(spec, kinds, key, where)
    if isinstance(spec, str):
        return build(spec, {})
    if isinstance(spec, Mapping):
        if len(spec) != 1:
            raise LuthierError(
                f"one technique at a time: this names {', '.join(map(str, spec)) or 'none'}",
                where=where,
                fix="write a list: [{first: {...}}, {second: {...}}]",
            )
        ((name, options),) = spec.items()
        if options is not None and not isinstance(options, Mapping):
            raise LuthierError(
                f"the options of `{name}` must be a mapping, not {options!r}",
                where=where,
                fix=f"write {name}: {{option: value}}",
            )
        return build(str(name), {str(key): value for key, value in (options or {}).items()})
    values = spec if isinstance(spec, tuple) and not hasattr(spec, "_fields") else (spec,)
    try:
        found = [kind_of(value) for value in values]
        kind = found[0]
    except (TypeError, IndexError):
        fix = "write several parts as a list" if isinstance(spec, tuple) else "known kinds: " + ", ".join(kinds)
        raise LuthierError(f"{cut_short(repr(spec))} is neither a technique's name nor a part", where=where, fix=fix) from None
    if kind not in kinds:
        raise LuthierError(f"a {kind} has no place here", where=where, fix="here go: " + ", ".join(kinds))
    return Part(name=kind, kind=kind, options={}, values=tuple(values))


def _placed(part: Part, kinds: tuple[str, ...], key: str, where: str) -> Part:
    """A part that was made elsewhere, where it belongs here."""
    belongs = part.card.key or key_of(part.kind)
    by_hand = part.kind not in KINDS
    if by_hand or ((belongs == key) if key else (part.kind in kinds)):
        return part
    raise LuthierError(f"`{part.name}` has no place here", where=where, fix=_instruction(belongs, part.kind, part.name))


def part(name: str, **options: Any) -> Part:
    """A technique with its options, for use in Python: `part("lora", rank=16)`.

    Raises:
        LuthierError: unknown technique or option, with the nearest name, or an option of the wrong type.
    """
    return make({name: options}, tuple(KINDS))


def make_all(specs: object, key: str) -> list[Part]:
    """The parts under a recipe's key, from one spec or a list of them; None and `none` name nothing, so that a sweep can say it.

    Raises:
        LuthierError: as `make`, or a technique belongs under another key.
    """

    def build(name: str, options: dict[str, Any], where: str) -> Part:
        return _build(find_under(name, key, where=where), options, where)

    return _under(specs, key, build)


def check_names(specs: object, key: str) -> None:
    """Find the mistakes under a recipe's key that can be told without loading a technique: of names, of options and of form.

    Raises:
        LuthierError: as `make_all`.
    """

    def check(name: str, options: dict[str, Any], where: str) -> None:
        told = [(kind, outline(files[name])) for kind in KINDS if name in (files := _files(kind))]
        here = [found for kind, found in told if found is None or (found.card.get("key") or key_of(kind)) == key]
        if not here:
            raise _unknown(name, kinds_under(key), where, key)
        found = here[0]
        if found is None:
            return
        for option in options:
            if option not in found.options:
                raise _no_option(name, option, found.options, where)
        for option in found.required:
            if option not in options:
                raise _missing_option(name, option, where)

    _under(specs, key, check)


def outlines(kinds: Iterable[str] | None = None) -> list[tuple[str, str, Outline | None]]:
    """Kind and name of every technique, and what its file says of it without being run; None where that is not to be told."""
    return [
        (kind, name, outline(path)) for kind in (KINDS if kinds is None else kinds) for name, path in sorted(_files(kind).items())
    ]


def _at_place(build: Callable[[str, dict[str, Any], str], Made], where: str, name: str, options: dict[str, Any]) -> Made:
    return build(name, options, where)


def _under(specs: object, key: str, build: Callable[[str, dict[str, Any], str], Made]) -> list[Made | Part]:
    if specs is None or specs == NOTHING:
        return []
    many = specs if isinstance(specs, list) else [specs]
    made = []
    for i, spec in enumerate(many):
        where = f"{key}[{i}]" if len(many) > 1 else key
        if spec == NOTHING:
            raise LuthierError(f"`{NOTHING}` names nothing, and stands in a list", where=where, fix="leave it out of the list")
        at_place = partial(_at_place, build, where)
        made.append(_make(spec, kinds_under(key), at_place, where, key))
    return made


def _build(technique: Technique, options: dict[str, Any], where: str) -> Part:
    name = technique.name
    try:
        checked = options_model(technique.factory, name)(**options)
    except pydantic.ValidationError as error:
        raise option_error(error, name, where, technique.factory) from None
    values = technique.factory(**{key: getattr(checked, key) for key in type(checked).model_fields})
    if not isinstance(values, tuple) or hasattr(values, "_fields"):
        values = (values,)
    _check_values(technique, values)
    chosen = {key: getattr(checked, key) for key in type(checked).model_fields}
    return Part(name=name, kind=technique.kind, options=chosen, values=values, card=technique.card)


def _check_values(technique: Technique, values: tuple[Any, ...]) -> None:
    """Refuse what a technique returns where a run could do nothing with it, which would go unnoticed."""
    where = inspect.getfile(technique.factory)
    strange = [value for value in values if not isinstance(value, tuple(KINDS.values()))]
    if strange or not values:
        what = f"a {type(strange[0]).__name__}" if strange else "nothing"
        fix = "return a value of `luthier.kinds`, or a tuple of several"
        raise LuthierError(f"`{technique.name}` returns {what}, and a technique is made of values of kinds", where=where, fix=fix)
    found = [kind_of(value) for value in values]
    if technique.kind not in found:
        raise LuthierError(
            f"`{technique.name}` lies among {technique.kind}, and what it returns is {', '.join(found)}",
            where=where,
            fix=f"move the file to `{found[0]}/`",
        )


def option_error(
    error: pydantic.ValidationError,
    name: str,
    where: str,
    factory: Callable[..., Any] | None = None,
    *,
    see: str = "luthier techniques",
) -> LuthierError:
    """The first mistake pydantic found, as one sentence with its place and the nearest known name; `see` is a command that tells more."""
    first = error.errors()[0]
    key = ".".join(str(piece) for piece in first["loc"])
    place = f"{where}: {name}" if where else name
    if first["type"] == "extra_forbidden":
        return _no_option(name, key, list(inspect.signature(factory).parameters) if factory else [], where)
    if first["type"] == "missing":
        return _missing_option(name, key, where)
    what, fix = explain(first)
    return LuthierError(f"the option `{key}` is {what}", where=place, fix=f"{fix}; see `{see} {name}`")


def _no_option(name: str, option: str, known: Iterable[str], where: str) -> LuthierError:
    known = list(known)
    fix = hint(option, name, known) or (nearest(option, known) if known else f"`{name}` has no options")
    return LuthierError(f"`{name}` has no option `{option}`", where=f"{where}: {name}" if where else name, fix=fix)


def _missing_option(name: str, option: str, where: str) -> LuthierError:
    place = f"{where}: {name}" if where else name
    return LuthierError(f"`{name}` needs the option `{option}`", where=place, fix=f"write {name}: {{{option}: ...}}")
