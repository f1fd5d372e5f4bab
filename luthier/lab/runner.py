"""Runs a replication: learning rates are chosen first, each variant's alike; then every variant runs at the seeds of each look, as many
looks as the rule asks for.

Work is cut into jobs, one stage or one measurement each, which leave their results in the lab's cache. A lab that was killed goes on
where it was when it is called again, and ends in the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from luthier.errors import LuthierError, Say, silent
from luthier.lab.cache import read
from luthier.lab.jobs import (
    SCORE,
    Do,
    Job,
    Question,
    RunAll,
    answer_of,
    answer_path,
    chain_keys,
    content_of,
    measure_chain,
    stage_path,
    train_stage,
    variant_recipes,
)
from luthier.lab.replication import CHOOSING_SEED, Recipe, Replication, Setting, Variant
from luthier.lab.verdict import CANNOT_TELL, Design, design_of, judge
from luthier.models.fingerprint import fingerprint
from luthier.models.load import load_model

Numbers = Mapping[str, tuple[Mapping[str, float | None], ...]]
"""By variant, the measures of each seed."""


class Lab(NamedTuple):
    """Where and how jobs are done."""

    root: Path
    """The cache."""
    run_all: RunAll
    device: str = "cpu"
    say: Say = silent


class Chain(NamedTuple):
    """One repetition of one variant at one learning rate."""

    variant: Variant
    rate: float | None
    """None: every stage names its own."""
    setting: Setting
    keys: tuple[str, ...]
    """Names the stages in the cache."""
    content: str
    """Identifies the recipes."""


class Tried(NamedTuple):
    """A learning rate and how it was judged; no score where training broke off."""

    rate: float
    score: float | None


class Choice(NamedTuple):
    """The learning rate of a variant, and how it was found."""

    rate: float | None
    tried: tuple[Tried, ...] = ()
    note: str = ""


class Ran(NamedTuple):
    """All that a replication's runs gave."""

    replication: Replication
    model: str
    fingerprint: str
    seeds: int
    """At the last look."""
    design: Design
    choices: Mapping[str, Choice]
    """By variant."""
    numbers: Numbers
    """By variant, of each seed; empty where training broke off."""
    seconds: float
    """Training time of all stages, those from the cache included."""
    stages: int
    """Stages that were asked for, equal ones once."""
    jobs: int
    """What had to be done now, because the cache did not hold it."""


def run_replication(replication: Replication, lab: Lab, *, seeds: int | None = None, model: str | None = None) -> Ran:
    """Run every variant of a replication, at the seeds 0, 1, ... of each look until the main expectation is decided.

    Args:
        replication: from `luthier.lab.replications.find`.
        lab: where and how.
        seeds: repetitions at a single look, instead of the lab's rule.
        model: instead of the replication's.

    Raises:
        LuthierError: a recipe is wrong, or a run stopped for another reason than numbers that are not finite.
    """
    model = model or replication.model
    work = Work(replication, lab, model, fingerprint(load_model(model)))
    choices = choose_rates(work)
    design = design_of(replication, seeds)
    for look in design.looks:
        chains = [work.chain(variant, choices[variant.name].rate, seed) for variant in replication.variants for seed in range(look)]
        answers = iter(work.ask(chains, "measure"))
        numbers = {variant.name: tuple(next(answers) for _ in range(look)) for variant in replication.variants}
        if decided(replication, numbers, design.level):
            break
    return Ran(replication, model, work.start, look, design, choices, numbers, work.seconds(), len(work.stages), work.jobs)


def decided(replication: Replication, numbers: Numbers, level: float) -> bool:
    """Whether the main expectation has a verdict at this look."""
    main = replication.main
    variant, versus = ([one.get(main.measure) for one in numbers[name]] for name in (main.variant, main.versus))
    return judge(variant, versus, main.direction, main.margin, level).verdict != CANNOT_TELL


