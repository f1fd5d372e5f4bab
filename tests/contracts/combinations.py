"""Which techniques are tried together, how they are put into one run, and which are refused beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

from luthier.columns.chunked import passes_of, resolve
from luthier.errors import LuthierError
from luthier.kinds import (
    Batch,
    Callback,
    GradientEstimator,
    GradientTransform,
    Head,
    LossTerm,
    Optimizer,
    PairLoss,
    Prompt,
    Selective,
    StepLoss,
    TokenLoss,
    TokenWeight,
    WeightDelta,
)
from luthier.recipe.parts import completed
from luthier.registry import KINDS, Part, key_of
from luthier.training.engine import Engine
from tests.conftest import split
from tests.contracts.covering import covering
from tests.contracts.fixtures import (
    FIXTURES,
    FREES,
    LEARNING,
    NOW,
    OPTIONS,
    RUNS,
    TOGETHER,
    engine_of,
    part_of,
    rows_for,
    toys_listed,
)
from tests.toys.helpers import model_of, rows_of_eight

Technique = tuple[str, str]
"""Kind and name."""

APART_BY_ROLES: tuple[tuple[str, ...], ...] = (
    ("attention_query", "attention_value"),
    ("mlp_up",),
    ("attention_output",),
    ("mlp_gate",),
)
"""Where selections stand, one each, when several are in a run."""
APART: dict[str, dict[str, Any]] = {"half": {"embeddings": "freeze"}}
"""Other options of selections that keep them to their roles."""
STANDS = ("s2ft",)
"""Selections that have no roles to choose and stand where no other one is given a place."""
IN_BLOCKS = ("half", "greentrainer")
"""Selections that take nothing outside of the blocks."""

BESIDE = ("half", "lora", "prompt_tuning", "spiel")
"""Rows of matrices, what stands beside them, what stands before the input, and scattered entries: everything that is learnt meets
each of them."""

MOST = {
    "tune": 7,
    "objective": 6,
    "input_map": 2,
    "loss_term": 3,
    "token_loss": 2,
    "pair_loss": 3,
    "step_loss": 2,
    "token_weight": 2,
}
"""How many of a key, or of a kind, stand in one combination; 1 of every other kind."""

TRAITS: dict[str, Callable[[Any], bool]] = {
    "counts": lambda value: isinstance(value, TokenWeight) and value.count is not None,
    "rule": lambda value: isinstance(value, TokenWeight) and value.look is not None,
    "observes": lambda value: isinstance(value, Selective | WeightDelta) and value.observe is not None,
    "comes and goes": lambda value: getattr(value, "refresh", None) is not None or getattr(value, "resize", None) is not None,
    "one at a time": lambda value: isinstance(value, GradientEstimator) and "all" not in value.gives,
    "looks elsewhere": lambda value: isinstance(value, GradientEstimator) and "gradients" not in value.gives,
    "all at once": lambda value: (
        (isinstance(value, GradientTransform) and value.scope == "all")
        or (isinstance(value, Callback) and "gradients" in value.needs)
    ),
    "reads rows": lambda value: isinstance(value, Head),
    "learns its prompt": lambda value: isinstance(value, Prompt) and value.labels is not None,
    "compares": lambda value: (
        (isinstance(value, PairLoss | StepLoss) and value.reference)
        or (
            isinstance(value, LossTerm | TokenLoss | TokenWeight)
            and any(one.at == "base" for one in passes_of(resolve(value.columns)))
        )
    ),
}
"""What the values of techniques are like, where that is the reason for a refusal."""

REFUSED: dict[tuple[str, str], str] = {
    # The number of units must be known before the step: two ways to count cannot both be right. Rules alone take turns.
    ("counts", "counts"): "count tokens differently",
    ("counts", "rule"): "count tokens differently",
    # Rows have one beginning.
    ("prompt", "prompt"): "is a second prompt",
    # A rule could keep one answer of two.
    ("rule", "pair_loss"): "these rows belong together",
    ("rule", "step_loss"): "these rows belong together",
    ("rule", "reference"): "these rows belong together",
    ("reference", "reference"): "are both the reference",
    # There is no average over time of numbers that come and go.
    ("following_reference", "comes and goes"): "an average over time needs the same numbers",
    # What a head reads need not have targets.
    ("rule", "reads rows"): "chooses among the labels of a step",
    ("reads rows", "reads rows"): "both put a head beside the model",
    # The base knows nothing of tokens that are learnt.
    ("learns its prompt", "compares"): "compares with the base, which does not read the virtual tokens",
    # There is never a whole gradient, or none that went through the model.
    ("looks elsewhere", "observes"): "observes whole gradients",
    ("one at a time", "observes"): "observes whole gradients",
    ("one at a time", "all at once"): "needs all gradients at once",
    # They take whole blocks and what is outside of them, and leave no other selection its place.
    ("reinitialized_top", "selective"): "both train the same numbers",
    ("freeze_lower", "half"): "both train the same numbers",
    ("freeze_lower", "greentrainer"): "both train the same numbers",
    ("freeze_lower", "s2ft"): "both train the same numbers",
}
"""What is refused beside each other, by names, kinds or traits, and words of the error. A pair that stands here is tried only to see
that it still is refused; every other pair must meet."""

COMPANION = ("selective", "half")
"""Joins two techniques one of which takes nothing that the other frees, such as a transform for whole matrices."""


def _traits(kind: str, name: str) -> frozenset[str]:
    values = part_of(kind, name).values
    return frozenset({kind, name, *(trait for trait, has in TRAITS.items() if any(map(has, values)))})


with toys_listed():
    traits = {one: _traits(*one) for one in RUNS}
    """Name, kind and traits of every technique that takes part in a run."""


@cache
def refused(one: Technique, other: Technique) -> str | None:
    """The words by which two techniques are refused; none: they go together."""
    for (a, b), words in REFUSED.items():
        if (a in traits[one] and b in traits[other]) or (b in traits[one] and a in traits[other]):
            return words
    return None


def _is_apart(kind: str, name: str) -> bool:
    """Whether a selection can be given roles, or stands where no other one does."""
    return kind != "selective" or name in STANDS or (kind, name, "target_modules") in OPTIONS


_key = {kind: key_of(kind) for kind in KINDS}
_group = {one: "tune" if key_of(one[0]) == "tune" else one[0] for one in RUNS}
_apart = {one: _is_apart(*one) for one in RUNS}


def has_room(chosen: Sequence[Technique], one: Technique) -> bool:
    """Whether a technique can join others in a combination."""
    if any(refused(one, other) is not None for other in chosen):
        return False
    here = [*chosen, one]
    rows = {FIXTURES[kind].rows for kind, _ in here} - {rows_of_eight}
    learnt = sum(_key[kind] == "objective" for kind, _ in here)
    same = sum(_group[other] == _group[one] for other in here)
    selections = [other for other in here if other[0] == "selective"]
    spread = sum(not _apart[other] for other in selections)
    return (
        len(rows) < 2
        and learnt <= MOST["objective"]
        and same <= MOST.get(_group[one], 1)
        and len(selections) <= (len(APART_BY_ROLES) if not spread else 2)
    )


def pairs() -> list[tuple[Technique, Technique]]:
    """What must meet: all that frees numbers, all that is learnt, and everything learnt beside some of what frees numbers."""
    beside = [(one, other) for one in LEARNING for other in FREES if other[1] in BESIDE]
    return [*combinations(FREES, 2), *combinations(LEARNING, 2), *beside]


def arrays() -> list[tuple[Technique, ...]]:
    """The combinations: every pair meets, and every technique meets one of each other kind."""
    return covering(TOGETHER, pairs(), groups={one: one[0] for one in TOGETHER}, room=has_room)


class Together(NamedTuple):
    """Techniques in one run."""

    chosen: tuple[Technique, ...]
    parts: dict[Technique, Part]
    run: Engine

    @property
    def batch(self) -> Batch:
        """The rows it learns from. Where a prompt has targets of its own, every row has one, and needs what rows with targets have."""
        batch = rows_for([kind for kind, _ in self.chosen])
        if not any("learns its prompt" in traits[one] for one in self.chosen):
            return batch
        return batch._replace(columns={name: column.nan_to_num(0.02) for name, column in batch.columns.items()})

    def tuning(self) -> dict[str, tuple[Technique, Part]]:
        """What frees numbers, by slot: of each technique there is one."""
        return {name: ((kind, name), part) for (kind, name), part in self.parts.items() if key_of(kind) == "tune"}


def parts_for(chosen: Sequence[Technique]) -> dict[Technique, Part]:
    """The parts of a combination. Selections that would claim the same numbers are given roles of their own."""
    selections = [one for one in chosen if one[0] == "selective"]
    free = iter(APART_BY_ROLES)
    spread = any(not _apart[one] for one in selections)
    options: dict[Technique, dict[str, Any]] = {}
    for one in selections if len(selections) > 1 else ():
        if _apart[one] and one[1] not in STANDS and not (spread and one[1] in IN_BLOCKS):
            options[one] = {**APART.get(one[1], {}), "target_modules": ("embedding",) if spread else next(free)}
    return {one: part_of(*one, options.get(one)) for one in chosen}


def compares(part: Part) -> bool:
    """Whether a part compares answers with a reference."""
    return any(isinstance(value, PairLoss | StepLoss) and value.reference for value in part.values)


def build(parts: dict[Technique, Part], **more: Any) -> Engine:
    """A run of these parts on a tiny model, with plain ones for what they leave open."""
    keys: dict[str, list[Any]] = {}
    for (kind, _), part in parts.items():
        keys.setdefault(key_of(kind), []).append(part)
    # Transforms stand before the optimizer.
    keys["optimizer"] = sorted(keys.get("optimizer", []), key=lambda part: isinstance(part.values[0], Optimizer))
    own = [value for part in keys["optimizer"] for value in part.values if isinstance(value, Optimizer)]
    if not own or own[-1].takes is not None:
        keys["optimizer"] = [*keys["optimizer"], "adamw"]
    if any(kind == "reference" for kind, _ in parts) and not any(compares(part) for part in parts.values()):
        keys["objective"].append("dpo")
    keys.setdefault("tune", ["full"])
    model = more.pop("model", None)
    try:
        return engine_of(model or model_of(), **_listed(keys), **more)
    except LuthierError as error:
        if "`adamw` takes none of what trains" not in str(error) or model is not None or not own:
            raise
    # Optimizers of the combination take all there is.
    return engine_of(model_of(), **_listed({**keys, "optimizer": keys["optimizer"][:-1]}), **more)


def _listed(keys: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: list(value) for key, value in completed(keys).items()}


def together(chosen: tuple[Technique, ...], **more: Any) -> Together:
    """A combination in one run that keeps the base."""
    parts = parts_for(chosen)
    return Together(chosen, parts, build(parts, **{"keep_base": True, **more}))


def try_out(chosen: tuple[Technique, ...]) -> None:
    """Build a combination and take a few steps, to see whether it is refused."""
    made = together(chosen)
    made.run.tune.model.train()
    for step in range(3):
        made.run.step(split(made.batch, (5, 3)), NOW._replace(step=step, learning_rate=1e-3))


def runnable(chosen: tuple[Technique, ...]) -> Iterator[tuple[Technique, ...]]:
    """A combination, or where it is refused smaller ones in which all of its pairs meet that can.

    Raises:
        AssertionError: an error does not name a part or says nothing of how to fix, or a pair is refused that no table lists.
    """
    try:
        try_out(chosen)
    except LuthierError as error:
        guilty = [one for one in chosen if one[1] in str(error)]
        said = f"{', '.join(name for _, name in chosen)}: {error}"
        assert guilty, f"a refusal names a part: {said}"
        assert error.fix, f"a refusal says how to fix: {said}"
        if len(chosen) == 2 and "takes none of what trains" in str(error) and COMPANION not in chosen:
            yield from runnable((COMPANION, *chosen))
            return
        assert len(chosen) > 2, f"refused, and not in the table of what is: {said}"
        one = guilty[-1]
        others = [other for other in chosen if other != one]
        yield from runnable(tuple(others))
        half = len(others) // 2
        for some in (others[:half], others[half:]):
            if some:
                yield from runnable(tuple(other for other in chosen if other == one or other in some))
        return
    yield chosen


def refusals() -> list[tuple[tuple[str, str], Technique, Technique]]:
    """Every pair that the table says is refused, with its entry. Two of one kind of which a run has one only are no pair."""
    found = []
    for entry in REFUSED:
        for one, other in combinations(TOGETHER, 2):
            if any(a in traits[one] and b in traits[other] for a, b in (entry, entry[::-1])):
                found.append((entry, one, other))
    return found
