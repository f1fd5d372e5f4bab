"""luthier fine-tunes language models and shows what each fine-tune changed.

`luthier.train(...)` runs a recipe, `luthier.part(...)` names a technique with its options, `luthier.read_run(...)` opens a run.
Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError
from luthier.threads import let_wait

let_wait()

if TYPE_CHECKING:
    from luthier.delta import Delta
    from luthier.evaluate.own import metric
    from luthier.recipe import Recipe, read_recipe
    from luthier.registry import method, part
    from luthier.results.folder import Run, read_run
    from luthier.results.opened import open_model, open_run
    from luthier.runs.probe import probe
    from luthier.runs.train import train

__version__ = "0.1.0"

_HOMES = {
    "train": "luthier.runs.train",
    "part": "luthier.registry",
    "method": "luthier.registry",
    "metric": "luthier.evaluate.own",
    "Recipe": "luthier.recipe",
    "read_recipe": "luthier.recipe",
    "Run": "luthier.results.folder",
    "read_run": "luthier.results.folder",
    "Delta": "luthier.delta",
    "open_model": "luthier.results.opened",
    "open_run": "luthier.results.opened",
    "probe": "luthier.runs.probe",
}

__all__ = [
    "Delta",
    "LuthierError",
    "Recipe",
    "Run",
    "__version__",
    "method",
    "metric",
    "open_model",
    "open_run",
    "part",
    "probe",
    "read_recipe",
    "read_run",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")
