"""What keys of other tools are called here, from the table that the errors and `luthier convert` read."""

from __future__ import annotations

from itertools import groupby

from generated.tables import table
from luthier.registry.foreign import foreign


def page() -> str:
    """One table for each part; the cells are Markdown already."""
    pieces = []
    for part, lines in groupby(foreign(), key=lambda line: line.part):
        rows = [(line.theirs, line.here, line.differs) for line in lines]
        pieces += [f"### {part}", table(("other tool's key", "here", "what differs"), rows)]
    return "\n\n".join(pieces)
