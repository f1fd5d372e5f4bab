"""What a row of training data is, and the shapes it can come in.

A shape is known by its keys. Nothing a record holds is dropped: scalar keys outside the shape become free columns that
travel with the row into its batch, everything else stays in `fields`.

| keys | the row |
|---|---|
| `messages` | a conversation of `{role, content}` |
| `conversations` | the same in ShareGPT form, `{from, value}`; becomes `messages` |
| `prompt`, `completion` | one answer to learn |
| `instruction`, `output`, maybe `input` | one answer to learn |
| `text` | a document to learn |
| `text`, `label` | a document to classify; `label` is a text, a number, or a list of them |
| `tokens`, `tags` or `text`, `spans` | a document whose words have labels, see `luthier.rows.spans` |
| `prompt`, `chosen`, `rejected` | two answers, the better one first |
| `conversations`, `chosen`, `rejected` or `chosen`, `rejected` | the same, see `luthier.rows.preferences` |
| `prompt`, `answers`, `scores` | any number of answers and a score of each, of which row maps make pairs |
| `members` | rows that belong together, each a record of its own |
| `query`, `positive`, maybe `negatives` | the same: texts, of which the second answers the first |
| `prompt`, `answer` or `question`, `answer` | an item with its accepted answers |
| `prompt`, `choices`, `answer` or `question`, `choices`, `answer` | multiple choice; `answer` is a text or its index |
| `question`, `function`, `ground_truth` | an item to be answered by calls, see `luthier.rows.function_calls` |
| `prompt` | an item without an answer |

`prompt`, `completion`, `chosen`, `rejected` and each of `answers` are text or a list of messages. A message with `learn: false` is context
only: it is read and never a label (`luthier.rows.messages`). Context such as `system`, `history` and `tools` may stand beside all but
documents (`luthier.rows.beside`); a prompt with a `system` or a `history` becomes a list of messages, an instruction with one a
conversation.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, NamedTuple

from luthier.errors import LuthierError, nearest
from luthier.rows import beside, spans
from luthier.rows.function_calls import of_leaderboard
from luthier.rows.messages import (
    checked_messages,
    checked_text,
    from_json_list,
    kind_of,
    sharegpt_messages,
    with_marks,
)
from luthier.rows.preferences import graded, of_conversation, of_dialogues, prompted, text_or_messages

Scalar = float | int | str


@dataclass(frozen=True)
class Row:
    """One record, checked.

    Args:
        id: the record's own `id`, or one derived from its content; never from its place in the file.
        shape: the shape's name, one of the values of `canonical_shapes()`.
        fields: the shape's own values after checking, plus every other value that is not a number or text.
        where: the place it was read from, for error messages.
        columns: free numbers and texts that came with the record; a numeric `label` is also one.
        derived: whether the id was derived from the content.
    """

    id: str
    shape: str
    fields: Mapping[str, Any]
    where: str
    columns: Mapping[str, Scalar] = field(default_factory=dict)
    derived: bool = False

    @property
    def place(self) -> str:
        """Where errors say that the row stands."""
        return f"{self.where} (row {self.id})"


class BadRow(NamedTuple):
    """A record that cannot be used: where it stands, why, and how to fix it."""

    where: str
    reason: str
    fix: str = ""


class _Shape(NamedTuple):
    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    becomes: str
    check: Callable[[Mapping[str, Any]], dict[str, Any]]


def row_of(record: Mapping[str, Any], *, id: str, where: str, shape: str | None = None) -> Row:
    """Check one record and give it its shape.

    Args:
        record: the keys and values as they were read.
        id: the row's id; a key `id` in the record is not kept a second time.
        where: the place, for error messages.
        shape: the shape to use where the keys would fit several, such as `"messages"` or `"prompt+completion"`.

    Raises:
        LuthierError: the keys fit no shape or several, or a value is missing, empty or of the wrong type.
    """
    try:
        chosen = _SHAPES[named_shape(shape) if shape is not None else _recognized(record)]
        missing = [key for key in chosen.needs if key not in record]
        if missing:
            raise LuthierError(f"the row has no {_listed(missing)}; it has {_listed(record)}")
        becomes, fields = chosen.becomes, chosen.check(record)
        if becomes not in _DOCUMENTS:
            becomes, fields = beside.context_of(record, becomes, fields)
    except LuthierError as problem:
        raise LuthierError(problem.what, where=where, fix=problem.fix) from None
    columns: dict[str, Scalar] = {}
    for key, value in record.items():
        if key == "id" or key in chosen.needs or key in chosen.may_have:
            continue
        if isinstance(value, str):
            columns[key] = value
        elif isinstance(value, numbers.Real):
            columns[key] = int(value) if isinstance(value, numbers.Integral) else float(value)
        else:
            fields[key] = value
    if isinstance(fields.get("label"), int | float):
        columns["label"] = fields["label"]
    if becomes == "members":
        each = enumerate(fields["members"])
        fields["members"] = [row_of(one, id=f"{id}/{number}", where=f"{where}: members[{number}]") for number, one in each]
    return Row(id=id, shape=becomes, fields=fields, where=where, columns=columns, derived=record.get("id") is None)


def known_shapes() -> tuple[str, ...]:
    """The names a recipe may give a shape, each made of the keys it needs."""
    return tuple(_SHAPES)


def canonical_shapes() -> tuple[str, ...]:
    """The names `Row.shape` can have: `known_shapes()` after `conversations` and `question` have been renamed."""
    return tuple(dict.fromkeys(shape.becomes for shape in _SHAPES.values()))


def text_keys() -> frozenset[str]:
    """Every key some shape reads as text: numbers in them are never converted."""
    keys = {key for shape in _SHAPES.values() for key in (*shape.needs, *shape.may_have)}
    return frozenset(keys - {"label", "scores"}) | {"id"}


def unread(row: Row) -> list[str]:
    """The keys of a row that hold text or more, and are no part of what a model reads of it."""
    return beside.unread(_OWN.get(row.shape, frozenset()), row.fields, row.columns)


def ignored(row: Row) -> list[str]:
    """The keys of a row that are no part of what a model reads: free columns, which techniques can read, and all else."""
    own = _OWN.get(row.shape, frozenset()) | ({"words"} if row.shape == "text+tags" else set())
    return [key for key, value in {**row.columns, **row.fields}.items() if key not in own and not is_dataclass(value)]


def bad_rows_error(bad: Sequence[BadRow], total: int) -> LuthierError:
    """One error that names up to five of the bad rows."""
    shown = [f"{row.where}: {row.reason}" for row in bad[:5]]
    if len(bad) > len(shown):
        shown.append(f"and {len(bad) - len(shown)} more")
    skip = 'or leave such rows out, counted, with on_bad_row="skip"'
    mends = list(dict.fromkeys(row.fix for row in bad[:5] if row.fix))
    if len(bad) == 1:
        return LuthierError(bad[0].reason, where=bad[0].where, fix="; ".join([*(mends or ["fix this row"]), skip]))
    what = f"{len(bad)} of {total} rows cannot be used:\n    " + "\n    ".join(shown)
    return LuthierError(what, where=bad[0].where, fix="; ".join([*(mends or ["fix these rows"]), skip]))


def named_shape(shape: str) -> str:
    """The name of a shape that was given by its name or its keys.

    Raises:
        LuthierError: there is no such shape.
    """
    for name, known in _SHAPES.items():
        if shape == name or set(shape.split("+")) == set(known.needs):
            return name
    if shape == "instruction":
        return "instruction+output"
    raise LuthierError(
        f"unknown format of rows `{shape}`", where="rows.format", fix=nearest(shape, _SHAPES) or "known: " + ", ".join(_SHAPES)
    )


def _recognized(record: Mapping[str, Any]) -> str:
    keys = set(record)
    fitting = {name: set(shape.needs) for name, shape in _SHAPES.items() if keys.issuperset(shape.needs)}
    # A shape whose keys another fitting shape also needs is only a part of that one: `text` within `text+label`.
    widest = [name for name, needs in fitting.items() if not any(needs < other for other in fitting.values())]
    if len(widest) == 1:
        return widest[0]
    if widest:
        raise LuthierError(
            f"the row's keys {_listed(record)} fit several shapes: {', '.join(widest)}",
            fix=f"say which one, such as rows.format={widest[0]}; the other keys stay with the row",
        )
    lacking = {name: [key for key in shape.needs if key not in record] for name, shape in _SHAPES.items()}
    begun = {name: gap for name, gap in lacking.items() if len(gap) < len(_SHAPES[name].needs)}
    if begun:
        # Of several, those that most of whose keys are there.
        most = max(len(_SHAPES[name].needs) - len(gap) for name, gap in begun.items())
        near = {name: gap for name, gap in begun.items() if len(_SHAPES[name].needs) - len(gap) == most}
        fewest = min(map(len, near.values()))
        said = [f"{_listed(gap)} for the shape {name}" for name, gap in near.items() if len(gap) == fewest]
        what = f"the row has {_listed(record)}, and lacks {' or '.join(said)}"
        hints = ["add it"]
    else:
        what, hints = f"the row's keys {_listed(record)} fit no known shape", []
    known = {key for shape in _SHAPES.values() for key in shape.needs}
    offers = {key: nearest(str(key), known) for key in record if key not in known}
    hints += [f"`{key}`: {offer}" for key, offer in offers.items() if "did you mean" in offer]
    hints.append("say which column is which, such as rows.columns={prompt: question, completion: reply}")
    raise LuthierError(what, fix="; ".join([*hints, "formats: " + ", ".join(_SHAPES)]))


def _listed(keys: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in keys) or "(none)"


def _conversation(record: Mapping[str, Any]) -> dict[str, Any]:
    messages = record["messages"]
    # Whatever is no list is refused as such, marks or not.
    given = from_json_list(messages)
    return (
        _with_marks(record, given, "messages")
        if isinstance(given, list | tuple)
        else {"messages": checked_messages(messages, "messages")}
    )


def _sharegpt(record: Mapping[str, Any]) -> dict[str, Any]:
    return _with_marks(record, sharegpt_messages(record["conversations"], "conversations"), "conversations")


def _with_marks(record: Mapping[str, Any], messages: Any, key: str) -> dict[str, Any]:
    marks = record.get("loss_mask")
    return {"messages": checked_messages(messages if marks is None else with_marks(messages, marks, "loss_mask"), key)}


def _instruction(record: Mapping[str, Any]) -> dict[str, Any]:
    given = record.get("input")
    if given is not None and not isinstance(given, str):
        raise LuthierError(f"`input` must be text, not {kind_of(given)}")
    instruction, output = checked_text(record["instruction"], "instruction"), checked_text(record["output"], "output")
    return {"instruction": instruction, "input": given or "", "output": output}


def _members(record: Mapping[str, Any]) -> dict[str, Any]:
    members = record["members"]
    if not isinstance(members, list | tuple) or not members or not all(isinstance(one, Mapping) for one in members):
        raise LuthierError("`members` must be a list of records", fix="write each member as a row of its own would be")
    return {"members": [dict(one) for one in members]}


def _found(record: Mapping[str, Any]) -> dict[str, Any]:
    """A question as a row of its own, before the text that answers it and those that do not."""
    negatives = record.get("negatives") or ()
    if not isinstance(negatives, list | tuple):
        raise LuthierError(f"`negatives` must be a list of texts, not {kind_of(negatives)}")
    texts = {"query": record["query"], "positive": record["positive"]}
    texts |= {f"negatives[{number}]": one for number, one in enumerate(negatives)}
    return {"members": [{"text": checked_text(text, key)} for key, text in texts.items()]}


def _labelled(record: Mapping[str, Any]) -> dict[str, Any]:
    label = record["label"]
    if isinstance(label, list | tuple):
        label = [one if type(one) is int else checked_text(one, f"label[{number}]") for number, one in enumerate(label)]
        if len(set(label)) < len(label):
            raise LuthierError("`label` names a label twice", fix="name each once")
    elif isinstance(label, bool):
        label = int(label)
    elif not isinstance(label, int | float):
        label = checked_text(label, "label")
    elif isinstance(label, float) and not math.isfinite(label):
        raise LuthierError(f"`label` is {label}, which is no number to learn")
    return {"text": checked_text(record["text"], "text"), "label": label}


def _answered(record: Mapping[str, Any], asked: str) -> dict[str, Any]:
    answer = record["answer"]
    accepted = list(answer) if isinstance(answer, list | tuple) else [answer]
    if not accepted:
        raise LuthierError("`answer` is empty")
    # A whole number has one way of being written; a fraction has many, so that choice stays with the file.
    texts = [str(one) if type(one) is int else checked_text(one, "answer") for one in accepted]
    return {"prompt": text_or_messages(record[asked], asked), "answer": texts}


def _multiple_choice(record: Mapping[str, Any], asked: str) -> dict[str, Any]:
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        raise LuthierError("`choices` must be a list of at least two texts")
    texts = [checked_text(choice, f"choices[{index}]") for index, choice in enumerate(choices)]
    if len(set(texts)) < len(texts):
        raise LuthierError("`choices` holds the same text twice")
    if type(answer) is int and not 0 <= answer < len(texts):
        raise LuthierError(f"`answer` is {answer}, but the choices are numbered 0 to {len(texts) - 1}")
    if type(answer) is not int and answer not in texts:
        raise LuthierError(f"`answer` is {answer!r}, which is neither one of the choices nor their index")
    index = answer if type(answer) is int else texts.index(answer)
    return {"prompt": text_or_messages(record[asked], asked), "choices": texts, "answer": index}


_DOCUMENTS = ("text", "text+label", "text+tags", "members")
_SHAPES: dict[str, _Shape] = {
    "messages": _Shape(("messages",), beside.OF_CONVERSATIONS, "messages", _conversation),
    "conversations": _Shape(("conversations",), beside.OF_CONVERSATIONS, "messages", _sharegpt),
    "prompt+completion": _Shape(
        ("prompt", "completion"), beside.OF_PROMPTS, "prompt+completion", lambda record: prompted(record, "completion")
    ),
    "instruction+output": _Shape(("instruction", "output"), ("input", *beside.OF_PROMPTS), "instruction", _instruction),
    "text": _Shape(("text",), (), "text", lambda record: {"text": checked_text(record["text"], "text")}),
    "text+label": _Shape(("text", "label"), (), "text+label", _labelled),
    "tokens+tags": _Shape(("tokens", "tags"), (), "text+tags", spans.of_tokens),
    "text+spans": _Shape(("text", "spans"), (), "text+tags", spans.of_spans),
    "prompt+chosen+rejected": _Shape(
        ("prompt", "chosen", "rejected"),
        beside.OF_PROMPTS,
        "prompt+chosen+rejected",
        lambda record: prompted(record, "chosen", "rejected"),
    ),
    "conversations+chosen+rejected": _Shape(
        ("conversations", "chosen", "rejected"), beside.OF_PROMPTS, "prompt+chosen+rejected", of_conversation
    ),
    "chosen+rejected": _Shape(("chosen", "rejected"), beside.OF_PROMPTS, "prompt+chosen+rejected", of_dialogues),
    "prompt+answers+scores": _Shape(("prompt", "answers", "scores"), beside.OF_PROMPTS, "prompt+answers+scores", graded),
    "members": _Shape(("members",), (), "members", _members),
    "query+positive": _Shape(("query", "positive"), ("negatives",), "members", _found),
    "prompt+answer": _Shape(("prompt", "answer"), beside.OF_PROMPTS, "prompt+answer", lambda record: _answered(record, "prompt")),
    "question+answer": _Shape(
        ("question", "answer"), beside.OF_PROMPTS, "prompt+answer", lambda record: _answered(record, "question")
    ),
    "prompt+choices+answer": _Shape(
        ("prompt", "choices", "answer"),
        beside.OF_PROMPTS,
        "prompt+choices+answer",
        lambda record: _multiple_choice(record, "prompt"),
    ),
    "question+choices+answer": _Shape(
        ("question", "choices", "answer"),
        beside.OF_PROMPTS,
        "prompt+choices+answer",
        lambda record: _multiple_choice(record, "question"),
    ),
    "question+function+ground_truth": _Shape(("question", "function", "ground_truth"), (), "prompt+answer", of_leaderboard),
    "prompt": _Shape(("prompt",), beside.OF_PROMPTS, "prompt", lambda record: prompted(record)),
}
_OWN: dict[str, frozenset[str]] = {
    name: frozenset(
        key for shape in _SHAPES.values() if shape.becomes == name for key in (*shape.needs, *shape.may_have, *name.split("+"))
    )
    for name in canonical_shapes()
}
