"""Writes what the code itself knows into the pages: `python docs/generate.py`; with `--check` it only says which fell behind.

What a page says about recipes comes from the recipe's schema, about techniques from their cards and docstrings, so that
neither can fall behind the code. The text is committed, so that the pages can be read in the repository; techniques of your own
(`LUTHIER_METHODS`) are left out of it.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from generated import api, choose, first_run, foreign, models, replications, rooms, translations
from generated.pages import stale
from generated.tables import cell, code, paper, table, target

from luthier import registry
from luthier.registry import KINDS, kinds_under

DOCS = Path(__file__).parent
EXAMPLE = Path(__file__).parent.parent / "examples" / "toy_technique.py"
RESULTS = Path(__file__).parent.parent / "bench" / "results.json"
PREFERENCES = RESULTS.with_name("preferences.json")
CLASSES = RESULTS.with_name("classify.json")
PREFERRED = RESULTS.with_name("preferred.json")
COSTS = Path(__file__).parent.parent / "bench" / "techniques.json"
OBJECTIVE_COSTS = Path(__file__).parent.parent / "bench" / "objectives.json"
Schema = Mapping[str, Any]


def recipe() -> str:
    """The recipe's keys: one table for the top and one for each section, in the order in which they are mentioned."""
    if find_spec("luthier.recipe") is None:
        return "This version of luthier reads no recipes."
    from luthier.recipe import Recipe

    schema = Recipe.model_json_schema()
    sections = schema.get("$defs", {})
    mentions = json.dumps([schema["properties"], sections])
    pieces = [keys_of(schema)]
    for name in sorted(sections, key=lambda name: mentions.find(f'/{name}"')):
        pieces += [f"## {heading(name)}", sections[name].get("description", ""), keys_of(sections[name])]
    return "\n\n".join(piece for piece in pieces if piece)


def keys_of(schema: Schema) -> str:
    """A table of one object's keys."""
    required = schema.get("required", ())
    rows = (
        (
            code(key),
            type_of(part),
            "*needed*" if key in required else code(yaml_of(part["default"])) if "default" in part else "",
            cell(part.get("description", "")),
        )
        for key, part in schema.get("properties", {}).items()
    )
    return table(("key", "value", "default", "meaning"), rows)


def type_of(part: Schema) -> str:
    """What may stand behind a key, in words; sections are links."""
    if "$ref" in part:
        name = heading(part["$ref"].rsplit("/", 1)[-1])
        return f"[{name}](#{name.lower().replace(' ', '-')})"
    if "allOf" in part:
        return " and ".join(type_of(piece) for piece in part["allOf"])
    for alternatives in ("anyOf", "oneOf"):
        if alternatives in part:
            return " or ".join(type_of(piece) for piece in part[alternatives])
    if "enum" in part:
        return ", ".join(code(yaml_of(value)) for value in part["enum"])
    if "const" in part:
        return code(yaml_of(part["const"]))
    words = {"object": "mapping", "boolean": "true or false", "integer": "whole number", "string": "text"}
    name = str(part.get("type", "anything"))
    if name == "array":
        inner = type_of(part["items"]) if part.get("items") else ""
        return f"list ({inner})" if inner else "list"
    if name == "object" and isinstance(part.get("additionalProperties"), Mapping):
        return f"mapping from names to {type_of(part['additionalProperties'])}"
    if name == "null":
        return code("null")
    return words.get(name, name)


