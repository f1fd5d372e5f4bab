"""What the lab keeps between calls, under keys made of everything a result depends on.

    CACHE/lab/stages/KEY/      one stage: its run's folder, and its merged model once a later stage needed it
    CACHE/lab/measures/KEY.json  the numbers that a replication took from a chain of stages

A stage's key holds its recipe with the content of its rows, the fingerprint of the model it starts from (or the key of the stage
before), the device, the versions of what computes, and the sources of luthier that it can reach: all but the lab, the reports and
the command line, and of the techniques those that the recipe names. It knows nothing of replications, so that two replications with one
baseline train it once. A measure's key holds the stages' keys, the replication's source and the sources that measuring can reach.
CACHE is `LUTHIER_CACHE`, or `~/.cache/luthier`.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import luthier
from luthier import disk, machine, registry
from luthier.errors import LuthierError
from luthier.models.wheel import cache_folder
from luthier.recipe import Recipe
from luthier.recipe.paths import SOURCES
from luthier.results.folder import write_json
from luthier.rows.ids import canonical
from luthier.rows.numbers import Numbers
from luthier.rows.read import files_of
from luthier.rows.template import given_template, is_file

PACKAGE = Path(luthier.__file__).parent
_COMPUTES_NOTHING = ("report", "cli", "sweep", "__main__", "registry/catalogue", "registry/listing", "registry/papers")
"""Modules of luthier that no number depends on."""
_LAB_COMPUTES_NOTHING = ("replications", "calibration", "verdict", "verdicts", "results", "figure", "overview", "command")
_KEY_DIGITS = 24


def lab_folder() -> Path:
    """Where the lab keeps what it has run."""
    return cache_folder() / "lab"


def forget() -> Path:
    """Remove all that the lab has kept, and nothing else. Returns where it was."""
    folder = lab_folder()
    disk.remove(folder)
    return folder


def kept_bytes() -> int:
    """The size of all that the lab has kept: a full fine-tune keeps as many bytes as its model has."""
    sizes = []
    for path in lab_folder().rglob("*"):
        # Another lab may remove a file meanwhile.
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size if path.is_file() else 0)
    return sum(sizes)


def key_of(facts: Any) -> str:
    """Names some facts: the first digits of their SHA-256."""
    return hashlib.sha256(canonical(facts).encode()).hexdigest()[:_KEY_DIGITS]


def stage_key(recipe: Recipe, start: str, device: str) -> str:
    """Names one stage.

    Args:
        recipe: with the seed; model, name and folder do not count.
        start: the fingerprint of the model, or the key of the stage before.
        device: what it is computed on.
    """
    left_out = ("model", "models", "name", "out")
    facts = {name: content(getattr(recipe, name), name) for name in type(recipe).model_fields if name not in left_out}
    # Without other models keys are what they were before there were any.
    others = {name: base_key(one, None) for name, one in recipe.models.items()}
    facts |= {"models": others} if others else {}
    sources = [core_sources(), technique_sources(technique_names(recipe))]
    return key_of({"recipe": facts, "start": start, "device": device, "versions": machine.versions(), "sources": sources})


def content(value: Any, where: str) -> Any:
    """A recipe's value as data that is equal for equal content: rows whole, files by their checksum, parts by name and options.

    Raises:
        LuthierError: a value that has no content to compare, such as a function.
    """
    if isinstance(value, str) and where == "rows.stored":
        return {"numbers": Numbers(Path(value)).fingerprint()}
    if isinstance(value, str) and where == "rows.chat_template" and is_file(value):
        return {"template": given_template(value)}
    if isinstance(value, str | int | float | bool) or value is None:
        files = _files_named(value, where) if isinstance(value, str) else ()
        if len(files) == 1 and files[0] == Path(str(value)):
            return {"file": disk.sha256(files[0])}
        return {"files": [[one.name, disk.sha256(one)] for one in files]} if files else value
    if isinstance(value, Path):
        return {"file": disk.sha256(value)}
    if isinstance(value, registry.Part) and value.name in registry.names(value.kind):
        return {value.name: content(value.options, where)}
    if isinstance(value, Mapping):
        return {str(key): content(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return [content(one, where) for one in value]
    if hasattr(type(value), "model_fields"):
        return {key: content(getattr(value, key), f"{where}.{key}") for key in type(value).model_fields}
    raise LuthierError(
        f"the lab cannot tell one {type(value).__name__} from another",
        where=where,
        fix="give rows as a list or a file, and techniques by name",
    )


def _files_named(value: str, where: str) -> tuple[Path, ...]:
    """The files of rows that a recipe's value names: one, those of a folder, or those of a pattern."""
    if not where.endswith(("rows", "train", *SOURCES)) or value.startswith("hub:"):
        return ()
    try:
        return files_of(value)
    except LuthierError:
        # Whatever else it means, or a file that is missing, which whoever reads it will say.
        return ()


