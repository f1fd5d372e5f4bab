"""The packages of luthier and the arrows between them, read from the imports: for the picture in the documentation, and for the test
that refuses circles and loose modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from generated.tables import cell, code, table
from luthier.report.svg import Element, add, figure, markup

PACKAGE = Path(__file__).parents[2] / "luthier"
GROUND = frozenset({"errors", "disk", "draws", "machine", "threads"})
"""The only modules that stand in no room."""
PICTURE = "images/rooms.svg"
"""Where the picture lies within `docs/`: Markdown as GitHub shows it holds no SVG of its own."""
TITLE = "The packages of luthier, each above those that it imports from"
WIDTH, BOX, TALL, GAP = 720, 108, 34, 26
STYLE = """
.paper { fill: #fcfaf7; }
.room { fill: #f1e8db; stroke: #8a5a2b; }
.arrow { stroke: #8a847b; fill: none; marker-end: url(#head); }
.head { fill: #8a847b; }
text { font: 13px system-ui, sans-serif; fill: #3d3a36; text-anchor: middle; }
"""

Arrows = Mapping[str, frozenset[str]]


def loose(package: Path = PACKAGE) -> set[str]:
    """Modules that lie beside the rooms, without the package's own two."""
    return {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}


def files(package: Path = PACKAGE, *, running: bool = True) -> dict[str, frozenset[str]]:
    """The modules that each module imports when it is loaded, all by dotted name; with `running` off, also those that it imports later
    or for a type checker alone."""
    modules = {_name(path, package): path for path in package.rglob("*.py")}
    return {name: frozenset(_imports(name, path, modules, running=running)) for name, path in modules.items()}


def rooms(package: Path = PACKAGE) -> Arrows:
    """Which rooms each room imports from, whenever and for whatever. The package's own modules are no room."""
    found: dict[str, set[str]] = {}
    for module, imported in files(package, running=False).items():
        room = _room(module)
        if room:
            found.setdefault(room, set()).update({_room(other) for other in imported} - {room, ""})
    return {room: frozenset(to) for room, to in sorted(found.items())}


def circle(arrows: Mapping[str, frozenset[str]]) -> list[str]:
    """A circle among the arrows, from a node back to it; empty where there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(arrows.get(node, ())):
            if found := walk(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := walk(node, []))), [])


def sentence(room: str, package: Path = PACKAGE) -> str:
    """What a room says of itself: the first sentence of its docstring."""
    path = package / room / "__init__.py" if (package / room).is_dir() else package / f"{room}.py"
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return f"{text.split('. ')[0].rstrip('.')}." if text else ""


def sentences() -> dict[str, str]:
    """What every room says of itself."""
    return {room: sentence(room) for room in rooms()}


def page() -> str:
    """The picture, and what each room says of itself."""
    rows = ((code(room), cell(text.replace("`", ""))) for room, text in sentences().items())
    return f"![{TITLE}]({PICTURE})\n\n{table(('room', 'what it is'), rows)}"


def picture() -> str:
    """The picture's file."""
    return draw(rooms())


def draw(arrows: Arrows) -> str:
    """The rooms, each above those it imports from, on the ground that all stand on. An arrow that others imply is left out."""
    arrows = {room: others - GROUND for room, others in arrows.items() if room not in GROUND}
    levels = _levels(arrows)
    rows = [[room for room in arrows if levels[room] == level] for level in range(max(levels.values()), -1, -1)]
    height = (len(rows) + 1) * (TALL + GAP) + GAP
    svg = figure(WIDTH, height, TITLE, "rooms")
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    add(svg, "style", STYLE)
    head = add(add(svg, "defs"), "marker", id="head", viewBox="0 0 8 8", refX=7, refY=4, orient="auto")
    head.set("markerWidth", "7")
    head.set("markerHeight", "7")
    add(head, "path", class_="head", d="M0 0L8 4L0 8z")
    add(svg, "rect", class_="paper", width=WIDTH, height=height, rx=6)
    middles = {
        room: (WIDTH * (place + 1) / (len(row) + 1), GAP + number * (TALL + GAP))
        for number, row in enumerate(rows)
        for place, room in enumerate(row)
    }
    for room, others in arrows.items():
        for other in sorted(others):
            if not any(other in _reached(arrows, third) for third in others - {other}):
                _arrow(svg, middles[room], middles[other])
    for room, (x, y) in middles.items():
        add(svg, "rect", class_="room", x=x - BOX / 2, y=y, width=BOX, height=TALL, rx=5)
        add(svg, "text", room, x=x, y=y + TALL / 2 + 5)
    add(svg, "rect", class_="room", x=GAP, y=height - GAP - TALL, width=WIDTH - 2 * GAP, height=TALL, rx=5)
    add(svg, "text", ", ".join(sorted(GROUND)), x=WIDTH / 2, y=height - GAP - TALL / 2 + 5)
    return str(markup(svg))


def _arrow(svg: Element, start: tuple[float, float], end: tuple[float, float]) -> None:
    (x, y), (to, below) = start, end
    y += TALL
    add(svg, "path", class_="arrow", d=f"M{x:g} {y:g}C{x:g} {y + GAP:g} {to:g} {below - GAP:g} {to:g} {below:g}")


def _levels(arrows: Arrows) -> dict[str, int]:
    """How high each room stands: one above the highest that it imports from."""
    levels: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in levels:
            levels[room] = 1 + max((level(other) for other in arrows.get(room, ())), default=-1)
        return levels[room]

    for room in arrows:
        level(room)
    return levels


def _reached(arrows: Arrows, room: str) -> set[str]:
    found: set[str] = set()
    waiting = [room]
    while waiting:
        for other in arrows.get(waiting.pop(), ()):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def _name(path: Path, package: Path) -> str:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    _, _, inside = module.partition(".")
    room = inside.partition(".")[0]
    return "" if room == "__main__" else room


def _imports(name: str, path: Path, modules: Mapping[str, Path], *, running: bool) -> Iterator[str]:
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), running=running):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        else:
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                target = deeper if deeper in modules else base
                if target in modules and target != name:
                    yield target


def _nodes(tree: ast.AST, *, running: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif running and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _for_types(node)):
            continue
        else:
            yield from _nodes(node, running=running)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
