"""Text between two markers of a page: filling it, and finding the pages that fell behind.

A page says `<!-- generated: NAME -->`; what the writer of that name returns stands below it, up to `<!-- end of generated -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

BEGIN = re.compile(r"<!-- generated: (\w+) -->")
END = "<!-- end of generated -->"

Writers = Mapping[str, Callable[[], str]]


def fill(markdown: str, writers: Writers, where: str = "the page") -> str:
    """A page with all its generated text made anew; what stood between the markers is dropped, conflict markers of git included.

    Raises:
        SystemExit: a marker names no writer, or begin and end do not alternate.
    """
    lines: list[str] = []
    inside = 0
    for number, line in enumerate(markdown.split("\n"), 1):
        begins = BEGIN.fullmatch(line)
        if begins and inside:
            raise SystemExit(
                f"{where}, line {number}: the text that begins in line {inside} has no `{END}`. Write it below that text."
            )
        if begins and begins[1] not in writers:
            raise SystemExit(f"{where}, line {number}: nothing writes `{begins[1]}`. There are: {', '.join(sorted(writers))}.")
        if begins:
            lines += [line, "", writers[begins[1]](), "", END]
            inside = number
        elif line == END and not inside:
            raise SystemExit(f"{where}, line {number}: `{END}` ends nothing. Remove it, or write `<!-- generated: NAME -->` above.")
        elif line == END:
            inside = 0
        elif not inside:
            lines.append(line)
    if inside:
        raise SystemExit(f"{where}, line {inside}: the generated text has no end. Write `{END}` below it.")
    return "\n".join(lines)


def stale(folder: Path, writers: Writers, pictures: Writers) -> dict[Path, str]:
    """Files that are not as they would be written now, each with its new text.

    Args:
        folder: where the pages lie.
        writers: the text of each marker.
        pictures: whole files, by their path within the folder.
    """
    found = {}
    for path in sorted(folder.glob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = fill(old, writers, str(path))
        if new != old:
            found[path] = new
    for name, picture in pictures.items():
        path = folder / name
        drawn = picture().rstrip() + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != drawn:
            found[path] = drawn
    return found
