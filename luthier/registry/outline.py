"""What a technique's file says of itself, read without running it: a name, an option or a line of a list needs no torch.

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
    card = {word.arg: word.value for word in calls[0].keywords if word.arg}
    facts = {name: ast.literal_eval(value) for name, value in card.items() if _written_out(value)}
    said = ast.get_docstring(function) or ""
    arguments = list(zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True))
    return Outline(
        facts,
        said.split("\n\n")[0].replace("\n", " "),
        "\n".join((path.stem, *(str(facts.get(name, "")) for name in ("title", "paper")), ast.get_docstring(tree) or "", said)),
        tuple(argument.arg for argument, _ in arguments),
        tuple(argument.arg for argument, default in arguments if default is None),
    )


def _written_out(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True
