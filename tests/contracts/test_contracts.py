"""What every technique must keep, whoever wrote it: the registry is walked, so a new file is tested by existing."""

from __future__ import annotations

import copy
import gc
import hashlib
import inspect
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Head, Now
from luthier.models.attention import use_attention
from luthier.recipe.parts import completed
from luthier.registry import KINDS, key_of
from luthier.training.engine import Engine
from tests.conftest import split
from tests.contracts.fixtures import (
    ALL,
    BY_STEP,
    FIXTURES,
    FREES,
    MODELS,
    OPTIONS,
    OTHERS,
    RUNS,
    engine_of,
    masters,
    outcomes,
    part_of,
    rows_for,
    run_of,
    shake,
    take_steps,
)
from tests.tolerance import Exactly
from tests.toys.helpers import TOYS, gap, gradients, logits_of, model_of, rows_of_eight, toys  # noqa: F401

# The gradient of GPT-2's key biases is rounding alone, and some steps go by its sign.
SPLIT = [(kind, name, a) for kind, name in RUNS for a in ("llama", "gpt2") if kind not in BY_STEP or a == "llama"]
SAME_BY_DESIGN = {frozenset({"backprop", "per_layer"})}


def test_every_kind_says_which_rows_its_techniques_need() -> None:
    assert set(FIXTURES) == set(KINDS), "a kind without an entry in tests/contracts/fixtures.py is not tested"
    for kind, fixture in FIXTURES.items():
        assert (fixture.place is None) == (fixture.outcome is not None), f"{kind}: either in a run or outside of it"


def _split_run(kind: str, name: str, architecture: str) -> Engine:
    model = model_of(architecture)
    use_attention(model)
    run = run_of(kind, name, model=model)
    shake(run)
    return run


@pytest.mark.parametrize(("kind", "name", "architecture"), SPLIT)
def test_faults_1_and_5_any_split_and_packing_give_the_same_gradient(now: Now, kind: str, name: str, architecture: str) -> None:
    """Fault 1: one batch equals its micro-batches, uneven and empty ones, with unequal numbers of targets. Fault 5: rows without
    padding give the gradients of padded ones. Neither sees the other rows."""
    batch = rows_for([kind])
    run = _split_run(kind, name, architecture)
    states, found = copy.deepcopy(run.states), []
    for sizes, packs in (((8,), False), ((1, 0, 5, 2), False), ((3, 1, 4, 0), True), ((2, 2, 2, 2), True)):
        if kind in BY_STEP:
            run = _split_run(kind, name, architecture)
        run.tune.packs = packs
        for slot, state in states.items():
            # In place: the parts of a technique share their state.
            run.states[slot].clear()
            run.states[slot].update(copy.deepcopy(state))
        if kind in BY_STEP:
            take_steps(run, split(batch, sizes), now._replace(learning_rate=0.01), 2)
            found.append(masters(run))
        else:
            # Of rows that begin alike and are packed, gradients are added up before norms that are in fp32, and of padded ones behind them.
            with Exactly() if batch.groups else nullcontext():
                # The step at which toys observe.
                found.append(gradients(run, split(batch, sizes), now._replace(step=1)))
    bound = 1e-7 if kind in BY_STEP else 1e-10 if architecture == "llama" else 1e-9
    for other in found[1:]:
        assert gap(other, found[0]) < bound


@pytest.fixture
def young() -> Iterator[None]:
    """Python's collector looks only at what is made in a test, so that a full collection is cheap."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_a_run_that_nobody_holds_leaves_nothing_in_memory(young: None, now: Now, kind: str, name: str) -> None:
    """Python's collector cannot see through the hooks of tensors: what these hold would stay until the process ends."""
    run = run_of(kind, name)
    take_steps(run, split(rows_for([kind]), (5, 3)), now, 2)
    model = weakref.ref(run.tune.model)
    del run
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "name"), FREES)
def test_fault_20_step_zero_is_the_base_as_the_card_says(kind: str, name: str, architecture: str) -> None:
    """Fault 20: adapters that start at zero leave the logits alone, exactly; others keep to what their card says."""
    model, batch = model_of(architecture).float(), rows_of_eight()
    wanted = logits_of(model, batch)
    run = run_of(kind, name, model=model, dtype=torch.float32)
    # A prompt's virtual tokens join in luthier's own forward pass.
    off = float((logits_of(model, batch) - wanted).abs().max())
    replication = registry.find(name, (kind,)).card.step0
    assert replication in ("base exactly", "base up to rounding", "on purpose not the base")
    assert run.tune.trained
    if replication == "base exactly":
        assert off == 0.0
    elif replication == "base up to rounding":
        assert 0.0 < off < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "name"), FREES)
