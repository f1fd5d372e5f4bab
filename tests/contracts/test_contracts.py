"""What every technique must keep, whoever wrote it: the registry is walked, so a new file is tested by existing."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from luthier import registry
from luthier.delta.weights import Weights, of_models
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.models.attention import use_attention
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.registry import KINDS, kinds_under
from luthier.rows.embed import HASH, embedder
from luthier.rows.select import ScoringServices
from luthier.rows.shapes import Row
from luthier.runs.measure import likelihood_of_rows
from tests.conftest import split
from tests.toys.helpers import TOYS, gap, gradients, logits_of, model_of, rows_of_eight, toys  # noqa: F401


@contextmanager
def _toys_listed() -> Iterator[None]:
    registry.add_folder(TOYS)
    yield
    registry.remove_folder(TOYS)


with _toys_listed():
    ALL = [(kind, name) for kind in KINDS for name in registry.names(kind)]
FREES = [(kind, name) for kind, name in ALL if kind in kinds_under("tune")]
OUTSIDE = ("row_score", "row_map", "probe")
"""Kinds that take no part in the steps of a run."""
RUNS = [(kind, name) for kind, name in ALL if kind not in OUTSIDE]
BY_STEP = ("transform", "optimizer", "source", "keeper")
# The gradient of GPT-2's key biases is rounding alone, and some steps go by its sign.
PACKED = [(kind, name, a) for kind, name in RUNS for a in ("llama", "gpt2") if kind not in BY_STEP or a == "llama"]
GIVEN: dict[str, dict[str, Any]] = {
    "adalora": {"warmup": 0.05},
    "convergence_balance": {"validation_source": "other", "every": 1, "window": 2},
    "caft": {"heads_first": 0.05},
    "greentrainer": {"selections": 5, "target": 0.7},
    "lift": {"rank": 4, "lora_rank": 2, "every": 2},
    "likelihood": {"models": ("tiny:llama",)},
    "lofit": {"selection": 0.1},
    "loca": {"search": 0.2, "coefficient_steps": 1, "location_steps": 1},
    "lt_sft": {"first": 0.1},
    "masked_thought": {"warmup": 0.05, "random_share": 0.5, "mask_id": 3},
    "neuroada": {"by": "gradient"},
    "noisefit": {"layers": 1},
    "prompt_tuning": {"init": "text"},
    "s2ft": {"by": "activation"},
    "spiel": {"every": 3, "gather": 1},
    "sstoken": {"attention_only": 0.05, "every": 2},
}
"""Options of techniques that have options without a default, or whose defaults do nothing in the first steps."""
OTHERS: dict[tuple[str, str], list[Any]] = {
    ("answer_coverage", "column"): ["other_share"],
    ("convergence_balance", "column"): ["quality"],
    ("convergence_balance", "validation_rows"): [7],
    ("got_d", "chunk"): [4],
    ("got_d", "tolerance"): [10.0],
    ("morepair", "field"): ["reason"],
    ("morepair", "weight"): [0.0],
    ("task_balance", "column"): ["quality"],
    ("task_balance", "weights"): [{"code": 3.0, "math": 1.0, "chat": 0.0}],
    ("task_focal", "column"): ["quality"],
    ("likelihood", "models"): [("tiny:gpt2",)],
    ("poft", "column"): ["other_log_likelihood"],
}
"""Other values of options for which the type does not tell them, by technique and option."""
SAME_BY_DESIGN = {frozenset({"backprop", "per_layer"})}


def run_of(engine: Any, kind: str, name: str, options: dict[str, Any] | None = None, **more: Any) -> Any:
    """An engine in which one technique stands in its place, and plain ones in all others."""
    spec = {name: {**GIVEN.get(name, {}), **(options or {})}}
    part = registry.make(spec, (kind,))
    places: dict[str, Any] = {"model": model_of(), "tune": "full", "step": ["adamw"]}
    if kind in kinds_under("tune"):
        places["tune"] = [part]
    elif kind in kinds_under("objective"):
        places["objective"] = ["cross_entropy", part]
    elif kind in ("transform", "optimizer"):
        takes_all = kind == "optimizer" and part.values[0].takes is None
        places["step"] = [part] if takes_all else [part, "adamw"]
    else:
        places[{"keeper": "keep", "freezing": "freeze"}.get(kind, kind)] = part
    return engine(**{**places, **more})


def shake(run: Any) -> None:
    """Move everything that trains a little, so that no start at zero hides a mistake."""
    for name, one in run.tune.trained.items():
        rng = torch.Generator().manual_seed(len(name))
        run.tune.set({name: one.master.detach() + 0.05 * torch.randn(one.master.shape, generator=rng)})


def masters(run: Any) -> dict[str, torch.Tensor]:
    return {name: one.master.detach().clone() for name, one in run.tune.trained.items()}


def take_steps(run: Any, batches: list[Any], now: Now, steps: int, first: int = 0) -> list[float]:
    """A few steps and the end of the stage. Returns the losses."""
    run.tune.model.train()
    losses = [run.step(batches, now._replace(step=i)).loss for i in range(first, first + steps)]
    for kept in run.keepers:
        if kept.keeper.after_stage is not None:
            kept.keeper.after_stage(kept.state, run.services(kept.slot, now))
    return losses


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_fault_1_any_split_gives_the_same_gradient(engine: Any, now: Now, kind: str, name: str) -> None:
    """Fault 1: one batch equals its micro-batches, even and uneven and empty ones, with unequal numbers of targets."""
    batch = rows_of_eight()
    found = []
    for sizes in ((8,), (2, 2, 2, 2), (1, 0, 5, 2), (3, 1, 4, 0)):
        run = run_of(engine, kind, name)
        shake(run)
        if kind in BY_STEP:
            take_steps(run, split(batch, sizes), now._replace(learning_rate=0.01), 2)
            found.append(masters(run))
        else:
            # The step at which toys observe.
            found.append(gradients(run, split(batch, sizes), now._replace(step=1)))
    for other in found[1:]:
        assert gap(other, found[0]) < (1e-7 if kind in BY_STEP else 1e-10)


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_a_run_that_nobody_holds_leaves_nothing_in_memory(engine: Any, now: Now, kind: str, name: str) -> None:
    """Python's collector cannot see through the hooks of tensors: what these hold would stay until the process ends."""
    run = run_of(engine, kind, name)
    take_steps(run, split(rows_of_eight(), (5, 3)), now, 2)
    model = weakref.ref(run.tune.model)
    del run
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "name"), FREES)
def test_the_base_is_never_lost(engine: Any, now: Now, kind: str, name: str, architecture: str) -> None:
    model, batch = model_of(architecture), rows_of_eight()
    wanted = logits_of(copy.deepcopy(model), batch)
    run = run_of(engine, kind, name, model=model, keep_base=True)
    take_steps(run, [batch], now, 3)
    with run.tune.off():
        assert torch.equal(logits_of(model, batch), wanted)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "name"), FREES)
