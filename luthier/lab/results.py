"""A claim's result: one JSON document with the verdict and every number behind it, and its table for the terminal."""

from __future__ import annotations

import json
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
from luthier.lab.claim import Arm, Claim, Expectation
from luthier.lab.figure import draw
from luthier.lab.runner import Choice, Ran
from luthier.lab.verdict import judge, together
from luthier.results.folder import write_json

Result = dict[str, Any]
Values = Mapping[str, Sequence[float | None]]
"""Of one arm: each measure's numbers, one a seed; None where training broke off."""
_COLORS = {"supported": "green", "refuted": "red", "inconclusive": "yellow"}
_WORDS = {
    "more": ("more than", "by"),
    "less": ("less than", "by"),
    "not_less": ("not less than", "within"),
    "not_more": ("not more than", "within"),
}
_VERSIONS = ("luthier", "torch", "transformers", "python")


def result_of(ran: Ran) -> Result:
    """What came of a claim, as plain data: two results of the same runs are equal.

    Raises:
        LuthierError: an expectation is about a measure that no arm has.
    """
    claim = ran.claim
    measures = list(dict.fromkeys(name for seeds in ran.numbers.values() for numbers in seeds for name in numbers))
    values = {arm: {name: [numbers.get(name) for numbers in seeds] for name in measures} for arm, seeds in ran.numbers.items()}
    expectations = [_expectation(claim, one, values, measures, ran.seeds) for one in claim.expects]
    short = _short_of(claim, values[claim.arms[0].name])
    versions = machine.versions()
    return {
        "claim": claim.name,
        "title": claim.title,
        "papers": list(claim.papers),
        "rows": list(claim.rows),
        "says": claim.says,
        "verdict": "inconclusive" if short else together([one["verdict"] for one in expectations]),
        "short": short,
        "expectations": expectations,
        "measures": measures,
        "arms": [_arm(arm, ran.choices[arm.name], values[arm.name]) for arm in claim.arms],
        "notes": claim.notes,
        "edge": [f"{name}: {choice.note}" for name, choice in ran.choices.items() if choice.tried and choice.note],
        "seeds": list(range(ran.seeds)),
        "model": {"name": ran.model, "fingerprint": ran.fingerprint},
        "versions": {name: versions[name] for name in _VERSIONS},
        "machine": machine_in_words(),
        "runs": ran.stages,
        "seconds": ran.seconds,
    }


def _short_of(claim: Claim, baseline: Values) -> list[str]:
    """Where the baseline did not reach what the claim needs of it, in words."""
    found = []
    for name, least in claim.floor.items():
        known = [one for one in baseline[name] if one is not None]
        mean = fmean(known) if known else 0.0
        if mean < least:
            found.append(f"the baseline reaches {mean:.2g} in `{name}` and needs {least:g}: this experiment can tell nothing")
    return found


def _expectation(claim: Claim, one: Expectation, values: Mapping[str, Values], measures: Sequence[str], seeds: int) -> Result:
    if measures and one.measure not in measures:
        where = f"claim {claim.name}, expects"
        raise LuthierError(f"nothing measures `{one.measure}`", where=where, mend=nearest(one.measure, measures))
    # Where training broke off in all arms there are no measures either.
    arm, versus = (values[name].get(one.measure, [None] * seeds) for name in (one.arm, one.versus))
    judged = judge(arm, versus, one.direction, one.margin)
    return {**one._asdict(), **judged._asdict()}


def _arm(arm: Arm, choice: Choice, values: Values) -> Result:
    return {
        "name": arm.name,
        "meaning": arm.meaning,
        "rate": choice.rate,
        "rate_note": choice.note,
        "tried": [one._asdict() for one in choice.tried],
        "numbers": values,
    }


def machine_in_words() -> str:
    """What computed, without names that point to one machine."""
    facts = machine.describe(torch.device("cpu"), torch.float32)
    return f"{facts['processor']}, {facts['cores']} cores, {int(facts['memory_bytes']) / 2**30:.0f} GiB"


def file_stem(claim: Claim, model: str | None) -> str:
    """What a result's files are called: the claim, and the model where it is not the claim's own."""
    if model is None or model == claim.model:
        return claim.name
    return f"{claim.name}.{re.sub(r'[^A-Za-z0-9_-]+', '-', model).strip('-')}"


def save(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write a result and its figure. Returns both files."""
    document, picture = folder / f"{stem}.json", folder / f"{stem}.svg"
    folder.mkdir(parents=True, exist_ok=True)
    with disk.written(picture) as beside:
        beside.write_text(draw(result), encoding="utf-8")
    write_json(document, result)
    return [document, picture]


def load(folder: Path, stem: str) -> Result | None:
    """A result from its folder; None where there is none.

    Raises:
        LuthierError: the file is damaged.
    """
    path = folder / f"{stem}.json"
    if not path.is_file():
        return None
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LuthierError(f"this result cannot be read: {error}", where=str(path), mend=f"luthier lab {stem}") from None
    return result


def number(value: float | None) -> str:
    """A number of a table."""
    return "none" if value is None else f"{value:.3g}"


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds, of those that have a number."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    return f"{fmean(known):.3g}" + (f" ± {stdev(known):.2g}" if len(known) > 1 else "")


def difference(one: Mapping[str, Any]) -> str:
    """An expectation's mean difference with its interval."""
    text = number(one["mean"])
    return text + (f" ({number(one['interval'][0])} to {number(one['interval'][1])})" if one["interval"] else "")


def expected(one: Mapping[str, Any]) -> str:
    """An expectation in words: `held_back: lora not less than full, within 0.05`."""
    words, by = _WORDS[one["direction"]]
    margin = f", {by} {one['margin']:g}" if one["margin"] else ""
    return f"{one['measure']}: {one['arm']} {words} {one['versus']}{margin}"


def colored(verdict: str) -> str:
    """A verdict for the terminal."""
    return f"[{_COLORS[verdict]}]{verdict}[/{_COLORS[verdict]}]"


def shown(result: Result) -> Group:
    """A result for the terminal."""
    numbers = _table("measure", *(escape(arm["name"]) for arm in result["arms"]))
    rates = [("by the recipes" if arm["rate"] is None else f"{arm['rate']:g}") for arm in result["arms"]]
    numbers.add_row("[dim]learning rate[/dim]", *(f"[dim]{rate}[/dim]" for rate in rates))
    for name in result["measures"]:
        numbers.add_row(escape(name), *(spread(arm["numbers"][name]) for arm in result["arms"]))
    pairs = _table("expected", "difference (95 % interval)", "verdict")
    for one in result["expectations"]:
        pairs.add_row(escape(one["says"] or expected(one)), difference(one), colored(one["verdict"]))
    remarks = [*result["short"], *result["edge"], *dict.fromkeys(one["note"] for one in result["expectations"] if one["note"])]
    seeds = len(result["seeds"])
    return Group(
        f"[bold]{escape(result['title'])}[/bold]",
        escape(result["says"]),
        "",
        numbers,
        f"[dim]mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}; {escape(result['model']['name'])}[/dim]",
        "",
        pairs,
        *(f"[dim]{escape(remark)}[/dim]" for remark in remarks),
        "",
        f"[bold]{escape(result['claim'])}[/bold]: {colored(result['verdict'])}",
    )


def _table(*columns: str) -> Table:
    made = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column)
    return made
