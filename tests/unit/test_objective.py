"""Weights, rules over the whole step, units counted several at a time, and what is logged beside a loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import draws, registry
from luthier.cli.progress import losses
from luthier.kinds import Batch, LossTerm, Now, StepTable, Tensors, TokenWeight, View
from luthier.recipe.parts import completed
from luthier.registry import kinds_under
from luthier.rows.batches import collate
from luthier.rows.encode import Encoded
from luthier.training.engine import with_context
from tests.conftest import split
from tests.contracts.fixtures import FIXTURES, rows_for
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight, toys  # noqa: F401


def with_columns(batch: Batch) -> Batch:
    rows = len(batch.row_ids)
    numbers = torch.arange(rows, dtype=torch.float32)
    tasks = tuple("ab"[i % 2] for i in range(rows))
    return batch._replace(columns={"number": numbers}, texts={"task": tasks}, token_columns={"mark": batch.token_ids_BT.float()})


def odd_rows(table: StepTable) -> Tensor:
    numbers = table.of_rows("number")
    assert numbers is not None
    return (numbers % 2 == 1).float()


def test_a_rule_sees_free_columns_of_rows_and_needs_no_pass(engine: Any, now: Now) -> None:
    seen: list[StepTable] = []

    def look(table: StepTable) -> Tensor:
        seen.append(table)
        table.note("rows seen", table.rows)
        return torch.ones(len(table))

    run, batch = engine(model=model_of(), token_weight=TokenWeight(look=look)), with_columns(rows_of_eight())
    result = run.step(split(batch, (3, 5)), now)
    (table,) = seen
    assert len(table) == batch.supervised and table.rows == 7 and result.notes["rows seen"] == 7
    names = {draws.seed_of(name): name for name in "ab"}
    task, number = table.of_rows("task"), table.of_rows("number")
    assert task is not None and number is not None and table.of_rows("other") is None
    assert all(names[int(t)] == "ab"[int(n) % 2] for t, n in zip(task, number, strict=True))
    assert table.targets_by_row().sum() == len(table)
    assert table.sum_rows(torch.ones(len(table))).tolist() == table.targets_by_row().tolist()
    with pytest.raises(KeyError):
        table["nll"]


def test_rows_of_which_nothing_is_kept_are_not_run(engine: Any, now: Now) -> None:
    batch = with_columns(rows_of_eight())
    run = engine(model=model_of(), token_weight=TokenWeight(look=odd_rows))
    run_rows: list[int] = []
    run.tune.model.get_submodule(run.tune.parts.backbone).register_forward_pre_hook(
        lambda module, args, options: run_rows.append(len(options["input_ids"])), with_kwargs=True
    )
    result = run.step(split(batch, (4, 1, 3)), now)
    # Row 3 has no target; 1, 5 and 7 are left, of the first and the last micro-batch.
    assert run_rows == [1, 2]
    kept = [5, 9, 3]
    assert result.weights is not None and result.weights.weighted_share == pytest.approx(sum(kept) / batch.supervised)
    assert result.supervised == batch.supervised and result.rows == 8
    fresh, alone = engine(model=model_of(), token_weight=TokenWeight(look=odd_rows)), engine(model=model_of())
    only = [one for one in split(batch, (1,) * 8) if int(one.row_ids[0][3:]) in (1, 5, 7)]
    assert gap(gradients(fresh, split(batch, (4, 1, 3)), now), gradients(alone, only, now)) < 1e-10
    assert result.loss == pytest.approx(engine(model=model_of()).step(only, now).loss, rel=1e-12)


def test_a_step_of_which_nothing_is_kept_is_skipped(engine: Any, now: Now) -> None:
    run = engine(model=model_of(), token_weight=TokenWeight(look=lambda table: torch.zeros(len(table))))
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    assert run.step([rows_of_eight()], now).skipped
    assert all(torch.equal(one.master, before[name]) for name, one in run.tune.trained.items())


def test_a_rule_can_hold_free_columns_that_only_some_micro_batches_have(engine: Any, now: Now) -> None:
    first, second = split(rows_of_eight(), (4, 4))
    second = second._replace(columns={"number": torch.ones(4)}, texts={"topic": ("a",) * 4})
    seen: list[StepTable] = []
    rule = TokenWeight(look=lambda table: (seen.append(table), torch.ones(len(table)))[1])  # type: ignore[func-returns-value]
    engine(model=model_of(), token_weight=rule).step([first, second], now)
    number, topic = seen[0].of_rows("number"), seen[0].of_rows("topic")
    assert number is not None and topic is not None
    assert int(number.isnan().sum()) == first.supervised and int((topic == draws.seed_of("")).sum()) == first.supervised


def test_weights_may_be_any_number_and_their_count_is_that_of_the_kept(engine: Any, now: Now) -> None:
    batch = with_columns(rows_of_eight())
    double = engine(model=model_of(), token_weight=TokenWeight(look=lambda table: torch.full((len(table),), 2.0)))
    plain = engine(model=model_of())
    twice = gradients(double, [batch], now)
    once = {name: 2 * one for name, one in gradients(plain, [batch], now).items()}
    assert gap(twice, once) < 1e-12


def several(view: View, own: Tensors) -> Tensor:
    """The loss of even and of odd positions."""
    odd_N = (view.position_N % 2).to(view["nll"])
    return torch.stack([(view["nll"] * (1 - odd_N)).sum(), (view["nll"] * odd_N).sum()])


def counts(batch: Batch) -> tuple[float, float]:
    odd_BT = (torch.arange(batch.label_BT.shape[1]) % 2 == 1).expand_as(batch.label_BT)
    follows_BT = (batch.label_BT >= 0) & (torch.arange(batch.label_BT.shape[1]) > 0)
    return float((follows_BT & ~odd_BT).sum()), float((follows_BT & odd_BT).sum())


def test_a_term_may_count_several_units(engine: Any, now: Now) -> None:
    """Each sum is divided by its own units of the whole step, however it is split, also where a part has none of one."""
    batch = rows_of_eight()
    whole = engine(model=model_of(), objective=LossTerm(several, count=counts))
    found = [gradients(whole, split(batch, sizes), now) for sizes in ((8,), (1, 2, 5), (6, 1, 1))]
    assert all(gap(other, found[0]) < 1e-10 for other in found[1:])
    even, odd = counts(batch)
    losses = [
        engine(model=model_of(), objective=LossTerm(lambda v, o, k=k: several(v, o)[k], count=lambda b, k=k: counts(b)[k]))
        .step([batch], now)
        .loss
        for k in (0, 1)
    ]
    assert even and odd and whole.step([batch], now).loss == pytest.approx(sum(losses), rel=1e-12)


def test_notes_are_means_over_the_steps_targets(engine: Any, now: Now) -> None:
    def weigh(view: View) -> Tensor:
        view.note("position", view.position_N)
        return torch.ones_like(view["nll"])

    batch = rows_of_eight()
    results = [engine(model=model_of(), token_weight=TokenWeight(weigh)).step(split(batch, sizes), now) for sizes in ((8,), (3, 5))]
    where = [p for row in range(8) for p in range(1, 12) if batch.label_BT[row, p] >= 0]
    assert all(one.notes == {"position": pytest.approx(sum(where) / len(where))} for one in results)


def test_effective_targets_of_equal_weights_are_all_of_them(engine: Any, now: Now) -> None:
    result = engine(model=model_of(), token_weight=TokenWeight(lambda view: torch.full_like(view["nll"], 0.25))).step(
        [rows_of_eight()], now
    )
    assert result.weights is not None
    assert result.weights.effective_labels == pytest.approx(result.supervised) and result.kept == pytest.approx(0.25)
    assert 0 < result.weights.entropy < math.log(256)
    assert "cross-entropy" in losses(result)


def test_texts_and_numbers_of_rows_travel_apart() -> None:
    rows = [
        Encoded("a", (5, 6), (False, True), "", {"task": "code", "score": 2.5}, 0, "text"),
        Encoded("b", (5, 6, 7), (False, True, True), "", {"task": "math"}, 0, "text"),
        Encoded("c", (5, 6), (False, True), "", {}, 0, "text"),
    ]
    batch = collate(rows)
    assert batch.texts == {"task": ("code", "math", "")} and batch.columns["score"].tolist()[0] == 2.5
    taken = with_columns(batch).take(torch.tensor([1]))
    assert taken.row_ids == ("b",) and taken.columns["number"].tolist() == [1.0] and taken.token_columns["mark"].shape == (1, 3)


def test_numbers_of_tokens_stay_at_their_tokens_behind_a_learnt_prompt() -> None:
    batch = with_columns(rows_of_eight())
    longer = with_context(batch, torch.tensor([3, -100]))
    assert torch.equal(longer.token_columns["mark"][:, 2:], batch.token_columns["mark"])
    assert not longer.token_columns["mark"][:, :2].any()


@pytest.mark.parametrize("key", ["token_weight", "keep"])
def test_none_names_no_technique(key: str) -> None:
    assert registry.make_all("none", key) == registry.make_all(None, key) == []


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("kl", ["kl", "cross_entropy"]),
        (["z_loss", "neftune"], ["z_loss", "neftune", "cross_entropy"]),
        (["focal", "kl"], ["focal", "kl"]),
        ("asft", ["asft"]),
        ("self_distillation", ["self_distillation", "cross_entropy"]),
        (["kl", "cross_entropy"], ["kl", "cross_entropy"]),
    ],
    ids=str,
)
def test_what_teaches_nothing_by_itself_stands_beside_cross_entropy(spec: Any, names: list[str]) -> None:
    assert [part.name for part in completed({"objective": spec})["objective"]] == names


TAUGHT = ("distill", "distill_stored")
"""What learns from another model alone."""
ROUTED = ("load_balance",)
"""What reads the routers of a mixture of experts, and has tests of its own on one."""
OBJECTIVES = [(kind, name) for kind in kinds_under("objective") for name in registry.names(kind) if name not in ROUTED]


@pytest.mark.parametrize(("kind", "name"), OBJECTIVES)
def test_a_recipe_with_any_one_objective_makes_targets_likelier(engine: Any, now: Now, kind: str, name: str) -> None:
    two = {"labels": ("no", "yes")}
    options: dict[str, Any] = {"noisefit": {"layers": 1}, "caft": {"heads_first": 0.0}, "dco": {"samples": 4}}.get(name, {})
    options = two if name in ("classify", "weak_to_strong", "classify_tokens", "multi_label") else options
    rows = rows_for([kind])
    columns = {"aligned_log_likelihood": torch.full((8,), -3.0), "right_share": torch.zeros(8)}
    batch = rows._replace(columns={**rows.columns, **columns})
    place = FIXTURES[kind].place
    assert place is not None
    spec = place(registry.make({name: options}, (kind,)))["objective"] if kind == "reference" else {name: options}
    objective = list(completed({"objective": spec})["objective"])
    run = engine(objective=objective, optimizer="adamw")
    steps = [run.step([batch], now._replace(step=i, learning_rate=0.003)).nll for i in range(6)]
    # Of some losses over pairs it is the rejected answers that become less likely, and a teacher may find others likely.
    assert steps[-1] < steps[0] - 0.05 or kind in ("pair_loss", "step_loss", "reference", "head") or name in TAUGHT


COVERED = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.5, 0.0, 0.0, 0.5])
"""Shares by which `answer_coverage` leaves out every other row or so."""


@pytest.mark.parametrize("objective", ["focal", "dco", "poft", "f_divergence_rows", "cross_entropy"])
def test_rows_of_which_a_token_weight_leaves_nothing_are_no_rows(engine: Any, now: Now, objective: str) -> None:
    """The loss is that of the rows that are left, whatever it is a mean over, and so is its gradient for any split."""
    columns = {"right_share": COVERED, "aligned_log_likelihood": torch.full((8,), -3.0)}
    batch = rows_of_eight()._replace(columns=columns)
    left = batch.take((COVERED == 0).nonzero()[:, 0])
    wanted, *found = (
        (engine(model=model_of(), objective=objective, token_weight="answer_coverage"), batches)
        for batches in ([left], [batch], split(batch, (3, 1, 4)))
    )
    slopes = [gradients(run, batches, now) for run, batches in (wanted, *found)]
    assert max(gap(one, slopes[0]) for one in slopes[1:]) < 1e-12
    losses = [run.step(batches, now).loss for run, batches in (wanted, *found)]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-12)


def test_a_penalty_alone_moves_nothing(engine: Any, now: Now) -> None:
    """Where every row is left out, there is nothing to learn from, however far the base is."""
    batch = rows_of_eight()
    run = engine(model=model_of(), objective=["cross_entropy", "kl"], token_weight="answer_coverage")
    assert not run.step([batch._replace(columns={"right_share": torch.zeros(8)})], now).skipped
    assert run.step([batch._replace(columns={"right_share": torch.full((8,), 0.5)})], now).skipped
