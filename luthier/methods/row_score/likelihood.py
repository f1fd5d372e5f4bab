"""How likely models find each row's answer: what preference-oriented fine-tuning (Fan et al., 2024) compares a model with."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from luthier.errors import LuthierError
from luthier.kinds import RowScore, RowServices
from luthier.registry import method
from luthier.rows.shapes import Row


@method(title="Likelihood under other models", needs=("likelihood",))
def likelihood(*, models: tuple[str, ...] = ("workshop",), per: Literal["token", "character"] = "token") -> RowScore:
    """Score each row by its answer's mean log-likelihood under one or several models, in nats; an average over the models.

    The labels are those of training, the token that ends a turn among them. Each model reads the row in its own chat template.

    Args:
        models: names of models or runs; the default comes with luthier and knows its small world only.
        per: `token`, each model's own, the mean that a run's loss is; or `character`, which does not favor models with short tokens.

    Raises:
        LuthierError: no model is named, or one twice.
    """
    if not models or len(set(models)) < len(models):
        said = "one model is named twice" if models else "no model is named"
        raise LuthierError(said, where="likelihood: models", fix="write e.g. models=[NAME, OTHER]")

    def score(rows: Sequence[Row], services: RowServices) -> list[float]:
        by_model = [services.likelihood(model, rows) for model in models]
        means = [[one.log_likelihood / (one.tokens if per == "token" else one.characters) for one in found] for found in by_model]
        return [fmean(of_row) for of_row in zip(*means, strict=True)]

    return RowScore(score)
