"""The lab's test of itself, fixed before any of it was run: effects that nobody doubts, and variants that differ by chance alone.

Twelve effects must be found and twelve nulls must not. A null is a variant against itself: of kind `order` with the same rows and
another training seed, which draws the order of rows and what a technique starts from, of kind `rows` with other rows as well. It
counts against the lab when either direction is said to hold, so each null expects `more` and, beside it, `less`. Six further effects
are run once, when the rule is fixed, and reported. All run by the lab's rule on the model that replications use, at learning rates named
here, with the margins that replications have; none is exchanged for another afterwards. Each was tried once before, with a seed that is
never measured (`luthier.lab.replication.CHOOSING_SEED`), to see that its baseline learns something and how long it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from luthier.lab import benchmark
from luthier.lab.jobs import merged
from luthier.lab.replication import Direction, Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.targets import TOP, answered, drift, targets_of, with_answers
from luthier.lab.tasks import NEW_LANGUAGE, TAUGHT, few_facts, mean, stage, teach

ITEMS, OLD_ITEMS, LANGUAGE_ITEMS = 300, 40, 150
"""Held-back items: of a skill that is judged right or wrong, of each of nine old skills, and of the new language, judged by likelihood."""
OFFSET = 50_000
"""Between the seeds of a null's variants: far from those of all repetitions and of the choice of learning rates."""
Measure = Callable[[Finished], float]
Stages = Callable[[Setting], Sequence[Recipe]]
RIGHT, KEPT, NATS, OLD_NATS, TRAINED, DRIFT, SURE = (
    "right",
    "kept",
    "nats",
    "nats, old",
    "nats, trained rows",
    "drift",
    "top probability",
)
UNITS = MappingProxyType({NATS: "nats", OLD_NATS: "nats", TRAINED: "nats", DRIFT: "nats", SURE: "of 1"})


def at(recipe: Recipe, rate: float, **train: Any) -> Recipe:
    """A stage with its own learning rate, so that nothing is searched."""
    return {**recipe, "train": {**recipe["train"], "learning_rate": rate, **train}}


def language(setting: Setting, *, rate: float = 3e-3, count: int = 400, noise: float = 0.0, **train: Any) -> list[Recipe]:
    """Known facts in a new language: 32 steps."""
    return [at(teach(NEW_LANGUAGE, setting, count=count, epochs=4, noise=noise), rate, **train)]


def sort(setting: Setting, **train: Any) -> list[Recipe]:
    """Letters brought into order."""
    return [at(teach("sort", setting, count=600, epochs=4), 3e-3, **train)]


def largest(setting: Setting, *, difficulty: int = 1, noise: float = 0.0) -> list[Recipe]:
    """The running maximum of a few numbers."""
    return [at(teach("largest", setting, count=200, epochs=8, difficulty=difficulty, noise=noise), 3e-3)]


def facts(setting: Setting, *, noise: float = 0.0, **train: Any) -> list[Recipe]:
    """New facts about a few people."""
    return [at(stage(few_facts("train", 240, setting.seed, noise), 6), 3e-3, **train)]


def sums(setting: Setting, *, noise: float = 0.0) -> list[Recipe]:
    """Sums, which the model knows in part."""
    return [at(teach("arithmetic", setting, count=600, epochs=3, noise=noise, difficulty=2), 1e-3)]


