"""Before against after on the same items, as `run.json` holds it; `luthier.evaluate.paired` has the rule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError, Say, silent
from luthier.evaluate.items import Item, by_class, is_binary
from luthier.evaluate.paired import NOT_MEASURED, difference_of, matters, verdict_of
from luthier.evaluate.sets import EvalSet, SetResult, measure
from luthier.evaluate.told import entry_of, note_of, on_common
from luthier.tune import Tune

FEWEST_AGAIN = 8
"""Of generated answers, at least so many are asked for again, to see whether answers repeat."""


def compare(before: SetResult, after: SetResult | None, *, noise: float | None = None) -> dict[str, Any]:
    """What became of one set, as the entry of `metrics` in `run.json`.

    Args:
        before: of the base.
        after: of the tuned model; None where it was not measured.
        noise: what repeating the measurement of the base changed, from `base_noise`; None where that was not measured.

    Returns:
        `metric`, `role`, `n`, `higher_is_better`; `before`, `after` and `difference` with their intervals; `p_value`;
        `matters`, the smallest change that does; `verdict`, which is `better`, `worse`, `no change`, `unclear` or `not measured`, and
        `note` where the reason needs words;
        `retained`, the share of items right before that still are; `items`; and what `luthier.evaluate.told` adds.

    Raises:
        LuthierError: the two were not measured on the same items, in the same way.
    """
    entry: dict[str, Any] = {
        "metric": before.metric,
        "role": before.role,
        "higher_is_better": before.higher_is_better,
        "is_mean": before.known.of_set is None,
        "n": before.n,
        "before": before.value,
        "before_interval": before.interval,
    }
    if after is None:
        return {**entry, **_NOTHING, "note": "the tuned model was not measured"}
    both = on_common(before, after)
    if both is None:
        return {**entry, **_NOTHING, **entry_of(before, after), "note": "no item has a score both before and after"}
    before, after = both
    entry |= {"n": before.n, "before": before.value, "before_interval": before.interval, **entry_of(before, after)}
    _check_pairs(before, after)
    higher = before.higher_is_better
    difference = difference_of(before.metric, before.items, after.items, higher_is_better=higher)
    verdict, note = verdict_of(difference, before.metric, before.value, before.n, noise, higher_is_better=higher)
    note = "; ".join(filter(None, (note, note_of(before, after))))
    return {
        **entry,
        **_classes(before, after),
        "matters": matters(before.metric, before.value),
        "after": after.value,
        "after_interval": after.interval,
        "difference": difference.value,
        "difference_interval": difference.interval,
        "p_value": difference.p_value,
        "verdict": verdict,
        "note": note,
        "retained": _share(_still_right(before.items, after.items)) if _can_be_right(before) else None,
        "items": [_pair(old, new) for old, new in zip(before.items, after.items, strict=True)],
    }


_NOTHING: Mapping[str, Any] = {
    "after": None,
    "after_interval": None,
    "difference": None,
    "difference_interval": None,
    "p_value": None,
    "verdict": NOT_MEASURED,
    "retained": None,
    "items": [],
}


def _classes(before: SetResult, after: SetResult) -> dict[str, Any]:
    """Precision, recall and F1 of each class, and where one class is told of each item which are taken for which."""
    old, new = by_class(before.items), by_class(after.items)
    if not new:
        return {}
    names = dict.fromkeys([*new, *old])
    found: dict[str, Any] = {
        "by_class": {
            name: {"n": new.get(name, (0, 0, 0))[0], "before": _rates(old.get(name)), "after": _rates(new.get(name))}
            for name in names
        }
    }
    if all(len(item.counts) < 3 and sum(named for _, named, _ in item.counts.values()) == 1 for item in after.items):
        pairs = Counter((_only(item, 0), _only(item, 1)) for item in after.items)
        found["confusion"] = {right: {said: pairs[right, said] for said in names} for right in names}
    return found


def _only(item: Item, place: int) -> str:
    """The class that is there (0), or is named (1); of several one that none is called, since they stand in no table of two sides."""
    found = [name for name, some in item.counts.items() if some[place]]
    return found[0] if len(found) == 1 else ""


def _rates(counts: tuple[int, int, int] | None) -> dict[str, float | None]:
    """Nothing where nothing is there, or named."""
    there, named, both = counts or (0, 0, 0)
    return {
        "precision": both / named if named else None,
        "recall": both / there if there else None,
        "f1": 2 * both / (there + named) if there + named else None,
    }


def share_retained(metrics: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Of all items of retention sets that were right before, the share that still is; None where there are none.

    Args:
        metrics: entries made by `compare`, by set.
    """
    fates = [
        pair["after_score"] == 1
        for entry in metrics.values()
        if entry["role"] == "retention" and entry["retained"] is not None
        for pair in entry["items"]
        if pair["before_score"] == 1
    ]
    return _share(fates)


