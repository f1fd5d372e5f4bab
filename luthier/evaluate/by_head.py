"""What a head says of evaluation rows, as items: classes, labels, numbers, scores, entities, and places among texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError
from luthier.evaluate.items import NOTHING, Item, prompt_text, text_of_answer
from luthier.kinds import Head
from luthier.rows.encode import Encoded
from luthier.rows.preferences import SIDES
from luthier.rows.shapes import Row
from luthier.rows.spans import OUTSIDE, WORD, entities_of
from luthier.training.readout import Combination

FEW = 10
"""Texts that a search shows."""
THRESHOLD = 0.5
"""Probability above which a label is named where any may be right."""


OF_PLACE: Mapping[str, Callable[[int], float]] = {
    "recall_at_1": lambda place: float(place == 1),
    "mean_reciprocal_rank": lambda place: 1.0 / place,
    "recall_at_10": lambda place: float(place <= FEW),
    "ndcg_at_10": lambda place: 1.0 / math.log2(place + 1) if place <= FEW else 0.0,
}
"""What a question counts whose one right text stands at this place, from 1, by metric; the best possible DCG is 1."""


def placed(metric: str, rows: Sequence[Row], places: Sequence[int]) -> list[Item]:
    """Questions, by the place of the text that answers each."""
    items = []
    for row, place in zip(rows, places, strict=True):
        query, right, *_ = row.fields["members"]
        items.append(Item(row.id, query.fields["text"], right.fields["text"], f"place {place}", OF_PLACE[metric](place)))
    return items


def classified(head: Head, rows: Sequence[Row], logits: Sequence[Tensor]) -> list[Item]:
    """Classes or labels that a head names.

    Args:
        head: it means classes, of which the likeliest is named, or labels, of which all with a probability above one half are.
        rows: with a `label`, or a list of them.
        logits: of each row, [1, K].

    Raises:
        LuthierError: the head knows no such class.
    """
    items = []
    for row, logits_1K in zip(rows, logits, strict=True):
        right = class_numbers(head, row.fields["label"], row.place)
        wide_K = machine.widened(logits_1K[0])
        probability_K = wide_K.sigmoid() if head.means == "labels" else wide_K.softmax(-1)
        named = [int(wide_K.argmax())] if head.means != "labels" else (probability_K > THRESHOLD).nonzero()[:, 0].tolist()
        hot = [[float(number in some) for number in range(len(head.names))] for some in (right, named)]
        there, said = ([head.names[number] for number in sorted(some)] for some in (right, named))
        texts = [", ".join(some) or NOTHING for some in (there, said)]
        numbers = (*hot[0], *hot[1], *probability_K.tolist())
        counts = _counts(there, said, [one for one in there if one in said])
        score = float(set(right) == set(named))
        items.append(Item(row.id, prompt_text(row), texts[0], texts[1], score, numbers=numbers, counts=counts))
    return items


def class_numbers(head: Head, label: object, where: str) -> list[int]:
    """The numbers of a row's class or labels.

    Raises:
        LuthierError: the head knows no such class, or tells one alone where the row has several or none.
    """
    known, several = [*head.names], isinstance(label, list)
    if several and head.means != "labels":
        raise LuthierError(
            f"the row has a list of labels, {label}, and this head tells one class", where=where, fix="use objective: multi_label"
        )
    found = []
    for one in label if isinstance(label, list) else [label]:
        if isinstance(one, str) and one in known:
            found.append(known.index(one))
        elif isinstance(one, int | float) and float(one) in range(len(known)):
            found.append(int(one))
        else:
            raise LuthierError(
                f"the row's label is `{one}`, and the classes are {', '.join(known)}", where=where, fix="fix the row"
            )
    return found


def valued(rows: Sequence[Row], numbers: Sequence[Tensor]) -> list[Item]:
    """Numbers, [1, 1] each, by their distance from the rows'."""
    return [
        Item(row.id, prompt_text(row), f"{row.fields['label']:g}", f"{value:g}", abs(value - float(row.fields["label"])))
        for row, value in zip(rows, (float(one[0, 0]) for one in numbers), strict=True)
    ]


