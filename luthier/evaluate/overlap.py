"""Overlap: which evaluation rows also stand in the training rows, so that a gain on them would prove nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from luthier.evaluate.items import accepted_answers
from luthier.rows.answers import contains, words_of
from luthier.rows.shapes import Row

Words = tuple[str, ...]
Asked = tuple[Words, list[str]]
"""The words of a question, and the answers that go with it: none where a row has no answer."""


def overlap(train_rows: Iterable[Row], eval_rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Evaluation rows that training has seen.

    Two rows overlap where they ask the same and their answers agree, or where they are the same document. Case,
    punctuation and spacing do not count. Answers agree where one stands in the other as whole words; a row without an
    answer agrees with every answer. The same answer to a question in other words is no overlap: such are held-out
    phrasings.

    Returns:
        The ids of each such evaluation row, in order, and of the first training row that it overlaps with.
    """
    return overlaps(train_rows, {"": eval_rows})[""]


def overlaps(train_rows: Iterable[Row], sets: Mapping[str, Sequence[Row]]) -> dict[str, list[tuple[str, str]]]:
    """`overlap` for several sets, in one pass over training rows that may be larger than memory."""
    # A conversation is one item: its last question with all that led to it.
    items = {name: [(row.id, *_asked(row)[-1]) for row in rows] for name, rows in sets.items()}
    seen: dict[Words, list[tuple[list[str], str]]] = {question: [] for rows in items.values() for _, question, _ in rows}
    if seen:
        for row in train_rows:
            for question, answers in _asked(row):
                if question in seen:
                    seen[question].append((answers, row.id))

    def first(question: Words, answers: list[str]) -> str | None:
        return next((train_id for taught, train_id in seen[question] if _agree(answers, taught)), None)

    return {
        name: [(id, found) for id, question, answers in rows if (found := first(question, answers)) is not None]
        for name, rows in items.items()
    }


def warnings_about(shared: Mapping[str, int]) -> list[str]:
    """What to say of sets with rows that training has seen, by how many.

    Args:
        shared: by set, the number of such rows.
    """
    return [
        f"{count:,} {'item' if count == 1 else 'items'} of {name} also stand in the training rows: gains there prove nothing."
        for name, count in shared.items()
        if count
    ]


def _agree(one: Sequence[str], other: Sequence[str]) -> bool:
    if not one or not other:
        return True
    return any(contains(text, one) for text in other) or any(contains(text, other) for text in one)


def _asked(row: Row) -> list[Asked]:
    """What a row asks and answers. A conversation asks at every turn, and at the end all its turns together; of rows that belong together
    the first one asks."""
    if row.shape == "members":
        return _asked(row.fields["members"][0])
    if row.shape in ("text", "text+tags"):
        return [(_key(row.fields["text"]), [])]
    if row.shape == "text+label":
        return [(_key(row.fields["text"]), accepted_answers(row))]
    if row.shape == "instruction":
        return [(_key(row.fields["instruction"], row.fields["input"]), accepted_answers(row))]
    prompt = row.fields["messages" if row.shape == "messages" else "prompt"]
    if isinstance(prompt, str):
        return [(_key(prompt), accepted_answers(row) or _completions(row))]
    return _turns(prompt, accepted_answers(row) or _completions(row))


def _completions(row: Row) -> list[str]:
    """The texts of a preference's two answers."""
    return [row.fields[key] for key in ("chosen", "rejected") if isinstance(row.fields.get(key), str)]


def _turns(messages: Sequence[dict[str, str]], last: list[str]) -> list[Asked]:
    asked: list[Asked] = []
    users: list[str] = []
    for place, message in enumerate(messages):
        if message["role"] == "user":
            users.append(message["content"])
            following = messages[place + 1 : place + 2]
            answers = [one["content"] for one in following if one["role"] == "assistant"]
            asked.append((_key(message["content"]), answers or last))
    # Without a user there is no question but the rest: a system message, a tool's result.
    return [*asked, (_key(*(users or [message["content"] for message in messages])), last)]


def _key(*texts: str) -> Words:
    # A text of signs alone has no words, and all such texts must not become equal.
    return tuple(word for text in texts for word in words_of(text) or tuple(text.split()))
