"""What a file says of the technique, or of another thing, that it makes, read without running it: a line of a list needs no torch.

The card and the options that count in a run are those of the function itself; `luthier.registry.techniques` loads it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Outline(NamedTuple):
    """A technique as its source text has it."""

    card: Mapping[str, Any]
    """The arguments of `@method(...)` that are written out there."""
    summary: str
    """The first paragraph of its docstring, on one line."""
    text: str
    """Everything that a search looks through: titles, docstrings, the paper."""
    options: tuple[str, ...]
    """The names of its options."""
    required: tuple[str, ...]
    """Those without a default."""


def outline(path: Path) -> Outline | None:
    """What the file of a technique says of it; None where that is not to be told from its text.

    Args:
        path: the file, named like its function.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    made = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == path.stem]
    if len(made) != 1 or made[0].args.kwarg is not None:
        return None
    function = made[0]
    calls = [one for one in function.decorator_list if isinstance(one, ast.Call) and ast.unparse(one.func).endswith("method")]
    if len(calls) != 1 or len(function.decorator_list) != 1:
        return None
    facts = _arguments(calls[0])
    said = ast.get_docstring(function) or ""
    arguments = list(zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True))
    return Outline(
        facts,
        said.split("\n\n")[0].replace("\n", " "),
        "\n".join((path.stem, *(str(facts.get(name, "")) for name in ("title", "paper")), ast.get_docstring(tree) or "", said)),
        tuple(argument.arg for argument, _ in arguments),
        tuple(argument.arg for argument, default in arguments if default is None),
    )


def arguments_of(path: Path, name: str) -> dict[str, Any]:
    """What stands in the call whose result a file calls `name`, of its arguments by name those that are written out there.

    Args:
        path: the file; one that cannot be read tells nothing.
        name: of a variable, such as `REPLICATION`.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {}
    given = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name]
    return _arguments(given[-1]) if given and isinstance(given[-1], ast.Call) else {}


def _arguments(call: ast.Call) -> dict[str, Any]:
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg and _written_out(word.value)}


def _written_out(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True