def test_fault_5_checkpointing_changes_no_gradient(now: Now, kind: str, name: str, architecture: str) -> None:
    """Fault 5: gradient checkpointing on and off give the same numbers, gap 0, also behind frozen first blocks."""
    batches = split(rows_for([kind]), (5, 3))
    found = []
    for checkpointing in (False, True):
        model = model_of(architecture)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = run_of(kind, name, model=model)
        shake(run)
        take_steps(run, batches[:1], now, 1)
        found.append(gradients(run, batches, now._replace(step=3)))
    assert gap(found[1], found[0]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_every_technique_trains_in_every_precision(now: Now, kind: str, name: str, architecture: str, dtype: torch.dtype) -> None:
    run = run_of(kind, name, model=model_of(architecture, layers=1), dtype=dtype)
    batches = split(rows_for([kind]), (5, 3))
    now, before = now._replace(learning_rate=1e-3), masters(run)
    run.tune.model.train()
    losses = [run.step(batches[:1], now).loss]
    # In the narrow type one more: what an optimizer rounds shows late.
    losses += [run.step(batches[1:], now._replace(step=1)).loss] if dtype == torch.bfloat16 else []
    losses += take_steps(run, batches, now, 1, first=len(losses))
    assert all(loss == loss and abs(loss) < 1e3 for loss in losses)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # What stands still and was forgotten is held by the model alone, in the model's type.
    asleep = {name for name, one in run.tune.trained.items() if one.still}
    assert all((one.dtype == wide or n in asleep) and one.isfinite().all() for n, one in masters(run).items())
    assert any(n not in before or not torch.equal(one, before[n]) for n, one in masters(run).items())


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_the_card_and_the_docstring_are_complete(kind: str, name: str) -> None:
    technique = registry.find(name, (kind,))
    text = inspect.getdoc(technique.factory) or ""
    assert technique.card.title and technique.card.summary.endswith((".", ";"))
    for option, parameter in inspect.signature(technique.factory).parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"{option}:" in text, f"`{name}` does not say what `{option}` is"


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_options_make_the_same_part_again(kind: str, name: str) -> None:
    part = part_of(kind, name)
    again = registry.make({part.name: dict(part.options)}, (part.kind,))
    assert (again.name, again.kind, again.options, again.card) == (part.name, part.kind, part.options, part.card)
    assert [type(value) for value in again.values] == [type(value) for value in part.values]
    schema = registry.options_model(registry.find(name, (kind,)).factory).model_json_schema()
    assert set(schema.get("properties", {})) == set(part.options) and schema["additionalProperties"] is False


def test_a_technique_is_one_short_file() -> None:
    """150 lines at most; what several share stands beside them, in files that begin with an underscore."""
    files = [*(Path(registry.__file__).parents[1] / "methods").glob("*/*.py"), *TOYS.glob("*/*.py")]
    long = {str(file): lines for file in files if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 150}
    assert not long


def other_values(name: str, option: str, annotation: Any, value: Any) -> list[Any]:
    """Some values of an option that differ from one, by its type."""
    if (name, option) in OTHERS:
        return OTHERS[name, option]
    if option == "calibration_rows":
        return [2, 1]
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if choice != value]
    kinds = get_args(annotation) if get_origin(annotation) not in (None, tuple) else (annotation,)
    if bool in kinds:
        return [not value]
    if float in kinds:
        return [value / 2, value / 100, 0.5, 0.1, value * 2 + 1e-3] if value else [0.5, 0.1, 1e-3]
    if int in kinds:
        return [value + 1, value + 2, max(1, value - 1)] if value is not None else [1, 2]
    if str in kinds:
        return [f"{value} other"]
    if tuple[str, ...] in kinds:
        return [("attention",), ("mlp_down",)]
    if tuple[int, ...] in kinds:
        return [(0,)]
    raise TypeError(f"{name}: {option} is {annotation}: add other values to OTHERS")


