"""The key `model` of a recipe, which may hold more than a name."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from luthier.errors import LuthierError, nearest

ADD_TOKENS = "add_tokens"


def with_model_spread(data: Mapping[str, Any], keys: Container[str]) -> dict[str, Any]:
    """A recipe's data in which `model: {name: ..., add_tokens: ...}` are keys of the recipe, as they are kept.

    Args:
        data: of a recipe.
        keys: that a recipe has.

    Raises:
        LuthierError: the model has another key, no name, or tokens stand in both places.
    """
    model = data.get("model")
    if not isinstance(model, Mapping):
        return dict(data)
    strange = [str(key) for key in model if key not in ("name", ADD_TOKENS)]
    if strange:
        fix = f"write `{strange[0]}` beside `model`" if strange[0] in keys else nearest(strange[0], ("name", ADD_TOKENS))
        raise LuthierError(f"there is no key `{strange[0]}` here", where="model", fix=fix or "a model has `name` and `add_tokens`")
    if "name" not in model:
        raise LuthierError("the model has no name", where="model", fix="add `name: MODEL`")
    if ADD_TOKENS in model and data.get(ADD_TOKENS):
        raise LuthierError(
            "tokens are added in two places", where=f"model.{ADD_TOKENS}", fix=f"leave `{ADD_TOKENS}` out of one of them"
        )
    rest = {key: value for key, value in data.items() if key != "model"}
    return {**rest, "model": model["name"], **{key: model[key] for key in (ADD_TOKENS,) if key in model}}
