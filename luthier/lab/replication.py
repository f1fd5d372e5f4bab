"""A replication: code that runs a paper's claim again as a small experiment. Plain values; `luthier.lab.runner` runs them.

A replication is a file `luthier/lab/replications/NAME.py` that exports `REPLICATION`. A replication about a technique bears the technique's
name, a study its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from luthier.errors import LuthierError, nearest
from luthier.results.folder import Run

CHOOSING_SEED = 10_000
"""Seed of the runs that choose learning rates: a replication makes its rows from the seed, so these see other rows than the measured."""

Recipe = dict[str, Any]
"""What `luthier.recipe.make_recipe` takes, without `model`, `seed`, `out` and `name`, which the lab sets."""

Direction = Literal["more", "less", "not_less", "not_more"]


class Setting(NamedTuple):
    """One repetition."""

    model: str
    """What `model:` takes in a recipe: the model that the first stage starts from."""
    seed: int
    """Of the training of the first stage, from which those of later stages follow, and of the rows, which a replication makes from it."""


class Variant(NamedTuple):
    """One side of a comparison."""

    name: str
    change: Mapping[str, Any] | Callable[[Recipe, int, Setting], Recipe | None] = MappingProxyType({})
    """What differs from the stages as the replication gives them: keys that are merged into every stage's recipe, mapping by
    mapping, or a function of a recipe, the number of its stage from 0, and the setting, which gives the recipe to run, or None where
    the variant has no such stage.
    The value of a technique's key (`tune`, `objective`, `rows.map` ...) is replaced as a whole."""
    meaning: str = ""
    """A few words for the table."""
    rates: Sequence[float] | None = None
    """Learning rates to choose from, where the technique needs others than the replication's; just as many."""
    like: str | None = None
    """Takes the learning rate chosen for the variant of this name instead of choosing its own: for controls."""
    rate_factor: float = 1.0
    """With `like`: multiplies the rate that is taken over."""
    seed_offset: int = 0
    """Added to the seed of the training, not to that of the rows: what is drawn while training is then drawn anew."""


class Expectation(NamedTuple):
    """What the paper leads us to expect: one measure of one variant against that of another."""

    measure: str
    variant: str
    versus: str
    direction: Direction
    """Of `variant - versus`: by `margin` more, by `margin` less, at most `margin` less, at most `margin` more.
    `luthier.lab.verdict` holds the rule."""
    margin: float = 0.0
    """In units of the measure; at least 0."""
    says: str = ""
    """One short sentence for the table."""


class Finished(NamedTuple):
    """One finished repetition of one variant: what `measure` and `choose` see."""

    setting: Setting
    variant: Variant
    runs: Sequence[Run]
    """One run a stage, in order. `run.facts` is its `run.json`; `luthier.opened.open_run(run)` opens the tuned model."""


class Replication(NamedTuple):
    """A paper's claim and the experiment that tests it."""

    name: str
    """Of the replication's file."""
    title: str
    papers: Sequence[str]
    """arXiv ids."""
    rows: Sequence[int]
    """The papers' numbers in `luthier/registry/papers.tsv`."""
    says: str
    """The paper's claim in one sentence, in our words."""
    stages: Callable[[Setting], Sequence[Recipe]]
    """Recipes of the stages, one after another: each starts from the merged result of the one before. None where no language model is
    trained, and `measure` does all."""
    variants: Sequence[Variant]
    """The baseline first."""
    main: Expectation
    """What the paper's claim comes to: its verdict is the replication's, and only it decides whether more seeds are run."""
    measure: Callable[[Finished], Mapping[str, float]]
    """The numbers of one finished repetition, the same names for every variant."""
    choose: Callable[[Finished], float]
    """Judges a learning rate, larger is better, from a repetition with the seed `CHOOSING_SEED` and `choose_stages` runs."""
    minutes: float
    """Rough cost of the first look on two processor cores."""
    also: Sequence[Expectation] = ()
    """What else is expected; each has a verdict of its own, and none changes the replication's."""
    question: str = "Other questions"
    """What a reader asks: replications of one question stand together."""
    unit: str = "share of items"
    """Of the main expectation's measure."""
    seeds: int | None = None
    """Where runs are too dear for the lab's two looks: so many seeds and one look."""
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3)
    """Learning rates to choose from. A stage that names its own `train.learning_rate` keeps it."""
    choose_stages: int = 1
    """How many stages are run to judge a learning rate."""
    apart: bool = False
    """Every stage starts from the replication's model instead of the one before: for changes that are put together afterwards."""
    model: str = "workshop-small"
    data: Sequence[str] = ()
    """Data sets that it reads and luthier does not bring, such as `mawps/train`: see `luthier.lab.real`."""
    floor: Mapping[str, float] = MappingProxyType({})
    """Measures and the least mean the baseline must reach: an experiment whose baseline did not learn can tell nothing."""
    notes: str = ""
    """Where and why the experiment differs from the paper's."""


def expectations(replication: Replication) -> tuple[Expectation, ...]:
    """All that is expected, the main expectation first."""
    return (replication.main, *replication.also)


def check(replication: Replication) -> None:
    """Refuse a replication that contradicts itself, before anything runs.

    Raises:
        LuthierError: two variants of one name, an unknown variant, grids of different lengths, no main expectation, a negative margin or an
            unknown direction.
    """
    names = [variant.name for variant in replication.variants]
    searching = [variant.name for variant in replication.variants if variant.like is None]
    _demand(len(set(names)) == len(names) > 0, replication, "variants", "variants need names that differ", "name each variant once")
    _demand(
        replication.choose_stages >= 1, replication, "choose_stages", "a learning rate is judged after a stage", "use 1 or more"
    )
    _demand(len(replication.rates) > 0, replication, "rates", "there is no learning rate to choose from", "give one or more")
    for variant in replication.variants:
        rates = replication.rates if variant.rates is None else variant.rates
        alike = len(set(rates)) == len(set(replication.rates)) == len(rates)
        _demand(
            alike,
            replication,
            f"variant {variant.name}",
            "variants choose among unlike numbers of rates",
            "give each as many as the replication has",
        )
        known = variant.like is None or variant.like in searching
        _demand(
            known,
            replication,
            f"variant {variant.name}",
            f"no variant `{variant.like}` chooses a rate",
            nearest(str(variant.like), searching),
        )
    _demand(
        isinstance(replication.main, Expectation),
        replication,
        "main",
        "a replication has one main expectation",
        "give one Expectation",
    )
    _demand(
        replication.seeds is None or replication.seeds >= 2,
        replication,
        "seeds",
        "an interval needs two seeds",
        "give 2 or more, or none",
    )
    for one in expectations(replication):
        for name in (one.variant, one.versus):
            _demand(name in names, replication, "expectations", f"there is no variant `{name}`", nearest(name, names))
        directions = get_args(Direction)
        _demand(
            one.direction in directions,
            replication,
            "expectations",
            f"`{one.direction}` is no direction",
            nearest(one.direction, directions),
        )
        _demand(
            one.margin >= 0,
            replication,
            "expectations",
            f"the margin {one.margin:g} is below 0",
            "turn the direction around instead",
        )


def _demand(holds: bool, replication: Replication, part: str, what: str, fix: str) -> None:
    if not holds:
        raise LuthierError(what, where=f"replication {replication.name}, {part}", fix=fix)
