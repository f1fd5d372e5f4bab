"""Attaching a run's parts to its model, and giving rows, steps and learning rate to them."""

from __future__ import annotations

from typing import NamedTuple

from luthier.kinds import Selective
from luthier.planning.load import Loaded
from luthier.planning.models import OtherModels
from luthier.planning.needs import check_needs, check_phases
from luthier.planning.prepare import check_lengths, make_calibration, make_feed, prepare_model
from luthier.planning.read import TrainingRows
from luthier.recipe import Recipe, TrainRecipe
from luthier.recipe.parts import Chosen
from luthier.registry import slots_of, values_of
from luthier.training.build import build_engine, turns_of
from luthier.training.engine import Engine
from luthier.training.feed import Feed
from luthier.training.inputs import vocabulary_of
from luthier.training.loop import Clock
from luthier.training.schedule import Schedule, warmup_steps
from luthier.training.world import World

RATE_WITHOUT_ADVICE = 1e-4


class Attached(NamedTuple):
    """What can step."""

    engine: Engine
    feed: Feed
    clock: Clock
    rate_from: str
    """Where the learning rate comes from."""
    padded: str
    """Why rows run with padding; empty where they are packed."""


def attach(
    recipe: Recipe,
    schedule: Schedule,
    chosen: Chosen,
    loaded: Loaded,
    rows: TrainingRows,
    others: OtherModels,
    world: World,
) -> Attached:
    """Build the engine, the order of rows and the clock.

    Raises:
        LuthierError: nothing trains, two parts cannot be combined, or rows lack what one of them reads or are too long once a
            prompt stands before them.
    """
    train, seed, encoded = recipe.train, recipe.seed, rows.encoded
    feed = make_feed(train, seed, encoded, world, loaded.device, rows.mixture)
    steps = feed.total()
    rate, rate_from = advised_rate(train, chosen)
    clock = Clock(steps, rate, schedule, warmup_steps(train.warmup, steps), seed, turns=turns_of(values_of(chosen)))
    # A run of one step is too short, too.
    clock.turns.check(steps)
    engine = build_engine(
        loaded.model,
        loaded.parts,
        chosen,
        calibration=make_calibration(recipe.rows, train.micro_batch_tokens, seed, encoded, loaded.tokenizer, loaded.reads),
        now=clock.at(0, 0.0),
        first=clock.first,
        vocabulary=vocabulary_of(loaded.tokenizer, loaded.parts.vocabulary),
        masters=train.master_weights,
        keep_base=bool(recipe.measured()) and _starts_elsewhere(chosen),
        load_others=others.load,
        world=world,
        root=loaded.root,
    )
    check_phases(engine.tune, clock)
    check_needs(engine.objective, encoded)
    check_lengths(engine.tune, encoded, loaded.reads.context)
    padded = prepare_model(train, engine.tune, feed)
    if engine.tune.packs:
        feed.pack(shared=engine.shares_beginnings)
    return Attached(engine, feed, clock, rate_from, padded)


def _starts_elsewhere(chosen: Chosen) -> bool:
    """Whether numbers of the model itself begin as something else than the base's, which is measured all the same."""
    parts = [part for _, _, part in slots_of(chosen)]
    return any(part.card.step0 != "base exactly" and any(isinstance(v, Selective) for v in part.values) for part in parts)


def advised_rate(train: TrainRecipe, chosen: Chosen) -> tuple[float, str]:
    """The learning rate and where it comes from: the recipe, or the most careful advice among the techniques that train."""
    if train.learning_rate is not None:
        return train.learning_rate, "the recipe"
    advice = [(part.card.learning_rate, part.name) for _, _, part in slots_of(chosen) if part.card.learning_rate is not None]
    if not advice:
        return RATE_WITHOUT_ADVICE, "the default"
    rate, name = min(advice)
    return rate, f"{name}'s default"
