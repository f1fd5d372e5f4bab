"""The recipe: what a run is asked to do, and how it is read."""

from luthier.recipe.reading import apply_overrides, differences, flat, make_recipe, read_recipe, reference, same_steps, with_keys
from luthier.recipe.schema import (
    GIVEN_IN_PYTHON,
    VALIDATION,
    BlocksRecipe,
    EvaluationSet,
    Recipe,
    RowsRecipe,
    SourceRecipe,
    TrainRecipe,
    by_task,
)

__all__ = [
    "GIVEN_IN_PYTHON",
    "VALIDATION",
    "BlocksRecipe",
    "EvaluationSet",
    "Recipe",
    "RowsRecipe",
    "SourceRecipe",
    "TrainRecipe",
    "apply_overrides",
    "by_task",
    "differences",
    "flat",
    "make_recipe",
    "read_recipe",
    "reference",
    "same_steps",
    "with_keys",
]
