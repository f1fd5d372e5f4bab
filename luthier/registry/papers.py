"""The papers luthier is about: one line each in `papers.tsv`, by number."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources
from typing import Literal, cast

PaperKind = Literal["technique", "recipe", "study", "survey"]


@dataclass(frozen=True)
class Paper:
    """One paper of the list. Its arXiv number, where known for certain, stands on the technique's card."""

    row: int
    """The number that cards give as `row`, from 0."""
    area: str
    """Where its subject lies, e.g. `tune/selective`."""
    kind: PaperKind
    """A technique, a recipe of a whole model, a study, or a survey."""
    title: str


def papers() -> list[Paper]:
    """All papers, by number."""
    text = resources.files("luthier.registry").joinpath("papers.tsv").read_text(encoding="utf-8")
    # Titles may hold quotation marks, which mean nothing here.
    lines = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    # The file also has arXiv numbers found by title alone: none is confirmed, so none is read.
    return [Paper(int(line["row"]), line["area"], cast(PaperKind, line["kind"]), line["title"]) for line in lines]
