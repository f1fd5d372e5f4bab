"""One optimizer step from within: what a micro-batch adds, what a step tells, and which passes add nothing."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.columns.chunked import CONTEXT_ATTENTION
from luthier.columns.targets import find_targets
from luthier.errors import LuthierError
from luthier.kinds import Callback, Column, LossTerm, Now, OtherPass, StepLoss, StepTable, Tensors, TokenLoss, TokenWeight, View
from luthier.training import agreement, memory
from luthier.training.engine import StepResult, Weights, Work, first_not_finite, idle_batch, not_finite, with_context
from luthier.training.objective import Counted, Noted, as_term
from luthier.training.services import _context, shares_beginnings, view_of
from luthier.training.world import World
from tests.conftest import make_batch, split
from tests.contracts.fixtures import shake
from tests.toys.helpers import logits_of, model_of, plain_loss, rows_of_eight, rows_of_pairs, toys  # noqa: F401

ONE = make_batch([(5, 1)])


def two(view: View, own: Tensors) -> Tensor:
    return own["number"].sum()


PENALTY = LossTerm(two, unit="step", penalty=True, start=lambda services: {"number": torch.ones(2, dtype=torch.float64)})
"""Of 2 a step, whatever its rows are."""
SQUARES = StepLoss(lambda view, own: view.log_likelihoods(), lambda table: (table.value**2).sum())
"""The squares of the rows' likelihoods."""


@pytest.mark.parametrize("sizes", [(8,), (5, 3), (3, 3, 2)])
def test_a_penalty_counts_once_a_step(engine: Any, now: Now, sizes: Sequence[int]) -> None:
    batch = rows_of_eight()
    run = engine(model=model_of(), objective=["cross_entropy", PENALTY])
    result = run.step(split(batch, sizes), now)
    plain = plain_loss(model_of(), batch).item()
    assert result.parts == {"cross_entropy": pytest.approx(plain, rel=1e-9), "loss_term": 2.0}
    assert result.loss == pytest.approx(plain + 2.0, rel=1e-9) and result.nll == pytest.approx(plain, rel=1e-9)
    assert result.kept == 1.0 and result.weights is None and not result.notes
    assert (result.tokens, result.supervised, result.rows) == (61, 30, 8)


def test_a_step_of_a_single_target(engine: Any, now: Now) -> None:
    model = model_of()
    log_V = logits_of(model, ONE)[0, 3].log_softmax(-1)
    nll, entropy = -float(log_V[ONE.label_BT[0, 4]]), -float((log_V.exp() * log_V).sum())
    result = engine(model=model, token_weight=TokenWeight(lambda view: torch.full_like(view["nll"], 0.5))).step([ONE], now)
    assert (result.tokens, result.supervised, result.rows, result.kept) == (5, 1, 1, 0.5)
    assert (result.nll, result.loss) == pytest.approx((nll, nll / 2), rel=1e-9)
    assert result.weights == pytest.approx(Weights(1.0, 1.0, entropy), rel=1e-6)


def test_what_weights_leave_by_hand(engine: Any, now: Now) -> None:
    """Weights of 2, 1 and 0 leave two targets of three, as good as (2 + 1)^2 / (4 + 1) equal ones; weights of 0 leave none."""
    batch = make_batch([(4, 3)])
    for weights, left in (((2.0, 1.0, 0.0), Weights(2 / 3, 9 / 5, 0.0)), ((0.0, 0.0, 0.0), Weights(0.0, 0.0, 0.0))):
        weigh = TokenWeight(lambda view, weights=weights: torch.tensor(weights, dtype=torch.float64))
        result = engine(model=model_of(), token_weight=weigh).step([batch], now)
        assert result.weights is not None and result.weights._replace(entropy=0.0) == pytest.approx(left)
        assert result.kept == pytest.approx(sum(weights) / 3)


