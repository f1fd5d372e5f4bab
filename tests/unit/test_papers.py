"""The list of papers ships whole, in order, and without what is not confirmed."""

from __future__ import annotations

import dataclasses
from collections import Counter

from luthier.registry.papers import Paper, papers


def test_every_number_from_0_to_269_stands_once_and_in_order() -> None:
    assert [paper.row for paper in papers()] == list(range(270))


def test_titles_are_whole_and_unique() -> None:
    titles = [paper.title for paper in papers()]
    assert len(set(titles)) == 270
    assert all(title == title.strip() and len(title) > 10 for title in titles)


def test_known_lines_are_read_exactly() -> None:
    listed = papers()
    assert listed[8] == Paper(8, "tune/selective", "technique", "HFT: Half Fine-Tuning for Large Language Models")
    assert listed[92] == Paper(92, "recipes of whole models", "recipe", "Language Models are Few-Shot Learners")
    # The title holds a tab's nearest relatives: braces, a comma, an ampersand.
    assert listed[62].title.startswith("S^{2}FT: Efficient, Scalable")


def test_kinds_and_areas() -> None:
    listed = papers()
    assert Counter(paper.kind for paper in listed) == {"technique": 234, "study": 25, "survey": 6, "recipe": 5}
    assert len({paper.area for paper in listed}) == 24
    assert {paper.area for paper in listed if paper.kind == "study"} == {"studies"}


def test_unconfirmed_numbers_are_not_shown() -> None:
    assert [field.name for field in dataclasses.fields(Paper)] == ["row", "area", "kind", "title"]
    assert "2404.18466" not in repr(papers()[8])
