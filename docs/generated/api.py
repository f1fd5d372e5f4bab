"""The public Python names with signature and docstring, read from the source: what stands there is the same for every version of Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import luthier
from generated.tables import target
from luthier import kinds

WIDTH = 100
"""Characters of a signature before it is broken into lines."""
ELSEWHERE = (
    "luthier.delta.Dense",
    "luthier.delta.LowRank",
    "luthier.delta.Sparse",
    "luthier.delta.summary",
    "luthier.evaluate.readings.readings",
    "luthier.export.load_peft",
    "luthier.lab.benchmark.rows",
    "luthier.lab.benchmark.sets",
    "luthier.models.load_model",
    "luthier.models.map_parts",
    "luthier.registry.add_folder",
    "luthier.runs.answers.best_of_answers",
    "luthier.runs.answers.write_answers",
    "luthier.training.readout.combination",
)
"""What other pages speak of, beside the public names."""
SECTION = re.compile(r"^(Args|Returns|Yields|Raises):$")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Found(NamedTuple):
    """Where a name is made: the node, the statements around it, and the text of its file."""

    node: ast.stmt
    body: list[ast.stmt]
    source: str


def public() -> str:
    """`luthier.__all__`, functions first."""
    names = [name for name in luthier.__all__ if not name.startswith("__")]
    found = {name: find(luthier._HOMES.get(name, "luthier.errors"), name) for name in names}
    return written(sorted(found.items(), key=lambda one: isinstance(one[1].node, ast.ClassDef)), "luthier.")


def of_kinds() -> str:
    """`luthier.kinds.__all__` by module, with what each module says of itself."""
    modules: dict[str, list[str]] = {}
    for name in kinds.__all__:
        modules.setdefault(home("luthier.kinds", name), []).append(name)
    pieces = []
    for module in dict.fromkeys(node.module for node in tree("luthier.kinds")[0].body if isinstance(node, ast.ImportFrom)):
        if module in modules:
            said = ast.get_docstring(tree(module)[0]) or ""
            names = [f"[`{name}`](#kinds-{name})" for name in modules[module]]
            pieces += [f"### `{module}`", prose(said), ", ".join(names) + "."]
            pieces.append(
                written([(name, find(module, name)) for name in modules[module]], "luthier.kinds.", level=4, prefix="kinds-")
            )
    return "\n\n".join(pieces)


def further() -> str:
    """What other pages speak of."""
    found = [(name, find(*name.rsplit(".", 1))) for name in ELSEWHERE]
    return written(found, "")


@cache
def tree(module: str) -> tuple[ast.Module, str]:
    """A module's syntax and its text."""
    path = Path(str(import_module(module).__file__))
    source = path.read_text(encoding="utf-8")
    return ast.parse(source), source


def home(module: str, name: str) -> str:
    """The module in which a name is made, following `from ... import`."""
    for node in tree(module)[0].body:
        if isinstance(node, ast.ImportFrom) and node.module and any((one.asname or one.name) == name for one in node.names):
            return home(node.module, name)
    return module


def find(module: str, name: str) -> Found:
    """A name's definition.

    Raises:
        SystemExit: the module does not make it.
    """
    place = home(module, name)
    parsed, source = tree(place)
    for node in parsed.body:
        if name in made(node):
            return Found(node, parsed.body, source)
    raise SystemExit(f"docs/generated/api.py: {place} makes no {name}")