def base_key(name: str, revision: str | None) -> str:
    """Names a model or a run: what lies in a folder or a file by its content, anything else by its name and revision."""
    try:
        path = Path(name).expanduser()
        files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path] if path.is_file() else []
    except (OSError, RuntimeError):
        # No file can have such a name.
        files = []
    weights = key_of([[one.name, _sha256(one, one.stat().st_size, one.stat().st_mtime_ns)] for one in files]) if files else ""
    return f"{name} {revision} {weights}".strip()


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    return disk.sha256(path)


def technique_names(recipe: Recipe) -> frozenset[str]:
    """Every word under a recipe's technique keys that could name a technique."""
    found: set[str] = set()
    for name, key in registry.KEYS.items():
        found.update(_words(content(key.of(recipe), name)))
    return frozenset(found)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from _words(one)
    elif isinstance(value, list):
        for one in value:
            yield from _words(one)


@cache
def core_sources() -> str:
    """Identifies the code that every stage runs."""
    skipped = {"replicate", "methods", *_COMPUTES_NOTHING}
    files = {path: path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    return _digest(path for path, name in files.items() if not skipped & {name.as_posix(), name.parts[0]})


@cache
def technique_sources(names: frozenset[str]) -> str:
    """Identifies the code of some techniques, with what they import from each other's files."""
    files: dict[str, list[Path]] = {}
    for path in (PACKAGE / "methods").rglob("*.py"):
        files.setdefault(path.stem, []).append(path)
    for kind in registry.KINDS:
        for name in names.intersection(registry.names(kind)):
            # A technique's file may lie outside the package.
            own = Path(inspect.getfile(registry.find(name, (kind,)).factory))
            files[name] = [*files.get(name, []), own]
    return _digest(_reached(names, files, r"luthier\.methods"))


def replication_source(path: Path) -> str:
    """Identifies a replication's code: its file, the other replications' files that it imports, and the files beside it that it names."""
    files = {other.stem: [other] for other in path.parent.glob("*.py")}
    reached = _reached([path.stem], files, r"luthier\.lab\.replications")
    text = "".join(one.read_text(encoding="utf-8") for one in reached)
    data = {other for other in path.parent.iterdir() if other.is_file() and other.suffix != ".py" and other.name in text}
    return _digest(reached | data)


@cache
def measure_sources() -> str:
    """Identifies the code that measuring runs, beside the replication's own and that of the techniques."""
    lab = PACKAGE / "lab"
    skipped = set(_LAB_COMPUTES_NOTHING)
    mine = (path for path in lab.rglob("*.py") if path.relative_to(lab).parts[0].removesuffix(".py") not in skipped)
    return core_sources() + _digest(mine)


def _reached(names: Iterable[str], files: Mapping[str, list[Path]], package: str) -> set[Path]:
    """The files of some names, and those whose names stand in their imports from `package`."""
    reached: set[Path] = set()
    waiting = list(names)
    while waiting:
        for path in files.get(waiting.pop(), ()):
            if path not in reached:
                reached.add(path)
                for line in re.findall(rf"^\s*(?:from|import) ({package}.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
                    waiting += re.findall(r"\w+", line)
    return reached


def _digest(paths: Iterable[Path]) -> str:
    # Two files of one name in two folders must not pass for one another, and a copy of the package elsewhere is the same package.
    found = sorted((path.parent.name, path.name, disk.sha256(path)) for path in paths)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def read(path: Path) -> dict[str, Any] | None:
    """Facts that were kept; None where there are none. Half a file cannot be: it is written beside and renamed."""
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LuthierError(f"the lab's cache is damaged: {error}", where=str(path), fix="luthier replicate --forget") from None
    return found


def keep(path: Path, facts: Mapping[str, Any]) -> None:
    """Keep facts, whole or not at all."""
    write_json(path, facts)
