"""The recipe: what a run is asked to do, and how it is read."""

from luthier.recipe.reading import apply_overrides, make_recipe, read_recipe, reference, same_steps, with_keys
from luthier.recipe.schema import EvaluationSet, Recipe, RowsRecipe, SourceRecipe, TrainRecipe

__all__ = [
    "EvaluationSet",
    "Recipe",
    "RowsRecipe",
    "SourceRecipe",
    "TrainRecipe",
    "apply_overrides",
    "make_recipe",
    "read_recipe",
    "reference",
    "same_steps",
    "with_keys",
]
