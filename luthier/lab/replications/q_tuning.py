"""Q-Tuning (arXiv:2509.23873): rows and tokens chosen in every step, where a quarter of the rows is wrong and a quarter repeated."""

from __future__ import annotations

from typing import Any

from luthier.lab.dice import Dice
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.targets import targets_of, with_answers
from luthier.lab.tasks import TAUGHT, few_facts, mean, right, stage

ROWS, STEPS, POOL, SHARE = 600, 60, 1024, 0.125
"""`POOL` tokens are looked at in every step, and `SHARE` of its rows are learned from."""


def mixed(seed: int) -> list[dict[str, Any]]:
    """Half of the rows clean, a quarter the same again, and a quarter with wrong answers."""
    different = ROWS * 3 // 4
    clean = few_facts("train", different, seed)
    wrong = few_facts("train", different, seed, noise=1.0)
    dice = Dice("q_tuning", seed)
    order = dice.shuffled(range(different))
    spoiled, again = order[: ROWS // 4], order[ROWS // 4 : ROWS // 2]
    rows = [wrong[place] if place in spoiled else clean[place] for place in range(different)]
    return [*rows, *({**clean[place], "id": f"{clean[place]['id']}-again"} for place in again)]


def stages(setting: Setting) -> list[Recipe]:
    """Few steps over many rows each."""
    recipe = stage(mixed(setting.seed), epochs=1)
    recipe["train"].update(steps=STEPS, batch_tokens=POOL)
    return [recipe]


def measure(finished: Finished) -> dict[str, float]:
    """Clean items: right answers and nats of a token; the old skills."""
    run = finished.runs[0]
    return {
        "right": right(run, few_facts("held_out")),
        "nats": targets_of(run, with_answers(few_facts("held_out")), ["nll"]).mean("nll"),
        "kept": mean(run, TAUGHT),
    }


def choose(finished: Finished) -> float:
    """Judges a learning rate by the likelihood of clean validation items."""
    return -targets_of(finished.runs[0], with_answers(few_facts("validation")), ["nll"]).mean("nll")


REPLICATION = Replication(
    name="q_tuning",
    title="Learning from an eighth of the rows, those surely wrong or unsurely right",
    papers=["2509.23873"],
    rows=[3],
    says="Choosing 12.5 % of the rows in every step by error and uncertainty learns better than all rows.",
    stages=stages,
    variants=[
        Variant("all rows", {}, "every row of every step; as many updates, and as many tokens looked at"),
        Variant("q_tuning", {"token_weight": {"q_tuning": {"rows": SHARE}}}, "an eighth of the rows of every step, chosen"),
        Variant("random rows", {"token_weight": {"random_step_rows": {"share": SHARE}}}, "control: an eighth of them by chance"),
        Variant(
            "all rows, small steps",
            {"train": {"steps": round(STEPS / SHARE), "batch_tokens": round(POOL * SHARE), "micro_batch_tokens": POOL}},
            "as many tokens looked at, in eight times the updates",
        ),
    ],
    main=Expectation("nats", "q_tuning", "all rows", "less", 0.0, "better than all rows in as many updates"),
    also=[
        Expectation("right", "q_tuning", "random rows", "more", 0.05, "better than as many rows by chance"),
        Expectation("right", "q_tuning", "all rows", "not_less", 0.05, "as good as all rows in as many updates"),
        Expectation("right", "q_tuning", "all rows, small steps", "not_less", 0.05, "and with as many tokens looked at"),
        Expectation("nats", "q_tuning", "random rows", "less", 0.0, "right answers are likelier than with random rows"),
    ],
    question="Which rows and tokens are worth learning from?",
    measure=measure,
    choose=choose,
    unit="nats",
    floor={"right": 0.4},
    minutes=5,
    notes="The paper prunes for models of 1.7B to 8B parameters on real sets. Here a quarter of the rows has wrong answers and a quarter "
    "occurs twice; a step looks at about 100 rows and learns from an eighth. Wrong answers here are not errors of a model that is sure.",
)
