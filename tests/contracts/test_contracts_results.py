"""What every technique that frees numbers leaves behind: optimizer state of the numbers that train alone, a merge, a delta."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from luthier import registry
from luthier.delta import Delta
from luthier.delta.forms import Dense, LowRank, Sparse
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.registry import kinds_under
from luthier.training.engine import Engine
from tests.contracts.fixtures import FREES, NOW, rows_for, run_of, shake, take_steps, toys_listed
from tests.toys.helpers import logits_of, model_of, rows_of_eight, toys  # noqa: F401

SELECTIVE = [name for kind, name in FREES if kind == "selective"]


class Ended(NamedTuple):
    """A run that took a few steps on a kept base."""

    kind: str
    name: str
    architecture: str
    base: Any
    """The model as it was."""
    run: Engine


@pytest.fixture(scope="module", params=[(*one, a) for one in FREES for a in ("llama", "gpt2")], ids="-".join)
def ended(request: pytest.FixtureRequest) -> Iterator[Ended]:
    """Every technique that frees numbers at its run's end. The tests below look at it in turn and leave it as they found it."""
    kind, name, architecture = request.param
    with toys_listed():
        run = run_of(kind, name, model=model_of(architecture), keep_base=True)
        take_steps(run, [rows_for([kind])], NOW, 3)
    yield Ended(kind, name, architecture, model_of(architecture), run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SELECTIVE)
def test_adamw_holds_two_numbers_for_each_that_trains(now: Now, name: str, dtype: torch.dtype) -> None:
    """Two moments in fp32 for each number of a selection and an age, in bf16 a master as well; nothing for the rest of the model."""
    run = run_of("selective", name, dtype=dtype, optimizer=["adamw"])
    take_steps(run, [rows_for(["selective"])], now._replace(learning_rate=1e-3), 3)
    moving = [one for one in run.tune.trained.values() if not one.forgotten]
    numbers = sum(one.numel for one in moving)
    state = run.chain.state["adamw"]
    assert set(state) == {one.name for one in moving}
    moments = [values[key] for values in state.values() for key in ("first", "second")]
    assert sum(one.numel() for one in moments) == 2 * numbers
    assert sum(one.numel() * one.element_size() for one in moments) == 8 * numbers
    ages = sum(values["age"].numel() for values in state.values())
    assert ages <= numbers
    extra = sum(
        value.numel() for values in state.values() for key, value in values.items() if key not in ("first", "second", "age")
    )
    assert extra == 0
    own = [one for one in moving if not one.is_live]
    assert all(one.master.dtype == torch.float32 for one in own)
    if dtype == torch.float32:
        assert all(one.is_live or one.form != "whole" for one in moving)
    still = [one for one in run.tune.trained.values() if one.forgotten]
    assert all(one.is_live for one in still), "a tensor that stands still for long needs no master of its own"


def test_the_base_is_never_lost(ended: Ended) -> None:
    model, batch = ended.run.tune.model, rows_of_eight()
    tuned = logits_of(model, batch)
    with ended.run.tune.off():
        assert torch.equal(logits_of(model, batch), logits_of(ended.base, batch))
    assert torch.equal(logits_of(model, batch), tuned)


def test_the_delta_makes_the_tuned_model_of_the_base(ended: Ended) -> None:
    """In its own form: entries where entries train, factors where the change is low-rank."""
    if ended.kind not in ("selective", "weight_delta"):
        return
    base, run, batch = ended.base, ended.run, rows_of_eight()
    delta = Delta.of(run.tune, base)
    wanted = logits_of(base, batch)
    delta.apply(base)
    assert float((logits_of(base, batch) - logits_of(run.tune.model, batch)).abs().max()) < 1e-9
    delta.remove(base)
    assert float((logits_of(base, batch) - wanted).abs().max()) < 1e-9
    if ended.kind == "weight_delta":
        value = next(one for slot, one, _ in run.tune.weight_deltas)
        low_rank = value.pair is not None or value.factors is not None
        changed_in_place = bool(value.subtract)
        forms = [form for some in delta.changes.values() for form in some]
        assert changed_in_place or all(isinstance(form, LowRank if low_rank else Dense | Sparse) for form in forms)
        return
    for one in run.tune.trained.values():
        if one.form == "flat" and one.place is not None and one.place.parameter in delta.changes:
            # As many entries as ever trained there at most; few of them are sparse.
            numbers = run.tune.region(one.place).numel()
            assert one.numel * 2 > numbers or all(isinstance(form, Sparse) for form in delta[one.place.parameter])


def test_merging_is_what_the_card_says(ended: Ended) -> None:
    run, model, batch = ended.run, ended.run.tune.model, rows_of_eight()
    card = registry.find(ended.name, (ended.kind,)).card
    beside = [one for one in run.tune.trained.values() if one.form in ("factor", "free")]
    if card.merges == "is in place":
        assert not beside
        return
    run.tune.snapshot("before")
    shake(run)
    tuned = logits_of(model, batch)
    try:
        run.tune.merge()
    except LuthierError:
        needs_bias = ended.architecture == "llama" and ended.kind == "representation_edit"
        assert card.merges == "never" or needs_bias
    else:
        assert card.merges != "never"
        assert float((logits_of(model, batch) - tuned).abs().max()) < 1e-9
        run.tune.unmerge()
    assert torch.equal(logits_of(model, batch), tuned), "unmerged, or refused: nothing changed"
    run.tune.go_back("before")


def test_every_kind_of_tune_is_covered() -> None:
    assert {kind for kind, _ in FREES} == set(kinds_under("tune"))


FAMILIES = ("qwen2", "gemma3_text", "phi3", "gpt_neox", "opt", "mixtral")
"""Biases, grouped heads and tied embeddings; scaled embeddings and norms of 1 + weight; fused projections; interleaved ones and
parallel sub-layers; no module around the MLP; experts."""


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(("kind", "name"), FREES)
def test_every_family_trains_or_is_refused_by_name(now: Now, kind: str, name: str, architecture: str) -> None:
    model, batch = model_of(architecture), rows_for([kind])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        run = run_of(kind, name, model=model, keep_base=True)
    except LuthierError as error:
        assert name in str(error) or architecture in str(error), "a refusal names what it refuses"
        assert error.fix
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        return
    losses = take_steps(run, [batch], now._replace(learning_rate=1e-3), 2)
    assert all(loss == loss for loss in losses)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    inside = {one.place.parameter for one in run.tune.trained.values() if one.place and one.form not in ("factor", "free")}
    inside |= {f"{tied}.weight" for tied, source in run.tune.parts.ties.items() if f"{source}.weight" in inside}
    assert changed <= inside | set(run.tune.altered), "numbers outside the tune keep their bits"
    with run.tune.off():
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) or run.tune.prompt_length
