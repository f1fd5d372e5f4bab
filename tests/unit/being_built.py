"""Keys that `luthier convert` writes and that another change brings. To be deleted, with its uses, when it has brought them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.recipe import reference

_KNOWN = [key for key, _, _ in reference()]
BEING_BUILT = {
    key for key in ("rows.columns", "rows.validate", "rows.blocks") if not any(f"{one}.".startswith(f"{key}.") for one in _KNOWN)
}
"""Keys of a recipe that the code does not know yet."""


def without_unbuilt(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what the code does not know yet; a source's own columns are of the same change."""
    if not BEING_BUILT:
        return dict(recipe)
    rows = {key: value for key, value in recipe["rows"].items() if f"rows.{key}" not in BEING_BUILT}
    if isinstance(rows["train"], list):
        rows["train"] = [
            {"rows": one["rows"], "weight": one.get("weight", 1)} if isinstance(one, Mapping) else one for one in rows["train"]
        ]
    return {**recipe, "rows": rows}
