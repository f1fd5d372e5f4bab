"""What a probe found, in the terminal and as a figure of its own."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from luthier import disk
from luthier.errors import LuthierError
from luthier.kinds import Cell, Drawing, Finding, Line
from luthier.kinds import Table as Rows
from luthier.report.svg import Element, Scale, add, figure, ticks
from luthier.report.terminal import plain
from luthier.report.words import number, plural, spaced

MOST_ROWS = 20
"""Rows of a table shown in the terminal; scripts get all."""
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 40, 48
COLORS = ("#9a5512", "#3d6a8a", "#6b7a2f", "#8a3d6a")
STYLE = (
    "svg { background: #fffefb; font-family: system-ui, sans-serif; } text { fill: #2b211a; font-size: 12px; } "
    ".tick { fill: #6d6056; font-size: 11px; } .title { font-weight: 600; } .grid { stroke: #e7dece; stroke-width: .75; } "
    ".curve { fill: none; stroke-width: 1.9; stroke-linejoin: round; }"
)


def found(finding: Finding) -> Group:
    """The sentence, the tables and the notes."""
    parts: list[RenderableType] = [plain(finding.sentence, "bold")]
    for title, rows in ({"": finding.rows} | dict(finding.tables)).items():
        if rows:
            parts += [Text(), *([plain(title, "dim")] if title else []), _table(rows[:MOST_ROWS])]
        if len(rows) > MOST_ROWS:
            parts.append(plain(f"and {plural(len(rows) - MOST_ROWS, 'more row', 'more rows')}: --json gives all", "dim"))
    notes = [plain(f"note: {note}", "yellow") for note in finding.notes]
    return Group(*parts, *([Text(), *notes] if notes else []))


def _table(rows: Rows) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column, value in rows[0].items():
        text = isinstance(value, str)
        # Where room is short names give way, never numbers.
        table.add_column(
            spaced(column).replace(" ", "\n"), justify="left" if text else "right", no_wrap=not text, overflow="ellipsis"
        )
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Cell) -> Text:
    if value is None:
        return Text("-")
    return plain(number(value) if isinstance(value, float) else str(value))


def write_figure(finding: Finding, path: Path) -> None:
    """Write a finding's figure as an SVG file that needs nothing else.

    Raises:
        LuthierError: the name is not that of an SVG file, the probe drew nothing, or the file cannot be written.
    """
    if path.suffix.lower() != ".svg":
        raise LuthierError("the figure is an SVG file", where=str(path), fix=f"name it {path.stem or 'figure'}.svg")
    if finding.figure is None:
        raise LuthierError("this probe draws no figure", where="--figure", fix="leave it out")
    svg = draw(finding.figure)
    # A file of its own says its language, its size and its colors itself.
    svg.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "width": str(WIDTH), "height": str(HEIGHT)}
    add(svg, "style", STYLE)
    with disk.written(path) as beside:
        beside.write_text(ElementTree.tostring(svg, encoding="unicode"), encoding="utf-8")


def draw(drawing: Drawing) -> Element:
    """A drawing as SVG: its lines over one grid, named below the title where there are several."""
    points = [point for line in drawing.lines for point in line.points] or [(0.0, 0.0)]
    low, high = min(0.0, *(y for _, y in points)), max(y for _, y in points)
    across = Scale(min(x for x, _ in points), max(x for x, _ in points), LEFT, WIDTH - RIGHT)
    up = Scale(low, high if high > low else low + 1.0, HEIGHT - BOTTOM, TOP)
    svg = figure(WIDTH, HEIGHT, f"{drawing.title}: {drawing.up} over {drawing.across}", "drawing")
    add(svg, "text", drawing.title, class_="title", x=LEFT, y=18)
    for tick in ticks(up.low, up.high, 5):
        add(svg, "line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=up.at(tick), y2=up.at(tick))
        add(svg, "text", f"{tick:,.12g}", class_="tick", x=LEFT - 8, y=up.at(tick) + 3.5, text_anchor="end")
    for tick in ticks(across.low, across.high, 8):
        add(svg, "text", f"{tick:,.12g}", class_="tick", x=across.at(tick), y=HEIGHT - BOTTOM + 18, text_anchor="middle")
    add(svg, "text", drawing.across, class_="tick", x=across.stop, y=HEIGHT - 10, text_anchor="end")
    add(svg, "text", drawing.up, class_="tick", x=LEFT, y=32)
    for index, line in enumerate(drawing.lines):
        _line(svg, line, across, up, COLORS[index % len(COLORS)])
        if len(drawing.lines) > 1:
            add(
                svg,
                "text",
                line.name,
                x=across.stop,
                y=TOP + 14 * (index + 1),
                text_anchor="end",
                style=f"fill: {COLORS[index % len(COLORS)]}",
            )
    return svg


def _line(svg: Element, line: Line, across: Scale, up: Scale, color: str) -> None:
    places = [(across.at(x), up.at(y)) for x, y in line.points]
    drawn = add(svg, "polyline", class_="curve", points=" ".join(f"{x:g},{y:g}" for x, y in places), stroke=color)
    add(drawn, "title", line.name)
    if line.dots:
        for (x, y), (cx, cy) in zip(line.points, places, strict=True):
            add(add(svg, "circle", cx=cx, cy=cy, r=3.5, fill=color), "title", f"{line.name}: {x:g}, {y:g}")
