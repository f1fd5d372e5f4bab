"""Keys of other tools and earlier names: the table says the truth of the recipe, errors name what to write, and the docs show the table."""

from __future__ import annotations

import importlib
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import luthier
from luthier import registry
from luthier.cli import COMMANDS, ROWS_COMMANDS, STORE_COMMANDS, app
from luthier.errors import LuthierError
from luthier.recipe import SourceRecipe, make_recipe, read_recipe, reference
from luthier.recipe.parts import choose_parts
from luthier.registry.foreign import NONE, find, foreign, hint, renamed

GLOSSARY = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8")
BASE = {"model": "tiny:llama", "rows": {"train": "rows.jsonl"}}


def table_of(heading: str) -> list[tuple[str, ...]]:
    """The lines of the glossary's table under a heading."""
    section = GLOSSARY.partition(f"### {heading}\n")[2].partition("\n#")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    return [tuple(cell.strip("` |") for cell in (*line, "")[:3]) for line in lines]


def recipe_keys() -> set[str]:
    keys = {key for key, _, _ in reference()}
    sections = {".".join(key.split(".")[:size]) for key in keys for size in range(1, key.count(".") + 1)}
    return keys | sections


def technique_options(name: str) -> set[str]:
    return set(registry.options_model(registry.find(name).factory, name).model_fields)


def check_techniques(spec: Any) -> None:
    """What stands under a key for techniques names techniques and options that there are."""
    for one in spec if isinstance(spec, list) else [spec]:
        for name, options in (one if isinstance(one, dict) else {one: {}}).items():
            assert set(options or {}) <= technique_options(name), (name, options)


def check_here(here: str) -> None:
    """All that a cell names is there: keys of recipes, options of techniques, commands."""
    owners = re.findall(r"((?:`[^`]+`(?:, | or | and )?)+) of `(\w+)`", here)
    owned = {span for spans, _ in owners for span in re.findall(r"`([^`]+)`", spans)}
    for spans, name in owners:
        for span in re.findall(r"`([^`]+)`", spans):
            assert span.partition(":")[0] in technique_options(name), (span, name)
    for span in set(re.findall(r"`([^`]+)`", here)) - owned - {name for _, name in owners}:
        key, _, value = span.partition(": ")
        words = span.split()
        if words[0] == "luthier":
            commands = {"rows": ROWS_COMMANDS, "store": STORE_COMMANDS}
            assert words[1] in COMMANDS or (words[1] in commands and words[2] in {**commands[words[1]], "store": None}), span
        elif span.startswith("hub:"):
            pass
        elif f"`{span}` of a source" in here:
            assert span in SourceRecipe.model_fields
        elif span == "learn: false":
            pass
        elif value and key in registry.KEYS:
            check_techniques(yaml.safe_load(value))
        elif key not in recipe_keys():
            assert registry.find(key), span


def test_what_the_table_names_is_there() -> None:
    for line in foreign():
        if line.here != NONE:
            assert "`" in line.here
            check_here(line.here)
        assert all(find(key) == line for key in line.keys)
    assert find("lora_target: all") is None and find("lora_target") is not None


def test_what_is_not_there_would_be_seen() -> None:
    for here in (
        "`train.epoch`",
        "`rang` of `lora`",
        "`tune: lorra`",
        "`luthier trian`",
        "`tune: {lora: {rang: 1}}`",
        "`a` of a source",
    ):
        with pytest.raises((AssertionError, LuthierError)):
            check_here(here)


def test_the_table_is_large_and_no_key_stands_twice() -> None:
    keys = [key for line in foreign() for key in line.keys]
    assert len(keys) >= 300 and len(set(keys)) == len(keys)
    assert {line.theirs for line in foreign()}.isdisjoint({""}) and all(line.part and line.keys for line in foreign())


def test_errors_of_every_key_are_short() -> None:
    """What was wrong in a line of 80 columns, what to do in two; the place is the user's own."""
    for key in (key for line in foreign() for key in line.keys):
        fix = hint(key, "train", ["learning_rate"])
        assert fix and len(f"there is no key `{key}` here") <= 80
        assert len(textwrap.wrap(f"  fix:   {fix}", 80)) <= 2, fix
        assert "](" not in fix


