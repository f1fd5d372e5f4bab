"""A claim: code that runs a paper's claim again as a small experiment. Plain values; `luthier.lab.runner` runs them.

A claim is a file `luthier/lab/claims/NAME.py` that exports `CLAIM`. A claim about a technique bears the technique's name, a
study its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from luthier.errors import LuthierError, nearest
from luthier.results.folder import Run

CHOOSING_SEED = 10_000
"""Seed of the runs that choose learning rates: a claim makes its rows from the seed, so these see other rows than the measured."""

Recipe = dict[str, Any]
"""What `luthier.recipe.make_recipe` takes, without `model`, `seed`, `out` and `name`, which the lab sets."""

Direction = Literal["more", "less", "not_less", "not_more"]


class Setting(NamedTuple):
    """One repetition."""

    model: str
    """What `model:` takes in a recipe: the model that the first stage starts from."""
    seed: int
    """Of the training of the first stage, from which those of later stages follow, and of the rows, which a claim makes from it."""


class Arm(NamedTuple):
    """One side of a comparison."""

    name: str
    change: Mapping[str, Any] | Callable[[Recipe, int, Setting], Recipe | None] = MappingProxyType({})
    """What differs from the stages as the claim gives them: keys that are merged into every stage's recipe, mapping by
    mapping, or a function of a recipe, the number of its stage from 0, and the setting, which gives the recipe to run, or None where
    the arm has no such stage.
    The value of a technique's key (`tune`, `objective`, `rows.map` ...) is replaced as a whole."""
    meaning: str = ""
    """A few words for the table."""
    rates: Sequence[float] | None = None
    """Learning rates to choose from, where the technique needs others than the claim's; just as many."""
    like: str | None = None
    """Takes the learning rate chosen for the arm of this name instead of choosing its own: for controls."""
    rate_factor: float = 1.0
    """With `like`: multiplies the rate that is taken over."""
    seed_offset: int = 0
    """Added to the seed of the training, not to that of the rows: what is drawn while training is then drawn anew."""


class Expectation(NamedTuple):
    """What the paper leads us to expect: one measure of one arm against that of another."""

    measure: str
    arm: str
    versus: str
    direction: Direction
    """Of `arm - versus`: by `margin` more, by `margin` less, at most `margin` less, at most `margin` more.
    `luthier.lab.verdict` holds the rule."""
    margin: float = 0.0
    """In units of the measure; at least 0."""
    says: str = ""
    """One short sentence for the table."""


class Finished(NamedTuple):
    """One finished repetition of one arm: what `measure` and `choose` see."""

    setting: Setting
    arm: Arm
    runs: Sequence[Run]
    """One run a stage, in order. `run.facts` is its `run.json`; `luthier.opened.open_run(run)` opens the tuned model."""


class Claim(NamedTuple):
    """A paper's claim and the experiment that tests it."""

    name: str
    """Of the claim's file."""
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
    arms: Sequence[Arm]
    """The baseline first."""
    main: Expectation
    """What the paper's claim comes to: its verdict is the claim's, and only it decides whether more seeds are run."""
    measure: Callable[[Finished], Mapping[str, float]]
    """The numbers of one finished repetition, the same names for every arm."""
    choose: Callable[[Finished], float]
    """Judges a learning rate, larger is better, from a repetition with the seed `CHOOSING_SEED` and `choose_stages` runs."""
    minutes: float
    """Rough cost of the first look on two processor cores."""
    beside: Sequence[Expectation] = ()
    """What else is expected; each has a verdict of its own, and none changes the claim's."""
    question: str = "Other questions"
    """What a reader asks: claims of one question stand together."""
    unit: str = "share of items"
    """Of the main expectation's measure."""
    seeds: int | None = None
    """Where runs are too dear for the lab's two looks: so many seeds and one look."""
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3)
    """Learning rates to choose from. A stage that names its own `train.learning_rate` keeps it."""
    choose_stages: int = 1
    """How many stages are run to judge a learning rate."""
    apart: bool = False
    """Every stage starts from the claim's model instead of the one before: for changes that are put together afterwards."""
    model: str = "workshop-small"
    data: Sequence[str] = ()
    """Data sets that it reads and luthier does not bring, such as `mawps/train`: see `luthier.lab.real`."""
    floor: Mapping[str, float] = MappingProxyType({})
    """Measures and the least mean the baseline must reach: an experiment whose baseline did not learn can tell nothing."""
    notes: str = ""
    """Where and why the experiment differs from the paper's."""


def expectations(claim: Claim) -> tuple[Expectation, ...]:
    """All that is expected, the main expectation first."""
    return (claim.main, *claim.beside)


def check(claim: Claim) -> None:
    """Refuse a claim that contradicts itself, before anything runs.

    Raises:
        LuthierError: two arms of one name, an unknown arm, grids of different lengths, no main expectation, a negative margin or an
            unknown direction.
    """
    names = [arm.name for arm in claim.arms]
    searching = [arm.name for arm in claim.arms if arm.like is None]
    _demand(len(set(names)) == len(names) > 0, claim, "arms", "arms need names that differ", "name each arm once")
    _demand(claim.choose_stages >= 1, claim, "choose_stages", "a learning rate is judged after a stage", "use 1 or more")
    _demand(len(claim.rates) > 0, claim, "rates", "there is no learning rate to choose from", "give one or more")
    for arm in claim.arms:
        rates = claim.rates if arm.rates is None else arm.rates
        alike = len(set(rates)) == len(set(claim.rates)) == len(rates)
        _demand(alike, claim, f"arm {arm.name}", "arms choose among unlike numbers of rates", "give each as many as the claim has")
        known = arm.like is None or arm.like in searching
        _demand(known, claim, f"arm {arm.name}", f"no arm `{arm.like}` chooses a rate", nearest(str(arm.like), searching))
    _demand(isinstance(claim.main, Expectation), claim, "main", "a claim has one main expectation", "give one Expectation")
    _demand(claim.seeds is None or claim.seeds >= 2, claim, "seeds", "an interval needs two seeds", "give 2 or more, or none")
    for one in expectations(claim):
        for name in (one.arm, one.versus):
            _demand(name in names, claim, "expectations", f"there is no arm `{name}`", nearest(name, names))
        directions = get_args(Direction)
        _demand(
            one.direction in directions,
            claim,
            "expectations",
            f"`{one.direction}` is no direction",
            nearest(one.direction, directions),
        )
        _demand(
            one.margin >= 0, claim, "expectations", f"the margin {one.margin:g} is below 0", "turn the direction around instead"
        )


def _demand(holds: bool, claim: Claim, part: str, what: str, mend: str) -> None:
    if not holds:
        raise LuthierError(what, where=f"claim {claim.name}, {part}", mend=mend)
