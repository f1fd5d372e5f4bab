"""What the contracts know of each kind: the rows that its techniques need, how one of them is placed into a run, and how what it does
is compared. Every technique of the registry, and every toy, is tested by what stands here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

from luthier import registry
from luthier.delta.weights import Weights, of_models
from luthier.kinds import Batch, Now
from luthier.kinds.parts import Parts
from luthier.models.attention import use_attention
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.registry import KINDS, Part, key_of, kinds_under
from luthier.rows.embed import HASH, embedder
from luthier.rows.groups import RANKED
from luthier.rows.select import ScoringServices
from luthier.rows.shapes import Row
from luthier.runs.measure import likelihood_of_rows
from luthier.training.build import build_engine
from luthier.training.engine import Engine
from tests.conftest import calibration, other_models, parts_of, split
from tests.toys.helpers import TOYS, model_of, rows_of_eight, rows_of_pairs

NOW = Now(step=0, steps=20, learning_rate=0.1, factor=1.0)
"""The first of 20 steps, as the fixture `now`."""


@contextmanager
def toys_listed() -> Iterator[None]:
    """The toys stand in the registry for a while, also within a test that has them already."""
    known = "extra_head" in registry.names("loss_term")
    if not known:
        registry.add_folder(TOYS)
    try:
        yield
    finally:
        if not known:
            registry.remove_folder(TOYS)


class Fixture(NamedTuple):
    """What the contracts know of one kind."""

    rows: Callable[..., Any]
    """What its techniques are handed: for kinds of a run one batch (`rows(seed=...)`), for others what `outcome` takes."""
    place: Callable[[Part], dict[str, Any]] | None = None
    """The keys of a run in which a technique stands in its place and plain ones in all others; None: it takes no part in steps."""
    outcome: Callable[[Any, Any], Any] | None = None
    """What a value of it makes of the rows, as something to compare; None: what the steps of a run come to."""
    by_step: bool = False
    """It shows in the steps that are taken, not in the gradients."""


def mapped_rows() -> list[Row]:
    """Rows with a reason, a conversation with a failed call, ranked answers, and answers from retrieved passages."""
    reasons = {"rationale": "because", "reason": "therefore"}
    asked = [{"prompt": f"{i}?", "completion": "abc" * i} for i in range(4)]
    rows = [Row(f"row{i}", "prompt+completion", fields, "", reasons) for i, fields in enumerate(asked)]
    says = {"user": "Is it open?", "assistant": "is_open()", "tool": "is_open is not defined"}
    turns = [{"role": role, "content": content} for role, content in says.items()]
    ranked = {"prompt": "Which?", "answers": ["this", "that", "both", "none"], "scores": [3.0, 9.0, 3.0, 1.0]}
    retrieved = {
        "prompt": "Who, and where?",
        "answers": ["Ann did [2].", "Ann slept in Oslo [1]."],
        "clean_answers": ["Ann did it in Oslo [1]."],
        "passages": ["Ann did nothing.", "Ann was in Oslo."],
        "clean_passages": ["Ann was in Oslo."],
        "short_answers": ["Ann", ["Oslo", "Kristiania"]],
    }
    return [
        *rows,
        Row("tools", "messages", {"messages": [*turns, turns[1]]}, "", reasons),
        Row("ranked", RANKED, ranked, "", reasons),
        Row("retrieved", "prompt", retrieved, "", reasons),
    ]


def scored_rows() -> list[Row]:
    """Texts, many of them alike."""
    texts = [*["a red fox"] * 6, "a red fox runs", "a blue whale", "the tide comes", "the tide", "no fox", "a tall grey bird"]
    return [Row(id=f"row{i}", shape="text", fields={"text": text}, where="") for i, text in enumerate(texts)]


def compared_weights() -> Weights:
    """A model and another one."""
    base, tuned = model_of(), tiny("llama", seed=2).double()
    parts = map_parts(base)
    return Weights(base, parts, of_models(base, parts, tuned, parts))


def _scores(value: Any, rows: list[Row]) -> Any:
    return value.score(rows, ScoringServices([rows[0], rows[7], rows[9]], embedder(HASH), "score", 0, likelihood_of_rows))


def _under(key: str) -> Callable[[Part], dict[str, Any]]:
    return lambda part: {key: [part]}


def _learnt(part: Part) -> dict[str, Any]:
    return {"objective": ["cross_entropy", part]}


def _teaching(part: Part) -> dict[str, Any]:
    return {"objective": [part]} if any(map(registry.KEYS["objective"].brings, part.values)) else _learnt(part)


def _compared(part: Part) -> dict[str, Any]:
    return {"objective": [_plain("dpo", "objective"), part]}


def _stepping(part: Part) -> dict[str, Any]:
    takes_all = part.kind == "optimizer" and part.values[0].takes is None
    return {"optimizer": [part] if takes_all else [part, "adamw"]}


FIXTURES: dict[str, Fixture] = {
    **{kind: Fixture(rows_of_eight, _under("tune")) for kind in kinds_under("tune")},
    **{kind: Fixture(rows_of_eight, _learnt) for kind in ("input_map", "loss_term", "token_loss")},
    "pair_loss": Fixture(rows_of_pairs, _under("objective")),
    "step_loss": Fixture(rows_of_pairs, _teaching),
    "reference": Fixture(rows_of_pairs, _compared),
    "head": Fixture(rows_of_pairs, _under("objective")),
    "token_weight": Fixture(rows_of_eight, _under("token_weight")),
    "gradient_transform": Fixture(rows_of_eight, _stepping, by_step=True),
    "optimizer": Fixture(rows_of_eight, _stepping, by_step=True),
    "gradient_estimator": Fixture(rows_of_eight, _under("gradient_estimator"), by_step=True),
    "callback": Fixture(rows_of_eight, _under("callbacks"), by_step=True),
    "freezing": Fixture(rows_of_eight, _under("freeze")),
    "row_map": Fixture(mapped_rows, outcome=lambda value, rows: [repr(row) for row in value.map(rows, None)]),
    "row_score": Fixture(scored_rows, outcome=_scores),
    "probe": Fixture(compared_weights, outcome=lambda value, weights: repr(value.look(weights))),
}
"""By kind. A kind that is missing here fails a test: its techniques must not be handed rows that were made for others."""

with toys_listed():
    ALL = [(kind, name) for kind in KINDS if kind in FIXTURES for name in registry.names(kind)]
    OPTIONS = [
        (kind, name, option) for kind, name in ALL for option in inspect.signature(registry.find(name, (kind,)).factory).parameters
    ]
FREES = [(kind, name) for kind, name in ALL if kind in kinds_under("tune")]
OUTSIDE = tuple(kind for kind, fixture in FIXTURES.items() if fixture.place is None)
"""Kinds that take no part in the steps of a run."""
RUNS = [(kind, name) for kind, name in ALL if kind not in OUTSIDE]
MODELS: dict[str, str] = {"load_balance": "mixtral"}
"""Techniques that need a model of another family than the others, and the one on which they are tried alone."""
TOGETHER = [one for one in RUNS if one[1] not in MODELS]
"""Techniques that are tried beside each other, on one model."""
BY_STEP = tuple(kind for kind, fixture in FIXTURES.items() if fixture.by_step)
LEARNING = [(kind, name) for kind, name in TOGETHER if key_of(kind) in ("objective", "token_weight")]

GIVEN: dict[str, dict[str, Any]] = {
    "adalora": {"warmup": 0.05},
    "adapter": {"dropout": 0.2},
    "convergence_balance": {"validation_source": "other", "every": 1, "window": 2},
    "caft": {"heads_first": 0.1},
    "classify": {"labels": ("no", "yes")},
    "classify_tokens": {"labels": ("no", "yes")},
    "multi_label": {"labels": ("no", "yes")},
    "ptec": {"labels": ("no", "yes"), "length": 3},
    "greentrainer": {"selections": 5, "target": 0.7},
    "lift": {"rank": 4, "lora_rank": 2, "every": 2},
    "likelihood": {"models": ("tiny:llama",)},
    "lofit": {"selection": 0.1},
    "loca": {"search": 0.2, "coefficient_steps": 1, "location_steps": 1, "dropout": 0.2},
    "lora": {"dropout": 0.2},
    "lt_sft": {"first": 0.1},
    "following_reference": {"sync_every": 1},
    "f_dpo": {"divergence": "alpha"},
    "sppo_hard": {"beta": 0.5},
    "masked_thought": {"warmup": 0.05, "random_share": 0.5, "mask_id": 3},
    "neuroada": {"by": "gradient"},
    "noisefit": {"layers": 1},
    "prompt_tuning": {"init": "text"},
    "s2ft": {"by": "activation"},
    "spiel": {"every": 3, "gather": 1},
    "weak_to_strong": {"labels": ("no", "yes"), "column": "weak", "warmup": 0.05},
    "embed": {"sizes": (8,)},
    "sstoken": {"attention_only": 0.05, "every": 2},
}
"""Options of techniques that have options without a default, whose defaults do nothing in the first steps, or that draw."""
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
    ("odpo", "column"): ["better"],
    ("kto", "column"): ["verdict"],
    ("apo_zero_unpaired", "column"): ["verdict"],
    ("weak_to_strong", "column"): ["verdict"],
    ("weak_to_strong", "labels"): [("yes", "no")],
    ("embed", "sizes"): [(4,)],
    ("classify", "labels"): [("yes", "no")],
    ("classify_tokens", "labels"): [("yes", "no")],
    ("multi_label", "labels"): [("yes", "no")],
    ("multi_label", "positive_weights"): [(3.0, 0.5)],
    ("ptec", "labels"): [("yes", "no")],
    ("ptec", "positive_weights"): [(3.0, 0.5)],
    ("regress", "column"): ["verdict"],
    ("reward_model", "margin"): ["margin"],
    ("stored_reference", "chosen"): ["other_chosen"],
    ("stored_reference", "rejected"): ["reference_chosen"],
}
"""Other values of options for which the type does not tell them, by technique and option."""


ROWS: dict[str, Callable[..., Batch]] = {"length_desensitization": rows_of_pairs}
"""Rows of techniques that show what they do on others than their kind's."""


