"""What each part of a run keeps to itself beside all others, by kind: found for every technique by the kind of its values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier import registry
from luthier.kinds import Batch, InputMap
from luthier.registry import key_of
from luthier.training.engine import Engine, StepResult
from luthier.tune.trained import Trained, write
from tests.conftest import split
from tests.contracts.combinations import Technique, Together, build, parts_for, traits
from tests.contracts.fixtures import NOW, engine_of, masters, part_of
from tests.toys.helpers import gap, gradients, logits_of, model_of

LIVED = NOW._replace(learning_rate=0.01)
STEPS = 3


class Lived(NamedTuple):
    """What was seen of a combination in its steps."""

    results: list[StepResult]
    still: list[tuple[str, Tensor, Tensor]]
    """Tensors that were to stand still in a step, with their values before and after it."""
    heard: dict[str, int]
    """How often each callback heard that a step was done, by slot."""
    claimed: dict[str, Tensor]
    """Which numbers of each parameter trained at any time."""
    frees: dict[str, list[tuple[str, tuple[int, ...]]]]
    """What trained at the start, by slot: form and shape of each tensor."""


def frees(run: Engine) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """What trains now, by slot: form and shape of each tensor."""
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for one in run.tune.trained.values():
        found.setdefault(one.slot, []).append((one.form, tuple(one.master.shape)))
    return {slot: sorted(some) for slot, some in found.items()}


def replication(run: Engine, claimed: dict[str, Tensor]) -> None:
    """Add which numbers of the model train now."""
    for one in run.tune.trained.values():
        if one.place is None or one.form in ("factor", "free"):
            continue
        live = run.tune.model.get_parameter(one.place.parameter)
        mask = claimed.setdefault(one.place.parameter, torch.zeros(live.shape, dtype=torch.bool))
        values = mask.t() if one.place.module in run.tune.parts.transposed and mask.ndim == 2 else mask
        values = values if one.place.start is None else values[one.place.start : one.place.stop]
        write(values, one.form, one.index, torch.ones((), dtype=torch.bool))


def live(together: Together, steps: int = STEPS) -> Lived:
    """Take steps with a combination, and look at what moves."""
    run, batch = together.run, together.batch
    heard: dict[str, int] = {}
    for kept in run.callbacks:
        _count(kept, heard)
    _follow_moments(run)
    lived = Lived([], [], heard, {}, frees(run))
    run.tune.model.train()
    for step in range(steps):
        replication(run, lived.claimed)
        before = masters(run)
        batches = [batch] if step else split(batch, (5, 3))
        lived.results.append(run.step(batches, LIVED._replace(step=step)))
        after = masters(run)
        # Where a technique exchanged entries, others stand there now.
        changed = {said.split(":")[0] for said in lived.results[-1].said}
        still = [n for n, one in run.tune.trained.items() if one.still and n in before and one.slot not in changed]
        lived.still.extend((n, before[n], after[n]) for n in still)
    replication(run, lived.claimed)
    return lived


def _follow_moments(run: Engine) -> None:
    """Whenever entries are rearranged, what optimizers know of those that stay stays with them, and of new ones they know nothing."""
    own, chain = run.tune.moved, run.chain

    def moved(trained: Trained, take: Tensor, old_size: int) -> None:
        before = {
            (slot, key): value.clone()
            for slot, states in chain.state.items()
            for key, value in states.get(trained.name, {}).items()
            if isinstance(value, Tensor) and value.ndim == trained.master.ndim and value.shape[trained.axis] == old_size
        }
        own(trained, take, old_size)
        for (slot, key), old in before.items():
            new = chain.state[slot][trained.name][key].movedim(trained.axis, 0)
            stays = take >= 0
            assert torch.equal(new[stays], old.movedim(trained.axis, 0)[take[stays]]), f"{key} of {trained.name} did not follow"
            assert not new[~stays].any(), f"{key} of {trained.name}: new entries have a past"

    run.tune.moved = moved


def _count(kept: Any, heard: dict[str, int]) -> None:
    """Count how often a callback hears of a step."""
    own = kept.callback.after_step
    if own is None:
        return
    heard[kept.slot] = 0

    def after_step(state: Any, services: Any) -> None:
        heard[kept.slot] += 1
        own(state, services)

    kept.callback = kept.callback._replace(after_step=after_step)


@cache
def _alone(kind: str, name: str, options: str) -> tuple[Any, Any]:
    run = engine_of(tune=[part_of(kind, name, _options[options])], keep_base=True)
    together = Together(((kind, name),), {}, run)
    lived = live(together)
    return lived.frees[name], frees(run)[name]


_options: dict[str, dict[str, Any]] = {}


def frees_as_alone(together: Together, lived: Lived, one: Technique) -> None:
    """Beside others a technique frees as many numbers as alone, of the same forms, at the start and some steps later."""
    options = dict(together.parts[one].options)
    _options[str(options)] = options
    first, last = _alone(*one, str(options))
    assert lived.frees[one[1]] == first, f"{one[1]} frees other numbers than alone"
    same = BY_GRADIENT.get(one[1], list.__eq__)
    # Phases of others leave it fewer steps than it has alone.
    if together.run.tune.turns.own(one[1], LIVED).steps == LIVED.steps:
        assert same(frees(together.run)[one[1]], last), f"after some steps {one[1]} frees other numbers than alone"


Shapes = list[tuple[str, tuple[int, ...]]]
BY_GRADIENT: dict[str, Callable[[Shapes, Shapes], bool]] = {
    "growing": lambda mine, alone: len(mine) == len(alone),
    # Where nothing was chosen one number stands in.
    "lt_sft": lambda mine, alone: abs(_numbers(mine) - _numbers(alone)) < len(alone),
}
"""Techniques whose shapes follow from gradients, which others change; and what stays the same."""


def _numbers(found: Shapes) -> int:
    return sum(prod(shape) for _, shape in found)


def stood_still(together: Together, lived: Lived, one: Technique) -> None:
    """What was to stand still in a step did not move in it."""
    for name, before, after in lived.still:
        assert torch.equal(before, after), f"{name} was to stand still"


def heard_every_step(together: Together, lived: Lived, one: Technique) -> None:
    """A callback heard of every step once, of those that are its own."""
    taken = [step for step, result in enumerate(lived.results) if not result.skipped]
    turns = together.run.tune.turns
    for slot, count in lived.heard.items():
        assert count == sum(turns.moves(slot, LIVED._replace(step=step)) for step in taken), lived.heard


def has_one_optimizer(together: Together, lived: Lived, one: Technique) -> None:
    """Every tensor has one optimizer, and what a technique brings for itself has state of its own tensors alone."""
    chain = together.run.chain
    trained = together.run.tune.trained
    assert set(chain.optimizer_of) == {name for name, one in trained.items() if not one.forgotten}
    for link in chain.links:
        mine = {name for name in chain.state[link.slot] if name in trained}
        assert not link.own or all(trained[name].slot == link.slot for name in mine)


def reads_as_alone(together: Together, lived: Lived, one: Technique) -> None:
    """An input map draws for itself: it gives what it gives alone, of the same rows."""
    value = next(value for value in together.parts[one].values if isinstance(value, InputMap))
    if value.map is None:
        return
    maps = [other for other in together.run.inputs.maps if other.value.map is not None]
    if len(maps) > 1:
        return
    alone = engine_of(objective=["cross_entropy", together.parts[one]])
    read, mine = (run.inputs.read(together.batch, LIVED) for run in (together.run, alone))
    assert torch.equal((read or together.batch).token_ids_BT, (mine or together.batch).token_ids_BT)


INVARIANTS: dict[str, Callable[[Together, Lived, Technique], None]] = {
    **dict.fromkeys(registry.kinds_under("tune"), frees_as_alone),
    "freezing": stood_still,
    "callback": heard_every_step,
    "gradient_transform": has_one_optimizer,
    "optimizer": has_one_optimizer,
    "input_map": reads_as_alone,
}
"""By kind; those of freezings, callbacks and the chain hold for what other kinds bring along, too."""


def starts_as_it_says(together: Together, batch: Batch) -> None:
    """Step 0: the base, bit for bit or up to rounding, as all cards say; what starts exactly adds nothing to what does not."""
    base = _base_logits(batch)
    replications = {one: registry.find(one[1], (one[0],)).card.step0 for one in together.chosen}
    found = logits_of(together.run.tune.model, batch)
    others = [one for one in together.chosen if key_of(one[0]) == "tune" and replications[one] != "base exactly"]
    if not others:
        assert torch.equal(found, base), "every card says `base exactly`"
    elif all(replications[one] == "base up to rounding" for one in others):
        assert float((found - base).abs().max()) < 1e-9
    else:
        alone = build({one: together.parts[one] for one in others}, keep_base=True)
        assert float((found - logits_of(alone.tune.model, batch)).abs().max()) < 1e-9, "what starts exactly changed the logits"


@cache
def _cached_logits(architecture: str) -> dict[bytes, Tensor]:
    return {}


def _base_logits(batch: Batch) -> Tensor:
    known, key = _cached_logits("llama"), batch.token_ids_BT.numpy().tobytes()
    if key not in known:
        known[key] = logits_of(model_of(), batch)
    return known[key]


def subtracts_what_it_adds(together: Together) -> None:
    """What a start took out of a weight stands beside it: together they are the base."""
    tune, base = together.run.tune, model_of()
    subtracting = [(site, one) for site in tune.sites.values() for one in site.additions if one.value.subtract]
    sums: dict[Any, Tensor] = {}
    for _, one in subtracting:
        delta = one.value.delta(one.masters())
        sums[one.place] = sums[one.place] + delta if one.place in sums else delta
    others = {one.place.parameter for one in tune.trained.values() if one.place is not None and one.form not in ("factor", "free")}
    for place, delta_OI in sums.items():
        if place.parameter in others:
            # A selection may have begun with other values.
            continue
        wanted = base.get_parameter(place.parameter).data
        assert float((tune.region(place) + delta_OI - wanted).abs().max()) < 1e-9, place


def splits_alike(together: Together) -> None:
    """Any split into micro-batches gives the same gradient, or the same step where gradients are not all there at once."""
    batch, run = together.batch, together.run
    if "all" not in run.source.gives:
        ends = []
        for sizes in ((8,), (3, 1, 4, 0)):
            other = build(together.parts, keep_base=True)
            other.tune.model.train()
            other.step(split(batch, sizes), LIVED)
            ends.append(masters(other))
        # A slope along a line divides rounding by the distance of its points.
        assert gap(ends[1], ends[0]) < 1e-6
        return
    states, found = copy.deepcopy(run.states), []
    run.tune.freeze(LIVED)
    for sizes in ((8,), (3, 1, 4, 0)):
        _restore(run, states)
        # The step at which toys observe.
        found.append(gradients(run, split(batch, sizes), LIVED._replace(step=1)))
    _restore(run, states)
    assert gap(found[1], found[0]) < 1e-9


def _restore(run: Engine, states: dict[str, Any]) -> None:
    """In place: the parts of a technique share their state."""
    for slot, state in copy.deepcopy(states).items():
        run.states[slot].clear()
        run.states[slot].update(state)


def teaches_as_without(together: Together, first: StepResult) -> None:
    """At step 0 a token weight keeps its share, and every part of the loss is what it is, without the parts that are left out here:
    other losses, transforms, optimizers, sources, callbacks and freezings; whatever the order of the weights."""
    if "gradients" not in together.run.source.gives:
        # It looks at the loss elsewhere.
        return
    losses = [one for one in together.chosen if one[0] in ("loss_term", "token_loss")]
    stays = [one for one in together.chosen if key_of(one[0]) in ("tune", "token_weight") or one[0] == "input_map"]
    rules = sum("rule" in traits[one] for one in stays)
    # Weights multiply, in any order; rules take turns.
    stays = stays if rules > 1 else [*(one for one in stays if one[0] != "token_weight"), *reversed(_weights(stays))]
    fewer = build({one: together.parts[one] for one in [*stays, *losses[:1]]}, keep_base=True)
    fewer.tune.model.train()
    alone = fewer.step(split(together.batch, (5, 3)), LIVED)
    assert _close(alone.kept, first.kept), "another share of the tokens is kept"
    assert _close(alone.nll, first.nll), "the plain loss is another one"
    if alone.weights is not None and first.weights is not None:
        assert all(_close(a, b) for a, b in zip(alone.weights, first.weights, strict=True))
    for slot in losses[:1]:
        mine, its = alone.parts.get(slot[1], alone.loss), first.parts.get(slot[1], first.loss)
        assert _close(mine, its), f"{slot[1]} is worth {its} instead of {mine}"


def _weights(chosen: Sequence[Technique]) -> list[Technique]:
    return [one for one in chosen if one[0] == "token_weight"]


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-8 * max(1.0, abs(one), abs(other))


def keeps_the_base(together: Together, lived: Lived, attached: dict[str, Tensor]) -> None:
    """What no part freed keeps its bits, and without all parts the model is the base, bit for bit."""
    tune, base = together.run.tune, model_of()
    same = {id(parameter): name for name, parameter in tune.model.named_parameters()}
    claimed: dict[str, Tensor] = {}
    for name, mask in lived.claimed.items():
        own = same[id(tune.model.get_parameter(name))]
        claimed[own] = claimed[own] | mask if own in claimed else mask
    for name, parameter in tune.model.named_parameters():
        outside = ~claimed[name] if name in claimed else torch.ones_like(parameter.data, dtype=torch.bool)
        assert torch.equal(parameter.data[outside], attached[name][outside]), f"{name}: numbers moved that nothing freed"
    wanted = dict(base.named_parameters())
    with tune.off():
        for name, parameter in tune.model.named_parameters():
            assert torch.equal(parameter.data, wanted[name].data), f"{name}: the base is lost"
        batch = together.batch
        assert torch.equal(logits_of(tune.model, batch), _base_logits(batch)), "the base is not what runs"


def check(chosen: tuple[Technique, ...]) -> None:
    """All that must hold of techniques in one run.

    Raises:
        LuthierError: they are refused beside each other.
    """
    parts = parts_for(chosen)
    together = Together(chosen, parts, build(parts, keep_base=True))
    attached = {name: parameter.data.clone() for name, parameter in together.run.tune.model.named_parameters()}
    starts_as_it_says(together, together.batch)
    subtracts_what_it_adds(together)
    splits_alike(together)
    lived = live(together)
    assert all(result.loss == result.loss and abs(result.loss) < 1e4 for result in lived.results)
    if len(chosen) > 2:
        teaches_as_without(together, lived.results[0])
    for one in chosen:
        if one[0] in INVARIANTS:
            INVARIANTS[one[0]](together, lived, one)
    stood_still(together, lived, chosen[0])
    heard_every_step(together, lived, chosen[0])
    has_one_optimizer(together, lived, chosen[0])
    keeps_the_base(together, lived, attached)