class Plain:
    """What a technique comes to with the options of the contracts, step by step, computed once and no further than asked for."""

    known: dict[tuple[str, str], Plain] = {}  # noqa: RUF012

    def __init__(self, kind: str, name: str) -> None:
        self.options = dict(part_of(kind, name).options)
        self.coming, self.come = outcomes(kind, name, self.options), []

    def __iter__(self) -> Iterator[Any]:
        yield from self.come
        for one in self.coming:
            self.come.append(digest(one))
            yield self.come[-1]


def plain(kind: str, name: str) -> Plain:
    """The outcome of a technique as the contracts give it."""
    if (kind, name) not in Plain.known:
        Plain.known[kind, name] = Plain(kind, name)
    return Plain.known[kind, name]


def digest(outcome: Any) -> str:
    """Something short that differs where an outcome differs."""
    return hashlib.sha256(repr(outcome).encode()).hexdigest()


def differs(left: Any, right: Any) -> bool:
    """Whether two outcomes differ at some step; steps behind the first one at which they do are not taken."""
    return any(one != other for one, other in zip_longest(left, right))


def names_of(kind: str, name: str, options: dict[str, Any]) -> list[tuple[str, ...]]:
    """What a head calls the classes that it tells, which no step shows."""
    return [value.names for value in part_of(kind, name, options).values if isinstance(value, Head)]


@pytest.mark.parametrize(("kind", "name", "option"), OPTIONS)
def test_every_option_is_read(kind: str, name: str, option: str) -> None:
    """Fault 26: every option of every technique changes what it does."""
    usual = plain(kind, name)
    annotation = get_type_hints(registry.find(name, (kind,)).factory)[option]
    for value in other_values(name, option, annotation, usual.options[option]):
        try:
            options = {**usual.options, option: value}
            if names_of(kind, name, options) != names_of(kind, name, usual.options):
                return
            if differs(map(digest, outcomes(kind, name, options)), usual):
                return
        except LuthierError:
            # Out of its range: that is reading it, but another value must still show a difference.
            continue
    pytest.fail(f"no other value of `{option}` changes anything")


TEACH_BY_THEMSELVES = frozenset({"ptec"})
"""Techniques of other keys than `objective` that bring a loss which stands for cross-entropy."""


@pytest.mark.parametrize(("kind", "name"), [one for one in RUNS if key_of(one[0]) != "objective"])
def test_what_is_no_objective_does_not_stand_for_one(kind: str, name: str) -> None:
    """A recipe without an objective minimizes cross-entropy, also beside a technique that brings a penalty along."""
    chosen = completed({"tune": ["full"], key_of(kind): [part_of(kind, name)]})
    assert (name in TEACH_BY_THEMSELVES) != ("cross_entropy" in [part.name for part in chosen["objective"]])


@pytest.mark.parametrize(("kind", "name"), [one for one in RUNS if one[1] in MODELS])
def test_what_needs_another_model_is_refused_by_name(kind: str, name: str) -> None:
    with pytest.raises(LuthierError, match=f"`{name}`.*llama has none") as error:
        engine_of(**{key_of(kind): [part_of(kind, name)]})
    assert error.value.fix


@pytest.mark.parametrize("kind", KINDS)
def test_two_techniques_of_a_kind_differ(kind: str) -> None:
    names = sorted(name for k, name in ALL if k == kind)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    assert {frozenset(pair) for pair in pairs if not differs(plain(kind, pair[0]), plain(kind, pair[1]))} <= SAME_BY_DESIGN
