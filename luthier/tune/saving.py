"""What `transformers` saves of a model is its weights: what stands beside them would be lost, and the untouched base be saved instead."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError
from luthier.models.quantized import quantized

if TYPE_CHECKING:
    from luthier.tune.attached import Attached

SAVES = ("save_pretrained", "push_to_hub")
"""The second calls the first, but makes a place on the hub before it does."""


class Guard:
    """Stands in a model for one of its ways to save, and refuses while that would save something else than what the model computes.

    Args:
        way: one of `SAVES`.
        model: what is saved.
        tune: what stands beside its weights.
    """

    def __init__(self, way: str, model: Any, tune: Attached) -> None:
        self.way, self.model, self.tune = way, weakref.ref(model), weakref.ref(tune)

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Save the model as it would be without this.

        Raises:
            LuthierError: something stands beside its weights and is neither merged nor switched off.
        """
        model, tune = self.model(), self.tune()
        lost = [] if tune is None else what_is_lost(tune)
        if lost:
            raise LuthierError(
                f"{', '.join(f'`{one}`' for one in lost)} would not be saved: it stands beside the weights, and they alone are the base's",
                where=f"model.{self.way}",
                fix="run.export(FOLDER) writes the whole result, and run.export(FOLDER, form='peft') an adapter; `run.tune.merge()` "
                "puts into the weights what can be put there; the base itself is saved under `with run.tune.off():`",
            )
        return getattr(type(model), self.way)(model, *given, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        # A copy of the model saves itself, not the one it was copied from.
        model = self.model()
        return Guard(self.way, memo.get(id(model), model), self.tune())  # type: ignore[arg-type]


def guard(tune: Attached) -> None:
    """Let the model refuse to be saved while something stands beside its weights."""
    for way in SAVES:
        if hasattr(type(tune.model), way):
            tune.model.__dict__[way] = Guard(way, tune.model, tune)


def unguard(tune: Attached) -> None:
    """Give the model its own ways to save back."""
    for way in SAVES:
        tune.model.__dict__.pop(way, None)


def what_is_lost(tune: Attached) -> list[str]:
    """The techniques of which the weights hold nothing as they are."""
    if tune.is_off or tune.merged is not None:
        return []
    beside = [own.slot for own, _ in tune.prefixes]
    for site in tune.sites.values():
        beside += [own.slot for own in (*site.additions, *site.edits) if own.stands]
        beside += [own.slot for own, _ in site.prompts]
    beside += [tune.head[0].slot] if tune.head is not None else []
    beside += ["quantize"] if quantized(tune.model) else []
    return list(dict.fromkeys(beside))
