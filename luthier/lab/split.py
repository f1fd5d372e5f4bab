"""Which items a model may learn from, by a hash of what is asked."""

from __future__ import annotations

import hashlib

from luthier.lab.skill import Prompt, Split
from luthier.rows.answers import words_of

_HELD_BACK, _VALIDATION = 8, 4
"""One prompt in so many is kept from training; of these, one in so many is for validation."""


def side_of(prompt: Prompt) -> Split:
    """Where a prompt, or a text, belongs by the hash of its words."""
    digest = hashlib.sha256(words(prompt).encode()).digest()
    if digest[0] % _HELD_BACK:
        return "train"
    return "held_out" if digest[1] % _VALIDATION else "validation"


def words(prompt: Prompt) -> str:
    """A prompt's words alone: lower case, no punctuation."""
    text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
    return " ".join(words_of(text))
