"""Lists of metrics, for the command line."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from luthier import registry
from luthier.errors import LuthierError, nearest, plain_name
from luthier.evaluate import own
from luthier.evaluate.metrics import METRICS, NEEDED_SHAPES, Metric

WIDTH = 80
"""Columns of a terminal that shows a metric on one line."""
GENERATED, OWN = "generated text", "your own, from generated text"
GROUPS: Mapping[str, str] = {
    "generation": GENERATED,
    "choice": "choices",
    "pair": "choices",
    "likelihood": "likelihood",
    "class": "a head",
    "tags": "a head",
    "value": "a head",
    "score": "a head",
    "vector": "a head",
}
"""By what a metric needs, the group that it is listed in."""
_ROWS: Mapping[str, Mapping[str, Any]] = {
    "generation": {"prompt": "How many legs have three spiders?", "answer": "24"},
    "choice": {"prompt": "The sky is", "choices": ["blue", "green"], "answer": "blue"},
    "pair": {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."},
    "score": {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."},
    "class": {"text": "A fine day.", "label": "praise"},
    "tags": {"text": "Ask Mara Quill", "spans": [{"start": 4, "stop": 14, "label": "person"}]},
    "value": {"text": "A fine day.", "label": 4.5},
    "vector": {"query": "Who minds the mill?", "positive": "Mara Quill minds the mill."},
    "likelihood": {"prompt": "Who minds the mill?", "completion": "Mara Quill."},
}
_OF_JSON = {"prompt": "Who minds the mill? Answer in JSON.", "answer": '{"name": "Mara Quill", "age": 36}'}
_OF_CALLS = {"prompt": "What is the weather in Uldra?", "answer": '{"name": "weather", "arguments": {"city": "Uldra"}}'}
_OF_RIGHT_CALLS = {
    "prompt": "What is the weather in Uldra?",
    "answer": '[{"weather": {"city": ["Uldra", "Uldra Town"], "unit": ["celsius", ""]}}]',
}
_OWN_ROWS: Mapping[str, Mapping[str, Any]] = {
    "tool_call": _OF_CALLS,
    "tool_calls": _OF_RIGHT_CALLS,
    "json_match": _OF_JSON,
    "json_key_accuracy": _OF_JSON,
    "judge": {"prompt": "Explain tides to a child."},
    "type_token_ratio": {"prompt": "Tell a story."},
    "repetition": {"prompt": "Tell a story."},
}
"""Rows of metrics that the others' do not suit."""
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "json_match": {"required": ["name"], "tolerance": 0.5},
    "json_key_accuracy": {"tolerance": 0.5},
    "judge": {
        "endpoint": "http://localhost:8000/v1",
        "model": "NAME",
        "rubric": "The answer is right and clear.",
        "scale": [1, 10],
    },
}


def as_rows() -> list[dict[str, Any]]:
    """Every metric in one line of data, group by group. Files of your own are named and not run."""
    rows = [
        {
            "name": name,
            "group": GROUPS[one.needs],
            "meaning": one.meaning,
            "rows": _needed(one),
            "higher_is_better": one.higher_is_better,
            "options": list(_schema(one.make, name)) if one.make is not None else [],
        }
        for name, one in METRICS.items()
    ]
    order = list(dict.fromkeys(GROUPS.values()))
    mine = [
        {"name": name, "group": OWN, "meaning": f"in {path}", "rows": "a `prompt`", "higher_is_better": None, "options": None}
        for name, path in sorted(registry.own_files(registry.METRIC).items())
    ]
    return [*sorted(rows, key=lambda row: order.index(str(row["group"]))), *mine]


def table(rows: list[dict[str, Any]]) -> Text:
    """Metrics, one a line that a terminal of 80 columns holds, under what they need."""
    lines: list[str] = []
    for group in dict.fromkeys(row["group"] for row in rows):
        names = [row for row in rows if row["group"] == group]
        wide = max(len(row["name"]) for row in names) + 2
        lines += [*([""] if lines else []), group, *(_clipped(f"  {row['name']:<{wide}}{row['meaning']}") for row in names)]
    return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")