def yaml_of(value: object) -> str:
    """A value as a recipe spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_of, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_of(one)}" for key, one in value.items()) + "}"
    return str(value)


def heading(name: str) -> str:
    """`BatchPolicy` as `Batch policy`."""
    return re.sub(r"(?<=[a-z])([A-Z])", lambda found: " " + found[1].lower(), name).replace("_", " ").capitalize()


def techniques() -> str:
    """Every technique under its kind, in the order of the kinds."""
    pieces = []
    for kind in KINDS:
        found = [registry.find(name, (kind,)) for name in registry.names(kind)]
        if found:
            pieces += [f"## {heading(kind)}", *map(technique, found)]
    return "\n\n".join(pieces) or "This version of luthier has no techniques."


def technique(found: registry.Technique) -> str:
    """One technique: what it does, its options, and the facts of its card that say something."""
    card = found.card
    facts = {
        "Paper": paper(card.paper),
        # Only what decides which parameters train can start away from the base, or be merged.
        "At the first step": cell(card.step0) if found.kind in kinds_under("tune") else "",
        "Merges": cell(card.merges) if found.kind in kinds_under("tune") else "",
        "Becomes simpler": cell(card.reduces_to),
        "Departs from the paper": cell(card.departs),
        "Needs": ", ".join(map(code, sorted(card.needs))),
        "Gives": ", ".join(map(code, sorted(card.gives))),
        "Learning rate unless named": "" if card.learning_rate is None else code(f"{card.learning_rate:g}"),
        "Replication tested by": replications.tested_by(card.replication),
    }
    schema = registry.options_model(found.factory).model_json_schema()
    meaning = described_arguments(found.factory)
    options = {name: {**part, "description": meaning.get(name, "")} for name, part in schema.get("properties", {}).items()}
    pieces = [
        target(found.name),
        f"### `{found.name}`: {cell(card.title)}",
        cell(card.summary),
        keys_of({**schema, "properties": options}) if options else "",
        "\n".join(f"- **{name}:** {text}" for name, text in facts.items() if text),
    ]
    return "\n\n".join(piece for piece in pieces if piece)


def described_arguments(function: Callable[..., Any]) -> dict[str, str]:
    """Option to meaning, from the `Args:` section of a docstring."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^ {4}(\w+): ((?:.*\n?)(?:^ {5,}.*\n?)*)", section[1], re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


def example() -> str:
    """The smallest technique, as it stands in the repository."""
    if not EXAMPLE.exists():
        return "Every file under `luthier/methods/` is an example; the shortest are the best to start from."
    return f"```python\n{EXAMPLE.read_text(encoding='utf-8').rstrip()}\n```"


def bench() -> str:
    """What `make bench` measured last, as it was committed."""
    return _beside(RESULTS, "TRL", "targets/s")


def bench_preferences() -> str:
    """What `python -m bench.preferences` measured last, as it was committed."""
    return _beside(PREFERENCES, "TRL", "targets/s")


def bench_classify() -> str:
    """What `python -m bench.classify` measured last, as it was committed."""
    return _beside(CLASSES, "transformers", "accuracy")


def preferred() -> str:
    """What `python -m bench.preferred` measured last, as it was committed."""
    if not PREFERRED.exists():
        return "Not measured yet."
    facts = json.loads(PREFERRED.read_text(encoding="utf-8"))

    def share(entry: Mapping[str, Any], when: str) -> str:
        low, high = entry[f"{when}_interval"]
        return f"{100 * entry[when]:.1f} % ({100 * low:.0f} to {100 * high:.0f})"

    rows = []
    for one in facts["results"]:
        held, ordinary, prose = (one["metrics"][name] for name in ("held_out", "ordinary", "prose"))
        chosen = [notes.get("chosen log-likelihood") for notes in one["notes"]]
        rows.append(
            (
                code(one["objective"]),
                f"{one['rows']}, {one['steps']} steps",
                share(held, "before"),
                share(held, "after"),
                f"{100 * ordinary['retained']:.0f} %",
                f"{prose['before']:.1f} to {prose['after']:.1f}",
                "" if None in chosen else f"{chosen[0]:.0f} to {chosen[1]:.0f} nats",
            )
        )
    header = (
        "objective",
        "rows",
        "ranked correctly before",
        "after",
        "ordinary answers retained",
        "perplexity of prose",
        "chosen log-likelihood",
    )
    machine = facts["machine"]
    said = f"{facts['model']}, LoRA of rank 8, one epoch. {machine['processor']}, {machine['precision']}."
    return f"{table(header, rows)}\n\n{cell(said)}"


