"""ssToken (arXiv:2510.18250): answers in which four of ten tokens are noise, and rules that choose the tokens to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.lab import benchmark
from luthier.lab.dice import Dice
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.skills.words import LETTERS
from luthier.lab.targets import targets_of
from luthier.lab.tasks import TAUGHT, mean, stage

SKILL, LETTERS_ADDED, SHARE = "largest", 7, 0.6
"""A trace has 11 tokens, two for each number, and a letter is one: 39 % are noise."""


def noisy(rows: Sequence[dict[str, Any]], *names: object) -> list[dict[str, Any]]:
    """Each answer with letters that nothing asks for, at random places."""
    made = []
    for number, row in enumerate(rows):
        dice, words = Dice("sstoken", *names, number), row["completion"].split()
        is_noise = dice.shuffled([True] * LETTERS_ADDED + [False] * len(words))
        rest = iter(words)
        made.append({**row, "completion": " ".join(dice.pick(LETTERS) if one else next(rest) for one in is_noise)})
    return made


def stages(setting: Setting) -> list[Recipe]:
    """Traces with noise between their steps."""
    return [stage(noisy(benchmark.rows(SKILL, "train", 200, seed=setting.seed), setting.seed), epochs=6)]


def tokens(finished: Finished, seed: int, *columns: str) -> dict[str, float]:
    """Means of columns over the labels of other noisy answers: over digits, and over letters, which are noise."""
    rows = noisy(benchmark.rows(SKILL, "train", 80, seed=seed), seed)
    found = targets_of(finished.runs[0], rows, columns)
    digits = [index for index, text in enumerate(found.text_N) if text.isdigit()]
    letters = [index for index, text in enumerate(found.text_N) if text.removeprefix("Ġ") in LETTERS]
    return {
        f"{name}, {of}": float(found[name][places].mean())
        for name in columns
        for of, places in (("clean", digits), ("noise", letters))
    }


def measure(finished: Finished) -> dict[str, float]:
    """Clean tokens amid noise, where the last block looks, answers that the model writes by itself, and the old skills."""
    run = finished.runs[0]
    found = tokens(finished, finished.setting.seed + 500, "right", "context_attention")
    return {
        "clean tokens": found["right, clean"],
        "attention, clean": found["context_attention, clean"],
        "attention, noise": found["context_attention, noise"],
        "answers": mean(run, [SKILL], count=100),
        "kept": mean(run, TAUGHT),
    }


def choosing(gamma: float) -> dict[str, Any]:
    """A recipe's key for ssToken."""
    return {"token_weight": {"sstoken": {"share": SHARE, "gamma": gamma, "attention_only": 0.2 if gamma else 0.0}}}


REPLICATION = Replication(
    name="sstoken",
    title="Choosing tokens by excess loss and by attention to the prompt",
    papers=["2510.18250"],
    rows=[1],
    says="Learning from the 60 % of tokens that were learnt most and look most at the prompt is better than learning from all.",
    stages=stages,
    variants=[
        Variant("all tokens", {}, "cross-entropy"),
        Variant("random tokens", {"token_weight": {"random_tokens": {"share": SHARE}}}, "control: 60 % of each answer by chance"),
        Variant("attention", choosing(0.0), "60 % of each answer by attention to the question"),
        Variant("excess loss", choosing(1.0), "by how much better the model is than the base"),
        Variant("both", choosing(0.5), "by both alike"),
    ],
    main=Expectation("clean tokens", "both", "all tokens", "more", 0.02, "so are both together"),
    also=[
        Expectation("clean tokens", "attention", "all tokens", "more", 0.02, "attention alone is better than all tokens"),
        Expectation("clean tokens", "excess loss", "all tokens", "more", 0.02, "so is excess loss"),
        Expectation("clean tokens", "both", "random tokens", "more", 0.02, "it is not that there are fewer tokens"),
        Expectation("clean tokens", "both", "attention", "not_less", 0.02, "both are as good as attention alone"),
        Expectation("clean tokens", "both", "excess loss", "not_less", 0.02, "both are as good as excess loss alone"),
    ],
    question="Which rows and tokens are worth learning from?",
    measure=measure,
    choose=lambda finished: tokens(finished, finished.setting.seed + 1000, "right")["right, clean"],
    floor={"clean tokens": 0.4},
    minutes=5,
    notes="The paper fine-tunes models of 3B to 14B parameters on real instructions, whose noise is not marked. Here two tokens of five "
    "in an answer are letters drawn by chance, so what should be left out is known.",
)
