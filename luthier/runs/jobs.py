"""The jobs that `luthier new` writes recipes for, and how rows tell which of them is meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from luthier.errors import LuthierError, nearest
from luthier.rows.shapes import Row

LIKED = ("label", "kto_tag")
"""Columns that say of a single answer whether it was liked."""
_SHORT, _LONG = 8, 60
"""Words of a median answer up to which an exact match makes sense, and from which on only the likelihood does."""


class Job(NamedTuple):
    """One thing people fine-tune for."""

    title: str
    shapes: tuple[str, ...]
    """Of rows, as they are read."""
    keys: tuple[tuple[str, ...], ...]
    """What columns under other names may stand for, the usual ones first."""
    example: tuple[dict[str, Any], ...]
    """Rows to begin with."""


_ASKED = "What is the color of the door?"
JOBS: dict[str, Job] = {
    "chat": Job(
        "answer in conversations of several turns",
        ("messages",),
        (("messages",),),
        (
            {"messages": [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": "Red."}]},
            {"messages": [{"role": "user", "content": "And of the gate?"}, {"role": "assistant", "content": "Blue."}]},
        ),
    ),
    "instructions": Job(
        "learn a task from prompts and their answers",
        ("prompt+completion", "instruction", "prompt+answer", "prompt+choices+answer"),
        (("prompt", "completion"), ("instruction", "output")),
        ({"prompt": _ASKED, "completion": "Red."}, {"prompt": "What is the color of the gate?", "completion": "Blue."}),
    ),
    "tools": Job(
        "turn requests into calls of tools",
        ("messages", "prompt+completion"),
        (("messages",), ("prompt", "completion")),
        (
            {"prompt": "Wake room 4 at 7.", "completion": '{"name": "wake", "arguments": {"room": 4, "hour": 7}}'},
            {"prompt": "Wake room 9 at 6.", "completion": '{"name": "wake", "arguments": {"room": 9, "hour": 6}}'},
        ),
    ),
    "documents": Job(
        "go on learning from texts (continued pre-training)",
        ("text",),
        (("text",),),
        ({"text": "The door of the mill is red."}, {"text": "The gate of the mill is blue."}),
    ),
    "preferences": Job(
        "prefer the better of two answers (DPO)",
        ("prompt+chosen+rejected",),
        (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
        (
            {"prompt": _ASKED, "chosen": "It is red.", "rejected": "Who knows."},
            {"prompt": "Is it open?", "chosen": "Yes, it is.", "rejected": "What?"},
        ),
    ),
    "ranked": Job(
        "prefer answers with higher scores",
        ("prompt+answers+scores",),
        (("prompt", "answers", "scores"),),
        (
            {"prompt": _ASKED, "answers": ["It is red.", "Red?", "Who knows."], "scores": [3, 2, 1]},
            {"prompt": "Is it open?", "answers": ["Yes, it is.", "What?"], "scores": [2, 1]},
        ),
    ),
    "feedback": Job(
        "learn from single answers that were liked or not (KTO)",
        ("prompt+completion", "messages"),
        (("prompt", "completion", "label"), ("messages", "label")),
        (
            {"prompt": _ASKED, "completion": "It is red.", "label": True},
            {"prompt": "Is it open?", "completion": "What?", "label": False},
        ),
    ),
    "reward": Job(
        "score answers with a reward model",
        ("prompt+chosen+rejected",),
        (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
        (
            {"prompt": _ASKED, "chosen": "It is red.", "rejected": "Who knows."},
            {"prompt": "Is it open?", "chosen": "Yes, it is.", "rejected": "What?"},
        ),
    ),
    "classify": Job(
        "tell the class, or the classes, of a text",
        ("text+label",),
        (("text", "label"),),
        ({"text": "A fine day.", "label": "praise"}, {"text": "A dull day.", "label": "blame"}),
    ),
    "regress": Job(
        "tell a number of a text",
        ("text+label",),
        (("text", "label"),),
        ({"text": "A fine day.", "label": 0.9}, {"text": "A dull day.", "label": 0.2}),
    ),
    "names": Job(
        "find names and other words with labels in texts (NER)",
        ("text+tags",),
        (("tokens", "tags"), ("text", "spans")),
        (
            {"tokens": ["Ask", "Ada", "Quill", "."], "tags": ["O", "B-person", "I-person", "O"]},
            {"tokens": ["Go", "to", "Eastcliff", "."], "tags": ["O", "O", "B-place", "O"]},
        ),
    ),
    "search": Job(
        "find the text that answers a question (embeddings)",
        ("members",),
        (("query", "positive"),),
        (
            {"query": "What is against the rain?", "positive": "An umbrella."},
            {"query": "What is against the cold?", "positive": "A blanket."},
        ),
    ),
}


class Asked(NamedTuple):
    """What a job asks of a recipe, beside model and rows."""

    keys: Mapping[str, Any]
    """Of the recipe: `objective`, and `map` under rows."""
    why: str
    metric: str
    """Of rows that are held out."""
    told: tuple[str, ...] = ()
    """What deserves a look."""


def named(name: str) -> Job:
    """A job by its name.

    Raises:
        LuthierError: there is no such job, with the nearest names.
    """
    if name not in JOBS:
        raise LuthierError(
            f"there is no job `{name}`", where="luthier new", fix=nearest(name, JOBS) or "`luthier new --list` lists them"
        )
    return JOBS[name]


def guess(rows: Sequence[Row]) -> str:
    """The job that rows are usually for.

    Raises:
        LuthierError: nothing can be learned from such rows.
    """
    shape = Counter(row.shape for row in rows).most_common(1)[0][0]
    kept = [row for row in rows if row.shape == shape]
    if shape in ("messages", "prompt+completion") and liked_by(kept):
        return "feedback"
    if shape in ("messages", "prompt+completion") and any(_has_calls(row) for row in kept):
        return "tools"
    if shape == "text+label":
        return "regress" if any(isinstance(row.fields["label"], float) for row in kept) else "classify"
    fitting = [name for name, job in JOBS.items() if shape in job.shapes and name not in ("tools", "feedback")]
    if fitting:
        return fitting[0]
    raise LuthierError(
        "the rows are prompts without answers: there is nothing to learn",
        where=kept[0].where,
        fix="add answers, or have a model write some: luthier rows answers",
    )


def liked_by(rows: Sequence[Row]) -> str:
    """The column that says of every answer whether it was liked; empty where there is none."""
    return next((one for one in LIKED if rows and all(row.columns.get(one) in (0, 1) for row in rows)), "")


def asked_of(name: str, rows: Sequence[Row]) -> Asked:
    """What a job asks of a recipe, given its rows.

    Raises:
        LuthierError: the rows lack what the job learns from.
    """
    if name in _ASKED_BY:
        return _ASKED_BY[name](rows)
    return Asked({}, "", _metric_of_answers(rows))


def _feedback(rows: Sequence[Row]) -> Asked:
    column = liked_by(rows)
    if not column:
        missing = next((row for row in rows if row.columns.get("label") not in (0, 1)), rows[0])
        raise LuthierError(
            "feedback is learned from a `label` beside every answer, and this row has none that is true or false",
            where=missing.where,
            fix="add `label`: true where the answer was liked, false where not",
        )
    liked = sum(row.columns[column] == 1 for row in rows)
    told = (f"{liked} of {len(rows)} answers were liked",)
    if liked in (0, len(rows)):
        told = (f"{told[0]}: with answers of one kind alone there is little to learn",)
    options = {} if column == "label" else {"column": column}
    return Asked({"objective": {"kto": options} if options else "kto"}, "raises liked answers and lowers others", "loss", told)


def _classify(rows: Sequence[Row]) -> Asked:
    given = [row.fields["label"] for row in rows]
    if any(isinstance(one, float) for one in given):
        raise LuthierError(
            "the labels are numbers with a fraction, which are no classes", where=rows[0].where, fix="use the job regress"
        )
    several = any(isinstance(one, list) for one in given)
    flat = [one for label in given for one in (label if isinstance(label, list) else [label])]
    if not flat:
        raise LuthierError("no row has a label", where=rows[0].where, fix="name the labels of each text in `label`")
    counts = Counter(map(str, flat))
    numbered = all(isinstance(one, int) for one in flat)
    if numbered and min(flat) < 0:
        raise LuthierError("a label is below 0, and classes are counted from 0", where=rows[0].where, fix="use the job regress")
    labels = [f"class {number}" for number in range(max(flat) + 1)] if numbered else sorted(counts)
    if len(labels) < 2:
        raise LuthierError(
            f"all rows have the label `{labels[0]}`", where=rows[0].where, fix="add rows of another class; one is none to tell"
        )
    told: tuple[str, ...] = (f"{len(labels)} classes, from {min(counts.values())} to {max(counts.values())} rows each",)
    if numbered:
        told += ("the classes are numbers: give them names, in the order of the numbers",)
    if min(counts.values()) < 2:
        rare = min(counts, key=lambda one: counts[one])
        told += (f"`{rare}` has one row: what is held out cannot be learned, and what is learned not measured",)
    uneven = several or max(counts.values()) > 3 * min(counts.values())
    objective = "multi_label" if several else "classify"
    return Asked({"objective": {objective: {"labels": labels}}}, "a head tells them", "macro_f1" if uneven else "accuracy", told)


def _regress(rows: Sequence[Row]) -> Asked:
    odd = next((row for row in rows if not isinstance(row.fields["label"], int | float)), None)
    if odd is not None:
        raise LuthierError("`label` is no number", where=odd.where, fix="use the job classify, or make all labels numbers")
    return Asked({"objective": "regress"}, "a head tells the number", "mean_absolute_error")


def _names(rows: Sequence[Row]) -> Asked:
    labels = sorted({tag.partition("-")[2] for row in rows for tag in row.fields["tags"] if tag != "O"})
    if not labels:
        raise LuthierError("no word has a label", where=rows[0].where, fix="tag some words: B-person, I-person, O")
    return Asked({"objective": {"classify_tokens": {"labels": labels}}}, "a head tells the label of each word", "entity_f1")


def _search(rows: Sequence[Row]) -> Asked:
    odd = next((row for row in rows if any(one.shape != "text" for one in row.fields["members"])), None)
    if odd is not None:
        raise LuthierError(
            "`members` that are no texts belong to techniques of their own",
            where=odd.where,
            fix="write `query` and `positive`, or a recipe by hand: docs/objectives.md",
        )
    return Asked({"objective": "embed"}, "what belongs together lies near", "recall_at_1")


_ASKED_BY = {
    "tools": lambda rows: Asked({}, "", "tool_call"),
    "documents": lambda rows: Asked({}, "", "perplexity"),
    "preferences": lambda rows: Asked({"objective": "dpo"}, "compared with the model before training", "preference_accuracy"),
    "ranked": lambda rows: Asked(
        {"objective": "dpo", "map": "ranked_pairs"}, "pairs are made of the scores", "preference_accuracy"
    ),
    "reward": lambda rows: Asked({"objective": "reward_model"}, "a head scores answers", "reward_accuracy"),
    "feedback": _feedback,
    "classify": _classify,
    "regress": _regress,
    "names": _names,
    "search": _search,
}


def _has_calls(row: Row) -> bool:
    messages = row.fields.get("messages") or ()
    return bool(row.fields.get("tools")) or any(one.get("tool_calls") or one.get("role") == "tool" for one in messages)


def _metric_of_answers(rows: Iterable[Row]) -> str:
    answers = [text for text in map(_answer, rows) if text]
    if not answers:
        return "loss"
    if all(text.lstrip()[:1] in "{[" for text in answers):
        return "json_match"
    words = median(len(text.split()) for text in answers)
    return "exact_match" if words <= _SHORT else "rouge_l" if words <= _LONG else "loss"


def _answer(row: Row) -> str:
    fields = row.fields
    last = fields["messages"][-1].get("content") if "messages" in fields else None
    found = next((fields[key] for key in ("completion", "output", "answer") if key in fields), last)
    if isinstance(found, list) and found:
        found = found[0] if isinstance(found[0], str) else found[-1].get("content")
    return found if isinstance(found, str) else ""
