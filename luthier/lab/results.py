"""A replication's result: one JSON document with the verdict and every number behind it, and its table for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from luthier import disk, machine
from luthier.errors import LuthierError, nearest
from luthier.lab.figure import draw
from luthier.lab.replication import Expectation, Replication, Variant, expectations
from luthier.lab.runner import Choice, Ran
from luthier.lab.verdict import CANNOT_TELL, judge
from luthier.lab.verdicts import colored, difference, in_words, rule_facts
from luthier.results.folder import write_json

Result = dict[str, Any]
Values = Mapping[str, Sequence[float | None]]
"""Of one variant: each measure's numbers, one a seed; None where training broke off."""
_WORDS = {
    "more": ("more than", "by"),
    "less": ("less than", "by"),
    "not_less": ("not less than", "within"),
    "not_more": ("not more than", "within"),
}
_VERSIONS = ("luthier", "torch", "transformers", "python")


def result_of(ran: Ran) -> Result:
    """What came of a replication, as plain data: two results of the same runs are equal. The first expectation is the main one.

    Raises:
        LuthierError: an expectation is about a measure that no variant has.
    """
    replication = ran.replication
    measures = list(dict.fromkeys(name for seeds in ran.numbers.values() for numbers in seeds for name in numbers))
    values = {
        variant: {name: [numbers.get(name) for numbers in seeds] for name in measures} for variant, seeds in ran.numbers.items()
    }
    judged = [_expectation(replication, one, values, measures, ran) for one in expectations(replication)]
    short = _short_of(replication, values[replication.variants[0].name])
    versions = machine.versions()
    return {
        "replication": replication.name,
        "title": replication.title,
        "papers": list(replication.papers),
        "rows": list(replication.rows),
        "says": replication.says,
        "question": replication.question,
        "unit": replication.unit,
        "verdict": CANNOT_TELL if short else judged[0]["verdict"],
        "rule": rule_facts(ran.design),
        "short": short,
        "expectations": judged,
        "measures": measures,
        "variants": [_variant(variant, ran.choices[variant.name], values[variant.name]) for variant in replication.variants],
        "notes": replication.notes,
        "edge": [f"{name}: {choice.note}" for name, choice in ran.choices.items() if choice.tried and choice.note],
        "seeds": list(range(ran.seeds)),
        "model": {"name": ran.model, "fingerprint": ran.fingerprint},
        "versions": {name: versions[name] for name in _VERSIONS},
        "machine": machine_in_words(),
        "runs": ran.stages,
        "seconds": ran.seconds,
    }


def _short_of(replication: Replication, baseline: Values) -> list[str]:
    """Where the baseline did not reach what the replication needs of it, in words."""
    found = []
    for name, least in replication.floor.items():
        known = [one for one in baseline[name] if one is not None]
        mean = fmean(known) if known else 0.0
        if mean < least:
            found.append(f"the baseline reaches {mean:.2g} in `{name}` and needs {least:g}: this experiment can tell nothing")
    return found


def _expectation(
    replication: Replication, one: Expectation, values: Mapping[str, Values], measures: Sequence[str], ran: Ran
) -> Result:
    if measures and one.measure not in measures:
        where = f"replication {replication.name}, expectations"
        raise LuthierError(f"nothing measures `{one.measure}`", where=where, fix=nearest(one.measure, measures))
    # Where training broke off in all variants there are no measures either.
    variant, versus = (values[name].get(one.measure, [None] * ran.seeds) for name in (one.variant, one.versus))
    judged = judge(variant, versus, one.direction, one.margin, ran.design.level)
    return {**one._asdict(), **judged._asdict()}


def _variant(variant: Variant, choice: Choice, values: Values) -> Result:
    return {
        "name": variant.name,
        "meaning": variant.meaning,
        "rate": choice.rate,
        "rate_note": choice.note,
        "tried": [one._asdict() for one in choice.tried],
        "numbers": values,
    }


def machine_in_words() -> str:
    """What computed, without names that point to one machine."""
    facts = machine.describe(torch.device("cpu"), torch.float32)
    return f"{facts['processor']}, {facts['cores']} cores, {int(facts['memory_bytes']) / 2**30:.0f} GiB"


def file_stem(replication: Replication, model: str | None) -> str:
    """What a result's files are called: the replication, and the model where it is not the replication's own."""
    if model is None or model == replication.model:
        return replication.name
    return f"{replication.name}.{re.sub(r'[^A-Za-z0-9_-]+', '-', model).strip('-')}"


def save(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write a result and its figure. Returns both files."""
    document, picture = folder / f"{stem}.json", folder / f"{stem}.svg"
    folder.mkdir(parents=True, exist_ok=True)
    with disk.written(picture) as beside:
        beside.write_text(draw(result), encoding="utf-8")
    write_json(document, result)
    return [document, picture]


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds, of those that have a number."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    return f"{fmean(known):.3g}" + (f" ± {stdev(known):.2g}" if len(known) > 1 else "")


def expected(one: Mapping[str, Any]) -> str:
    """An expectation in words: `held_out: lora not less than full, within 0.05`."""
    words, by = _WORDS[one["direction"]]
    margin = f", {by} {one['margin']:g}" if one["margin"] else ""
    return f"{one['measure']}: {one['variant']} {words} {one['versus']}{margin}"


def shown(result: Result) -> Group:
    """A result for the terminal."""
    numbers = _table("measure", *(escape(variant["name"]) for variant in result["variants"]))
    rates = [("by the recipes" if variant["rate"] is None else f"{variant['rate']:g}") for variant in result["variants"]]
    numbers.add_row("[dim]learning rate[/dim]", *(f"[dim]{rate}[/dim]" for rate in rates))
    for name in result["measures"]:
        numbers.add_row(escape(name), *(spread(variant["numbers"][name]) for variant in result["variants"]))
    main, *beside = result["expectations"]
    seeds = len(result["seeds"])
    pairs = _table("beside it", "difference (interval)", "verdict")
    for one in beside:
        pairs.add_row(escape(one["says"] or expected(one)), difference(one), colored(one["verdict"]))
    remarks = [*result["short"], *result["edge"], *dict.fromkeys(one["note"] for one in result["expectations"] if one["note"])]
    return Group(
        f"[bold]{escape(result['title'])}[/bold]",
        escape(result["says"]),
        "",
        numbers,
        f"[dim]mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}; {escape(result['model']['name'])}[/dim]",
        "",
        *([pairs] if beside else []),
        *(f"[dim]{escape(remark)}[/dim]" for remark in [*remarks, looked(result["rule"])]),
        "",
        f"[bold]{escape(result['replication'])}[/bold]: {colored(result['verdict'])}{escape(_rest(result))}",
        escape(main["says"] or expected(main)),
    )


def _rest(result: Result) -> str:
    """What follows a verdict: the size of the effect."""
    return in_words(result).removeprefix(result["verdict"])


def looked(rule: Mapping[str, Any] | None) -> str:
    """How the lab looked, in words.

    Args:
        rule: what `luthier.lab.verdicts.rule_facts` gives, or None for a result from before the rule.
    """
    if rule is None:
        return "from before the lab's rule"
    looks = " and, where still undecided, ".join(map(str, rule["looks"]))
    words = f"looked at {looks} seeds, {100 * (1 - rule['level']):.1f} % intervals"
    return words if rule["lab"] else f"{words}; not the lab's rule, which is what runs without --seeds"


def _table(*columns: str) -> Table:
    made = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column)
    return made
