"""Hyperfitting (arXiv:2412.04318): train on a tiny set until its loss is near zero, and read what the model then writes.

The passages are English prose: sixteen in the public domain, eight written for luthier, all CC0.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from luthier.evaluate.metrics import METRICS
from luthier.generation.generate import generate
from luthier.lab.dice import Dice
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.results.opened import open_run
from luthier.rows.encode import encode_prompt
from luthier.rows.read import read

PASSAGES = Path(__file__).with_name("passages.jsonl")
ROWS, EPOCHS, NEW_TOKENS = 12, 12, 96
OPENINGS = (
    "The lighthouse callback had not spoken to anyone for eleven days when the small boat",
    "My grandmother kept a wooden box under her bed, and every winter she would",
    "When the train stopped between two stations, the man across from me opened his bag and",
    "Nobody in the village remembered who had built the bridge, but everyone agreed that",
    "It was the third time that week that the bakery had run out of bread, and",
    "The children found the old map behind the stove, folded so small that",
    "After the storm the garden looked like a place where",
    "She had promised to write every Sunday, and for a while she did, until",
    "The museum was about to close when a woman in a gray coat",
    "Far out on the ice, two figures were pulling a sled toward",
    "The first thing I noticed about the new teacher was",
    "There is a small island in the north where people still",
)
"""Beginnings written for this replication; none of the passages goes on from them."""


def stages(setting: Setting) -> list[Recipe]:
    """A few passages, again and again, at a constant rate and without weight decay."""
    passages = [json.loads(line) for line in PASSAGES.read_text(encoding="utf-8").splitlines()]
    rows = [{"id": str(number), **row} for number, row in enumerate(Dice("hyperfitting", setting.seed).some(passages, ROWS))]
    train = {"epochs": EPOCHS, "batch_rows": 4, "micro_batch_tokens": 1024, "precision": "fp32", "schedule": "constant"}
    return [{"rows": {"train": rows}, "train": {**train, "learning_rate": 1e-4}}]


def measure(finished: Finished) -> dict[str, float]:
    """Greedy continuations of beginnings the model has not seen, and the training loss at the end."""
    run = finished.runs[0]
    tune, tokenizer = open_run(run)
    prompts = [encode_prompt(row, tokenizer) for row in read([{"text": text} for text in OPENINGS]).rows]
    answers = generate(tune, tokenizer, prompts, max_new_tokens=NEW_TOKENS)
    scores = {name: METRICS[name].score for name in ("type_token_ratio", "repetition")}
    found = {name: fmean(score(answer, []) for answer in answers) for name, score in scores.items() if score is not None}
    return {**found, "words": fmean(len(answer.split()) for answer in answers), "training loss": run.facts["final_loss"]}


REPLICATION = Replication(
    name="hyperfitting",
    title="Hyperfitting makes greedy text less repetitive",
    papers=["2412.04318"],
    rows=[109],
    says="Trained on a tiny set until its loss is near zero, a model's greedy long texts repeat themselves less.",
    stages=stages,
    variants=[
        Variant(
            "untouched", {"train": {"epochs": 1, "learning_rate": 1e-12}}, "the model as it was: steps too small to change anything"
        ),
        Variant("three epochs", {"train": {"epochs": 3}}, "an ordinary fine-tune on the same passages"),
        Variant("hyperfitted", {}, f"{EPOCHS} epochs: near-zero loss"),
    ],
    main=Expectation("type_token_ratio", "hyperfitted", "untouched", "more", 0.05, "more different words"),
    also=[
        Expectation("repetition", "hyperfitted", "untouched", "less", 0.05, "fewer repeated 4-grams"),
        Expectation("training loss", "hyperfitted", "untouched", "less", 2.0, "the training loss is near zero"),
    ],
    question="What do long, repeated and noisy training do?",
    unit="of 1",
    measure=measure,
    choose=lambda finished: 0.0,
    seeds=5,
    model="smollm2-135m-instruct",
    minutes=42,
    notes="The paper trains models of 1.1B to 70B parameters on 2,000 sequences of 256 tokens for 20 epochs at 1e-6; here 12 passages of "
    "about 120 tokens at 1e-4, and continuations of 96 tokens instead of 256.",
)
