"""The one table of what techniques are: each kind's folder and value, and the key of a recipe, or the command, that takes it.

A new kind is its value in `luthier.kinds`, its name in this table, and the owner that takes its values from a run's parts. The fields of
the recipe, what the command line can override, paths beside the recipe, the keys by which the lab and sweeps know a run, and the
parts of the plan and the engine follow from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from luthier.errors import LuthierError, nearest
from luthier.kinds import (
    Callback,
    Freezing,
    GradientEstimator,
    GradientTransform,
    Head,
    InputMap,
    LossTerm,
    Optimizer,
    PairLoss,
    Prefix,
    Probe,
    Prompt,
    Reference,
    RepresentationEdit,
    RowMap,
    RowScore,
    Selective,
    StepLoss,
    TokenLoss,
    TokenWeight,
    WeightDelta,
)


class Key(NamedTuple):
    """A key of a recipe that holds techniques."""

    name: str
    """As written on the command line: `tune`, `rows.map`."""
    meaning: str
    kinds: Mapping[str, type]
    """What goes there: folder under `luthier/methods/` to the kind of its values."""
    default: Any = None
    """What a recipe holds that does not name the key."""
    otherwise: str = ""
    """The technique that joins a run in which no part, under whatever key, `brings` what this key is for."""
    brings: Callable[[Any], bool] = lambda value: True

    @property
    def path(self) -> tuple[str, ...]:
        """The key step by step."""
        return tuple(self.name.split("."))

    def of(self, recipe: Any) -> Any:
        """What a recipe holds under it."""
        for step in self.path:
            recipe = getattr(recipe, step)
        return recipe


def _teaches(value: Any) -> bool:
    return isinstance(value, PairLoss | Head) or (isinstance(value, LossTerm | TokenLoss | StepLoss) and not value.penalty)


KEYS: Mapping[str, Key] = {
    key.name: key
    for key in (
        Key(
            "tune",
            "which parameters may change",
            {
                "selective": Selective,
                "weight_delta": WeightDelta,
                "representation_edit": RepresentationEdit,
                "prefix": Prefix,
                "prompt": Prompt,
            },
            default="full",
        ),
        Key(
            "objective",
            "what is minimized, and what the model reads meanwhile; cross_entropy where nothing else is minimized",
            {
                "input_map": InputMap,
                "loss_term": LossTerm,
                "token_loss": TokenLoss,
                "pair_loss": PairLoss,
                "step_loss": StepLoss,
                "head": Head,
                "reference": Reference,
            },
            otherwise="cross_entropy",
            brings=_teaches,
        ),
        Key("token_weight", "how much each token counts", {"token_weight": TokenWeight}),
        Key(
            "optimizer",
            "gradient transforms and optimizers, in order",
            {"gradient_transform": GradientTransform, "optimizer": Optimizer},
            default=["clip", "adamw"],
        ),
        Key(
            "gradient_estimator",
            "how gradients are made; backprop where nothing else is named",
            {"gradient_estimator": GradientEstimator},
            otherwise="backprop",
            brings=lambda value: isinstance(value, GradientEstimator),
        ),
        Key("callbacks", "what happens between steps", {"callback": Callback}),
        Key("freeze", "what stands still, and when", {"freezing": Freezing}),
        Key("rows.map", "row maps: what else to learn from", {"row_map": RowMap}),
    )
}
"""By name, in the order in which their parts join a run."""

COMMANDS: Mapping[str, tuple[str, type]] = {
    "probe": ("luthier probe", Probe),
    "row_score": ("luthier rows select --by", RowScore),
}
"""Kinds that no recipe holds: folder to the command that uses them and the kind of their values."""

KINDS: Mapping[str, type] = {
    **{folder: kind for key in KEYS.values() for folder, kind in key.kinds.items()},
    **{folder: kind for folder, (_, kind) in COMMANDS.items()},
}
"""Folder under `luthier/methods/` to kind."""


def kinds_under(key: str) -> tuple[str, ...]:
    """The kinds that go under a recipe's key.

    Raises:
        LuthierError: no such key holds techniques.
    """
    if key not in KEYS:
        raise LuthierError(f"no key `{key}` holds techniques", fix=nearest(key, KEYS))
    return tuple(KEYS[key].kinds)


def key_of(kind: str) -> str:
    """The key that a kind goes under; empty for one that a command uses."""
    return next((key.name for key in KEYS.values() if kind in key.kinds), "")


def kind_of(value: object) -> str:
    """The folder name of a value's kind."""
    for name, kind in KINDS.items():
        if isinstance(value, kind):
            return name
    raise TypeError(f"{type(value).__name__} is no kind of luthier")


def fields_under(section: str) -> Iterator[tuple[str, Key]]:
    """The keys in one section of the recipe (empty: the recipe itself), by their names there."""
    for key in KEYS.values():
        *above, name = key.path
        if ".".join(above) == section:
            yield name, key
