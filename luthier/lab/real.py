"""Rows of public data sets for replications that are run on a real model. luthier brings none: they lie in a folder of one's own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.lab.dice import Dice
from luthier.lab.replication import Replication

FOLDER = "LUTHIER_DATA"
"""The environment variable that names the folder: its files are `NAME/SPLIT.jsonl`."""
MODEL = "smollm2-135m-instruct"
LONGEST, MOST_SIGNS = 28, 16
"""Words of a question, and letters of an equation: short rows, since a processor trains on some hundred tokens a second."""
INTENTS = 12
"""Of 77: the first in alphabetical order."""
BATCH_TOKENS = 512
Row = dict[str, Any]


def path_of(name: str) -> Path | None:
    """The file of one set, such as `mawps/train`; None where it is not there."""
    folder = os.environ.get(FOLDER, "")
    path = Path(folder) / f"{name}.jsonl"
    return path if folder and path.is_file() else None


def missing(replication: Replication) -> list[str]:
    """The sets that a replication needs and that are not there."""
    return [name for name in replication.data if path_of(name) is None]


@cache
def _records(path: Path) -> tuple[Row, ...]:
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def records(name: str) -> tuple[Row, ...]:
    """The records of one set, with its own field names.

    Raises:
        LuthierError: it is not there.
    """
    path = path_of(name)
    if path is None:
        raise LuthierError(
            f"this replication needs the data set `{name}`, which does not come with luthier",
            where=FOLDER,
            fix=f"set {FOLDER} to a folder that has {name}.jsonl; the documentation of replications says which sets these are",
        )
    return _records(path)


def row(id: str, question: str, answer: str) -> Row:
    """A question and what a model should write, without a system message, which would be as long as the row."""
    prompt = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
    return {"id": id, "prompt": prompt, "completion": answer}


def _drawn(rows: Sequence[Row], count: int, *names: object) -> list[Row]:
    """So many of the rows, or all there are."""
    return Dice("real", *names).some(rows, min(count, len(rows)))


def equations(split: str, count: int, seed: int) -> list[Row]:
    """MAWPS: short word problems, and the arithmetic that solves each, written alike."""
    short = [one for one in records(f"mawps/{split}") if len(one["original_text"].split()) <= LONGEST and _equation(one)]
    return _drawn([row(f"mawps-{one['id']}", one["original_text"], _equation(one)) for one in short], count, "mawps", split, seed)


def _equation(record: Row) -> str:
    """The right side of `x=...`, without outer parentheses and `.0`; empty where the equation has another form or is long."""
    found = re.fullmatch(r"[xX]=([0-9.+*/()-]+)", record["equation"])
    side = re.sub(r"\.0\b", "", found[1]) if found else ""
    while side.startswith("(") and _closes(side) == len(side) - 1:
        side = side[1:-1]
    return side if len(side) <= MOST_SIGNS else ""


def _closes(text: str) -> int:
    """Where the parenthesis that a text begins with is closed."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if depth == 0:
            return place
    return -1


def changed_facts(count: int, seed: int) -> list[Row]:
    """CounterFact: statements to end, with ends that contradict what is known."""
    return _drawn([_fact(one, "prompt", "target_new") for one in records("counterfact/edit")], count, "counterfact", seed)


def rephrased(rows: Sequence[Row]) -> list[Row]:
    """The same facts in other words."""
    wanted = {one["id"]: place for place, one in enumerate(rows)}
    found = (_fact(one, "rephrase_prompt", "target_new") for one in records("counterfact/edit"))
    return sorted((one for one in found if one["id"] in wanted), key=lambda one: wanted[one["id"]])


def other_facts(count: int) -> list[Row]:
    """What is known of others and should stay."""
    return _drawn([_fact(one, "locality_prompt", "locality_ground_truth") for one in records("counterfact/train")], count, "known")


def _fact(record: Row, prompt: str, answer: str) -> Row:
    return row(f"counterfact-{record['case_id']}", record[prompt], record[answer])


def intents(split: str, count: int, seed: int) -> list[Row]:
    """BANKING77: what customers ask, and which of the first few intents it is."""
    names = sorted({one["category"] for one in records("banking77/train")})[:INTENTS]
    of_few = [one for one in records(f"banking77/{split}") if one["category"] in names and len(one["text"].split()) <= LONGEST]
    rows = [row(f"banking-{split}-{number}", one["text"], one["category"].replace("_", " ")) for number, one in enumerate(of_few)]
    return _drawn(rows, count, "banking77", split, seed)


def wrong_answers(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The rows, so many of them with the answer of another."""
    dice, made = Dice("real", "wrong", seed), list(rows)
    for place in dice.some(range(len(rows)), round(share * len(rows))):
        others = sorted({one["completion"] for one in rows} - {rows[place]["completion"]})
        made[place] = {**rows[place], "completion": dice.pick(others)}
    return made


def stage(rows: Sequence[Row], **train: Any) -> Row:
    """A stage on given rows: once, unless `epochs` or `steps` says otherwise."""
    common = {"epochs": 1, "batch_tokens": BATCH_TOKENS, "micro_batch_tokens": 2 * BATCH_TOKENS, "precision": "fp32", "warmup": 0.1}
    return {"rows": {"train": list(rows)}, "train": {**common, **train}}
