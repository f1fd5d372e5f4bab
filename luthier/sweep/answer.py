"""What a sweep comes to, in one sentence: what to take, how sure that is, and what to run next. `docs/sweep.md` states the rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from luthier.evaluate.intervals import FALSE_POSITIVES, Interval
from luthier.evaluate.items import Item
from luthier.evaluate.paired import SHARE_THAT_MATTERS, difference_of, matters, recorded
from luthier.lab.verdict import t_interval, t_quantile
from luthier.report.words import measured, number, percent, plural, shown
from luthier.sweep.search import WIDER

Facts = Mapping[str, Any]
Entries = Mapping[str, Sequence[Mapping[str, Any] | None]]
"""By variant, what each of its runs says of the target; None where a run was not finished."""
Apart = Literal["below", "alike", "open"]
"""Whether a variant is clearly below the best one, differs by less than matters, or neither can be said."""

MOST_SEEDS = 16
"""The most seeds that are advised."""
FIRST_SEEDS = 3
"""Advised where one seed, or none, tells nothing of the spread."""


class Beside(NamedTuple):
    """A variant beside the one that reached the best value; differences are those of the other minus the best."""

    name: str
    apart: Apart
    difference: float | None
    interval: Interval | None
    """Of the seeds' differences, by Student's t."""
    p_value: float | None
    """Of the paired test over items, each with its mean score over the seeds; None where items cannot be paired."""
    seeds: int | None
    """How many seeds would tell, by the spread; None where more seeds are not what is missing."""


def answer_of(facts: Facts, entries: Entries) -> dict[str, Any]:
    """The answer of a sweep, as `sweep.json` holds it.

    Args:
        facts: what `sweep.json` holds besides.
        entries: what the runs say of the target.

    Returns:
        `sentence`; `take`, the variant or None; `sure`; `run_again`, the words to add to the command; `notes`, sentences on the search;
        `beside`, every other tuned variant beside the best one.
    """
    target = facts["sets"].get(facts["target"], {})
    form: Callable[[float], str] = percent if target.get("is_share") else number
    sign = 1 if target.get("higher_is_better", True) else -1
    able = [one for one in facts["variants"] if one["tuned"] and measured(one["target"]["mean"])]
    edges = [one["name"] for one in facts["variants"] if one["learning_rate_side"] and one["tuned"]]
    idle = [one["name"] for one in facts["variants"] if not one["tuned"]]
    again = [f"learning_rates={facts['learning_rates'] + 2 * WIDER}"] if edges or idle else []
    best = max(able, key=lambda one: sign * one["target"]["mean"], default=None)
    before = target.get("before")
    beside: list[Beside] = []
    take, sure = None, False
    if best is None:
        said = "No variant to take: " + ("none is tuned" if idle else "no run was finished")
    elif measured(before) and sign * (best["target"]["mean"] - before) <= 0:
        said = (
            f"No variant to take: none made {facts['target']} better than the {form(before)} before training "
            f"(the best, {best['name']}: {form(best['target']['mean'])})"
        )
    else:
        beside = [_beside(best, one, entries, facts, sign) for one in able if one is not best]
        take, words, sure, seeds = _taken(best, able, beside, facts, form)
        sure = sure and not edges and not idle
        said = f"Take {take}{'' if sure else ' for now'}: {words}"
        again = [*([f"seeds={seeds}"] if seeds else []), *again]
    said += _edge_words(edges) + _idle_words(idle, facts)
    return {
        "sentence": f"{said}{': run again with ' + ' '.join(again) if again else ''}.",
        "take": take,
        "sure": sure,
        "run_again": again,
        "notes": _added_notes(facts),
        "beside": [{**one._asdict(), "best": best["name"]} for one in beside] if best else [],
    }


def _taken(
    best: Facts, able: Sequence[Facts], beside: Sequence[Beside], facts: Facts, form: Callable[[float], str]
) -> tuple[str, str, bool, int | None]:
    """The variant to take, why, whether that is clear, and how many seeds would make it so."""
    apart = {one.name: one for one in beside}
    contenders = [one for one in able if one is best or apart[one["name"]].apart != "below"]
    take = min(contenders, key=lambda one: (_lost(one), one is not best))
    target, seeds = facts["target"], len(facts["seeds"])
    reached = f"{target} {form(take['target']['mean'])}"
    lost = shown(take["forgetting"]["mean"], percent)
    kept = f", {lost} forgotten" if measured(take["forgetting"]["mean"]) else ""
    rivals = [one for one in contenders if one is not take]
    if not rivals:
        return take["name"], reached + (", clearly the best" if len(able) > 1 else ", the only one") + kept, True, None
    if take is best:
        words = f"{reached}, the best{kept}"
        doubtful = {one["name"]: apart[one["name"]].seeds for one in rivals if apart[one["name"]].apart == "open"}
    else:
        alike = apart[take["name"]].apart == "alike"
        value = f"{form(take['target']['mean'])}, {best['name']} {form(best['target']['mean'])}"
        how = "as much learned as with" if alike else "not clearly less learned than with"
        words = (
            f"{how} {best['name']} ({target} {value}), and {lost} forgotten instead of {shown(best['forgetting']['mean'], percent)}"
        )
        doubtful = {one["name"]: need for one in rivals if (need := _forgets_more(one, take)) is not None}
        if not alike:
            doubtful.setdefault(best["name"], apart[take["name"]].seeds)
    if not doubtful:
        return take["name"], words, True, None
    words += f"; not told apart from {_listed(list(doubtful))} with {plural(seeds, 'seed')}"
    needed = max((one for one in doubtful.values() if one is not None), default=0)
    if needed > seeds:
        return take["name"], words, False, needed
    hope = f"more items of {target} would tell" if None in doubtful.values() else "more seeds would hardly tell"
    return take["name"], f"{words}, and {hope}", False, None


def _lost(variant: Facts) -> float:
    mean = variant["forgetting"]["mean"]
    return mean if measured(mean) else math.inf


def _forgets_more(rival: Facts, take: Facts) -> int | None:
    """None where a variant clearly forgets more than another, or as much but for less than matters; else how many seeds would tell."""
    differences = _by_seed(rival["forgetting"]["values"], take["forgetting"]["values"])
    interval = t_interval(differences)
    if interval is not None and (interval[0] > 0 or -SHARE_THAT_MATTERS < interval[0] <= interval[1] < SHARE_THAT_MATTERS):
        return None
    return seeds_to_tell(differences, SHARE_THAT_MATTERS)


def _beside(best: Facts, other: Facts, entries: Entries, facts: Facts, sign: int) -> Beside:
    """Both tests must say that a variant is below: seed by seed for other runs, item by item for other items."""
    target = facts["sets"][facts["target"]]
    differences = _by_seed(other["target"]["values"], best["target"]["values"])
    mean, interval = (fmean(differences) if differences else None), t_interval(differences)
    margin = matters(target["metric"], best["target"]["mean"])
    p_value = _over_items(entries[best["name"]], entries[other["name"]])
    lower = interval is not None and max(sign * interval[0], sign * interval[1]) < 0
    apart: Apart = "open"
    if interval is not None and -margin < interval[0] <= interval[1] < margin:
        apart = "alike"
    elif lower and (p_value is None or p_value < FALSE_POSITIVES):
        apart = "below"
    return Beside(other["name"], apart, mean, interval, p_value, None if lower else seeds_to_tell(differences, margin))


def _by_seed(one: Sequence[float | None], other: Sequence[float | None]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True) if measured(a) and measured(b)]


def _over_items(best: Sequence[Mapping[str, Any] | None], other: Sequence[Mapping[str, Any] | None]) -> float | None:
    """The paired test on each item's mean score over the seeds that both have; None where items differ or are not kept."""
    pairs = [(one, another) for one, another in zip(best, other, strict=True) if one and another]
    sides = [[recorded(entry) for entry in side] for side in zip(*pairs, strict=True)]
    known = [[items for items in side if items is not None] for side in sides]
    if not pairs or any(len(side) < len(pairs) for side in known):
        return None
    flat = [items for side in known for items in side]
    if len({tuple((item.id, item.prompt, str(item.expected)) for item in items) for items in flat}) > 1 or flat[0][0].numbers:
        return None
    means = [[_mean_item(items) for items in zip(*side, strict=True)] for side in known]
    return difference_of(
        str(pairs[0][0]["metric"]), *means, higher_is_better=bool(pairs[0][0].get("higher_is_better", True))
    ).p_value


