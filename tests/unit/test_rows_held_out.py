"""Rows that are held out: which ones follows from the seed and what they say, and they are measured and never learned."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.draws import seed_of
from luthier.errors import LuthierError
from luthier.planning.plan import Plan, make_plan
from luthier.recipe import differences, make_recipe, read_recipe
from luthier.rows.held_out import DRAWS, Split, draw_of, held_out
from luthier.rows.read import Rows, read
from luthier.rows.shapes import Row
from luthier.runs.inputs import inputs_of
from luthier.sweep.grid import choosing_set, target_set

TEXTS = [
    f"The {thing} is {color}." for thing in ("door", "gate", "mill", "well", "barn") for color in ("red", "old", "gray", "low")
]
FACTS = [
    {"prompt": f"Is it true? {text}", "completion": "Yes." if n % 3 else "No.", "thing": text.split()[1]}
    for n, text in enumerate(TEXTS)
]


def _rows(records: Sequence[dict[str, Any]]) -> Rows:
    return read(list(records))


def _texts(rows: Sequence[Row]) -> set[str]:
    return {row.fields["text"] for row in rows}


def _refused(call: Callable[[], Any]) -> LuthierError:
    with pytest.raises(LuthierError) as told:
        call()
    return told.value


def test_a_share_is_what_draws_below_it() -> None:
    rows = _rows([{"text": text} for text in TEXTS])
    assert draw_of(rows[0], 3) == seed_of(3, "held out", TEXTS[0])
    split, (taken,) = held_out([rows], 0.3, 3)
    expected = [text for text in TEXTS if seed_of(3, "held out", text) < 0.3 * 2**63]
    assert [row.fields["text"] for row in taken] == expected and 0 < len(expected) < len(TEXTS)
    assert [row.fields["text"] for row in rows if split.takes(row)] == expected
    assert _texts(held_out([rows], 0.3, 4)[1][0]) != set(expected), "another seed draws others"
    lowest = draw_of(rows[0], 3)
    assert not Split(3, None, lowest).takes(rows[0]) and Split(3, None, lowest + 1).takes(rows[0])
    many = _rows([{"text": f"row {n}"} for n in range(2000)])
    assert abs(len(held_out([many], 0.1, 0)[1][0]) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5


def test_more_rows_and_another_order_move_no_row() -> None:
    rows = [{"text": text} for text in TEXTS]
    before = _texts(held_out([_rows(rows)], 0.3, 1)[1][0])
    more = [{"text": f"More: {text}"} for text in TEXTS]
    mixed = [*more, *rows]
    random.Random(0).shuffle(mixed)
    after = _texts(held_out([_rows(mixed)], 0.3, 1)[1][0])
    assert before == after & set(TEXTS) and after - set(TEXTS)
    assert held_out([_rows(mixed)], 0.3, 1)[1][0] == [row for row in _rows(mixed) if row.fields["text"] in after], "in their order"


def test_rows_that_say_the_same_are_on_one_side() -> None:
    """Whatever their ids, their free columns and their source: a row that is learned must not be measured."""
    first = _rows([{"text": text} for text in TEXTS])
    second = _rows([{"id": n, "text": text, "source": n} for n, text in enumerate(TEXTS)] * 1)
    split, taken = held_out([first, second], 0.4, 0)
    assert _texts(taken[0]) == _texts(taken[1]) and len(taken[0]) == len(taken[1])
    assert not _texts(taken[0]) & _texts([row for row in second if not split.takes(row)])


def test_of_few_rows_one_is_held_out_and_one_stays() -> None:
    rows = _rows([{"text": text} for text in TEXTS[:5]])
    lowest = min(rows, key=lambda row: draw_of(row, 0))
    highest = max(rows, key=lambda row: draw_of(row, 0))
    assert held_out([rows], 1e-9, 0)[1][0] == [lowest]
    split, (taken,) = held_out([rows], 1 - 1e-9, 0)
    assert [row for row in rows if not split.takes(row)] == [highest] and len(taken) == 4
    for order in (rows[:], rows[::-1]):
        assert held_out([order], 1e-9, 0)[1][0] == [lowest] and held_out([order], 1 - 1e-9, 0)[0] == split
    twice = _rows([{"text": "a", "n": 1}, {"text": "b"}, {"text": "a", "n": 2}])
    assert len(held_out([twice], 1e-9, 0)[1][0]) in (1, 2)
    for share in (1e-9, 0.5, 1 - 1e-9):
        split, (taken,) = held_out([twice], share, 0)
        assert 0 < len(taken) < 3 and len({split.takes(row) for row in twice if row.fields["text"] == "a"}) == 1


def test_a_number_of_rows_are_the_lowest_draws() -> None:
    """Against sorting all of them, also where rows stay together."""
    drawn = random.Random(1)
    for wanted in (1, 2, 7, 30):
        records = [{"text": f"{n}", "group": drawn.randrange(25)} for n in range(60)]
        rows = _rows(records)
        ordered = sorted(rows, key=lambda row: draw_of(row, 5))
        split, (taken,) = held_out([rows], wanted, 5)
        assert _texts(taken) == _texts(ordered[:wanted]) and split.below == draw_of(ordered[wanted - 1], 5) + 1
        split, (together,) = held_out([rows], wanted, 5, "group")
        groups: dict[int, list[Row]] = {}
        for row in sorted(rows, key=lambda row: draw_of(row, 5, "group")):
            groups.setdefault(int(row.columns["group"]), []).append(row)
        expected: list[Row] = []
        for some in groups.values():
            expected += some if len(expected) < wanted else []
        assert _texts(together) == _texts(expected)
        assert not {row.columns["group"] for row in together} & {row.columns["group"] for row in rows if not split.takes(row)}


def test_a_column_keeps_rows_together() -> None:
    rows = _rows(FACTS)
    split, (taken,) = held_out([rows], 0.5, 0, "thing")
    sides: dict[Any, set[bool]] = {}
    for row in rows:
        sides.setdefault(row.columns["thing"], set()).add(split.takes(row))
    assert all(len(side) == 1 for side in sides.values()) and {True} in sides.values() and {False} in sides.values()
    assert len(taken) == 4 * sum(side == {True} for side in sides.values())
    one, other, text = _rows([{"text": "a", "k": 7}, {"text": "b", "k": 7.0}, {"text": "c", "k": "7"}])
    assert draw_of(one, 0, "k") == draw_of(other, 0, "k") == draw_of(text, 0, "k") == seed_of(0, "held out", "7")
    asked = _rows([{"prompt": "Why?", "completion": str(n)} for n in range(9)])
    assert len({draw_of(row, 0, "prompt") for row in asked}) == 1, "a key of the row is a column, too"


def test_what_cannot_be_split_is_refused() -> None:
    rows = _rows(FACTS)
    told = _refused(lambda: held_out([rows], 0.5, 0, "think"))
    assert told.what == "the row has no column `think`; it has `thing`, `prompt`, `completion`"
    assert (told.where, told.fix) == ("row 1 (rows.validate_by)", "did you mean `thing`?")
    same = _refused(lambda: held_out([rows[:4]], 0.5, 0, "thing"))
    assert same.what == "none of 4 rows can be held out and another stay, since all have the same `thing`"
    assert same.where == "rows.validate_by"
    alike = _refused(lambda: held_out([[rows[0]] * 3], 1, 0))
    assert alike.what.endswith("since all have the same text") and alike.where == "rows.validate"
    assert _refused(lambda: held_out([rows[:1]], 0.5, 0)).what == "there is one row"
    for wanted in (20, 21):
        assert _refused(lambda wanted=wanted: held_out([rows], wanted, 0)).what == f"{wanted} of 20 rows leave none to train on"
    by = _refused(lambda: held_out([rows], 17, 0, "thing"))
    assert by.what == "17 of 20 rows, with those of the same `thing` together leave none to train on"
    assert len(held_out([rows], 16, 0, "thing")[1][0]) == 16


def _recipe(rows: dict[str, Any], **keys: Any) -> Any:
    train = {"steps": 3, "batch_rows": 4, "precision": "fp32", "learning_rate": 1e-2, **keys.pop("train", {})}
    return make_recipe({"model": "tiny:llama", "rows": rows, "train": train, "repeat_baseline": False, **keys})


def _plan(rows: dict[str, Any], **keys: Any) -> Plan:
    return make_plan(_recipe(rows, **keys))


def _split(plan: Plan) -> tuple[list[str], list[str]]:
    return [row.id for row in plan.rows.rows], [row.id for row in plan.sets[0].rows]


def test_the_plan_says_how_many_and_learns_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory and streamed alike, and from each source of a mixture."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    files = []
    for name, records in (("one", FACTS[:12]), ("two", [*FACTS[12:], FACTS[0], FACTS[1]])):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(record) + "\n" for record in records))
    train = [{"rows": str(files[0]), "weight": 2.0}, str(files[1])]
    plan = _plan({"train": train, "validate": 0.4})
    learned, measured = _split(plan)
    assert len(learned) + len(measured) == 22 and not set(learned) & set(measured)
    one, two = ({row.id for row in read(file)} for file in files)
    counts = [sum(row.where.startswith(str(file)) for row in plan.sets[0].rows) for file in files]
    assert min(counts) > 0 and sum(counts) == len(measured) and one and two
    line = f"              held out: {len(measured)} rows ({counts[0]} of one, {counts[1]} of two)"
    assert line in plan.lines()
    assert "evaluates     validation, before and after; validation every step" in plan.lines()
    streamed = _plan({"train": train, "validate": 0.4, "streaming": True})
    assert _split(streamed) == (learned, measured) and line in streamed.lines()
    assert [row.where for row in streamed.sets[0].rows] == [row.where for row in plan.sets[0].rows]
    whole = _plan({"train": train, "streaming": True})
    assert len(whole.rows.rows) == 22, "rows that were encoded without those held out are not used for all"
    by = _plan({"train": train, "validate": 3, "validate_by": "thing"})
    assert any(", those of one `thing` together" in one for one in by.lines())
    assert inputs_of(plan)["evaluate.validation.rows"].startswith(f"{len(measured)} rows"), "a resumed run must hold out the same"
    assert [one["name"] for one in plan.feed.shares()] == ["one", "two"]


def test_a_run_measures_what_it_held_out(tmp_path: Path) -> None:
    """As another set with the same rows is measured, before, in between and after; the other set is measured before and after alone."""
    rows = {"train": FACTS, "validate": 0.3}
    held = [FACTS[int(row.where.removeprefix("row ")) - 1] for row in _plan(rows).sets[0].rows]
    recipe = _recipe(rows, evaluate={"copy": {"rows": held, "metric": "loss"}}, out=str(tmp_path), train={"steps": 25})
    run = luthier.train(recipe)
    copy, validation = (run.facts["metrics"][name] for name in ("copy", "validation"))
    assert (validation["metric"], validation["role"], validation["n"]) == ("loss", "target", len(held))
    assert validation["before"] == pytest.approx(copy["before"]) and validation["after"] == pytest.approx(copy["after"])
    assert validation["after"] < validation["before"]
    assert [(one["step"], list(one["metrics"])) for one in run.facts["evaluations"]] == [
        (step, ["validation"]) for step in (3, 6, 9, 12, 15, 18, 21, 24, 25)
    ]
    assert run.facts["evaluations"][-1]["metrics"]["validation"] == pytest.approx(validation["after"], rel=1e-4)
    assert run.facts["rows"]["rows"] == len(FACTS) - len(held) and run.facts["rows"]["overlap"]["validation"] == 0
    assert "validation" in run.report.read_text(encoding="utf-8")


def test_the_best_weights_by_held_out_rows_need_no_other_key() -> None:
    keys = {"train": {"best": "validation", "patience": 2}}
    assert _plan({"train": FACTS, "validate": 0.3}, **keys).between[0] == 1
    plan = _plan(
        {"train": FACTS, "validate": 0.3}, train={"evaluate_every": 2}, evaluate={"more": {"rows": FACTS[:2], "metric": "loss"}}
    )
    assert (plan.between[0], [one.name for one in plan.between[1]]) == (2, ["validation", "more"])
    assert "`best` names `validation`" in _refused(lambda: _plan({"train": FACTS}, **keys)).what
    assert (
        "nothing is measured"
        in _refused(
            lambda: _plan({"train": FACTS, "validate": 0.3}, train={"best": "more"}, evaluate={"more": {"rows": FACTS[:2]}})
        ).what
    )
    assert _plan({"train": FACTS}).between == (None, [])


def test_held_out_rows_have_the_labels_and_the_length_of_those_that_are_learned() -> None:
    turns = [{"role": role, "content": f"{n}!"} for n, role in enumerate(["user", "assistant"] * 2)]
    talks = [{"messages": [*turns[:3], {"role": "assistant", "content": f"Well, {text}" * 3}]} for text in TEXTS]
    plan = _plan({"train": talks, "validate": 0.5, "loss_on": "last", "max_length": 60, "too_long": "left"})
    assert plan.sets[0].encoding == {"loss_on": "last", "max_length": 60, "too_long": "left"}
    cut = _plan({"train": [{"text": text * 60} for text in TEXTS], "validate": 0.5, "too_long": "left"})
    assert cut.sets[0].encoding["max_length"] == 512, "what the model reads"
    pairs = [{"prompt": text * 60, "chosen": "Yes.", "rejected": "No."} for text in TEXTS]
    assert _plan({"train": pairs, "validate": 0.5, "too_long": "left"}, objective="dpo").sets[0].rows, (
        "they are cut where they are measured"
    )
    unlearned = [*talks, {"messages": [*turns[:3], {"role": "assistant", "content": "No.", "learn": False}]}]
    sides = [_plan({"train": unlearned, "validate": 0.5, "loss_on": "last"}, seed=seed) for seed in range(6)]
    assert {(len(one.rows.dropped), "of which 1 cannot be used" in "".join(one.lines())) for one in sides} == {
        (1, False),
        (0, True),
    }
    long = _refused(lambda: _plan({"train": [{"text": text * 60} for text in TEXTS], "validate": 0.5}))
    assert "rows cannot be used" in long.what
    found = set()
    odd = [*FACTS, {"prompt": "x" * 600, "completion": "Never."}]
    found = set()
    for seed in range(9):
        skipped = _plan({"train": odd, "validate": 0.5, "on_bad_row": "skip"}, seed=seed)
        lost = [line for line in skipped.lines() if "of which 1 cannot be used" in line]
        assert len(skipped.rows.rows) + len(skipped.sets[0].rows) == 20 and len(lost) <= 1
        found.add(len(lost))
    assert found == {0, 1}, "which side it is on follows from the seed"


def test_rows_of_every_format_are_measured_as_they_can_be() -> None:
    pairs = [{"prompt": f"{text}?", "chosen": "Yes.", "rejected": "No."} for text in TEXTS]
    assert _plan({"train": pairs, "validate": 0.5}, objective="dpo").sets[0].chosen_metric == "preference_accuracy"
    ranked = [{"prompt": f"{text}?", "answers": ["Yes.", "No."], "scores": [1, 0]} for text in TEXTS]
    plan = _plan({"train": ranked, "validate": 0.5, "map": "ranked_pairs"}, objective="dpo")
    assert plan.sets[0].chosen_metric == "preference_accuracy" and plan.sets[0].rows[0].shape == "prompt+chosen+rejected"
    moods = [{"text": text, "label": ["no", "yes"][n % 2]} for n, text in enumerate(TEXTS)]
    assert _plan({"train": moods, "validate": 0.5}, objective={"classify": {"labels": ["no", "yes"]}}).sets[0].metric == "accuracy"
    found = [{"query": f"{text}?", "positive": text} for text in TEXTS]
    assert _plan({"train": found, "validate": 0.5}, objective="embed").sets[0].metric == "mean_reciprocal_rank"
    told = _refused(lambda: _plan({"train": found, "validate": moods}, objective="embed"))
    assert told.what == "no metric measures rows that are `text+label` here" and told.where == "rows.validate: row 1"
    assert _plan({"train": [{"text": text} for text in TEXTS], "validate": 0.5}).sets[0].metric == "loss"
    assert _plan({"train": pairs, "validate": pairs[:3]}, objective="dpo").rows.rows, "rows of their own"


def test_rows_of_their_own_are_read_as_those_beside_them(tmp_path: Path) -> None:
    theirs = [{"q": row["prompt"], "a": row["completion"]} for row in FACTS]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in theirs[:3]))
    (tmp_path / "recipe.yaml").write_text(
        "model: tiny:llama\nrows: {train: held.jsonl, validate: held.jsonl, columns: {prompt: q, completion: a}}\ntrain: {steps: 1}\n"
    )
    plan = make_plan(read_recipe(tmp_path / "recipe.yaml"))
    assert [row.fields["prompt"] for row in plan.sets[0].rows] == [row["q"] for row in theirs[:3]]
    assert "              held out: 3 rows of held" in plan.lines()


def test_keys_that_make_no_sense_together_are_refused() -> None:
    for value in (0, 1.0, -0.1, 0.0, 1.5, True, [], "", b"x", 3j):
        assert "validate" in _refused(lambda value=value: _recipe({"train": FACTS, "validate": value})).where, value
    assert "no rows are drawn" in _refused(lambda: _recipe({"train": FACTS, "validate_by": "thing"})).what
    assert "no rows are drawn" in _refused(lambda: _recipe({"train": FACTS, "validate": FACTS, "validate_by": "thing"})).what
    clash = _refused(lambda: _recipe({"train": FACTS, "validate": 3}, evaluate={"validation": {"rows": FACTS}}))
    assert clash.where == "evaluate.validation"
    one, other = (_recipe({"train": FACTS, "validate": share}).as_plain() for share in (0.1, 0.2))
    assert differences(one, other) == [("rows.validate", 0.1, 0.2)]


def test_sweeps_choose_by_what_is_held_out() -> None:
    recipe = _recipe(
        {"train": FACTS, "validate": 0.1}, evaluate={"new": {"rows": FACTS}, "old": {"rows": FACTS, "role": "retention"}}
    )
    assert (choosing_set(recipe, None), target_set(recipe, "validation")) == ("validation", "new")
    assert choosing_set(recipe, "validation") == "validation" and choosing_set(recipe, "new") == "new"
    assert target_set(recipe, "new") == "validation"
    assert Split(0, None, DRAWS).takes(read([{"text": "all"}])[0])


def test_too_few_held_out_rows_for_a_row_map_are_told_as_such() -> None:
    """One row that was held out of KTO's was to be mended by training on two rows or more."""
    rows = [{"prompt": f"q{n}", "completion": f"a{n}", "label": bool(n % 2)} for n in range(10)]
    keys: dict[str, Any] = {"model": "tiny:llama", "objective": "kto", "train": {"steps": 1}}
    with pytest.raises(LuthierError, match="of the rows that are held out: there is one row") as refused:
        make_plan(make_recipe({**keys, "rows": {"train": rows, "validate": 1}}))
    assert refused.value.where == "rows.validate, kto" and "hold out more rows" in refused.value.fix
    assert len(make_plan(make_recipe({**keys, "rows": {"train": rows, "validate": 2}})).sets[0].rows) == 2
