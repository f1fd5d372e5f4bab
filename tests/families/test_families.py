"""Families of models: the map is whole, luthier computes what the model does, and a step changes what it should and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from luthier.delta import Delta
from luthier.kinds.parts import GROUPS
from luthier.models.experts import mixture_of
from luthier.training.build import build_engine
from tests.conftest import parts_of
from tests.families.configurations import FAMILIES, READING_IMAGES
from tests.families.trying import (
    BATCH,
    NOW,
    SAME,
    TECHNIQUES,
    apart,
    base,
    facts,
    freed,
    linear,
    logits,
    moved,
    own_logits,
    stepped,
    untouched,
)

FACTS = Path(__file__).parents[2] / "docs" / "generated" / "families.json"
ALL = (*FAMILIES, *READING_IMAGES)
TOLD = json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.is_file() else {}


def test_every_family_is_told_of() -> None:
    """What stands in the documentation is what is tried here, in the same order."""
    assert tuple(TOLD) == ALL


@pytest.mark.parametrize("family", ALL)
def test_what_the_documentation_says(family: str) -> None:
    """After a change that is meant, `python -m tests.families` writes it anew."""
    assert facts(family) == TOLD[family]


@pytest.mark.parametrize("family", ALL)
def test_the_map_is_whole(family: str) -> None:
    tune = untouched(family)
    with torch.no_grad():
        for parameter in tune.model.parameters():
            parameter.zero_()
        for place in tune.parts.places:
            tune.parts.view(tune.model, place).add_(1)
    for name, parameter in tune.model.named_parameters():
        assert torch.equal(parameter, torch.ones_like(parameter)), name


@pytest.mark.parametrize("family", ALL)
def test_luthier_computes_what_the_model_itself_does(family: str) -> None:
    assert apart(logits(untouched(family)), own_logits(base(family))) < 1e-6


@pytest.mark.parametrize("family", ALL)
def test_one_step_changes_what_it_should_and_nothing_else(family: str) -> None:
    """Of a model that also reads images, what does is frozen."""
    parts = stepped(family, "full").tune.parts
    reached = {place.parameter for place in parts.places if place.role in GROUPS["all"]}
    assert freed(stepped(family, "full")) == reached
    assert {place.parameter for place in parts.places} - reached == (
        {name for name, _ in base(family).named_parameters() if name not in reached}
    )
    for technique in ("full", "half"):
        engine = stepped(family, technique)
        assert moved(engine.tune, family) == freed(engine)
    assert freed(stepped(family, "half")) < reached


@pytest.mark.parametrize("family", ALL)
def test_lora_stands_beside_every_linear_map(family: str) -> None:
    tune = stepped(family, "lora").tune
    assert sorted({str(one.place) for one in tune.trained.values()}) == sorted(linear(tune.parts))
    assert all(one.master.any() for one in tune.trained.values()), "a factor that began at zero got no gradient"
    assert not moved(tune, family)
    assert apart(logits(tune), own_logits(base(family))) > 1e-2


MIXTURES = [family for family in ALL if "expert" in TOLD.get(family, {}).get("roles", {})]


@pytest.mark.parametrize("role", ["expert", "router"])
@pytest.mark.parametrize("family", MIXTURES)
def test_lora_reaches_experts_and_routers_that_are_named(family: str, role: str) -> None:
    plain = untouched(family)
    lora = parts_of(
        tune={"lora": {"rank": 2, "target_modules": [role]}},
        objective=["cross_entropy", "load_balance"],
        optimizer="sgd",
        gradient_estimator="backprop",
    )
    engine = build_engine(plain.model, plain.parts, lora, now=NOW)
    tune = engine.tune
    told = [engine.step([BATCH], NOW).parts["load_balance"] for _ in range(2)]
    assert {one.place.role for one in tune.trained.values() if one.place is not None} == {role} and min(told) > 0.0
    assert all(one.master.any() for one in tune.trained.values()), "a factor that began at zero got no gradient"
    beside = logits(tune)
    assert apart(beside, own_logits(base(family))) > 1e-3 and not moved(tune, family)
    tune.merge()
    assert apart(logits(tune), beside) < SAME
    tune.unmerge()
    assert mixture_of(tune.model, tune.parts) is not None


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_delta_is_saved_and_opened_again(family: str, technique: str, tmp_path: Path) -> None:
    tune = stepped(family, technique).tune
    delta = Delta.of(tune, base(family))
    delta.save(tmp_path / "delta.safetensors")
    opened = Delta.load(tmp_path / "delta.safetensors")
    assert set(opened) == set(delta)
    assert all(torch.equal(opened.spread(name), delta.spread(name)) for name in delta)
    model = copy.deepcopy(base(family))
    opened.apply(model)
    assert apart(own_logits(model), logits(tune)) < SAME
