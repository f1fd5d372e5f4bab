"""What the comparison of a set tells beside its numbers: answers without a score, who judged and what that took, the metric's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from luthier.evaluate.items import Item
from luthier.evaluate.sets import SetResult, result_of

_NAMED = 5
"""Answers without a score that a note names."""


def on_common(before: SetResult, after: SetResult) -> tuple[SetResult, SetResult] | None:
    """Both results on the items that have a score in both; as they are where all have one, None where there is no such item."""
    if not (before.told.get("unscored") or after.told.get("unscored")):
        return before, after
    common = {item.id for item in before.items} & {item.id for item in after.items}
    return (_of(before, common), _of(after, common)) if common else None


def _of(one: SetResult, ids: set[str]) -> SetResult:
    items: Sequence[Item] = [item for item in one.items if item.id in ids]
    return one if len(items) == len(one.items) else replace(result_of(one, items, one.asked), told=one.told)


def entry_of(before: SetResult, after: SetResult) -> dict[str, Any]:
    """More keys of a set's entry: `options` of the metric, `own` for one of your own, before and after of `judge` and `unscored`, and of a
    task of the evaluation harness `benchmark`: what decided its questions and scores, and all its values before and after."""
    found: dict[str, Any] = {"options": before.told["options"]} if "options" in before.told else {}
    found |= {"own": True} if "higher_is_better" in before.told and "benchmark" not in before.told else {}
    if "benchmark" in before.told:
        same = {key: value for key, value in before.told["benchmark"].items() if key not in ("values", "notes")}
        values = {when: one.told["benchmark"]["values"] for when, one in (("before", before), ("after", after))}
        found["benchmark"] = {**same, **values}
    for key in ("judge", "unscored"):
        both = {when: one.told.get(key) for when, one in (("before", before), ("after", after))}
        found |= {key: both} if any(both.values()) else {}
    return found


def note_of(before: SetResult, after: SetResult) -> str:
    """What a reader of the verdict must know of how it came to be."""
    said = []
    judged = after.told.get("judge")
    if judged:
        tokens, price = judged["tokens_so_far"], judged["price_so_far"]
        said.append(f"judged by {judged['model']}, {tokens:,} tokens" + ("" if price is None else f", {price:.3g} paid"))
        names = sorted({*(before.told.get("judge") or judged)["models"], *judged["models"]})
        said += [f"the judge changed meanwhile: {', '.join(names)}"] if len(names) > 1 else []
    if "benchmark" in after.told:
        said += [f"{count} {note}" for note, count in after.told["benchmark"]["notes"].items()]
    for when, one in (("before", before), ("after", after)):
        left_out = [each["id"] for each in one.told.get("unscored", ())]
        if left_out:
            more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
            said.append(f"no score {when}: {', '.join(left_out[:_NAMED])}{more}")
    return "; ".join(said)