def test_fault_20_step_zero_is_the_base_as_the_card_says(engine: Any, kind: str, name: str, architecture: str) -> None:
    """Fault 20: adapters that start at zero leave the logits alone, exactly; others keep to what their card says."""
    model, batch = model_of(architecture).float(), rows_of_eight()
    wanted = logits_of(copy.deepcopy(model), batch)
    run = run_of(engine, kind, name, model=model, dtype=torch.float32)
    # A prompt's virtual tokens join in luthier's own forward pass.
    off = float((logits_of(model, batch) - wanted).abs().max())
    claim = registry.find(name, (kind,)).card.step0
    assert claim in ("base exactly", "base up to rounding", "on purpose not the base")
    assert run.tune.trained
    if claim == "base exactly":
        assert off == 0.0
    elif claim == "base up to rounding":
        assert 0.0 < off < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "name"), FREES)
def test_fault_5_checkpointing_changes_no_gradient(engine: Any, now: Now, kind: str, name: str, architecture: str) -> None:
    """Fault 5: gradient checkpointing on and off give the same numbers, gap 0, also behind frozen first blocks."""
    batches = split(rows_of_eight(), (5, 3))
    found = []
    for checkpointing in (False, True):
        model = model_of(architecture)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = run_of(engine, kind, name, model=model)
        shake(run)
        model.train()
        take_steps(run, batches, now, 2)
        found.append(gradients(run, batches, now._replace(step=3)))
    assert gap(found[1], found[0]) == 0.0


