"""From parts to a run: the order of the chain, what is kept of the base, and what cannot be put together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Callback, Freezing, GradientTransform, Head, LossTerm, Now, Prompt
from luthier.models.parts import map_parts
from luthier.registry import Part
from luthier.training.build import _watched, build_engine, check_predicts
from luthier.training.engine import Engine
from tests.conftest import parts_of
from tests.toys.helpers import model_of, toys  # noqa: F401

AS_IT_IS = GradientTransform(lambda trained: {}, lambda value, state, trained, now: value)


def built(steps: int = 20, **chosen: Any) -> Engine:
    model = model_of(layers=1)
    specs = {
        "tune": "full",
        "objective": "cross_entropy",
        "optimizer": ["clip", "adamw"],
        "gradient_estimator": "backprop",
        **chosen,
    }
    parts = {key: [value] if isinstance(value, Part) else parts_of(**{key: value})[key] for key, value in specs.items()}
    return build_engine(model, map_parts(model), parts, now=Now(steps=steps))


def test_the_base_is_kept_only_for_who_asks() -> None:
    assert all(one.start is None for one in built().tune.trained.values())
    assert all(one.start is not None for one in built(callbacks=Callback(needs=frozenset({"base"}))).tune.trained.values())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_phases_need_a_step_each_as_soon_as_there_is_a_clock(steps: int) -> None:
    phases = Freezing(ends=(1 / 3, 2 / 3), restart=True, alone=frozenset([0]))
    if steps == 2:
        with pytest.raises(LuthierError, match="too few for its 3 phases"):
            built(steps, freeze=phases)
    else:
        # Where memory is only estimated there is one step.
        built(steps, freeze=phases)


def test_what_a_technique_does_to_gradients_comes_before_the_step_of_the_recipe() -> None:
    run = built(callbacks=Part("mine", "callback", {}, (Callback(), AS_IT_IS)))
    assert [link.slot for link in run.chain.links] == ["mine", "clip", "adamw"]
    assert [
        (link.slot, link.own) for link in built(tune=Part("half", "selective", {}, (*half().values, AS_IT_IS))).chain.links
    ] == [
        ("half", True),
        ("clip", False),
        ("adamw", False),
    ]


def half() -> Part:
    return registry.part("half")


def test_callbacks_look_at_their_own_techniques_gradients_or_at_all() -> None:
    tune: Any = SimpleNamespace(trained={name: SimpleNamespace(slot=name[0]) for name in ("a/1", "a/2", "b/1")})
    looks, other = Callback(needs=frozenset({"gradients"})), Callback()
    assert _watched(tune, [("a", looks)]) == {"a/1", "a/2"}
    assert _watched(tune, [("c", looks)]) == {"a/1", "a/2", "b/1"}
    assert _watched(tune, [("a", other)]) == set()
    assert _watched(tune, [("a", looks), ("b", looks)]) == {"a/1", "a/2", "b/1"}


@pytest.mark.parametrize(("label", "refused"), [(0, True), (1, True), (7, True), (-100, False)])
def test_virtual_tokens_that_are_targets_are_not_compared_with_the_base(label: int, refused: bool) -> None:
    (plain,) = registry.part("plain_prompt", length=1).values
    assert isinstance(plain, Prompt)
    prompt = plain._replace(labels=lambda services: torch.tensor([label]))
    if refused:
        with pytest.raises(LuthierError, match="`kl` compares with the base, which does not read the virtual tokens"):
            built(tune=prompt, objective=["cross_entropy", "kl"])
    else:
        built(tune=prompt, objective=["cross_entropy", "kl"])
    built(tune=prompt)


def test_an_encoder_reads_texts_and_no_answers() -> None:
    parts: Any = SimpleNamespace(causal=False, architecture="BertModel")
    reads = LossTerm(lambda view, own: view.outputs_BK.sum(), unit="row", columns=())

    def values(means: Any) -> list[tuple[str, object]]:
        return [("mine", Head(lambda services: {}, lambda tensors, state_BD: state_BD, means)), ("mine", reads)]

    check_predicts(values("classes"), parts)
    with pytest.raises(LuthierError, match="`mine` reads answers within their conversation"):
        check_predicts(values("score"), parts)
    with pytest.raises(LuthierError, match="`mine` learns from the tokens that a language model predicts"):
        check_predicts(values("classes")[1:], parts)
    check_predicts(values("score"), SimpleNamespace(causal=True))  # type: ignore[arg-type]