def scored(rows: Sequence[Row], scores: Sequence[Tensor], how: Combination, head: Head) -> list[Item]:
    """Pairs of answers, chosen and rejected in turn, by which of them has the higher score.

    Args:
        rows: the pairs.
        scores: of each answer, [1, K].
        how: how those of members become one.
        head: what they come from.

    Raises:
        LuthierError: the combination compares members whose scores cannot be compared.
    """
    score_NK = torch.cat([*scores])
    how.check(score_NK.shape[-1], head.centered)
    return paired(rows, how.of(score_NK).tolist())


def paired(rows: Sequence[Row], score_N: Sequence[float]) -> list[Item]:
    """Pairs of answers by which of them has the higher of two numbers, of the chosen and the rejected one in turn; a tie is a half."""
    items = []
    for row, chosen, rejected in zip(rows, score_N[::2], score_N[1::2], strict=True):
        answers = [text_of_answer(row.fields[side]) for side in SIDES]
        score = 0.5 if chosen == rejected else float(chosen > rejected)
        items.append(Item(row.id, prompt_text(row), answers[0], answers[chosen < rejected], score))
    return items


def tagged(head: Head, rows: Sequence[Row], encoded: Sequence[Encoded], logits: Sequence[Tensor], *, entities: bool) -> list[Item]:
    """Tags of words, [N, K] for the N words that begin at a token of their own; a word that does not is told `O`, or the first tag.

    Args:
        head: it means tags.
        rows: with `words` and `tags`.
        encoded: the same rows.
        logits: of each.
        entities: compare entities, by name and both ends, instead of tags; else an item counts as many as it has words.

    Raises:
        LuthierError: the head knows no such tag.
    """
    items = []
    for row, ids, logits_NK in zip(rows, encoded, logits, strict=True):
        right = list(row.fields["tags"])
        unknown = next((tag for tag in right if tag not in head.names), None)
        if unknown is not None:
            what = f"a word's tag is `{unknown}`, and the tags are {', '.join(head.names)}"
            raise LuthierError(what, where=row.place, fix="fix the row")
        said = [OUTSIDE if OUTSIDE in head.names else head.names[0]] * len(right)
        begins = [int(word) for word in ids.token_columns[WORD] if word]
        for word, number in zip(begins, logits_NK.argmax(-1).tolist(), strict=True):
            said[word - 1] = head.names[number]
        if entities:
            items.append(_of_entities(row, right, said))
        else:
            hits = [one for one, other in zip(right, said, strict=True) if one == other]
            words, counts = float(len(right)), _counts(right, said, hits)
            items.append(Item(row.id, prompt_text(row), " ".join(right), " ".join(said), len(hits) / words, words, counts=counts))
    return items


def _of_entities(row: Row, right: Sequence[str], said: Sequence[str]) -> Item:
    there, named = entities_of(right), entities_of(said)
    hits = [one for one in there if one in named]
    total = len(there) + len(named)
    numbers = (float(len(hits)), float(len(there)), float(len(named)))
    score = 2 * len(hits) / total if total else 1.0
    counts = _counts(*([name for name, _, _ in some] for some in (there, named, hits)))
    return Item(row.id, prompt_text(row), _listed(row, there), _listed(row, named), score, numbers=numbers, counts=counts)


def _listed(row: Row, found: Sequence[tuple[str, int, int]]) -> str:
    """Entities as a person would read them."""
    text, words = row.fields["text"], row.fields["words"]
    return "; ".join(f"{name}: {text[words[first][0] : words[behind - 1][1]]}" for name, first, behind in found) or NOTHING


def _counts(there: Sequence[str], named: Sequence[str], both: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """How often each class is there, named, and both."""
    return {one: (there.count(one), named.count(one), both.count(one)) for one in dict.fromkeys([*there, *named])}
