"""A file of another tool, recognized and turned into a recipe with what differs and what was not carried over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from luthier.convert import axolotl, llama_factory, trl
from luthier.convert.config import Config
from luthier.convert.draft import Draft, Left
from luthier.errors import LuthierError, nearest
from luthier.recipe.yaml_text import read_yaml

OWN = frozenset({"model", "rows", "tune"})
"""Keys by which a recipe of luthier's own is recognized."""


class _Tool(NamedTuple):
    title: str
    marks: Set[str]
    convert: Callable[[Config, int], Draft]


TOOLS: Mapping[str, _Tool] = {
    "axolotl": _Tool("Axolotl", axolotl.MARKS, axolotl.convert),
    "llama-factory": _Tool("LLaMA-Factory", llama_factory.MARKS, llama_factory.convert),
    "trl": _Tool("TRL", trl.MARKS, trl.convert),
    **{
        f"trl-{script}": _Tool(f"TRL, trl {script}", frozenset(), partial(trl.convert, script=script))
        for script in ("sft", "dpo", "kto", "reward")
    },
}
"""By the names that `--from` takes."""


class Converted(NamedTuple):
    """A recipe, and what is to be said of it."""

    tool: str
    """One of `TOOLS`."""
    recipe: Mapping[str, Any]
    """As plain data."""
    text: str
    """The same as YAML, with comments."""
    remarks: Mapping[str, str]
    """What differs, by whole key."""
    left: tuple[Left, ...]
    """What was not carried over, with its reason."""
    needless: tuple[str, ...]
    """Keys without a counterpart of which nothing is lost."""

    def as_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return {**self._asdict(), "left": [one._asdict() for one in self.left]}


def convert(path: str | Path, tool: str | None = None, devices: int = 1) -> Converted:
    """Turn a configuration of another tool into a recipe.

    Args:
        path: a YAML or JSON file.
        tool: one of `TOOLS`; None: recognized by the file's keys.
        devices: how many the file was run on: a step's rows are those of all of them.

    Raises:
        LuthierError: no such file, it is of no tool that is known, or asks for something luthier does not do.
    """
    data = read_yaml(Path(path))
    if not isinstance(data, Mapping) or not data:
        raise LuthierError(
            "a configuration is a mapping of keys", where=str(path), fix="give the YAML file that the other tool reads"
        )
    if tool is not None and tool not in TOOLS:
        raise LuthierError(f"`{tool}` is no tool that is known", where="--from", fix=nearest(tool, TOOLS))
    name = tool or _recognized(data, str(path))
    draft = TOOLS[name].convert(Config(data, str(path)), devices)
    title = (
        f"From {Path(path).name}, a configuration of {TOOLS[name].title}. See what it would do before it trains: `luthier plan`, and "
        "`luthier rows look` for what the model reads."
    )
    return Converted(name, draft.recipe(), draft.text(title), draft.remarks, tuple(draft.left), tuple(draft.needless))


def _recognized(data: Mapping[str, Any], where: str) -> str:
    """The tool most of whose own keys a file has."""
    counts = {name: len(set(data) & one.marks) for name, one in TOOLS.items()}
    most = max(counts.values())
    found = [name for name, count in counts.items() if count == most]
    if most and len(found) == 1:
        return found[0]
    if len(set(data) & OWN) > 1:
        raise LuthierError("this is a recipe of luthier already", where=where, fix=f"`luthier plan {where}`")
    known = ", ".join(name for name, one in TOOLS.items() if one.marks)
    what = f"its keys are those of {' and '.join(found)}" if most else "none of its keys tells which tool it is of"
    raise LuthierError(f"the tool cannot be told: {what}", where=where, fix=f"say --from TOOL; known: {known}")
