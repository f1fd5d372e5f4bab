"""What every objective, token weight and input map must keep beside whatever trains, and beside each other."""

from __future__ import annotations

from typing import Any

import pytest

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.registry import kinds_under
from tests.conftest import split
from tests.contracts.test_contracts import ALL, GIVEN, shake, take_steps
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight, toys  # noqa: F401

LEARNING = [(kind, name) for kind, name in ALL if kind in (*kinds_under("objective"), "token_weight")]
TUNES: dict[str, dict[str, Any]] = {
    "half": {},
    "lora": {},
    "prompt_tuning": {"init": "text"},
    "spiel": {"every": 3, "gather": 1},
}
"""Rows of matrices, what stands beside them, what stands before the input, and scattered entries."""


def placed(*chosen: tuple[str, str]) -> dict[str, Any]:
    """Recipe keys for techniques that say what is learnt."""
    specs = [(kind, {name: GIVEN.get(name, {})}) for kind, name in chosen]
    objective = [spec for kind, spec in specs if kind != "token_weight"]
    return {
        "objective": ["cross_entropy", *objective],
        "token_weight": [registry.make(spec, ("token_weight",)) for kind, spec in specs if kind == "token_weight"],
    }


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize(("kind", "name"), LEARNING)
def test_it_trains_whatever_is_free_and_any_split_gives_the_same_gradient(
    engine: Any, now: Now, kind: str, name: str, tune: str
) -> None:
    batch, found = rows_of_eight(), []
    for sizes in ((8,), (3, 1, 4)):
        run = engine(**{"model": model_of(), "tune": {tune: TUNES[tune]}, **placed((kind, name))})
        shake(run)
        losses = take_steps(run, split(batch, sizes), now._replace(learning_rate=1e-3), 2)
        assert all(loss == loss and abs(loss) < 1e3 for loss in losses)
        found.append(gradients(run, split(batch, sizes), now._replace(step=2)))
    assert gap(found[1], found[0]) < 1e-6


@pytest.mark.parametrize(("kind", "name"), LEARNING)
def test_it_goes_with_every_other_or_says_why_not(engine: Any, now: Now, kind: str, name: str) -> None:
    batches, ran = split(rows_of_eight(), (5, 3)), 0
    for other in LEARNING[LEARNING.index((kind, name)) + 1 :]:
        try:
            run = engine(**{"model": model_of(layers=1), **placed((kind, name), other)})
            losses = take_steps(run, batches, now._replace(learning_rate=1e-3), 2)
        except LuthierError as error:
            assert error.mend, f"{name} with {other[1]}: {error}"
            continue
        ran += 1
        assert all(loss == loss and abs(loss) < 1e4 for loss in losses), f"{name} with {other[1]}"
    assert ran or len(LEARNING) - LEARNING.index((kind, name)) < 3


TOGETHER = [
    {"token_weight": "dft", "objective": ["cross_entropy", "kl"]},
    {"token_weight": ["sstoken", "tl_weights"], "objective": "cross_entropy"},
    {"token_weight": "q_tuning", "objective": ["cross_entropy", "masked_thought"]},
]


@pytest.mark.parametrize("keys", TOGETHER, ids=lambda keys: " + ".join(map(str, keys.values())))
def test_these_are_promised_to_go_together(engine: Any, now: Now, keys: dict[str, Any]) -> None:
    batch = rows_of_eight()
    found = [gradients(engine(model=model_of(), **keys), split(batch, sizes), now._replace(step=1)) for sizes in ((8,), (3, 1, 4))]
    assert gap(found[1], found[0]) < 1e-9
    assert all(one.abs().sum() > 0 for one in found[0].values())