def test_a_step_without_targets_tells_its_rows_and_tokens(engine: Any, now: Now) -> None:
    nothing = make_batch([(4, 0), (3, 0)])
    result = engine(model=model_of()).step([nothing], now)
    assert result == StepResult(0.0, 0.0, {}, 7, 0, 2, 0.0, skipped=True)


def test_what_happens_by_the_clock_cannot_be_taken_back(engine: Any, now: Now) -> None:
    """Also in a step without targets: memory that runs out there is no reason to try again."""

    def exhaust(state: Any, services: Any) -> None:
        raise MemoryError

    run = engine(model=model_of(), callbacks=Callback(after_step=exhaust, by_clock=True))
    with pytest.raises(LuthierError, match="had begun to change numbers"):
        memory.attempt(run, [make_batch([(4, 0), (3, 0)])], now)
    with pytest.raises(LuthierError, match="had begun to change numbers"):
        memory.attempt(run, [make_batch([(4, 1), (3, 1)])], now)


def test_numbers_of_several_micro_batches_add_up() -> None:
    assert Noted(3.0, 2.0).plus(Noted(4.0, 5.0)) == (7.0, 7.0) and Noted(3.0, 2.0).mean == 1.5
    assert Noted(3.0, 1.0).mean == 3.0 and Noted().mean == 0.0
    one = Counted(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    assert one.plus(one) == tuple(2 * number for number in one)


def test_a_note_of_one_number_is_that_number(engine: Any, now: Now) -> None:
    def weigh(view: View) -> Tensor:
        view.note("position", view.position_N)
        return torch.ones_like(view["nll"])

    assert engine(model=model_of(), token_weight=TokenWeight(weigh)).step([ONE], now).notes == {"position": 4.0}


def test_rows_behind_a_learnt_prompt() -> None:
    batch = make_batch([(3, 1), (2, 1)])._replace(token_columns={"mark": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])})
    found = with_context(batch, torch.tensor([7, -100]))
    assert torch.equal(found.token_ids_BT, torch.cat([torch.tensor([[-1, -2]] * 2), batch.token_ids_BT], 1))
    assert found.attend_BT.tolist() == [[True] * 5, [True, True, True, True, False]]
    assert found.position_BT.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 2]]
    assert torch.equal(found.label_BT, torch.cat([torch.tensor([[7, -100]] * 2), batch.label_BT], 1))
    assert found.token_columns["mark"].tolist() == [[0.0, 0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 4.0, 5.0, 0.0]]
    assert with_context(batch, None) is batch


def test_an_idle_pass_runs_two_tokens_and_no_target() -> None:
    batch = idle_batch()
    assert batch.token_ids_BT.tolist() == [[0, 0]] and batch.attend_BT.tolist() == [[True, True]]
    assert batch.position_BT.tolist() == [[0, 1]] and batch.label_BT.tolist() == [[-100, -100]] and batch.row_ids == ("",)


def test_an_idle_pass_adds_nothing(engine: Any, now: Now) -> None:
    """Where a process has no rows it is the first, and a penalty would count for it."""
    run = engine(model=model_of(), objective=["cross_entropy", PENALTY])
    work = Work(run, [idle_batch()], now, [(3.0,), (1.0,)], [], idle=1)
    assert work._given(work.batches[0], trains=True)["keep_N"] is None
    sums = work._sums(work.batches[0], trains=True)
    assert sums.loss.item() == 0.0 and sums.loss.requires_grad and sums[1:] == ({}, Counted(), {})
    rows = make_batch([(4, 2)])
    work = Work(run, [rows, idle_batch()], now, [(2.0,), (1.0,)], None, idle=1)
    found = [work._sums(one, trains=True) for one in work.batches]
    assert found[0].loss.item() == pytest.approx(plain_loss(model_of(), rows).item() + 2.0) and found[1].loss.item() == 0.0


def test_processes_of_a_model_that_is_spread_make_equally_many_passes(engine: Any) -> None:
    run = engine(model=model_of())
    assert run._idle_passes(2) == []
    run.world, run.tune.root = SimpleNamespace(max=lambda own: 5), SimpleNamespace()
    assert [one.row_ids for one in run._idle_passes(2)] == [("",)] * 3