def _mean_item(items: Sequence[Item]) -> Item:
    return items[0]._replace(score=fmean(item.score for item in items))


def seeds_to_tell(differences: Sequence[float], margin: float) -> int:
    """How many seeds would tell two variants apart, or show that they differ by less than matters, if the spread stays as it is.

    Args:
        differences: of each seed.
        margin: the smallest difference that matters.

    Returns:
        At most `MOST_SEEDS`; `FIRST_SEEDS` where fewer than two seeds tell nothing of the spread.
    """
    if len(differences) < 2:
        return FIRST_SEEDS
    mean, spread = abs(fmean(differences)), stdev(differences)
    need = max(mean, margin - mean)
    enough = (n for n in range(2, MOST_SEEDS) if t_quantile(n - 1) * spread / math.sqrt(n) < need)
    return next(enough, MOST_SEEDS)


def _edge_words(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"; {_listed(names)}: the best learning rate lies at an end of the grid"


def _idle_words(names: Sequence[str], facts: Facts) -> str:
    if not names:
        return ""
    return f"; {_listed(names)}: not tuned, no learning rate made {facts['chosen_by']} better"


def _added_notes(facts: Facts) -> list[str]:
    added = [(one["name"], one["learning_rates_added"]) for one in facts["variants"] if one["learning_rates_added"]]
    if not added:
        return []
    told = "; ".join(f"{name} at {' and '.join(f'{rate:g}' for rate in rates)}" for name, rates in added)
    return [f"The best learning rate lay at an end of the grid, so {WIDER} more were tried beyond it: {told}."]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