def old_rows(setting: Setting, count: int) -> list[dict[str, Any]]:
    """Rows of what the model knows, as many of each skill."""
    each = -(-count // len(TAUGHT))
    return [row for skill in TAUGHT for row in benchmark.rows(skill, "train", each, seed=setting.seed)]


def right(skill: str, difficulty: int = 1) -> Measure:
    """The share of a skill's items that are answered rightly, behind the last stage."""
    return lambda finished: mean(finished.runs[-1], [skill], count=ITEMS, difficulty=difficulty)


def nats_of(rows: Callable[[Setting], Sequence[Mapping[str, Any]]], column: Any = "nll") -> Measure:
    """The mean over the labels of some rows, behind the last stage."""
    return lambda finished: targets_of(finished.runs[-1], rows(finished.setting), [column]).mean(getattr(column, "name", column))


def new_facts(setting: Setting) -> list[dict[str, Any]]:
    """The same facts asked for in other words."""
    return with_answers(few_facts("held_out"))


LANGUAGE_NATS = nats_of(lambda setting: answered([NEW_LANGUAGE], count=LANGUAGE_ITEMS))
SUM_NATS = nats_of(lambda setting: answered(["arithmetic"], count=ITEMS, difficulty=2))
OLD = partial(answered, TAUGHT, count=OLD_ITEMS)


def kept(finished: Finished) -> float:
    """Right answers to items of nine old skills, 360 in all, behind the last stage."""
    return mean(finished.runs[-1], TAUGHT, count=OLD_ITEMS)


def drifted(finished: Finished) -> float:
    """How far the model's distributions went from the base's on old items."""
    return drift(finished.runs[-1], OLD())


def comparison(
    name: str,
    says: str,
    stages: Stages,
    base: Variant,
    variant: Variant,
    measured: tuple[str, Measure],
    expects: Sequence[tuple[Direction, float]],
) -> Replication:
    """A comparison of two variants by one measure."""
    measure, taken = measured
    found = [Expectation(measure, variant.name, base.name, direction, margin) for direction, margin in expects]
    return Replication(
        name=f"calibration-{name}",
        title=name.replace("_", " "),
        papers=[],
        rows=[],
        says=says,
        stages=stages,
        variants=[base, variant],
        main=found[0],
        also=found[1:],
        measure=lambda finished: {measure: taken(finished)},
        choose=lambda finished: 0.0,
        minutes=2,
        unit=UNITS.get(measure, "share of items"),
    )


def effect(
    name: str,
    says: str,
    stages: Stages,
    change: Stages | Mapping[str, Any],
    measured: tuple[str, Measure],
    direction: Direction,
    margin: float,
    *,
    base: Mapping[str, Any] = MappingProxyType({}),
) -> Replication:
    """What a variant with other stages, or with other keys in all of them, does to a measure."""
    other = _instead(change) if callable(change) else change
    return comparison(name, says, stages, Variant("as usual", base), Variant("changed", other), measured, [(direction, margin)])


def null(
    name: str,
    stages: Stages,
    differ: Literal["order", "rows"],
    measured: tuple[str, Measure],
    margin: float,
    **keys: Any,
) -> Replication:
    """A variant against itself."""
    again = Variant("again", keys, seed_offset=OFFSET)
    if differ == "rows":
        again = again._replace(change=_instead(lambda setting: stages(setting._replace(seed=setting.seed + OFFSET)), keys))
    says = f"The same once more, with another training seed{' and other rows' if differ == 'rows' else ''}."
    return comparison(name, says, stages, Variant("once", keys), again, measured, [("more", margin), ("less", margin)])


def _instead(stages: Stages, keys: Mapping[str, Any] = MappingProxyType({})) -> Callable[[Recipe, int, Setting], Recipe]:
    return lambda recipe, number, setting: merged(stages(setting)[number], keys)


def replayed(setting: Setting) -> list[Recipe]:
    """The new language, and among it half as many rows of what is known."""
    (recipe,) = language(setting)
    return [{**recipe, "rows": {"train": [*recipe["rows"]["train"], *old_rows(setting, 180)]}}]


def stream(setting: Setting) -> list[Recipe]:
    """Two new skills, one after the other, at a rate that leaves something of the old ones."""
    return [*language(setting, rate=1e-3), *sort(setting, learning_rate=1e-3)]


def language_twice(setting: Setting) -> list[Recipe]:
    """The new language, and again."""
    return [*language(setting), *language(setting, rate=1e-3)]


def language_and_back(setting: Setting) -> list[Recipe]:
    """The new language, and then rows of what was known."""
    return [*language(setting), at(stage(old_rows(setting, 180), 4), 1e-3)]


FULL = {"tune": "full"}
LORA = {"tune": {"lora": {"rank": 16, "alpha": 32}}, "train": {"learning_rate": 3e-3}}
RANK_ONE = {"tune": {"lora": {"rank": 1, "alpha": 2}}, "train": {"learning_rate": 3e-3}}
PROMPT = {"tune": {"prompt_tuning": {"length": 8}}, "train": {"learning_rate": 3e-2}}
UNTOUCHED = {"train": {"steps": 1, "learning_rate": 1e-12}}
ANCHOR = {"objective": ["cross_entropy", {"kl": {"weight": 1.0}}]}

EFFECTS = (
    effect("replay", "Rows of old skills among the new keep the old ones.", language, replayed, (KEPT, kept), "more", 0.02),
    effect(
        "wrong_answers",
        "With half of the answers wrong, right ones are less likely.",
        facts,
        partial(facts, noise=0.5),
        (NATS, nats_of(new_facts)),
        "more",
        0.05,
    ),
    effect(
        "ten_times_the_rate",
        "Ten times the learning rate forgets more.",
        partial(language, rate=3e-4),
        language,
        (KEPT, kept),
        "less",
        0.02,
    ),
    effect(
        "rank_one", "LoRA of rank 1 learns less than of rank 16.", language, RANK_ONE, (NATS, LANGUAGE_NATS), "more", 0.0, base=LORA
    ),
    effect(
        "fewer_rows",
        "An eighth of the rows teaches less.",
        language,
        partial(language, count=50),
        (NATS, LANGUAGE_NATS),
        "more",
        0.05,
    ),
    effect(
        "prompt",
        "A prompt of 8 learns less than LoRA of rank 16.",
        language,
        PROMPT,
        (NATS, LANGUAGE_NATS),
        "more",
        0.05,
        base=LORA,
    ),
    effect(
        "more_epochs",
        "Four epochs instead of one fit the training rows better.",
        partial(sort, epochs=1),
        sort,
        (TRAINED, nats_of(lambda setting: sort(setting)[0]["rows"]["train"][:ITEMS])),
        "less",
        0.05,
    ),
    effect(
        "trained",
        "A model does less well at a skill it was not trained on.",
        largest,
        UNTOUCHED,
        (RIGHT, right("largest")),
        "less",
        0.02,
    ),
    effect("another_skill", "Learning to sort does not teach maxima.", largest, sort, (RIGHT, right("largest")), "less", 0.02),
    effect(
        "fewer_steps",
        "An eighth of the steps learns fewer facts.",
        facts,
        partial(facts, epochs=0.75),
        (NATS, nats_of(new_facts)),
        "more",
        0.05,
    ),
    effect(
        "norms_alone",
        "Norms alone learn less than every number.",
        language,
        {"tune": {"full": {"roles": ["norm"]}}},
        (NATS, LANGUAGE_NATS),
        "more",
        0.05,
    ),
    effect("anchor", "A KL anchor of weight 1 stays nearer to the base.", language, ANCHOR, (DRIFT, drifted), "less", 0.0),
)

NULLS = (
    null("full_language_nats", language, "order", (NATS, LANGUAGE_NATS), 0.0, **FULL),
    null("full_language_kept", partial(language, rate=1e-3), "order", (KEPT, kept), 0.02, **FULL),
    null("lora_language_nats", language, "order", (NATS, LANGUAGE_NATS), 0.0, **LORA),
    null("prompt_language_nats", language, "rows", (NATS, LANGUAGE_NATS), 0.0, **PROMPT),
    null("half_language_right", language, "order", (RIGHT, right(NEW_LANGUAGE)), 0.02, tune="half"),
    null("full_sort_right", sort, "rows", (RIGHT, right("sort")), 0.02, **FULL),
    null("full_largest_longer", largest, "order", (RIGHT, right("largest", 3)), 0.02, **FULL),
    null("full_facts_nats", facts, "rows", (NATS, nats_of(new_facts)), 0.0, **FULL),
    null("dft_wrong_sums_nats", partial(sums, noise=0.2), "rows", (NATS, SUM_NATS), 0.05, token_weight="dft"),
    null("anchor_language_drift", language, "order", (DRIFT, drifted), 0.0, **ANCHOR),
    null(
        "full_sort_trained_rows",
        sort,
        "order",
        (TRAINED, nats_of(lambda setting: sort(setting)[0]["rows"]["train"][:ITEMS])),
        0.0,
        **FULL,
    ),
    null("stream_kept", stream, "order", (KEPT, kept), 0.02, **FULL),
)

FURTHER = (
    effect(
        "a_hundredth_of_the_rate",
        "A hundredth of the rate learns less.",
        language,
        partial(language, rate=3e-5),
        (NATS, LANGUAGE_NATS),
        "more",
        0.05,
    ),
    effect(
        "label_smoothing",
        "Label smoothing makes a model less sure.",
        facts,
        {"objective": {"label_smoothing": {"amount": 0.3}}},
        (SURE, nats_of(new_facts, TOP)),
        "less",
        0.05,
    ),
    effect(
        "old_rows_again",
        "Old rows afterwards bring old skills back.",
        language_twice,
        language_and_back,
        (KEPT, kept),
        "more",
        0.02,
    ),
    effect(
        "as_long_as_asked",
        "Training on lists as long as those asked for gets more of them right.",
        largest,
        partial(largest, difficulty=3),
        (RIGHT, right("largest", 3)),
        "more",
        0.02,
    ),
    effect(
        "few_large_steps",
        "An eighth of the updates, each on eight times the rows, learns less at the same rate.",
        language,
        partial(language, batch_tokens=4096),
        (NATS, LANGUAGE_NATS),
        "more",
        0.05,
    ),
    effect(
        "wrong_sums",
        "When every answer is wrong, right sums become less likely.",
        sums,
        partial(sums, noise=1.0),
        (NATS, SUM_NATS),
        "more",
        0.05,
    ),
)

COMPARISONS: Mapping[str, Replication] = {replication.name: replication for replication in (*EFFECTS, *NULLS, *FURTHER)}