def told(data: Mapping[str, Any]) -> LuthierError:
    with pytest.raises(LuthierError) as caught:
        choose_parts(make_recipe({**BASE, **data}, where="mine.yaml"))
    return caught.value


@pytest.mark.parametrize(
    ("data", "where", "fix"),
    [
        ({"lr": 1e-4}, "mine.yaml: lr", "write `train.learning_rate`. Default: what the technique advises"),
        ({"train": {"lr": 1e-4}}, "mine.yaml: train.lr", "write `learning_rate`. Default:"),
        ({"train": {"LR": 1e-4}}, "mine.yaml: train.LR", "write `learning_rate`."),
        ({"train": {"gradient-accumulation-steps": 8}}, "train.gradient-accumulation-steps", "leave it out. `train.batch_rows` are"),
        ({"train": {"optim": "adamw_8bit"}}, "train.optim", "write `optimizer`. A list;"),
        ({"train": {"seed": 1}}, "train.seed", "write `seed` at the top of the recipe. Default 0,"),
        ({"train": {"tf32": True}}, "train.tf32", "leave it out: luthier has nothing like it"),
        ({"rows": {"train": "x", "packing": True}}, "rows.packing", "write `train.packing`. On by itself"),
        ({"rows": {"dataset_name": "x"}}, "rows.dataset_name", "write `train`. A file, a folder"),
        ({"rows": {"train": {"path": "x", "type": "alpaca"}}}, "rows.train", "write the source itself: a file, a folder"),
        ({"rows": {"train": [{"rows": "x", "ds_type": "json"}]}}, "rows.train", "write `rows.train`. The files themselves"),
        ({"rows": {"train": ["y", {"rows": "x", "fraction": 1}]}}, "rows.train", "write `weight` of a source."),
        ({"tune": {"lora": {"r": 8, "lora_alpha": 16}}}, "tune: lora", "write `rank`. Default 8, as in PEFT;"),
        ({"tune": ["full", {"lora": {"lora_alpha": 16}}]}, "tune[1]: lora", "write `alpha`."),
        ({"tune": {"lora": {"learning_rate": 1}}}, "tune: lora", "write `train.learning_rate`."),
        ({"tune": {"adalora": {"deltaT": 1}}}, "tune: adalora", "write `every`"),
        # AdaLoRA's `warmup` is another one.
        ({"tune": {"adalora": {"warmup_steps": 1}}}, "tune: adalora", "write `train.warmup`."),
        ({"objective": {"dpo": {"sync_ref_model": True}}}, "objective: dpo", "write `following_reference`."),
        ({"evaluate": {"mine": {"rows": "x", "eval_max_new_tokens": 3}}}, "evaluate.mine.eval_max", "write `max_new_tokens`. Default 48."),
        # Earlier names.
        ({"step": ["adamw"]}, "mine.yaml: step", "write `optimizer`, which is its name now"),
        ({"rows": {"train": "x", "max_tokens": 9}}, "rows.max_tokens", "write `max_length`, which is its name now"),
        ({"evaluate": {"mine": {"rows": "x", "side": "kept"}}}, "evaluate.mine.side", "write `role`, which is its name now"),
        ({"tune": {"lora": {"roles": ["linear"]}}}, "tune: lora", "write `target_modules`, which is its name now"),
        ({"objective": {"kto": {"liked": 2}}}, "objective: kto", "write `desirable_weight`, which is its name now"),
        # Keys of luthier's own, where they do not stand.
        ({"epochs": 3}, "mine.yaml: epochs", "write `train.epochs`"),
        ({"train": {"model": "x"}}, "train.model", "write `model` at the top of the recipe"),
        # What stands in several places is none of these: `rows` is a section, and a key of evaluation sets.
        ({"train": {"rows": "x"}}, "train.rows", "known: batch_rows, "),
        ({"train": {"epohcs": 1}}, "train.epohcs", "did you mean `epochs`?"),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_names_the_key_to_write(data: Mapping[str, Any], where: str, fix: str) -> None:
    error = told(data)
    assert where in error.where and error.fix.startswith(fix), error
    assert "no key" in error.what or "no option" in error.what


def test_a_foreign_key_explains_why_its_counterpart_is_missing() -> None:
    """Else the first error would be that `model` is missing, which the user has named."""
    with pytest.raises(LuthierError) as caught:
        make_recipe({"base_model": "x", "unheard_of": 1, "rows": {"train": "x"}})
    assert caught.value.what == "there is no key `base_model` here" and caught.value.fix.startswith("write `model`.")
    with pytest.raises(LuthierError, match="the key `model` is missing"):
        make_recipe({"modell": "x", "rows": {"train": "x"}})


def test_a_whole_file_of_another_tool_is_known_by_its_keys() -> None:
    keys = {"base_model": "x", "sequence_len": 8, "num_epochs": 1, "adapter": "lora"}
    assert told(keys).fix.endswith("All of it at once: `luthier convert FILE`")
    assert "convert" not in told(dict(list(keys.items())[:3])).fix


def test_files_python_and_the_command_line_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: tiny:llama\nrows: {train: rows.jsonl}\n")
    with pytest.raises(LuthierError, match=r"train\.lr(.|\n)*write `learning_rate`"):
        read_recipe(path, ["train.lr=1e-4"])
    with pytest.raises(LuthierError, match=r"write `train\.learning_rate`"):
        luthier.train(model="tiny:llama", rows={"train": "rows.jsonl"}, lr=1e-4)
    for command in ("train", "plan"):
        for word, fix in (("lr=1e-4", "train.learning_rate"), ("tune.lora.r=8", "`rank`"), ("train.lora_r=8", "`rank` of `lora`")):
            shown = CliRunner().invoke(app, [command, str(path), word, "--json"])
            assert shown.exit_code == 2 and fix in json.loads(shown.stdout)["fix"], shown.output
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    for words in (["rows", "look", rows, "max_seq_length=9"], ["rows", "store", "likelihood", rows, "max_seq_length=9"]):
        shown = CliRunner().invoke(app, [str(word) for word in words] + ["--model", "tiny:llama", "--json"])
        assert shown.exit_code == 2 and "max_length" in json.loads(shown.stdout)["fix"], shown.output


def test_rows_whose_keys_are_their_own_are_rows() -> None:
    """A file name among a row's columns makes no source of it."""
    made = make_recipe({**BASE, "rows": {"train": [{"path": "a.py", "text": "x"}, {"rows": "y", "text": "x"}]}})
    assert len(made.rows.train) == 2


@pytest.mark.parametrize(
    ("key", "section", "known", "fix"),
    [
        ("step", "", ["optimizer"], "write `optimizer`, which is its name now"),
        ("shape", "rows", ["format"], "write `format`, which is its name now"),
        ("side", "evaluate.NAME", ["role"], "write `role`, which is its name now"),
        ("smoothing", "dpo", ["beta", "label_smoothing"], "write `label_smoothing`, which is its name now"),
        ("roles", "lora", ["rank", "target_modules"], "write `target_modules`, which is its name now"),
        ("head_rate", "classify", ["head_learning_rate_factor"], "write `head_learning_rate_factor`, which is its name now"),
        # An old name of one place is none of another.
        ("smoothing", "simpo", ["beta"], ""),
        ("shape", "train", ["epochs"], ""),
        ("head_rate", "lora", ["rank"], ""),
        ("step", "train", ["steps"], ""),
    ],
)
def test_an_old_name_leads_to_the_new_one(key: str, section: str, known: list[str], fix: str) -> None:
    assert hint(key, section, known) == fix


def test_the_glossary_and_the_table_have_the_same_old_names() -> None:
    rows = [*table_of("Keys of a recipe"), *table_of("Options of techniques")]
    assert len(rows) >= 35
    assert [(old, new) for old, new, _ in rows] == [(line.old, line.new) for line in renamed()]


@pytest.fixture
def page() -> Iterator[str]:
    sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
    yield importlib.import_module("generated.foreign").page()


def test_the_page_has_every_line_of_the_table(page: str) -> None:
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    assert lines == [f"| {one.theirs} | {one.here} | {one.differs} |" for one in foreign()]
    assert len(re.findall("^### ", page, re.MULTILINE)) == len({one.part for one in foreign()})
    assert "<!-- generated: other_tools -->" in GLOSSARY
