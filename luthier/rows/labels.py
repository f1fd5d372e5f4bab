"""What a text's labels become when it is encoded: columns of the row and of its tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from luthier.errors import LuthierError
from luthier.rows.ids import canonical
from luthier.rows.spans import OUTSIDE, TAGS, WORD, first_pieces

JOINED = "labelled words begin within a token of the word before: their labels are neither learnt nor found"


class Labels(NamedTuple):
    """The labels of one encoded text."""

    columns: Mapping[str, float | int | str]
    of_tokens: Mapping[str, tuple[float, ...]] = {}
    notes: tuple[str, ...] = ()


def labels_of(fields: Mapping[str, Any], offsets: Sequence[tuple[int, int]] | None, where: str) -> Labels:
    """The labels of a row that holds a text.

    A list of labels becomes JSON; tags of words become one text, a line each, and the first token of each word bears its number.

    Args:
        fields: the row's.
        offsets: which characters each token stands for; None where the tokenizer does not tell.
        where: the row, for errors.

    Raises:
        LuthierError: words have labels, and the tokenizer does not tell where they are.
    """
    if "tags" not in fields:
        label = fields.get("label")
        return Labels({} if label is None else {"label": canonical(label) if isinstance(label, list) else label})
    if offsets is None:
        raise LuthierError(
            "this tokenizer does not tell where its tokens stand in the text, so words are not found again",
            where=where,
            fix="use a model with a fast tokenizer (tokenizer.json)",
        )
    begins = first_pieces(fields["words"], offsets)
    labelled = {number for number, tag in enumerate(fields["tags"], start=1) if tag != OUTSIDE}
    notes = (JOINED,) if labelled - {int(one) for one in begins} else ()
    return Labels({TAGS: "\n".join(fields["tags"])}, {WORD: begins}, notes)


def several(label: str) -> list[Any] | None:
    """The labels that `labels_of` wrote as JSON; None for any other text."""
    if not label.startswith("["):
        return None
    try:
        found = json.loads(label)
    except ValueError:
        return None
    return found if isinstance(found, list) else None