def test_rows_of_numbers_that_are_not_finite_are_named() -> None:
    rows = [f"r{i}" for i in range(11)]
    where = {count: not_finite("the loss", rows[:count]).where for count in (1, 8, 9, 11)}
    eight = "rows r0, r1, r2, r3, r4, r5, r6, r7"
    assert where == {1: "rows r0", 8: eight, 9: f"{eight} and 1 more", 11: f"{eight} and 3 more"}


def test_the_first_gradient_that_is_not_finite_is_named() -> None:
    def trained(name: str, *values: float) -> Any:
        return SimpleNamespace(name=name, gradient=torch.tensor(values) if values else None)

    fine, still = trained("fine", 1.0, 2.0), trained("still")
    one, other = trained("one", 1.0, float("nan")), trained("other", float("inf"), 0.0)
    assert first_not_finite([fine, still]) is None and first_not_finite([]) is None
    assert first_not_finite([still, fine, one, other]) == "one" and first_not_finite([other, fine, one]) == "other"


def test_a_loss_that_is_not_finite_names_its_own_micro_batch(engine: Any, now: Now) -> None:
    run = engine(model=model_of(), objective=LossTerm(lambda view, own: view["nll"].sum() / (len(view.batch.row_ids) - 3)))
    with pytest.raises(LuthierError, match="the loss is not a finite number") as caught:
        run.step(split(rows_of_eight(), (5, 3)), now)
    assert caught.value.where == "rows row5, row6, row7"
    for source in ("backprop", "per_layer"):
        run = engine(
            model=model_of(), objective=LossTerm(lambda view, own: view["nll"].sum() * float("nan")), gradient_estimator=source
        )
        with pytest.raises(LuthierError, match="the loss is not a finite number") as caught:
            run.step(split(rows_of_eight(), (1, 7)), now)
        assert caught.value.where == "rows row0", "the first ends it"


def test_gradients_are_summed_over_processes_also_where_this_one_has_none(engine: Any) -> None:
    run = engine(model=model_of(layers=1))
    first, second, third, *_ = run.tune.trained.values()
    first.gradient, third.gradient = torch.ones_like(first.master.detach()), torch.ones_like(third.master.detach())
    summed: list[Tensor] = []
    # The other process has gradients of the first two, and this one of the first and the third.
    run.world = SimpleNamespace(
        size=2,
        sum_numbers=lambda values: [1.0 + (i == 0) if i < 3 else 0.0 for i in range(len(values))],
        sum=lambda value: summed.append(value),
    )
    run._sum_gradients([])
    assert [one is held.gradient for one, held in zip(summed, (first, second, third), strict=True)] == [True] * 3
    assert second.gradient.dtype == second.master.dtype and not second.gradient.any() and not second.gradient.requires_grad
    assert all(one.gradient is None for one in list(run.tune.trained.values())[3:])


def test_parts_of_the_loss_are_added_up_over_processes(engine: Any) -> None:
    run = engine(model=model_of(layers=1))
    run.world = SimpleNamespace(gather_plain=lambda own: [own, {"kl": 0.25, "other": 1.0}])
    assert run._together({"kl": 0.5, "mine": 2.0}) == {"kl": 0.75, "other": 1.0, "mine": 2.0}