def rows_for(kinds: Iterable[str], **options: Any) -> Batch:
    """One batch that techniques of all these kinds can read: the rows of the one that needs other rows than targets."""
    wanted = {FIXTURES[kind].rows for kind in kinds} - {rows_of_eight}
    assert len(wanted) < 2, f"{', '.join(kinds)} need different rows"
    return next(iter(wanted), rows_of_eight)(**options)


_parts: dict[str, Part] = {}


def part_of(kind: str, name: str, options: Mapping[str, Any] | None = None) -> Part:
    """A technique with the options that the contracts give it, and others. It holds no state, so it is made once."""
    given = {**GIVEN.get(name, {}), **(options or {})}
    key = f"{kind} {name} {given}"
    if key not in _parts:
        _parts[key] = registry.make({name: given}, (kind,))
    return _parts[key]


@cache
def _plain(name: str, key: str) -> Part:
    return registry.make_all(name, key)[0]


def _made(spec: Any, key: str) -> Any:
    """The parts of what stands under a key; plain ones are made once."""
    some = spec if isinstance(spec, list) else [] if spec is None else [spec]
    return [_plain(one, key) if isinstance(one, str) else one for one in some]


_maps: dict[tuple[str, int], Parts] = {}


def _mapped(model: Any) -> Parts:
    """The map of a tiny model: the same for all of an architecture and depth."""
    key = (model.config.model_type, model.config.num_hidden_layers)
    if key not in _maps:
        _maps[key] = map_parts(model)
    return _maps[key]