def made(node: ast.stmt) -> list[str]:
    """The names that a statement makes."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [one.id for one in node.targets if isinstance(one, ast.Name)]
    return []


def written(found: list[tuple[str, Found]], before: str, *, level: int = 3, prefix: str = "") -> str:
    """The sections of some names."""
    pieces = []
    for name, one in found:
        pieces += [target(f"{prefix}{name}")] if prefix else []
        pieces.append(f"{'#' * level} `{before}{name}`")
        pieces += list(section(one))
    return "\n\n".join(piece for piece in pieces if piece)


def section(found: Found) -> Iterator[str]:
    """One name: its signature or value, what it says of itself, and of a class its fields and methods."""
    node, body, source = found
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield fenced(signature(node, source))
        yield prose(ast.get_docstring(node) or "")
    elif isinstance(node, ast.ClassDef):
        yield from class_section(node, source)
    else:
        yield fenced(text_of(node, source))
        yield prose(said_below(body, node))


def class_section(node: ast.ClassDef, source: str) -> Iterator[str]:
    """A class; keys of a recipe stand on a page of their own."""
    inside = [one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    start = next((one for one in inside if one.name == "__init__"), None)
    bases = ", ".join(text_of(base, source) for base in node.bases)
    yield fenced(
        f"class {signature(start, source, node.name)}"
        if start
        else f"class {node.name}({bases})"
        if bases
        else f"class {node.name}"
    )
    yield prose(ast.get_docstring(node) or "")
    keys = "Model" in bases or "Strict" in bases
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and not made(one)[0].startswith("_")]
    if fields and keys:
        yield "Its fields are the [keys of a recipe](recipes.md#keys)."
    elif fields:
        yield "\n".join(field(one, node.body, source) for one in fields)
    for one in inside:
        decorators = [text_of(decorator, source).partition("(")[0] for decorator in one.decorator_list]
        if one.name.startswith("_") or any("validator" in decorator or "serializer" in decorator for decorator in decorators):
            continue
        is_property = any("property" in decorator for decorator in decorators)
        shown = one.name if is_property else signature(one, source)
        returns = f": {text_of(one.returns, source)}" if is_property and one.returns else ""
        marks = "".join(
            f"@{decorator}\n"
            for decorator in decorators
            if decorator in ("classmethod", "staticmethod", "property", "contextmanager")
        )
        yield fenced(f"{marks}{shown if not is_property else f'{shown}{returns}'}")
        yield prose(ast.get_docstring(one) or "")


def field(node: ast.AnnAssign, body: list[ast.stmt], source: str) -> str:
    """A field of a value, with what stands below it."""
    default = f" = {text_of(node.value, source)}" if node.value is not None and "field(" not in text_of(node.value, source) else ""
    said = " ".join(said_below(body, node).split())
    return f"- `{made(node)[0]}: {text_of(node.annotation, source)}{default}`" + (f": {said}" if said else "")


def said_below(body: list[ast.stmt], node: ast.stmt) -> str:
    """The text that stands below an assignment and describes it."""
    after = body[body.index(node) + 1 :][:1]
    for one in after:
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
            return one.value.value
    return ""


def signature(node: Function, source: str, name: str = "") -> str:
    """A function as one would write it down, without `self`."""
    known = node.args
    positional = [*known.posonlyargs, *known.args]
    defaults = [None] * (len(positional) - len(known.defaults)) + list(known.defaults)
    parts = [
        argument(one, default, source) for one, default in zip(positional, defaults, strict=True) if one.arg not in ("self", "cls")
    ]
    if known.vararg:
        parts.append("*" + argument(known.vararg, None, source))
    elif known.kwonlyargs:
        parts.append("*")
    parts += [argument(one, default, source) for one, default in zip(known.kwonlyargs, known.kw_defaults, strict=True)]
    if known.kwarg:
        parts.append("**" + argument(known.kwarg, None, source))
    returns = f" -> {text_of(node.returns, source)}" if node.returns is not None and not name else ""
    line = f"{name or node.name}({', '.join(parts)}){returns}"
    broken = "".join(f"\n    {part}," for part in parts)
    return line if len(line) <= WIDTH else f"{name or node.name}({broken}\n){returns}"


def argument(one: ast.arg, default: ast.expr | None, source: str) -> str:
    """One parameter."""
    shown = one.arg + (f": {text_of(one.annotation, source)}" if one.annotation is not None else "")
    if default is None:
        return shown
    value = "..." if isinstance(default, ast.Lambda) else text_of(default, source)
    return f"{shown} = {value}" if one.annotation is not None else f"{shown}={value}"


def text_of(node: ast.AST, source: str) -> str:
    """What stands in the file, on one line."""
    return " ".join((ast.get_source_segment(source, node) or "").split())


def fenced(text: str) -> str:
    """Code."""
    return f"```python\n{text}\n```"


def prose(docstring: str) -> str:
    """A docstring as Markdown: its sections of arguments, results and errors become lists."""
    lines: list[str] = []
    within = ""
    for line in docstring.splitlines():
        opens = SECTION.fullmatch(line)
        if opens:
            within = opens[1]
            lines += [f"**{'Arguments' if within == 'Args' else within}**", ""]
        elif within and (entry := re.fullmatch(r" {4}(\*{0,2}\w+): (.*)", line)) and within != "Returns":
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif within and line.strip():
            lines.append(("  " if within != "Returns" else "") + line.strip())
        else:
            within = within if line.startswith(" ") or not line else ""
            lines.append(line)
    return "\n".join(lines).strip()
