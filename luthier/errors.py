"""One error for everything a user can mend: what was wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LuthierError(Exception):
    """A mistake the user can mend.

    Args:
        what: what was wrong, one sentence.
        where: the place: a file and line, a recipe key, a row id.
        mend: what to do about it, as an instruction.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if mend:
            lines.append(f"  mend:  {mend}")
        super().__init__("\n".join(lines))

    def as_json(self) -> dict[str, str]:
        """The same three facts for scripts."""
        return {"error": self.what, "where": self.where, "mend": self.mend}


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the known names closest to `name`, or all of them when few."""
    names = sorted(str(candidate) for candidate in known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"`{candidate}`" for candidate in close) + "?"
    if names and len(names) <= 30:
        return "known: " + ", ".join(names)
    return ""
