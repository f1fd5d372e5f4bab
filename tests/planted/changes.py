"""What a fault that is drawn by chance may change, in three sets.

`near` takes the nearest other thing: `<` becomes `<=`, 1 becomes 2, a product a quotient. `far` takes another one at the same places, and
`parts` changes other parts of the language: conditions, arguments, functions, statements. Tests that were mended until they caught every
fault of one set say by the others how much they hold that nobody mended them for.
"""

from __future__ import annotations

import ast
import bisect
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

Change = tuple[str, int, int, str]
"""Its kind, and the bytes of the file that become something else."""


class Text:
    """A file's bytes, by line and column."""

    def __init__(self, text: str) -> None:
        self.raw = text.encode()
        self.starts = [0, *(match.end() for match in re.finditer(rb"\n", self.raw))]
        self.lines = [line.strip() for line in text.split("\n")]

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def begin(self, node: ast.expr | ast.keyword | ast.stmt) -> int:
        return self.at(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.keyword | ast.stmt) -> int:
        return self.at(node.end_lineno or node.lineno, node.end_col_offset or 0)

    def of(self, node: ast.expr) -> str:
        return self.raw[self.begin(node) : self.end(node)].decode()

    def place(self, begin: int) -> str:
        """Where something stands: the text of its line, the column there, and which of equal lines it is."""
        number = bisect.bisect_right(self.starts, begin) - 1
        line, left = self.lines[number], self.raw[self.starts[number] :]
        column = begin - self.starts[number] - (len(left) - len(left.lstrip()))
        again = self.lines[:number].count(line)
        return f"`{line}` at {column}{f', {again + 1}.' if again else ''}"


_OPERATORS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*")}
_OPERATORS |= {ast.Pow: ("**", "*"), ast.Mod: ("%", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&")}
_COMPARISONS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")}
_COMPARISONS |= {ast.Eq: ("==", "!="), ast.NotEq: ("!=", "==")}
_FAR_OPERATORS = {ast.Add: ("+", "*"), ast.Sub: ("-", "*"), ast.Mult: ("*", "+"), ast.Div: ("/", "-"), ast.FloorDiv: ("//", "+")}
_FAR_OPERATORS |= {ast.Pow: ("**", "+"), ast.Mod: ("%", "+")}
_FAR_COMPARISONS = {ast.Lt: ("<", ">"), ast.LtE: ("<=", ">="), ast.Gt: (">", "<"), ast.GtE: (">=", "<="), ast.Is: ("is", "is not")}
_FAR_COMPARISONS |= {ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in")}
_ASSIGNED = {ast.Add: ("+=", "-="), ast.Sub: ("-=", "+="), ast.Mult: ("*=", "/="), ast.Div: ("/=", "*=")}
_FUNCTIONS = {"min": "max", "amin": "amax", "minimum": "maximum", "argmin": "argmax", "any": "all", "sum": "mean", "floor": "ceil"}
_FUNCTIONS |= {"sin": "cos", "triu": "tril", "zeros_like": "ones_like", "zeros": "ones", "new_zeros": "new_ones", "log": "exp"}
_OTHER_FUNCTIONS = _FUNCTIONS | {new: old for old, new in _FUNCTIONS.items()}


def near(node: ast.AST, where: Text, defaults: dict[int, ast.expr]) -> Iterator[Change]:
    """An operator, a sign, a number, a comparison, a detached tensor or a default becomes its neighbor."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        old, new = _OPERATORS[type(node.op)]
        yield from _between("operator", where, where.end(node.left), where.begin(node.right), old, new)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        old, new = _COMPARISONS[type(node.ops[0])]
        yield from _between("comparison", where, where.end(node.left), where.begin(node.comparators[0]), old, new)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", where.begin(node), where.begin(node) + 1, ""
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach" and not node.args:
        yield "detach", where.raw.rindex(b".", where.begin(node), where.end(node)), where.end(node), ""
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        kind = "default" if id(node) in defaults else "constant"
        yield kind, where.begin(node), where.end(node), _other(node.value)


def far(node: ast.AST, where: Text, defaults: dict[int, ast.expr]) -> Iterator[Change]:
    """Another operator, a comparison turned round, a smaller number, a minus put in."""
    if isinstance(node, ast.BinOp) and type(node.op) in _FAR_OPERATORS:
        old, new = _FAR_OPERATORS[type(node.op)]
        yield from _between("operator", where, where.end(node.left), where.begin(node.right), old, new)
        if isinstance(node.op, ast.Mult | ast.Div) and not isinstance(node.left, ast.BinOp):
            yield "sign", where.begin(node.left), where.begin(node.left), "-"
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _FAR_COMPARISONS:
        old, new = _FAR_COMPARISONS[type(node.ops[0])]
        yield from _between("comparison", where, where.end(node.left), where.begin(node.comparators[0]), old, new)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        kind = "default" if id(node) in defaults else "constant"
        yield kind, where.begin(node), where.end(node), _smaller(node.value)


def parts(node: ast.AST, where: Text, defaults: dict[int, ast.expr]) -> Iterator[Change]:
    """A condition the other way round, an argument left out or swapped, another function, an assignment undone, a statement gone."""
    if isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in pairwise(node.values):
            yield from _between("condition", where, where.end(left), where.begin(right), old, new)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "condition", where.begin(node), where.begin(node) + 3, ""
    elif isinstance(node, ast.If | ast.IfExp):
        yield "condition", where.begin(node.test), where.end(node.test), f"not ({where.of(node.test)})"
    elif isinstance(node, ast.Call):
        yield from _called(node, where)
    elif isinstance(node, ast.AugAssign) and type(node.op) in _ASSIGNED:
        old, new = _ASSIGNED[type(node.op)]
        yield from _between("assignment", where, where.end(node.target), where.begin(node.value), old, new)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "statement", where.begin(node), where.end(node), "pass"


def _called(node: ast.Call, where: Text) -> Iterator[Change]:
    given: list[ast.expr | ast.keyword] = [*node.args, *node.keywords]
    for before, one in pairwise(given):
        gap = where.raw[where.end(before) : where.begin(one)].decode()
        if isinstance(one, ast.keyword) and one.arg not in (None, "strict") and gap.strip() == ",":
            yield "argument", where.end(before), where.end(one), ""
    if len(node.args) >= 2 and not any(isinstance(one, ast.Starred) for one in node.args[:2]):
        first, second = node.args[:2]
        gap = where.raw[where.end(first) : where.begin(second)].decode()
        if gap.strip() == ",":
            yield "argument", where.begin(first), where.end(second), f"{where.of(second)}{gap}{where.of(first)}"
    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
    if name in _OTHER_FUNCTIONS:
        end = where.end(node.func)
        yield "function", end - len(name), end, _OTHER_FUNCTIONS[name]


def _between(kind: str, where: Text, begin: int, end: int, old: str, new: str) -> Iterator[Change]:
    gap = where.raw[begin:end].decode()
    if gap.count(old) == 1 and "#" not in gap:
        place = begin + len(gap[: gap.index(old)].encode())
        yield kind, place, place + len(old), new


def _other(value: float) -> str:
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    return repr(value * 2) if value else "0.5"


def _smaller(value: float) -> str:
    if isinstance(value, int):
        return str(value - 1)
    return repr(value / 2) if value else "-0.5"


SETS: dict[str, Callable[[ast.AST, Text, dict[int, ast.expr]], Iterator[Change]]] = {"near": near, "far": far, "parts": parts}
