"""What belongs to a technique and to a paper: replications, and recipes to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import luthier
from luthier.errors import LuthierError

RECIPES = (Path(luthier.__file__).parents[1] / "recipes", Path(luthier.__file__).parent / "recipes", Path("recipes"))
"""Where recipes to start from lie: beside the package in a checkout, within it where it is installed, else in the working folder."""


def recipes_folder() -> Path | None:
    """The folder of recipes to start from; none where there is no such folder."""
    # Installed packages lie beside folders of other packages: only one that holds recipes counts.
    return next((folder for folder in RECIPES if any(folder.glob("*.yaml"))), None)


def claim(name: str) -> str:
    """What a replication is about; its name where it is not to be found."""
    from luthier.lab import replications

    try:
        return replications.line(name).title
    except LuthierError:
        return name


def replications_by_paper() -> dict[int, list[str]]:
    """The names of replications, by the number of the paper whose claim they run."""
    from luthier.lab import replications

    found: dict[int, list[str]] = {}
    for name in replications.names():
        for row in replications.line(name).rows:
            found.setdefault(row, []).append(name)
    return found


def recipes_by_technique() -> dict[str, list[str]]:
    """The file names of recipes to start from, by the techniques that they name."""
    from luthier.recipe.yaml_text import read_yaml
    from luthier.registry import KEYS

    folder = recipes_folder()
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.yaml")) if folder else []:
        data = read_yaml(path)
        for key in KEYS.values():
            held = data
            for step in key.path:
                held = held.get(step) if isinstance(held, Mapping) else None
            for one in held if isinstance(held, list) else [held]:
                for name in one if isinstance(one, Mapping) else [one]:
                    if isinstance(name, str):
                        found.setdefault(name, []).append(path.name)
    return found
