"""Which techniques a recipe names, by key, looked up and checked; and the learning rate they advise."""

from __future__ import annotations

from collections.abc import Sequence

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import OBJECTIVES, STEPS, TUNES, Term, TokenLoss
from luthier.recipe import Recipe
from luthier.registry import Part

RATE_WITHOUT_ADVICE = 1e-4


def choose_parts(recipe: Recipe) -> dict[str, list[Part]]:
    """All techniques a recipe names, looked up and checked, by key."""
    sources = registry.make_all(recipe.source, ("source",), where="source")
    if len(sources) != 1:
        raise LuthierError("a run has exactly one source of gradients", where="source", mend="name one, e.g. backprop")
    return {
        "maps": registry.make_all(recipe.rows.map, ("row_map",), where="rows.map"),
        "tune": registry.make_all(recipe.tune, TUNES, where="tune"),
        "objective": objectives(recipe.objective),
        "weight": registry.make_all(recipe.token_weight, ("token_weight",), where="token_weight"),
        "chain": registry.make_all(recipe.step, STEPS, where="step"),
        "source": sources,
        "keep": registry.make_all(recipe.keep, ("keeper",), where="keep"),
        "freeze": registry.make_all(recipe.freeze, ("freezing",), where="freeze"),
    }


def objectives(spec: object) -> list[Part]:
    """The parts under `objective`: where they teach nothing by themselves, input maps and penalties, cross-entropy joins them.

    Raises:
        LuthierError: unknown technique or option, with the nearest name, or an option of the wrong type.
    """
    parts = registry.make_all(spec, OBJECTIVES, where="objective")
    values = [value for part in parts for value in part.values]
    if any(isinstance(value, Term | TokenLoss) and not value.penalty for value in values) or not parts:
        return parts
    return [*parts, registry.part("cross_entropy")]


def advised_rate(recipe: Recipe, tune: Sequence[Part]) -> tuple[float, str]:
    """The learning rate and where it comes from: the recipe, or the most careful advice among the techniques that train."""
    if recipe.train.learning_rate is not None:
        return recipe.train.learning_rate, "the recipe"
    advice = [(part.card.learning_rate, part.name) for part in tune if part.card.learning_rate is not None]
    if not advice:
        return RATE_WITHOUT_ADVICE, "the default"
    rate, name = min(advice)
    return rate, f"{name}'s default"