@pytest.mark.parametrize(("kind", "name", "architecture"), PACKED)
def test_fault_5_packing_changes_no_gradient(engine: Any, now: Now, kind: str, name: str, architecture: str) -> None:
    """Fault 5: rows without padding give the gradients of padded ones, whatever the technique: neither sees the other rows."""
    batches = split(rows_of_eight(), (5, 3))
    found = []
    for packs in (False, True):
        model = model_of(architecture)
        use_attention(model)
        run = run_of(engine, kind, name, model=model)
        run.tune.packs = packs
        shake(run)
        if kind in BY_STEP:
            take_steps(run, batches, now._replace(learning_rate=0.01), 2)
            found.append(masters(run))
        else:
            found.append(gradients(run, batches, now._replace(step=1)))
    assert gap(found[1], found[0]) < (1e-7 if kind in BY_STEP else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_every_technique_trains_in_every_precision(
    engine: Any, now: Now, kind: str, name: str, architecture: str, dtype: torch.dtype
) -> None:
    run = run_of(engine, kind, name, model=model_of(architecture, layers=1), dtype=dtype)
    batches = split(rows_of_eight(), (5, 3))
    before = masters(run)
    losses = take_steps(run, batches, now._replace(learning_rate=1e-3), 3)
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
    part = registry.make({name: GIVEN.get(name, {})}, (kind,))
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


def outcome(engine: Any, now: Now, kind: str, name: str, options: dict[str, Any]) -> Any:
    """What four steps with a technique come to, as something to compare."""
    if kind == "row_map":
        part = registry.make({name: options}, (kind,))
        reasons = {"rationale": "because", "reason": "therefore"}
        asked = [{"prompt": f"{i}?", "completion": "abc" * i} for i in range(4)]
        rows = [Row(f"row{i}", "prompt+completion", fields, "", reasons) for i, fields in enumerate(asked)]
        says = {"user": "Is it open?", "assistant": "is_open()", "tool": "is_open is not defined"}
        turns = [{"role": role, "content": content} for role, content in says.items()]
        rows.append(Row("tools", "messages", {"messages": [*turns, turns[1]]}, "", reasons))
        return [repr(row) for row in part.values[0].map(rows, None)]
    if kind == "row_score":
        texts = [*["a red fox"] * 6, "a red fox runs", "a blue whale", "the tide comes", "the tide", "no fox", "a tall grey bird"]
        rows = [Row(id=f"row{i}", shape="text", fields={"text": text}, where="") for i, text in enumerate(texts)]
        services = ScoringServices([rows[0], rows[7], rows[9]], embedder(HASH), name, 0, likelihood_of_rows)
        return registry.make({name: options}, (kind,)).values[0].score(rows, services)
    if kind == "probe":
        base, tuned = model_of(), tiny("llama", seed=2).double()
        parts = map_parts(base)
        weights = Weights(base, parts, of_models(base, parts, tuned, parts))
        return repr(registry.make({name: options}, (kind,)).values[0].look(weights))
    run = run_of(engine, kind, name, options)
    losses = take_steps(run, split(rows_of_eight(), (5, 3)), now._replace(learning_rate=0.01), 4)
    live = [one.data.sum().item() for one in run.tune.model.parameters()]
    return losses, live, [(n, one.numpy().tobytes()) for n, one in masters(run).items()]


with _toys_listed():
    OPTIONS = [
        (kind, name, option) for kind, name in ALL for option in inspect.signature(registry.find(name, (kind,)).factory).parameters
    ]


@pytest.mark.parametrize(("kind", "name", "option"), OPTIONS)
def test_every_option_is_read(engine: Any, now: Now, kind: str, name: str, option: str) -> None:
    """Fault 26: every option of every technique changes what it does."""
    part = registry.make({name: GIVEN.get(name, {})}, (kind,))
    annotation = get_type_hints(registry.find(name, (kind,)).factory)[option]
    plain = outcome(engine, now, kind, name, dict(part.options))
    for value in other_values(name, option, annotation, part.options[option]):
        try:
            other = outcome(engine, now, kind, name, {**part.options, option: value})
        except LuthierError:
            # Out of its range: that is reading it, but another value must still show a difference.
            continue
        if other != plain:
            return
    pytest.fail(f"no other value of `{option}` changes anything")


@pytest.mark.parametrize("kind", KINDS)
def test_two_techniques_of_a_kind_differ(engine: Any, now: Now, kind: str) -> None:
    found = {name: outcome(engine, now, kind, name, GIVEN.get(name, {})) for k, name in ALL if k == kind}
    names = sorted(found)
    equal = {frozenset({a, b}) for i, a in enumerate(names) for b in names[i + 1 :] if found[a] == found[b]}
    assert equal <= SAME_BY_DESIGN
