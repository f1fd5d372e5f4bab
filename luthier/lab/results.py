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
from luthier.lab.claim import Arm, Claim, Expectation, expectations
from luthier.lab.figure import draw
from luthier.lab.runner import Choice, Ran
from luthier.lab.verdict import CANNOT_TELL, judge
from luthier.lab.verdicts import COLORS, difference, in_words, readable, rule_facts
from luthier.results.folder import write_json

Result = dict[str, Any]
Values = Mapping[str, Sequence[float | None]]
"""Of one arm: each measure's numbers, one a seed; None where training broke off."""
_WORDS = {
    "more": ("more than", "by"),
    "less": ("less than", "by"),
    "not_less": ("not less than", "within"),
    "not_more": ("not more than", "within"),
}
_VERSIONS = ("luthier", "torch", "transformers", "python")


def result_of(ran: Ran) -> Result:
    """What came of a claim, as plain data: two results of the same runs are equal. The first expectation is the main one.

    Raises:
        LuthierError: an expectation is about a measure that no arm has.
    """
    claim = ran.claim
    measures = list(dict.fromkeys(name for seeds in ran.numbers.values() for numbers in seeds for name in numbers))
    values = {arm: {name: [numbers.get(name) for numbers in seeds] for name in measures} for arm, seeds in ran.numbers.items()}
    judged = [_expectation(claim, one, values, measures, ran) for one in expectations(claim)]
    short = _short_of(claim, values[claim.arms[0].name])
    versions = machine.versions()
    return {
        "claim": claim.name,
        "title": claim.title,
        "papers": list(claim.papers),
        "rows": list(claim.rows),
        "says": claim.says,
        "question": claim.question,
        "unit": claim.unit,
        "verdict": CANNOT_TELL if short else judged[0]["verdict"],
        "rule": rule_facts(ran.design),
        "short": short,
        "expectations": judged,
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


def _expectation(claim: Claim, one: Expectation, values: Mapping[str, Values], measures: Sequence[str], ran: Ran) -> Result:
    if measures and one.measure not in measures:
        where = f"claim {claim.name}, expectations"
        raise LuthierError(f"nothing measures `{one.measure}`", where=where, mend=nearest(one.measure, measures))
    # Where training broke off in all arms there are no measures either.
    arm, versus = (values[name].get(one.measure, [None] * ran.seeds) for name in (one.arm, one.versus))
    judged = judge(arm, versus, one.direction, one.margin, ran.design.level)
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
    return readable(result)


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds, of those that have a number."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    return f"{fmean(known):.3g}" + (f" ± {stdev(known):.2g}" if len(known) > 1 else "")


def expected(one: Mapping[str, Any]) -> str:
    """An expectation in words: `held_back: lora not less than full, within 0.05`."""
    words, by = _WORDS[one["direction"]]
    margin = f", {by} {one['margin']:g}" if one["margin"] else ""
    return f"{one['measure']}: {one['arm']} {words} {one['versus']}{margin}"


def colored(verdict: str) -> str:
    """A verdict for the terminal."""
    return f"[{COLORS[verdict]}]{verdict}[/{COLORS[verdict]}]"


def shown(result: Result) -> Group:
    """A result for the terminal."""
    numbers = _table("measure", *(escape(arm["name"]) for arm in result["arms"]))
    rates = [("by the recipes" if arm["rate"] is None else f"{arm['rate']:g}") for arm in result["arms"]]
    numbers.add_row("[dim]learning rate[/dim]", *(f"[dim]{rate}[/dim]" for rate in rates))
    for name in result["measures"]:
        numbers.add_row(escape(name), *(spread(arm["numbers"][name]) for arm in result["arms"]))
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
        f"[bold]{escape(result['claim'])}[/bold]: {colored(result['verdict'])}{escape(_rest(result))}",
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
