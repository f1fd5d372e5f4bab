"""Defaults that differ between techniques, and what the plan warns of."""

from __future__ import annotations

from typing import Any

import pytest

from luthier import registry
from luthier.kinds.parts import GROUPS
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe


def plan(tune: Any) -> Any:
    return make_plan(make_recipe({"model": "tiny:llama", "rows": {"train": [{"prompt": "a", "completion": "b"}]}, "tune": tune}))


def test_low_rank_deltas_get_ten_times_the_learning_rate_of_full_fine_tuning() -> None:
    """Fault 17: learning-rate defaults differ for LoRA; the plan says where the rate comes from."""
    assert plan("lora").clock.learning_rate == pytest.approx(10 * plan("full").clock.learning_rate)
    assert any("lora's default" in line for line in plan("lora").lines())


def test_low_rank_deltas_stand_at_all_linear_maps_by_default() -> None:
    """Fault 17: all linear maps are adapted, the MLP's too; attention alone is warned of."""
    made = plan("lora")
    assert {one.place.role for one in made.engine.tune.trained.values()} == {
        role for role in GROUPS["linear"] if made.parts.select(target_modules=role)
    }
    assert made.warnings() == []
    assert len(plan({"lora": {"target_modules": ["attention"]}}).warnings()) == 1


def test_what_a_model_lacks_biases_for_is_said_before_training() -> None:
    """Shifts of a model without biases stay beside the weights, and only the end of the run said so."""
    warnings = plan({"ssf": {"shift": "everywhere"}}).warnings()
    assert ["`ssf` learns shifts" in warning and "cannot be exported" in warning for warning in warnings] == [True]
    assert plan({"ssf": {"shift": "none"}}).warnings() == plan("ia3").warnings() == []


def test_a_recipe_without_a_rate_gets_the_most_careful_advice() -> None:
    rates = {name: registry.find(name).card.learning_rate for name in ("half", "lora")}
    mixed = plan([{"half": {"target_modules": ["mlp"]}}, {"lora": {"target_modules": ["attention"]}}])
    assert mixed.clock.learning_rate == min(rate for rate in rates.values() if rate is not None)
