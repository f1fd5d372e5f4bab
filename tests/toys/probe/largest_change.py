"""A toy probe: which tensors moved farthest."""

from __future__ import annotations

from luthier.kinds import Comparison, Drawing, Finding, Line, Probe
from luthier.registry import method


@method(title="Largest change")
def largest_change(*, most: int = 3) -> Probe:
    """List the tensors whose change has the largest norm.

    Args:
        most: how many.
    """

    def look(comparison: Comparison) -> Finding:
        norms = {str(place): float(comparison.change(place).norm()) for place in comparison.changed}
        rows = [{"tensor": name, "norm": norms[name]} for name in sorted(norms, key=lambda name: -norms[name])[:most]]
        line = Line("norms", [(float(i), row["norm"]) for i, row in enumerate(rows)], dots=True)
        sentence = f"{rows[0]['tensor']} moved farthest." if rows else "Nothing changed."
        return Finding(sentence, {"changed": len(norms)}, rows, figure=Drawing("Norms", "place in the list", "norm", [line]))

    return Probe(look)
