"""The pages made from the code: the recipe's keys, the techniques, their options."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Literal

import pydantic
import pytest

from luthier import registry


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("docs_generate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BatchTokens(pydantic.BaseModel):
    """How rows become batches."""

    tokens: int = pydantic.Field(default=1024, description="Real tokens | step.")


class Small(pydantic.BaseModel):
    model: str
    keep: bool = True
    order: Literal["random", "length"] = "random"
    rate: float | None = None
    batch: BatchTokens = BatchTokens()
    paths: list[str] = []
    sets: dict[str, BatchTokens] = {}


def test_keys_of_a_schema(generate: ModuleType) -> None:
    assert generate.keys_of(Small.model_json_schema()).splitlines() == [
        "| key | value | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `model` | text | *needed* |  |",
        "| `keep` | true or false | `true` |  |",
        "| `order` | `random`, `length` | `random` |  |",
        "| `rate` | number or `null` | `null` |  |",
        "| `batch` | [Batch tokens](#batch-tokens) | `{tokens: 1024}` |  |",
        "| `paths` | list (text) | `[]` |  |",
        "| `sets` | mapping from names to [Batch tokens](#batch-tokens) | `{}` |  |",
    ]


def test_a_border_inside_a_cell_stays_text(generate: ModuleType) -> None:
    table = generate.keys_of(BatchTokens.model_json_schema())
    assert table.splitlines()[2] == "| `tokens` | whole number | `1024` | Real tokens \\| step. |"


def test_every_link_to_a_section_has_its_section(generate: ModuleType) -> None:
    page = generate.recipe()
    linked = set(re.findall(r"\]\(#([a-z-]+)\)", page))
    headings = {line[3:].lower().replace(" ", "-") for line in page.splitlines() if line.startswith("## ")}
    assert linked and linked <= headings


def test_text_of_cards_is_escaped(generate: ModuleType) -> None:
    assert generate.cell("a <b>\n  c & d") == "a &lt;b&gt; c &amp; d"


def test_arguments_are_read_from_a_docstring(generate: ModuleType) -> None:
    def documented() -> None:
        """One line.

        Args:
            share: how much trains;
                all of it at 1.
            level: where.

        Returns:
            nothing: at all.
        """

    assert generate.described_arguments(documented) == {"share": "how much trains; all of it at 1.", "level": "where."}
    assert generate.described_arguments(lambda: None) == {}


def test_only_arxiv_numbers_become_links(generate: ModuleType) -> None:
    assert generate.paper("arXiv:2404.18466") == "[arXiv:2404.18466](https://arxiv.org/abs/2404.18466)"
    assert generate.paper("Journal of Examples 3") == "Journal of Examples 3"


def test_every_technique_stands_on_its_page(generate: ModuleType) -> None:
    page = generate.on_page_markdown("before\n\n<!-- generated: techniques -->\n\nafter")
    assert page.startswith("before\n\n## ") and page.endswith("\n\nafter")
    headings = [line.split("`")[1] for line in page.splitlines() if line.startswith("### ")]
    assert headings == [card.name for card in registry.cards()]


def test_an_unknown_marker_is_an_error(generate: ModuleType) -> None:
    with pytest.raises(KeyError):
        generate.on_page_markdown("<!-- generated: nothing -->")