def _beside(file: Path, peer: str, second: str) -> str:
    """Both tools on the same work, one setting a line: tokens a second, their ratio, a second figure and the peak of memory."""
    if not file.exists():
        return "Not measured yet."
    facts = json.loads(file.read_text(encoding="utf-8"))
    figures = {
        "tokens/s": lambda one, side: f"{one[side]['tokens_per_second']:,.0f}",
        "targets/s": lambda one, side: f"{one[side]['supervised_tokens_per_second']:,.0f}",
        "accuracy": lambda one, side: f"{100 * one['ended'][side]['held_out']:.1f} %",
        "peak": lambda one, side: f"{one[side]['peak_bytes'] / 2**30:.2f} GiB",
    }
    rows = []
    for one in facts["results"]:
        first, *others = [[figures[name](one, side) for side in ("luthier", "peer")] for name in ("tokens/s", second, "peak")]
        ratio = f"**{one['ratio']:.2f}** ({one['ratio_spread'][0]:.2f} to {one['ratio_spread'][1]:.2f})"
        rows.append((f"{one['tune']}, {one['precision']}", *first, ratio, *chain(*others)))
    shown = [[f"{tool}, {name}" for tool in ("luthier", peer)] for name in ("tokens/s", second, "peak")]
    first, machine = facts["results"][0], facts["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    setting = (
        f"{first['model']} on {first['rows']}, {first['rows_a_step']} rows a step of at most {first['max_length']} tokens; LoRA of "
        f"rank 8 on all linear layers of the blocks. {machine['processor']}, {machine['cores']} cores. {versions}."
    )
    return f"{table(('trains', *shown[0], 'ratio', *shown[1], *shown[2]), rows)}\n\n{cell(setting)}"


def costs() -> str:
    """What every tuning technique took in `make bench-techniques`, as it was committed."""
    if not COSTS.exists():
        return "No results are stored."
    facts = json.loads(COSTS.read_text(encoding="utf-8"))
    rows = []
    for one in facts["results"]:
        if "error" in one:
            rows.append((code(one["name"]), cell(one["error"]), "", "", "", ""))
            continue
        bare = one["imported_bytes"] + one["model_bytes"] if "model_bytes" in one else None
        rows.append(
            (
                cell(one["name"]) if " " in one["name"] else code(one["name"]),
                f"{one['trained_parameters']:,}" if "trained_parameters" in one else "",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['speed_over_full']:.2f}",
                f"{one['peak_bytes'] / 2**20:,.0f} MiB",
                f"{(one['peak_bytes'] - bare) / 2**20:,.0f} MiB" if bare is not None else "",
            )
        )
    header = ("trains", "parameters", "tokens/s", "speed over full", "peak", "above the model")
    return f"{table(header, rows)}\n\n{cell(circumstances(facts))}"


def circumstances(facts: Mapping[str, Any]) -> str:
    """Model, rows, machine and versions of a bench."""
    setting, machine = facts["setting"], facts["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{setting['model']}, {setting['precision']}, {setting['rows_a_step']} rows of {setting['max_length']} tokens a step. "
        f"{machine['processor']}, {machine['cores']} cores. {versions}."
    )


def objective_costs() -> str:
    """What every objective, token weight and input map added to a step in `make bench-objectives`, as it was committed."""
    if not OBJECTIVE_COSTS.exists():
        return "No results are stored."
    facts = json.loads(OBJECTIVE_COSTS.read_text(encoding="utf-8"))
    rows = []
    for one in facts["results"]:
        if "error" in one:
            rows.append((code(one["name"]), one["kind"].replace("_", " "), cell(one["error"]), "", "", ""))
            continue
        low, high = one["extra_time_range"]
        rows.append(
            (
                code(one["name"]),
                one["kind"].replace("_", " "),
                f"{100 * one['extra_time_median']:+.0f} %",
                f"{100 * low:+.0f} to {100 * high:+.0f} %",
                str(one["pairs"]),
                f"{one['extra_bytes'] / 2**20:+,.0f} MiB",
            )
        )
    header = ("technique", "kind", "extra time a step, median", "of single pairs", "pairs", "extra peak memory")
    return f"{table(header, rows)}\n\n{cell(circumstances(facts))}"


