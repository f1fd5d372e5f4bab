"""The sentence that a sweep ends in: what to take, how sure, what to run next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from luthier.lab.verdict import t_quantile
from luthier.sweep.answer import answer_of, seeds_to_tell
from luthier.sweep.facts import summary

GAP = "\u00a0"


def variant(
    name: str, target: Sequence[float | None], lost: Sequence[float | None], *, side: int = 0, tuned: bool = True
) -> dict[str, Any]:
    return {
        "name": name,
        "target": summary(target),
        "forgetting": summary(lost),
        "learning_rate_side": side,
        "learning_rates_added": [9e-4, 2.7e-3] if side else [],
        "tuned": tuned,
    }


def answer(*variants: dict[str, Any], entries: dict[str, Any] | None = None, **of_set: Any) -> dict[str, Any]:
    seeds = len(variants[0]["target"]["values"])
    facts = {
        "target": "sorting",
        "chosen_by": "checked",
        "seeds": list(range(seeds)),
        "learning_rates": 3,
        "sets": {"sorting": {"metric": "equal", "before": 0.0, "higher_is_better": True, "is_share": True, **of_set}},
        "variants": list(variants),
    }
    return answer_of(facts, entries or {one["name"]: [None] * seeds for one in variants})


def plain(found: dict[str, Any]) -> str:
    return str(found["sentence"]).replace(GAP, " ")


def test_the_one_that_learned_most_is_taken_where_the_others_are_clearly_below() -> None:
    found = answer(variant("half", [0.9, 0.92, 0.94], [0.1] * 3), variant("lora", [0.5, 0.51, 0.55], [0.0] * 3))
    assert plain(found) == "Take half: sorting 92 %, clearly the best, 10 % forgotten."
    assert (found["take"], found["sure"], found["run_again"]) == ("half", True, [])
    (beside,) = found["beside"]
    spread = t_quantile(2) * 0.01 / 3**0.5
    assert beside["apart"] == "below" and beside["difference"] == pytest.approx(-0.4)
    assert beside["interval"] == pytest.approx((-0.4 - spread, -0.4 + spread))


def test_of_those_that_learned_as_much_the_one_that_forgot_least_is_taken() -> None:
    found = answer(variant("lora", [0.90, 0.91, 0.92], [0.3, 0.32, 0.34]), variant("half", [0.89, 0.90, 0.91], [0.03] * 3))
    assert plain(found) == "Take half: as much learned as with lora (sorting 90 %, lora 91 %), and 3 % forgotten instead of 32 %."
    assert found["sure"] is True


def test_what_is_not_told_apart_names_the_seeds_that_would_tell() -> None:
    found = answer(variant("lora", [0.083, 0.117, 0.25], [0.3, 0.32, 0.34]), variant("half", [0.09, 0.09, 0.1], [0.04, 0.04, 0.05]))
    assert found["take"] == "half" and found["sure"] is False
    assert plain(found).startswith(
        "Take half for now: not clearly less learned than with lora (sorting 9.3 %, lora 15 %), and 4.3 % "
    )
    assert plain(found).endswith("; not told apart from lora with 3 seeds: run again with seeds=11.")
    assert found["run_again"] == ["seeds=11"], "2.228 * 0.0827 / 3.317 < 0.0567, and 2.262 * 0.0827 / 3.162 is not"
    one = answer(variant("lora", [0.9], [0.3]), variant("half", [0.1], [0.4]))
    assert (
        plain(one)
        == "Take lora for now: sorting 90 %, the best, 30 % forgotten; not told apart from half with 1 seed: run again with seeds=3."
    )


def test_seeds_to_tell_by_hand() -> None:
    """t of n - 1 degrees times 0.1 over the root of n first falls below 0.1 at n = 7: 2.447 / 2.646 (at 6: 2.571 / 2.449)."""
    assert seeds_to_tell([0.0, 0.1, 0.2], 0.05) == 7
    assert seeds_to_tell([-0.1, 0.1], 0.3) == 4, "an interval within what matters tells as well: 3.182 * 0.1414 / 2 < 0.3"
    assert seeds_to_tell([-0.1, 0.1], 0.0) == 16 and seeds_to_tell([0.5], 0.05) == 3


def test_less_is_better_where_it_is_a_loss() -> None:
    low = variant("low", [1.0, 1.01, 1.02], [0.1] * 3)
    high = variant("high", [2.0, 2.01, 2.03], [0.0] * 3)
    found = answer(high, low, metric="loss", before=3.0, higher_is_better=False, is_share=False)
    assert plain(found) == "Take low: sorting 1.01, clearly the best, 10 % forgotten."
    # Of a loss a fiftieth matters, not 5 points.
    near = variant("near", [1.04, 1.06, 1.04], [0.0] * 3)
    assert answer(low, near, metric="loss", before=3.0, higher_is_better=False)["beside"][0]["apart"] == "open"


def entry(scores: Sequence[float]) -> dict[str, Any]:
    items = [
        {"id": str(place), "prompt": "p", "expected": "e", "after": "a", "before_score": 0.0, "after_score": float(score)}
        for place, score in enumerate(scores)
    ]
    return {"metric": "equal", "after": sum(scores) / len(scores), "items": items}


def test_other_items_must_show_it_too() -> None:
    """Seeds that agree exactly say nothing of other items: 4 of 8 against 6 of 8, all gained, has p = 2 / 2**2."""
    many, few = [1] * 6 + [0] * 2, [1] * 4 + [0] * 4
    best, other = variant("lora", [0.75] * 3, [0.1] * 3), variant("half", [0.5] * 3, [0.1] * 3)
    found = answer(best, other, entries={"lora": [entry(many)] * 3, "half": [entry(few)] * 3})
    assert found["beside"][0]["p_value"] == 0.5 and found["beside"][0]["apart"] == "open"
    assert (
        plain(found).endswith("; not told apart from half with 3 seeds, and more items of sorting would tell.")
        and not found["sure"]
    )
    wide = answer(best, other, entries={"lora": [entry(many * 5)] * 3, "half": [entry(few * 5)] * 3})
    assert wide["beside"][0]["p_value"] == 2 / 2**10 and wide["beside"][0]["apart"] == "below" and wide["sure"]
    moved = [{**one, "items": [{**item, "prompt": "other"} for item in one["items"]]} for one in [entry(few)] * 3]
    assert answer(best, other, entries={"lora": [entry(many)] * 3, "half": moved})["beside"][0]["p_value"] is None


def test_an_end_of_the_grid_and_what_is_not_tuned_are_named_and_never_sure() -> None:
    found = answer(
        variant("half", [0.9, 0.92, 0.94], [0.1] * 3, side=1),
        variant("lora", [0.5, 0.51, 0.55], [0.0] * 3),
        variant("s2ft", [0.0] * 3, [0.0] * 3, side=-1, tuned=False),
    )
    assert plain(found) == (
        "Take half for now: sorting 92 %, clearly the best, 10 % forgotten; half: the best learning rate lies at an end of the grid; "
        "s2ft: not tuned, no learning rate made checked better: run again with learning_rates=7."
    )
    assert found["take"] == "half" and found["sure"] is False and len(found["notes"]) == 1
    assert "half at 0.0009 and 0.0027; s2ft at 0.0009 and 0.0027." in found["notes"][0]
    nothing = answer(variant("s2ft", [0.0], [0.0], side=1, tuned=False))
    assert nothing["take"] is None and plain(nothing).startswith("No variant to take: none is tuned; s2ft: not tuned")


def test_nothing_is_taken_that_is_no_better_than_before() -> None:
    found = answer(variant("half", [0.1, 0.1], [0.0, 0.0]), before=0.1)
    assert found["take"] is None
    assert plain(found) == "No variant to take: none made sorting better than the 10 % before training (the best, half: 10 %)."
    assert answer(variant("half", [None], [None]))["sentence"] == "No variant to take: no run was finished."
    assert plain(answer(variant("half", [0.5], [None]))) == "Take half: sorting 50 %, the only one."
