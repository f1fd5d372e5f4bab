"""From parts to a run that can step: attach what trains, then objectives, then the chain; check that it all goes together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from luthier.columns.chunked import CONTEXT_ATTENTION
from luthier.errors import LuthierError
from luthier.kinds import (
    Callback,
    Freezing,
    GradientEstimator,
    GradientTransform,
    Head,
    InputMap,
    LossTerm,
    Now,
    Optimizer,
    PairLoss,
    Reference,
    State,
    StepLoss,
    TokenLoss,
    TokenWeight,
    Vocabulary,
)
from luthier.kinds.parts import Parts
from luthier.models.attention import use_attention
from luthier.models.experts import routers_of
from luthier.models.modes import evaluating
from luthier.models.sharding import Root
from luthier.registry import KEYS, Part, slots_of, values_of
from luthier.training import agreement
from luthier.training.chain import Chain, Link
from luthier.training.engine import Engine, Kept, idle_batch
from luthier.training.inputs import Inputs, Mapped, bare_vocabulary
from luthier.training.objective import Minimized, Objective, Weighted, as_term
from luthier.training.pairs import BASE_REFERENCE
from luthier.training.services import Calibration, RunServices
from luthier.training.world import World
from luthier.tune import Tune
from luthier.tune.attached import Attached
from luthier.tune.forward import hidden
from luthier.tune.turns import Turns

LOSSES = LossTerm | TokenLoss | PairLoss | StepLoss
"""What is minimized."""

FREES = tuple(KEYS["tune"].kinds.values())
"""The kinds that free numbers of the model, or put some beside them."""


def build_engine(
    model: nn.Module,
    parts: Parts,
    chosen: Mapping[str, Sequence[Part]],
    *,
    calibration: Calibration | None = None,
    now: Now,
    first: Callable[[str], Now] | None = None,
    vocabulary: Vocabulary | None = None,
    masters: str = "fp32",
    keep_base: bool = False,
    load_others: Callable[[Mapping[str, str]], Mapping[str, Attached]] | None = None,
    world: World | None = None,
    root: Root | None = None,
) -> Engine:
    """Attach every part of a run to a model.

    A technique may give values of several kinds; whatever key it stands under, each goes to its place, and all share one state.

    Args:
        model: a loaded model.
        parts: its map.
        chosen: the run's parts by the recipe's key, as `luthier.recipe.parts` chooses them.
        calibration: gives the rows that some techniques look at before they start.
        now: the clock as the run begins.
        first: the clock at the first step of a technique's own, by slot, where that is a later one.
        vocabulary: without it, input maps know no special tokens and no mask.
        masters: as in a recipe.
        keep_base: keep the base's values of numbers that train in place, whoever asks for them.
        load_others: gives the other models that techniques ask for, by name; it gets their names, each with a technique that asks.
        world: the processes.
        root: stands above a model that is spread over processes.

    Raises:
        LuthierError: nothing trains, nothing is minimized, a part takes nothing, or two parts cannot be combined.
    """
    chosen = {name: tuple(chosen.get(name, ())) for name in KEYS}
    values = values_of(chosen)
    named = slots_of(chosen)
    states: dict[str, State] = {slot: {} for _, slot, _ in named}
    reference = _reference(values)
    goal = Objective(
        terms=[
            Minimized(slot, as_term(v, reference), states[slot], of_step=v if isinstance(v, StepLoss) else None)
            for slot, v in values
            if isinstance(v, LOSSES)
        ],
        weights=[Weighted(slot, v, states[slot]) for slot, v in values if isinstance(v, TokenWeight)],
        reference=reference,
        head=_head(values),
    )
    if not goal.terms:
        raise LuthierError("nothing is minimized", where="objective", fix="name one, e.g. cross_entropy")
    if goal.head is not None and goal.rules:
        raise LuthierError(
            f"`{goal.rules[0].slot}` chooses among the labels of a step, and what `{goal.head[0]}` reads has none",
            where="token_weight",
            fix="leave one of them out",
        )
    # Refuses two parts that define a column differently.
    goal.columns()
    check_predicts(values, parts)
    _check_routers(goal, model, parts)
    maps = [Mapped(slot, v) for slot, v in values if isinstance(v, InputMap)]
    inputs = Inputs(vocabulary or bare_vocabulary(parts.vocabulary), maps)
    callbacks = [(slot, v) for slot, v in values if isinstance(v, Callback)]
    looking = goal.readers(CONTEXT_ATTENTION.name)
    if looking and not use_attention(model):
        raise _hidden(looking, parts)
    others = _others(goal.models(), load_others)
    comparing = bool(goal.comparing()) or any(one.model is model or one.beneath is not None for one in others.values())
    keep_base = keep_base or comparing or any("base" in v.needs for _, v in callbacks)
    owner = Tune(model, parts, masters=masters, keep_base=keep_base, root=root)
    owner.others.update(others)
    for one in others.values():
        if one.model is model:
            one.beneath = owner
    owner.turns = turns_of(values)
    # Where memory is only estimated there is no clock.
    if now.steps > 1:
        owner.turns.check(now.steps)

    def services_of(slot: str) -> RunServices:
        return RunServices(owner, slot, now if first is None else first(slot), calibration)

    for slot, value in values:
        if isinstance(value, FREES):
            owner.add(slot, value, services_of(slot), states[slot])
    if parts.added:
        owner.add_new_rows({})
    if goal.comparing() and owner.prompt_labels is not None and bool((owner.prompt_labels >= 0).any()):
        raise LuthierError(
            f"`{goal.comparing()[0]}` compares with the base, which does not read the virtual tokens that are labels here",
            where="objective",
            fix="leave it out, or use a prompt without labels, such as prompt_tuning",
        )
    goal.start(owner, services_of)
    if not owner.trained:
        raise LuthierError("nothing trains", where="tune", fix="name a technique, e.g. full, half or lora")
    if looking:
        _try_looking(owner, looking)
    # What a technique returns beside what it frees is for its own tensors, and comes before what the recipe names as its step.
    freeing = {slot for slot, v in values if isinstance(v, FREES)}
    in_step = {slot for key, slot, _ in named if key == "optimizer"}
    moving = [(slot, v) for slot, v in values if isinstance(v, GradientTransform | Optimizer)]
    links = [Link(slot, v, own=slot in freeing) for slot, v in sorted(moving, key=lambda one: one[0] in in_step)]
    sources = [(slot, v) for slot, v in values if isinstance(v, GradientEstimator)]
    world = world or World.current()
    _refuse_impossible(sources, links, owner, callbacks, world)
    chain = Chain(links, owner)
    chain.watching = _watched(owner, callbacks)
    engine = Engine(owner, goal, inputs, chain, sources[0][1], [], world, states, calibration=calibration, chosen=chosen)
    for slot, callback in callbacks:
        if callback.start is not None:
            states[slot].update(callback.start(services_of(slot)))
        engine.callbacks.append(Kept(slot, callback, states[slot]))
    owner.freezings = [(slot, v, states[slot]) for slot, v in values if isinstance(v, Freezing)]
    if owner.freezings and root is not None:
        raise LuthierError(
            f"`{owner.freezings[0][0]}` freezes what trains in mid-run, which a model spread over processes cannot do",
            where="train.sharding",
            fix="use train.sharding: none",
        )
    agreement.check(world, owner, values=True)
    return engine


def _others(asked: Mapping[str, str], load: Callable[[Mapping[str, str]], Mapping[str, Attached]] | None) -> Mapping[str, Attached]:
    """The other models that techniques compare with."""
    if asked and load is None:
        name, slot = next(iter(asked.items()))
        raise LuthierError(
            f"`{slot}` asks for a model `{name}`, and there is none here",
            where="models",
            fix="give build_engine `load_others`, as a run from a recipe does",
        )
    return load(asked) if asked and load is not None else {}


def check_predicts(values: Sequence[tuple[str, object]], parts: Parts) -> None:
    """Refuse an encoder where something learns from predicted tokens.

    Args:
        values: of all parts, with their slots.
        parts: the model's map.

    Raises:
        LuthierError: the model is no causal one, and a loss or a token weight reads what a language head says, or a head answers.
    """
    if parts.causal:
        return
    has_head = any(isinstance(v, Head) for _, v in values)
    terms = [(slot, as_term(v)) for slot, v in values if isinstance(v, LOSSES)]
    asking = [slot for slot, term in terms if term.columns or not has_head]
    asking += [slot for slot, v in values if isinstance(v, TokenWeight)]
    fix = "use classify, multi_label, classify_tokens, regress or embed, or a causal language model"
    encoder = f"{parts.architecture} is an encoder"
    if asking:
        what = f"`{asking[0]}` learns from the tokens that a language model predicts, and {encoder}, which predicts none"
        raise LuthierError(what, where="objective", fix=fix)
    scoring = [slot for slot, v in values if isinstance(v, Head) and v.means == "score"]
    if scoring:
        what = f"`{scoring[0]}` reads answers within their conversation, and {encoder}, which reads texts alone"
        raise LuthierError(what, where="objective", fix=fix)


def _check_routers(goal: Objective, model: nn.Module, parts: Parts) -> None:
    """Refuse a term that reads routers where the model has none, or none that tell what they choose."""
    asking = [one.slot for one in goal.terms if one.term.routers]
    if asking and not routers_of(model, parts):
        raise LuthierError(
            f"`{asking[0]}` reads the routers of a mixture of experts, and {parts.architecture} has none",
            where="objective",
            fix=f"leave `{asking[0]}` out, or use a model with experts",
        )


def _head(values: Sequence[tuple[str, object]]) -> tuple[str, Head] | None:
    """What reads whole rows."""
    found = [(slot, v) for slot, v in values if isinstance(v, Head)]
    if len(found) > 1:
        raise LuthierError(
            f"`{found[0][0]}` and `{found[1][0]}` both put a head beside the model", where="objective", fix="leave one of them out"
        )
    return found[0] if found else None


def _reference(values: Sequence[tuple[str, object]]) -> Reference:
    """What answers are compared with."""
    found = [(slot, v) for slot, v in values if isinstance(v, Reference)]
    if len(found) > 1:
        raise LuthierError(
            f"`{found[0][0]}` and `{found[1][0]}` are both the reference", where="objective", fix="leave one of them out"
        )
    if found and not any(isinstance(v, PairLoss | StepLoss) and v.reference for _, v in values):
        raise LuthierError(
            f"`{found[0][0]}` is what answers are compared with, and nothing compares them",
            where="objective",
            fix="name a loss with a reference beside it, such as dpo",
        )
    return found[0][1] if found else BASE_REFERENCE


def turns_of(values: Sequence[tuple[str, object]]) -> Turns:
    """The clocks of a run's techniques.

    Args:
        values: of all parts, with their slots, in the order in which they stand in the run.
    """
    frees = {slot for slot, v in values if isinstance(v, (*FREES, Head)) or (isinstance(v, LossTerm) and v.start is not None)}
    return Turns({slot: v for slot, v in values if isinstance(v, Freezing) and (v.ends or v.alone)}, frees)


def _hidden(slots: list[str], parts: Parts) -> LuthierError:
    return LuthierError(
        f"`{slots[0]}` asks where the model looks, and the attention of {parts.architecture} does not tell",
        where=CONTEXT_ATTENTION.name,
        fix=f"leave `{slots[0]}` out, or use a model with the exchangeable attention of transformers, such as Llama or Qwen",
    )


def _try_looking(tune: Tune, slots: list[str]) -> None:
    """Try on the model itself whether its last block tells where it looks: some have attention of another kind there."""
    batch = idle_batch().to(next(tune.model.parameters()).device)
    try:
        with evaluating(tune.model):
            tune.run(lambda: hidden(tune, batch, context_BT=batch.attend_BT))
    except (LuthierError, TypeError) as error:
        raise _hidden(slots, tune.parts) from error


def _watched(tune: Tune, callbacks: list[tuple[str, Callback]]) -> frozenset[str]:
    """The tensors whose gradients callbacks look at: those of their own technique, else all."""
    watched: set[str] = set()
    for slot, callback in callbacks:
        if "gradients" in callback.needs:
            mine = {name for name, one in tune.trained.items() if one.slot == slot}
            watched |= mine or set(tune.trained)
    return frozenset(watched)


def _refuse_impossible(
    sources: list[tuple[str, GradientEstimator]], links: list[Link], tune: Tune, callbacks: list[tuple[str, Callback]], world: World
) -> None:
    if len(sources) != 1:
        raise LuthierError("a run has exactly one gradient estimator", where="gradient_estimator", fix="name one, e.g. backprop")
    if not any(isinstance(link.part, Optimizer) for link in links):
        raise LuthierError("nothing moves the parameters: no optimizer is named", where="optimizer", fix="add one, e.g. adamw")
    name, source = sources[0]
    gives = source.gives
    if gives == {"gradients"} and world.size > 1:
        raise LuthierError(
            "updates inside backward are not summed over several processes",
            where="gradient_estimator",
            fix="use gradient_estimator: backprop, or one process",
        )
    need_all = [link.slot for link in links if isinstance(link.part, GradientTransform) and link.part.scope == "all"]
    need_all += [slot for slot, callback in callbacks if "gradients" in callback.needs]
    if "all" not in gives and need_all:
        raise LuthierError(
            f"`{need_all[0]}` needs all gradients at once, and `{name}` gives them one at a time",
            where="gradient_estimator",
            fix=f"use gradient_estimator: backprop, or leave `{need_all[0]}` out",
        )
    observers = [slot for slot, value, _ in tune.selectives if value.observe is not None]
    observers += [slot for slot, value, _ in tune.weight_deltas if value.observe is not None]
    if not gives >= {"all", "gradients"} and observers:
        raise LuthierError(
            f"`{observers[0]}` observes whole gradients, and `{name}` gives none to observe",
            where="gradient_estimator",
            fix="use gradient_estimator: backprop",
        )
