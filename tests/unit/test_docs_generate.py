"""The pages made from the code: the recipe's keys, the techniques, their options."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Literal

import pydantic
import pytest
import yaml

import luthier
from luthier import registry

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generate: ModuleType) -> ModuleType:
    return importlib.import_module("generated.pages")


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


def test_every_page_is_as_the_code_has_it(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUTHIER_METHODS", raising=False)
    found = generate.stale(generate.DOCS, generate.WRITERS, generate.PICTURES)
    assert not found, f"{', '.join(map(str, found))}: run `python docs/generate.py` and commit what it writes"


def test_every_technique_stands_on_its_pages_once() -> None:
    page = (DOCS / "technique-reference.md").read_text(encoding="utf-8")
    headings = [line.split("`")[1] for line in page.splitlines() if line.startswith("### ")]
    assert headings == [card.name for card in registry.cards()]
    listed = re.findall(
        r"^\| \[`(\w+)`\]\(technique-reference.md#(\w+)\)", (DOCS / "techniques.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [name for name, _ in listed] == [name for _, name in listed] and sorted(name for name, _ in listed) == sorted(headings)
    assert all(f'<a id="{name}"></a>\n\n### `{name}`' in page for name in headings)


def test_what_the_first_three_cost_is_what_was_measured(generate: ModuleType) -> None:
    one = {
        "trained_parameters": 25,
        "peak_bytes": 7 * 2**20,
        "imported_bytes": 2**20,
        "model_bytes": 2 * 2**20,
        "speed_over_full": 0.5,
    }
    assert generate.choose.above(one) == 4.0 and generate.choose.with_frozen(one) == "4 MiB, 2.00"
    assert generate.choose.share({"trained_parameters": 2_500_000}, {"trained_parameters": 10_000_000}) == "2.5 million (25.0 %)"


def test_learned_and_retained_are_means_over_seeds_of_the_variants_meant(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {"lora, rank 8": ([0.2, 0.4], [1.0, 0.5]), "full": ([0.5], [0.25]), "full, half the rate": ([0.9], [0.9])}
    variants = [{"name": name, "numbers": {"new": new, "old": old, "other": [0]}} for name, (new, old) in numbers.items()]
    (tmp_path / "toy.json").write_text(json.dumps({"measures": ["new", "old", "other"], "variants": variants}), encoding="utf-8")
    monkeypatch.setattr(generate.choose, "REPLICATIONS", tmp_path)
    assert generate.choose.learned("toy") == ["30 %, 75 %", "50 %, 25 %", ""]


SOURCE = '''
"""A module."""

LIMIT = 3
"""The most."""


def call_everything(path: str, *rest: int, mode: Literal["a", "b"] = "a", say: Say = lambda text: None, **more: Any) -> int:
    """Do it.

    First that,
    then this.

    Args:
        path: where,
            exactly.
        **more: the rest.

    Returns:
        A number: the first.
    """


class Value(NamedTuple):
    """A value."""

    width: int = 4
    """In pixels."""
    _hidden: int = 0

    def grow(self, *, by: int) -> Value:
        """Wider."""

    def _quiet(self) -> None: ...
'''


def test_names_are_read_from_their_source(generate: ModuleType) -> None:
    tree = ast.parse(SOURCE)
    limit, call, value = (
        "\n\n".join(generate.api.section(generate.api.Found(node, tree.body, SOURCE))) for node in (tree.body[1], *tree.body[3:])
    )
    assert limit == "```python\nLIMIT = 3\n```\n\nThe most."
    assert call == (
        '```python\ncall_everything(\n    path: str,\n    *rest: int,\n    mode: Literal["a", "b"] = "a",\n'
        "    say: Say = ...,\n    **more: Any,\n"
        ") -> int\n```\n\nDo it.\n\nFirst that,\nthen this.\n\n**Arguments**\n\n- `path`: where,\n  exactly.\n- `**more`: the rest.\n\n"
        "**Returns**\n\nA number: the first."
    )
    assert value == (
        "```python\nclass Value(NamedTuple)\n```\n\nA value.\n\n- `width: int = 4`: In pixels.\n\n"
        "```python\ngrow(*, by: int) -> Value\n```\n\nWider."
    )


def test_every_public_name_stands_on_the_page_of_python() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert all(f"### `luthier.{name}`" in page for name in luthier.__all__ if not name.startswith("__"))
    assert all(f"#### `luthier.kinds.{name}`" in page and f'<a id="kinds-{name}">' in page for name in luthier.kinds.__all__)


PAGES = [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"]


def test_recipes_on_pages_can_be_read_and_files_they_name_are_there() -> None:
    """Blocks with a model and rows are recipes; Python must compile; `recipes/...` and `examples/...` must exist."""
    found = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            data = yaml.safe_load(block)
            if isinstance(data, dict) and {"model", "rows"} <= set(data):
                assert luthier.Recipe.model_validate(data), page
                found += 1
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            assert page.name in ("api.md", "architecture.md") or compile(block, str(page), "exec")
        named = re.findall(r"(?:recipes|examples)/[\w/.-]+\.(?:yaml|py|jsonl)", text)
        assert all((DOCS.parent / name).is_file() for name in named), (page, named)
    assert found >= 8


WRITERS = {"one": lambda: "first\n\nline", "two": lambda: "second"}
FULL = "before\n\n<!-- generated: one -->\n\nfirst\n\nline\n\n<!-- end of generated -->\n\nafter\n"


def test_text_stands_between_its_markers(pages: ModuleType) -> None:
    assert pages.fill("before\n\n<!-- generated: one -->\n<!-- end of generated -->\n\nafter\n", WRITERS) == FULL
    assert pages.fill(FULL, WRITERS) == FULL and pages.fill("`<!-- generated: one -->`", WRITERS) == "`<!-- generated: one -->`"
    conflict = FULL.replace("first", "<<<<<<< HEAD\nold\n=======\nother\n>>>>>>> branch")
    assert pages.fill(conflict, WRITERS) == FULL


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- generated: three -->\n<!-- end of generated -->", "page.md, line 1: nothing writes `three`. There are: one, two"),
        ("\n<!-- generated: one -->\n", "page.md, line 2: the generated text has no end"),
        (
            "<!-- generated: one -->\n<!-- generated: two -->\n<!-- end of generated -->",
            "line 2: the text that begins in line 1 has no",
        ),
        ("<!-- end of generated -->", "page.md, line 1: .* ends nothing"),
    ],
)
def test_markers_that_do_not_match_are_named(pages: ModuleType, text: str, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        pages.fill(text, WRITERS, "page.md")


def test_what_is_stale_is_found_and_written(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text(FULL, encoding="utf-8")
    (docs / "b.md").write_text(FULL.replace("first", "old"), encoding="utf-8")
    monkeypatch.setattr(generate, "DOCS", docs)
    monkeypatch.setattr(generate, "WRITERS", WRITERS)
    monkeypatch.setattr(generate, "PICTURES", {"c.svg": lambda: "<svg/>"})
    with pytest.raises(SystemExit, match=r"not as the code has it: docs/b.md, docs/c.svg. Run `python docs/generate.py`"):
        generate.main(["--check"])
    assert not (docs / "c.svg").exists() and "old" in (docs / "b.md").read_text(encoding="utf-8")
    generate.main([])
    assert (docs / "b.md").read_text(encoding="utf-8") == FULL and (docs / "c.svg").read_text(encoding="utf-8") == "<svg/>\n"
    generate.main(["--check"])