def base_noise(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[EvalSet],
    before: Mapping[str, SetResult],
    *,
    say: Say = silent,
    batch_tokens: int = 1024,
) -> dict[str, float]:
    """Measure the base a second time, in other batches: the difference, by set, that rounding alone makes.

    Generated answers take long and mostly repeat exactly: a tenth of them is asked for again, and all only where one of these differs.

    Args:
        tune: the model.
        tokenizer: its tokenizer.
        sets: what to measure.
        before: the first measurement.
        say: hears of each set.
        batch_tokens: the most tokens of one batch; other than in the first measurement.

    Raises:
        LuthierError: as `measure`; or the base was not kept.
    """
    generated = [one for one in sets if one.known.needs in ("generation", "task") and not one.chosen.scoring.sends]
    some = [replace(one, limit=count) for one in generated if (count := _tenth(one)) < len(one.used)]
    with tune.at("base"):
        told = measure(tune, tokenizer, some, say=say, batch_tokens=batch_tokens)
        alike = {name for name, result in told.items() if _repeats(result, before[name])}
        rest = [one for one in sets if one.name not in alike]
        again = measure(tune, tokenizer, rest, say=say, batch_tokens=batch_tokens)
    return {one.name: 0.0 if one.name in alike else abs(again[one.name].value - before[one.name].value) for one in sets}


def _tenth(one: EvalSet) -> int:
    return max(FEWEST_AGAIN, math.ceil(len(one.used) / 10))


def _repeats(again: SetResult, before: SetResult) -> bool:
    """Whether answers came out as they did before."""
    known = {item.id: (item.answer, item.score) for item in before.items}
    return all(known.get(item.id) == (item.answer, item.score) for item in again.items)


def _check_pairs(before: SetResult, after: SetResult) -> None:
    place = f"evaluation set `{before.name}`"
    if [item.id for item in before.items] != [item.id for item in after.items]:
        raise LuthierError("before and after hold different items", where=place, fix="measure both on the same rows")
    if before.metric != after.metric or before.asked != after.asked:
        raise LuthierError(
            "before and after were not asked in the same way: the metric, template, tokenizer or decoding differs",
            where=place,
            fix="measure both with the same tokenizer and settings",
        )
    if any(old.expected != new.expected for old, new in zip(before.items, after.items, strict=True)):
        raise LuthierError("before and after expect different answers", where=place, fix="measure both on the same rows")


def _can_be_right(one: SetResult) -> bool:
    # A metric of your own may be right or wrong as well, and need no accepted answer for it.
    return one.known.higher_is_better and (one.known.compares or ("higher_is_better" in one.told and is_binary(one.items)))


def _still_right(before: Sequence[Item], after: Sequence[Item]) -> list[bool]:
    return [new.score == 1 for old, new in zip(before, after, strict=True) if old.score == 1]


def _share(fates: Sequence[bool]) -> float | None:
    return sum(fates) / len(fates) if fates else None


def _pair(old: Item, new: Item) -> dict[str, Any]:
    # What another run needs to be compared with this one, where a value is more than a plain mean of scores.
    beside: dict[str, Any] = {"weight": new.weight} if new.weight != 1 else {}
    beside |= {"after_numbers": list(new.numbers)} if new.numbers else {}
    return {
        "id": old.id,
        "prompt": old.prompt,
        "expected": old.expected,
        "before": old.answer,
        "after": new.answer,
        "before_score": old.score,
        "after_score": new.score,
        **beside,
        **({"before_note": old.note, "after_note": new.note} if old.note or new.note else {}),
    }
