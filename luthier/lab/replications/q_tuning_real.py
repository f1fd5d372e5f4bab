"""Q-Tuning (arXiv:2509.23873) on a real model: word problems, a quarter with wrong equations and a quarter repeated."""

from __future__ import annotations

from luthier.lab.dice import Dice
from luthier.lab.real import MODEL, Row, equations, stage, wrong_answers
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.targets import targets_of

ROWS, STEPS, POOL, SHARE = 160, 6, 1024, 0.25


def mixed(seed: int) -> list[Row]:
    """Half of the rows clean, a quarter the same again, and a quarter with wrong answers."""
    clean = equations("train", ROWS * 3 // 4, seed)
    rows = wrong_answers(clean, 1 / 3, seed)
    right = [one for one, other in zip(rows, clean, strict=True) if one == other]
    return [*rows, *({**one, "id": f"{one['id']}-again"} for one in Dice("q_tuning", seed).some(right, ROWS // 4))]


def stages(setting: Setting) -> list[Recipe]:
    """Few steps over many rows each."""
    return [stage(mixed(setting.seed), steps=STEPS, batch_tokens=POOL)]


def measure(finished: Finished) -> dict[str, float]:
    """Other problems: equations that are the likeliest token by token, and nats of a token."""
    found = targets_of(finished.runs[0], equations("test", 80, 0), ["right", "nll"])
    return {"right": float(found.least("right").mean()), "nats": found.mean("nll")}


REPLICATION = Replication(
    name="q_tuning_real",
    title="Learning from a quarter of the rows, on a real model",
    papers=["2509.23873"],
    rows=[3],
    says="Choosing a part of the rows in every step by error and uncertainty learns better than all rows.",
    stages=stages,
    variants=[
        Variant("all rows", {}, "every row of every step; as many updates, and as many tokens looked at"),
        Variant("q_tuning", {"token_weight": {"q_tuning": {"rows": SHARE}}}, "a quarter of the rows of every step, chosen"),
        Variant("random rows", {"token_weight": {"random_step_rows": {"share": SHARE}}}, "control: a quarter of them by chance"),
        Variant(
            "all rows, small steps",
            {"train": {"steps": round(STEPS / SHARE), "batch_tokens": round(POOL * SHARE)}},
            "as many tokens looked at, in four times the updates",
        ),
    ],
    main=Expectation("nats", "q_tuning", "all rows", "less", 0.0, "better than all rows in as many updates"),
    also=[
        Expectation("nats", "q_tuning", "random rows", "less", 0.0, "right equations are likelier than with random rows"),
        Expectation("nats", "q_tuning", "all rows", "not_more", 0.1, "as likely as with all rows in as many updates"),
        Expectation("nats", "q_tuning", "all rows, small steps", "not_more", 0.1, "and with as many tokens looked at"),
        Expectation("right", "q_tuning", "random rows", "more", 0.02, "more equations are right than with random rows"),
    ],
    question="Which rows and tokens are worth learning from?",
    unit="nats",
    measure=measure,
    choose=lambda finished: -targets_of(finished.runs[0], equations("validation", 60, 0), ["nll"]).mean("nll"),
    rates=(5e-5, 2e-4),
    seeds=5,
    model=MODEL,
    data=("mawps/train", "mawps/validation", "mawps/test"),
    floor={"right": 0.05},
    minutes=16,
    notes="The paper prunes for models of 1.7B to 8B parameters and, on one of them, keeps 12.5 % of 52,000 rows; here a step looks at "
    "some 20 problems of MAWPS, too few for less than a quarter.",
)