def world() -> str:
    """The skills of the synthetic benchmark, each with the first row that teaches it."""
    from luthier.lab.benchmark import SKILLS, rows

    lines = []
    for name, skill in SKILLS.items():
        (row,) = rows(name, "train", 1)
        taught = "yes" if skill.pretrained else "no"
        lines.append((code(name), cell(skill.meaning), code(skill.metric), taught, row_text(row)))
    splits: dict[str, list[str]] = {}
    for name, skill in SKILLS.items():
        splits.setdefault(skill.splits, []).append(code(name))
    held_out = ", ".join(f"{cell(split)} ({', '.join(names)})" for split, names in splits.items())
    shown = table(("skill", "what it is", "metric", "taught", "an example"), lines)
    return f"{shown}\n\nTraining rows and held-out items differ by construction, never by chance: {held_out}."


def row_text(row: Mapping[str, Any]) -> str:
    """A training row in one cell: its text, or its turns and what is learned."""
    if "text" in row:
        return cell(row["text"])
    prompt = row["prompt"]
    turns = [prompt] if isinstance(prompt, str) else [f"{turn['role']}: {turn['content']}" for turn in prompt]
    return "<br>".join([*map(cell, turns), f"**{cell(row['completion'])}**"])


def metrics() -> str:
    """What an evaluation set can be measured by."""
    from luthier.evaluate.metrics import METRICS
    from luthier.evaluate.sets import NEEDED_SHAPES

    rows = (
        (
            code(name),
            cell(one.meaning),
            NEEDED_SHAPES[one.needs] if one.compares else "a `prompt`",
            "higher" if one.higher_is_better else "lower",
        )
        for name, one in METRICS.items()
    )
    return table(("metric", "what it is", "rows", "better is"), rows)


def workshop() -> str:
    """The cards of the models in the package."""
    from luthier.models.packaged import PACKAGED, folder_of

    cards = [(folder_of(name) / "README.md").read_text(encoding="utf-8") for name in PACKAGED]
    return "\n\n".join(card.replace("# ", "## ", 1) for card in cards)


_ALL = (
    recipe,
    techniques,
    example,
    bench,
    bench_preferences,
    bench_classify,
    preferred,
    costs,
    objective_costs,
    world,
    workshop,
    metrics,
)
_OF_REPLICATIONS = (
    replications.replications,
    replications.replication_rule,
    replications.replication_effects,
    replications.calibration,
    replications.comparisons,
)
_FIRST = (first_run.quickstart_seeds, first_run.busy_machine)
_CHOSEN = (choose.by_purpose, choose.choices, api.public, api.of_kinds, api.further)
WRITERS: dict[str, Callable[[], str]] = {writer.__name__: writer for writer in (*_ALL, *_FIRST, *_OF_REPLICATIONS, *_CHOSEN)} | {
    "rooms": rooms.page,
    "other_tools": foreign.page,
    "models": models.page,
    "translations": translations.page,
}
PICTURES: dict[str, Callable[[], str]] = {rooms.PICTURE: rooms.picture}


def main(words: list[str]) -> None:
    """Write the pages, or with `--check` only say which are not as they would be written."""
    if words not in ([], ["--check"]):
        raise SystemExit("python docs/generate.py [--check]")
    os.environ.pop("LUTHIER_METHODS", None)
    found = stale(DOCS, WRITERS, PICTURES)
    names = ", ".join(str(path.relative_to(DOCS.parent)) for path in found)
    if words and found:
        raise SystemExit(
            f"not as the code has it: {names}. Run `python docs/generate.py` (or `make docs-text`) and commit what it writes."
        )
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
    if found:
        print(f"written: {names}")


if __name__ == "__main__":
    main(sys.argv[1:])