def one_metric(name: str) -> tuple[dict[str, Any], Group]:
    """One metric whole: what it is, its options, the rows it needs and an example. A file of your own is run, to read what it says.

    Raises:
        LuthierError: there is no such metric.
    """
    name = next((one for one in (name, plain_name(name)) if one in METRICS), name)
    function = None if name in METRICS else own.of_file(name)
    if name not in METRICS and function is None:
        raise LuthierError(
            f"there is no metric `{name}`", fix=nearest(name, [*METRICS, *own.names()]) or "`luthier metrics` lists them"
        )
    known = METRICS.get(name)
    makes = known.make if known is not None else own.options_of(function) if function is not None else None
    told = described(known.make if known is not None else function)
    options = {key: {**one, "meaning": told.get(key, "")} for key, one in _schema(makes, name).items()}
    facts = {
        "name": name,
        "group": GROUPS[known.needs] if known is not None else OWN,
        "meaning": known.meaning if known is not None else own.meaning_of(function or one_metric),
        "rows": _needed(known),
        "higher_is_better": known.higher_is_better if known is not None else own.is_higher_better(function or one_metric),
        "formula": _formula(known) if known is not None else _before_arguments(inspect.getdoc(function) or ""),
        "options": options,
        "example": example(name, known),
    }
    return facts, _shown(facts)


def example(name: str, known: Metric | None) -> dict[str, Any]:
    """What a recipe says to measure by it, and a row that it can be measured on."""
    given = _OPTIONS.get(name)
    spec: Any = {name: dict(given)} if given else name
    row = _OWN_ROWS.get(name) or _ROWS[known.needs if known is not None else "generation"]
    return {"metric": spec, "row": dict(row)}


def _needed(known: Metric | None) -> str:
    return NEEDED_SHAPES[known.needs] if known is not None and known.compares else "a `prompt`"


def _formula(known: Metric) -> str:
    """How the value is worked out and where that comes from, as the function says that does it."""
    function = known.make or known.score or known.of_set
    return _before_arguments(inspect.getdoc(function) or "" if function is not None else "") or known.meaning


def _before_arguments(text: str) -> str:
    """What a docstring says before it comes to arguments and errors, a paragraph a line."""
    parts = [" ".join(part.split()) for part in re.split(r"\n\n(?:Args|Returns|Raises):", text)[0].split("\n\n")]
    return "\n\n".join(parts)


def described(function: Callable[..., Any] | None) -> dict[str, str]:
    """What the docstring of a function says of its arguments, by name."""
    told = re.search(r"\nArgs:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(function) or "" if function is not None else "", re.DOTALL)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in told[1].splitlines() if told is not None else ():
        begins = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        names = begins[1].split(", ") if begins is not None else names
        found |= {name: begins[2] if begins is not None else f"{found[name]} {line.strip()}" for name in names}
    return found


def _schema(factory: Callable[..., Any] | None, name: str) -> dict[str, Any]:
    found: dict[str, Any] = (
        {} if factory is None else registry.options_model(factory, name).model_json_schema().get("properties", {})
    )
    return found


def _shown(facts: Mapping[str, Any]) -> Group:
    card = Table.grid(padding=(0, 2))
    better = "higher" if facts["higher_is_better"] else "lower"
    for key, text in (("needs", facts["group"]), ("rows", facts["rows"]), ("better is", better)):
        card.add_row(f"[bold]{key}[/bold]", escape(text))
    parts: list[Any] = [Text(facts["name"], style="bold"), Text(facts["formula"]), Text(), card]
    if facts["options"]:
        shown = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for column in ("option", "default", "meaning"):
            shown.add_column(column)
        for key, option in facts["options"].items():
            default = json.dumps(option["default"]) if "default" in option else "required"
            shown.add_row(key, escape(default), escape(option["meaning"]))
        parts += [Text(), shown]
    recipe = {"evaluate": {"held_out": {"rows": "held_out.jsonl", "metric": facts["example"]["metric"]}}}
    row = json.dumps(facts["example"]["row"], ensure_ascii=False)
    said = f"{yaml.safe_dump(recipe, sort_keys=False)}\nwith lines in held_out.jsonl such as\n{row}"
    return Group(*parts, Text(), Text("example", style="bold"), Text(said))


def _clipped(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1].rstrip()}\u2026"
