"""Where a recipe's files lie: what is not found from the working folder is looked for beside the recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.registry import KEYS

SOURCES = ("calibration_source", "validation_source")
"""Options of techniques that name rows."""


TEMPLATES = (".jinja", ".jinja2")
"""How the names of files end that hold a chat template; other names are those of a tokenizer's own."""


def with_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe's data in which names of files that lie beside the recipe are paths to them."""

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(one) for one in value]
        if isinstance(value, dict) and "rows" in value:
            return {**value, "rows": found(value["rows"])}
        if not isinstance(value, str) or value.startswith("hub:") or _is_there(Path(value)):
            return value
        if _is_there(folder / value):
            return str(folder / value)
        # One split of a data set that lies there.
        before, colon, split = value.rpartition(":")
        return f"{folder / before}:{split}" if colon and not _is_there(Path(before)) and _is_there(folder / before) else value

    data = dict(data)
    rows = data.get("rows")
    if isinstance(rows, dict):
        data["rows"] = {**rows, **{key: found(rows[key]) for key in ("train", "validate", "stored") if key in rows}}
        template = rows.get("chat_template")
        if isinstance(template, str) and template.endswith(TEMPLATES):
            data["rows"]["chat_template"] = found(template)
    sets = data.get("evaluate")
    if isinstance(sets, dict):
        data["evaluate"] = {
            name: {**one, **{key: found(one[key]) for key in ("rows", "include_path") if key in one}}
            if isinstance(one, dict)
            else one
            for name, one in sets.items()
        }
    if isinstance(data.get("model"), str):
        data["model"] = found(data["model"])
    if isinstance(data.get("models"), dict):
        data["models"] = {name: found(one) for name, one in data["models"].items()}
    if isinstance(data.get("baseline_run"), str):
        data["baseline_run"] = found(data["baseline_run"])
    for key in KEYS.values():
        data = _changed(data, key.path, lambda spec: _with_sources(spec, found))
    return data


def _changed(data: dict[str, Any], path: tuple[str, ...], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Data in which what stands at a path, if anything does, is changed."""
    key, *rest = path
    if key not in data:
        return data
    if not rest:
        return {**data, key: change(data[key])}
    return {**data, key: _changed(data[key], tuple(rest), change)} if isinstance(data[key], dict) else data


def _with_sources(spec: Any, found: Callable[[Any], Any]) -> Any:
    """The rows that techniques calibrate and validate on are named from the recipe's folder, too."""
    if isinstance(spec, list):
        return [_with_sources(one, found) for one in spec]
    if isinstance(spec, dict):
        return {
            name: {key: found(value) if key in SOURCES else value for key, value in options.items()}
            if isinstance(options, dict)
            else options
            for name, options in spec.items()
        }
    return spec


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # No file can have such a name; whoever opens it will say so.
        return False