def test_processes_compare_their_numbers_where_these_were_chosen(engine: Any, now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training and when they are chosen anew; within a step only which of them move."""
    asked: list[bool] = []
    monkeypatch.setattr(agreement, "check", lambda world, tune, *, values: asked.append(values))
    run = engine("growing", model=model_of(), optimizer="adamw")
    assert asked == [True]
    while len(asked) < 40 and asked[-2:] != [False, True]:
        run.step([rows_of_eight()], now._replace(step=len(asked)))
    assert asked[-2:] == [False, True] and not any(asked[1:-1])


def drops(engine: Any, **options: Any) -> Any:
    run = engine({"lora": {"dropout": 0.5}}, model=model_of(), **options)
    shake(run)
    run.tune.model.train()
    return run


def test_losses_of_two_points_are_compared_without_dropout(engine: Any, now: Now) -> None:
    for objective in ("cross_entropy", SQUARES):
        batches = split(rows_of_eight(), (5, 3))
        run = drops(engine, objective=objective)
        views = [run.services("lora", now).forward(batch, ["nll"]) for batch in batches]
        likely = torch.cat([view.log_likelihoods() for view in views])
        targets = sum(batch.supervised for batch in batches)
        wanted = (likely**2).sum() / 7 if objective is SQUARES else -likely.sum() / targets
        units = run.objective.units(batches, None, World())
        work = Work(run, batches, now, units, None)
        assert work.loss() == pytest.approx(float(wanted), rel=1e-9)
        plain = run.step(batches, now)
        assert abs(plain.loss - float(wanted)) > 1e-3, "nothing was dropped in the step either"


def test_what_an_objective_runs_is_dropped_unless_told_otherwise(engine: Any, now: Now) -> None:
    run = drops(engine)
    services_of = lambda slot: run.services(slot, now)  # noqa: E731
    units = [(1.0,)]
    kept = run.objective.total(run.tune, ONE, units, now, first=True, services_of=services_of, trains=False).loss.item()
    dropped = run.objective.total(run.tune, ONE, units, now, first=True, services_of=services_of, trains=True).loss.item()
    assert kept != dropped == run.objective.total(run.tune, ONE, units, now, first=True, services_of=services_of).loss.item()
    assert run.objective.see(run.tune, ONE, now, services_of=services_of)["nll"].item() == dropped


def test_a_pass_drops_only_where_the_run_learns_from_it(engine: Any, now: Now) -> None:
    run = drops(engine)
    columns = run.objective.columns()
    plain, learnt, other = (view_of(run.tune, ONE, columns, now, **one)["nll"] for one in ({}, {"trains": True}, {"trains": False}))
    assert torch.equal(plain, other) and not torch.allclose(plain, learnt)


def test_a_loss_of_the_whole_step_drops_alike_in_both_passes(engine: Any, now: Now) -> None:
    seen: list[list[float]] = []

    def value(view: View, own: Tensors) -> Tensor:
        found = view.log_likelihoods()
        seen.append(found.tolist())
        return found

    run = drops(engine, objective=SQUARES._replace(value=value))
    batches = split(rows_of_eight(), (5, 3))
    result = run.step(batches, now)
    assert seen[:2] == seen[2:] and len(seen) == 4
    assert result.loss == pytest.approx(sum(one**2 for some in seen[:2] for one in some) / 7, rel=1e-9)


def test_rows_share_their_beginning_where_nothing_tells_them_apart(engine: Any) -> None:
    run = drops(engine)
    assert shares_beginnings(run.tune, [], trains=False) and not shares_beginnings(run.tune, [], trains=True)
    assert not shares_beginnings(run.tune, [CONTEXT_ATTENTION], trains=False)


def test_a_view_keeps_hidden_states_only_where_they_are_asked_for(engine: Any, now: Now) -> None:
    run, batch = engine(model=model_of()), make_batch([(4, 2)])
    assert view_of(run.tune, batch, run.objective.columns(), now).hidden_BTD is None
    kept = view_of(run.tune, batch, run.objective.columns(), now, keep_hidden=True)
    assert kept.hidden_BTD is not None and kept.hidden_BTD.shape[:2] == (1, 4)


def test_a_snapshot_is_of_the_numbers_as_they_are_now(engine: Any, now: Now) -> None:
    run = engine({"lora": {"rank": 1}}, model=model_of(layers=1))
    services = run.services("lora", now)
    services.remember("mine")
    for wanted, remember in (
        (1.0, lambda: services.remember("mine")),
        (1.5, lambda: services.remember("mine", 0.5)),
    ):
        for name, one in run.tune.trained.items():
            run.tune.set({name: torch.full_like(one.master.detach(), 1.0 if wanted == 1.0 else 2.0)})
        remember()
        assert {float(one) for value in run.tune.snapshots["mine"].values() for one in value.unique()} == {wanted}


def test_own_tensors_are_those_of_the_technique_at_the_place(engine: Any, now: Now) -> None:
    run = engine([{"lora": {"rank": 2}}, {"lora": {"rank": 3}}], model=model_of("gpt2", layers=1))
    query, key = run.tune.parts.select(target_modules=["attention_query", "attention_key"])
    first, second = run.services("lora", now), run.services("lora.2", now)
    assert [len(one.tensors(query)["down"]) for one in (first, second)] == [2, 3]
    shake(run)
    for place in (query, key):
        for slot, services in (("lora", first), ("lora.2", second)):
            down = next(
                one.master for name, one in run.tune.trained.items() if name.startswith(f"{slot}/{place}") and "down" in name
            )
            assert torch.equal(services.tensors(place)["down"], down.detach())
    assert first.tensors(run.tune.parts.select(target_modules=["norm"])[0]) == {}
    assert first.shape(query) == first.weight(query).shape == first.shape(key) == (32, 32)
    up = run.tune.parts.select(target_modules=["mlp_up"])[0]
    assert first.shape(up) == first.weight(up).shape and first.shape(up)[0] > first.shape(up)[1]


def test_a_term_without_rows_has_one_count(engine: Any) -> None:
    run = engine(model=model_of(layers=1), objective=["cross_entropy", PENALTY])
    assert run.objective.units([], None, World()) == [(0.0,), (0.0,)]
    assert run.objective.units([ONE, ONE], None, World()) == [(2.0,), (1.0,)]


def test_rows_with_a_single_target_are_rows(engine: Any) -> None:
    """Without those of which a weight leaves nothing."""
    batch = make_batch([(3, 1), (3, 0), (4, 2), (3, 1)])
    by_row = LossTerm(lambda view, own: view["nll"].sum(), unit="row")
    run = engine(model=model_of(layers=1), objective=by_row)
    assert run.objective.units([batch], None, World()) == [(3.0,)]
    one = TokenWeight(lambda view: view["nll"], count=lambda batch: torch.tensor([1.0, 0.0, 2.0, 0.0]))
    weighted = engine(model=model_of(layers=1), objective=by_row, token_weight=one)
    assert weighted.objective.units([batch], None, World()) == [(2.0,)]


def test_targets_of_any_weight_but_0_are_counted(engine: Any) -> None:
    run = engine(model=model_of(layers=1))
    keeps = [torch.tensor([0.0, 1.0, 0.5, -2.0]), torch.tensor([1.0])]
    assert run.objective.units([make_batch([(5, 4)]), ONE], keeps, World()) == [(4.0,)]


def test_two_that_count_tokens_differently_are_refused(engine: Any, now: Now) -> None:
    counting = TokenWeight(lambda view: torch.ones_like(view["nll"]), count=lambda batch: batch.targets_by_row())
    looking = TokenWeight(look=lambda table: torch.ones(len(table)))
    for weights in ([counting, counting], [counting, looking]):
        run = engine(model=model_of(layers=1), token_weight=weights)
        with pytest.raises(LuthierError, match="count tokens differently"):
            run.step([ONE], now)


def test_rules_take_turns_on_what_is_left(engine: Any, now: Now) -> None:
    """Weights of 3 and a half multiply, and what the first left out the second does not see."""
    seen: list[list[int]] = []

    def look(table: StepTable, weight: float) -> Tensor:
        seen.append([int(one) for one in table.row_M])
        return weight * (table.position_M > table.position_M.min()).double()

    rules = [TokenWeight(look=lambda table, weight=weight: look(table, weight)) for weight in (3.0, 0.5)]
    run, batch = engine(model=model_of(layers=1), token_weight=rules), make_batch([(4, 2), (4, 3), (4, 1)])
    looked = run.objective.look(run.tune, [batch], now, World(), lambda slot: run.services(slot, now))
    (left,), (keep_N,) = looked.batches, looked.keeps
    assert [len(one) for one in seen] == [6, 5] and left.row_ids == ("row0", "row1", "row2")
    assert keep_N.tolist() == [0.0, 1.5, 0.0, 0.0, 1.5, 1.5]


def test_nothing_is_said_of_entropy_unless_it_is_asked_for(engine: Any, now: Now) -> None:
    run = engine(model=model_of(layers=1))
    sums = run.objective.total(run.tune, ONE, [(1.0,)], now, first=True, services_of=lambda slot: run.services(slot, now))
    assert sums.counted.entropy == 0.0 and (sums.counted.targets, sums.counted.own, sums.counted.kept) == (1.0, 1.0, 1.0)


def test_what_has_no_unit_in_the_step_adds_nothing(engine: Any, now: Now) -> None:
    """Whatever the term itself says of it."""
    run = engine(
        model=model_of(layers=1), objective=LossTerm(lambda view, own: torch.stack([view["nll"].sum(), view["nll"].sum()]))
    )
    sums = run.objective.total(run.tune, ONE, [(2.0, 0.0)], now, first=True, services_of=lambda slot: run.services(slot, now))
    alone = run.objective.total(run.tune, ONE, [(1.0, 0.0)], now, first=True, services_of=lambda slot: run.services(slot, now))
    assert sums.loss.item() == pytest.approx(alone.loss.item() / 2, rel=1e-12)
    assert alone.loss.item() == pytest.approx(alone.counted.nll, rel=1e-12)


def test_targets_are_no_context() -> None:
    batch = make_batch([(4, 2), (3, 1)])
    assert _context(batch, find_targets(batch)).tolist() == [[True, True, False, False], [True, True, False, False]]


def test_a_loss_of_tokens_counts_each_by_its_weight() -> None:
    nll, batch = torch.tensor([1.0, 2.0, 4.0]), make_batch([(4, 3)])
    weight_N = torch.tensor([0.5, 2.0, 0.0])
    view = View(batch, {"nll": nll}, label_N=nll.long(), row_N=nll.long() * 0, position_N=nll.long(), weight_N=weight_N)
    assert as_term(TokenLoss(lambda view: view["nll"] + 1.0)).total(view, {}).item() == 0.5 * 2.0 + 2.0 * 3.0


def test_of_rows_that_belong_together_others_see_the_first_alone(engine: Any, now: Now) -> None:
    seen: dict[str, list[int]] = {}

    def term(unit: Any) -> LossTerm:
        def total(view: View, own: Tensors) -> Tensor:
            seen[unit] = view.row_N.unique().tolist()
            return view["nll"].sum()

        return LossTerm(total, unit=unit)

    engine(model=model_of(layers=1), objective=[term("token"), term("row"), term("group")]).step([rows_of_pairs()], now)
    assert seen == {"token": [0, 2, 4, 6], "row": [0, 2, 4, 6], "group": list(range(8))}


def test_who_compares_with_the_base(engine: Any) -> None:
    """Not who looks at the same weights a second time. The base is kept for it."""
    again = Column("again", lambda chunk: chunk.label_log_probability, passes=(OtherPass("again", at=""),))
    twice = LossTerm(lambda view, own: view["again"].sum(), columns=(again,))
    run = engine(model=model_of(layers=1), objective=["cross_entropy", "kl", twice])
    assert run.objective.comparing() == ["kl"] and run.objective.readers("again") == ["loss_term"]
    assert all(one.start is not None for one in run.tune.trained.values())
    alone = engine(model=model_of(layers=1), objective=["cross_entropy", twice])
    assert not alone.objective.comparing() and all(one.start is None for one in alone.tune.trained.values())