def engine_of(model: Any = None, *, dtype: torch.dtype = torch.float64, now: Now = NOW, **keys: Any) -> Engine:
    """An engine from recipe keys on a tiny model; keys that are not named hold something plain. Other keys are those of
    `build_engine`."""
    named = {"tune": "full", "objective": "cross_entropy", "optimizer": "adamw", "gradient_estimator": "backprop"} | keys
    specs = {key: _made(named.pop(key), key) for key in [*named] if key in registry.KEYS}
    model = (model_of() if model is None else model).to(dtype)
    return build_engine(
        model,
        _mapped(model),
        parts_of(**specs),
        now=now,
        **{"calibration": calibration, "load_others": other_models(dtype), **named},
    )


def run_of(kind: str, name: str, options: Mapping[str, Any] | None = None, **more: Any) -> Engine:
    """An engine in which one technique stands in its place, and plain ones in all others."""
    place = FIXTURES[kind].place
    assert place is not None, f"a {kind} takes no part in a run"
    given = more.get("model")
    if name in MODELS and (given is None or given.config.model_type != MODELS[name]):
        more["model"] = model_of(MODELS[name], layers=2 if given is None else given.config.num_hidden_layers)
        use_attention(more["model"])
    return engine_of(**{**place(part_of(kind, name, options)), **more})


def shake(run: Engine) -> None:
    """Move everything that trains a little, so that no start at zero hides a mistake."""
    for name, one in run.tune.trained.items():
        rng = torch.Generator().manual_seed(len(name))
        run.tune.set({name: one.master.detach() + 0.05 * torch.randn(one.master.shape, generator=rng)})


def masters(run: Engine) -> dict[str, torch.Tensor]:
    """Copies of all numbers that train, as optimizers see them."""
    return {name: one.master.detach().clone() for name, one in run.tune.trained.items()}


def take_steps(run: Engine, batches: list[Batch], now: Now, steps: int, first: int = 0) -> list[float]:
    """A few steps and the end of the stage. Returns the losses."""
    run.tune.model.train()
    losses = [run.step(batches, now._replace(step=i)).loss for i in range(first, first + steps)]
    end_stage(run, now)
    return losses


def end_stage(run: Engine, now: Now) -> None:
    """What callbacks do when a stage ends."""
    for kept in run.callbacks:
        if kept.callback.after_stage is not None:
            kept.callback.after_stage(kept.state, run.services(kept.slot, now))


def outcomes(kind: str, name: str, options: Mapping[str, Any], steps: int = 4) -> Iterator[Any]:
    """What a technique comes to, as things to compare: of one that takes part in steps what each of them comes to, in turn."""
    part = registry.make({name: dict(options)}, (kind,))
    fixture = FIXTURES[kind]
    if fixture.outcome is not None:
        yield fixture.outcome(part.values[0], fixture.rows())
        return
    run, now = run_of(kind, name, options), NOW._replace(learning_rate=0.01)
    batches = split(ROWS[name]() if name in ROWS else rows_for([kind]), (5, 3))
    run.tune.model.train()
    for step in range(steps):
        loss = run.step(batches, now._replace(step=step)).loss
        if step == steps - 1:
            end_stage(run, now)
        live = [one.data.sum().item() for one in run.tune.model.parameters()]
        yield loss, live, [(key, one.numpy().tobytes()) for key, one in masters(run).items()]