class Work:
    """The jobs of one replication on one model, and what they have come to."""

    def __init__(self, replication: Replication, lab: Lab, model: str, start: str) -> None:
        self.replication, self.lab, self.model, self.start = replication, lab, model, start
        self.stages: set[str] = set()
        self.jobs = 0
        self.bases = cache(lambda setting: tuple(replication.stages(setting)))

    def chain(self, variant: Variant, rate: float | None, seed: int, stages: int | None = None) -> Chain:
        """One repetition, or its first stages."""
        setting = Setting(self.model, seed)
        recipes = variant_recipes(variant, rate, setting, self.bases(setting)[:stages])
        return Chain(variant, rate, setting, self._keys(recipes), content_of(recipes))

    def _keys(self, recipes: Sequence[Recipe]) -> tuple[str, ...]:
        return chain_keys(recipes, self.start, self.lab.device, self.replication.apart)

    def ask(self, chains: Sequence[Chain], question: Question) -> list[Mapping[str, float | None]]:
        """Train what has not been trained, stage by stage, and put a question to each chain. Empty answers: training broke off."""
        stages = [(key, chain, number) for chain in chains for number, key in enumerate(chain.keys)]
        self.stages.update(key for key, _, _ in stages)
        for depth in range(max((len(chain.keys) for chain in chains), default=0)):
            # Equal stages of several variants are trained once.
            todo = {key: self.job(chain, number) for key, chain, number in stages if number == depth and not self.known(key)}
            self.do(train_stage, list(todo.values()), f"training, stage {depth + 1}")
        asked = [self.job(chain)._replace(question=question) for chain in chains]
        asked = [job._replace(answer=str(answer_path(job))) for job in asked]
        todo = {job.answer: job for job in asked if read(Path(job.answer)) is None}
        self.do(measure_chain, list(todo.values()), "measuring" if question == "measure" else "judging learning rates")
        return [answer_of(Path(job.answer)) for job in asked]

    def job(self, chain: Chain, number: int = 0) -> Job:
        """What a process needs to know."""
        names = (str(self.lab.root), self.replication.name, chain.variant.name, chain.rate, chain.setting, self.lab.device)
        return Job(*names, chain.keys, chain.content, number)

    def known(self, key: str) -> bool:
        """Whether a stage is in the cache."""
        return read(stage_path(self.lab.root, key)) is not None

    def do(self, do: Do, jobs: Sequence[Job], words: str) -> None:
        """Do some jobs, and say how far they are."""
        for number, error in enumerate(self.lab.run_all(do, jobs), start=1):
            if error is not None:
                raise error
            self.jobs += 1
            self.lab.say(f"{self.replication.name}: {words}: {number} of {len(jobs)}")

    def seconds(self) -> float:
        """Training time of all stages."""
        return math.fsum((read(stage_path(self.lab.root, key)) or {}).get("seconds") or 0.0 for key in self.stages)


def choose_rates(work: Work) -> dict[str, Choice]:
    """The learning rate of each variant: the best of its grid at `CHOOSING_SEED`, or what another variant's gives."""
    replication = work.replication
    searching = [variant for variant in replication.variants if variant.like is None]
    grids = {variant.name: _grid(work, variant) for variant in searching}
    chains = [
        work.chain(variant, rate, CHOOSING_SEED, replication.choose_stages) for variant in searching for rate in grids[variant.name]
    ]
    answers = iter(work.ask(chains, "choose"))
    choices: dict[str, Choice] = {}
    for variant in searching:
        tried = [Tried(rate, next(answers).get(SCORE)) for rate in grids[variant.name]]
        choices[variant.name] = best(tried) if tried else Choice(None, note="its stages name their own learning rates")
    for variant in replication.variants:
        if variant.like is not None:
            rate = choices[variant.like].rate
            choices[variant.name] = Choice(
                rate and rate * variant.rate_factor, note=f"{variant.rate_factor:g} times that of {variant.like}"
            )
    return {variant.name: choices[variant.name] for variant in replication.variants}


def _grid(work: Work, variant: Variant) -> list[float]:
    """The rates to choose from; none for a variant whose recipes are the same at all of them, since they name their own.

    Raises:
        LuthierError: the stages that are judged are the same at all rates, and later ones are not.
    """
    rates = sorted(work.replication.rates if variant.rates is None else variant.rates)
    whole = {work.chain(variant, rate, CHOOSING_SEED).keys for rate in rates}
    if len(whole) == 1 < len(rates):
        return []
    if len({keys[: work.replication.choose_stages] for keys in whole}) == 1 < len(rates):
        where = f"replication {work.replication.name}, variant {variant.name}"
        raise LuthierError("the stages that judge a learning rate do not use it", where=where, fix="raise choose_stages")
    return rates


def best(tried: Sequence[Tried], losses: Mapping[float, float] = MappingProxyType({})) -> Choice:
    """The rate with the largest score; a rate at which training broke off is worse than any.

    Args:
        tried: every rate.
        losses: by rate, what decides between equal scores; of equal ones, and where there is none, the smallest rate.
    """
    tried = sorted(tried)

    def rank(one: Tried) -> tuple[float, float]:
        return (-math.inf if one.score is None else one.score, -losses.get(one.rate, math.inf))

    chosen = max(tried, key=rank)
    note = ""
    if chosen.score is None:
        note = "training broke off at every rate"
    elif len(tried) > 1 and chosen in (tried[0], tried[-1]):
        note = f"the chosen rate {chosen.rate:g} is the {'smallest' if chosen is tried[0] else 'largest'} that was tried"
    return Choice(chosen.rate, tuple(tried), note)


def here(do: Do, jobs: Sequence[Job]) -> Iterator[LuthierError | None]:
    """Does jobs in this process, one after another."""
    return map(do, jobs)
