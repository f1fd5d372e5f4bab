"""AdaLoRA against the paper's rule: scores by hand, the budget step by step, what is pruned, and what never comes back."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Now, Place, State
from luthier.methods.weight_delta._sensitivity import excess, importance, look, prune, triplets
from luthier.methods.weight_delta.adalora import _phases, adalora, far_from_orthonormal
from tests.conftest import split
from tests.toys.helpers import gap, gradients, logits_of, model_of, plain_gradients, rows_of_eight

SMALL: dict[str, Any] = {"initial_rank": 3, "target_rank": 2, "target_modules": ("attention_query", "mlp_down")}


def go(run: Any, now: Now, steps: int, first: int = 0) -> None:
    """Steps on changing rows, with a clock that ends after twenty."""
    for i in range(first, first + steps):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))


def end(run: Any, now: Now) -> None:
    """The end of the stage."""
    for kept in run.callbacks:
        kept.callback.after_stage(kept.state, run.services(kept.slot, now))


def values_of(run: Any) -> dict[str, Tensor]:
    return {name: one.master.detach().clone() for name, one in run.tune.trained.items() if name.endswith(".values")}


def stays(run: Any) -> Tensor:
    return torch.cat([values[:, 0] != 0 for values in values_of(run).values()])


def tensor(name: str, value: float, gradient: float | None) -> Any:
    made = None if gradient is None else torch.tensor([[gradient]])
    return SimpleNamespace(name=name, master=torch.tensor([[value]]), gradient=made)


def test_importance_by_hand() -> None:
    """I = 6, its mean 0.9, the distance from the new mean 0.15 * 5.1 = 0.765, their product 0.6885; then I = 4."""
    state: State = {}
    for value, gradient, wanted in ((2.0, 3.0, 0.9 * 0.765), (-2.0, 2.0, 1.365 * 1.0455)):
        look(state, tensor("one", value, gradient), 0.85, 0.85)
        found = state["sensitivity one"] * state["uncertainty one"]
        torch.testing.assert_close(found, torch.tensor([[wanted]]))
    torch.testing.assert_close(torch.tensor([0.6885, 1.4271]), torch.tensor([0.9 * 0.765, 1.365 * 1.0455]), atol=1e-4, rtol=0)
    look(state, tensor("one", 2.0, None), 0.5, 0.25)
    # Nothing arrived: the mean halves to 0.6825, and 0.25 * 1.0455 + 0.75 * 0.6825 is left of the uncertainty.
    torch.testing.assert_close(state["sensitivity one"], torch.tensor([[0.6825]]))
    torch.testing.assert_close(state["uncertainty one"], torch.tensor([[0.77325]]))


def test_a_triplet_s_importance_is_its_value_s_and_the_means_of_its_vectors() -> None:
    scores = {"left": [[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]], "values": [[10.0], [20.0]], "right": [[1.0, 3.0], [0.5, 0.5]]}
    state = {f"sensitivity {name}": torch.tensor(score) for name, score in scores.items()}
    state |= {f"uncertainty {name}": torch.full_like(torch.tensor(score), 2.0) for name, score in scores.items()}
    mine: Any = {name: SimpleNamespace(name=name) for name in scores}
    torch.testing.assert_close(importance(state, mine), 2 * torch.tensor([10 + 3 + 2.0, 20 + 3 + 0.5]))


def test_the_budget_falls_by_a_cube() -> None:
    """From 12 to 8 over ten steps."""
    budgets = [int(8 + 4 * excess(step, 0, 10)) for step in range(12)]
    assert budgets[1] == 10 and budgets[5] == 8 and budgets[0] == 12 and budgets[10] == budgets[11] == 8
    assert [excess(step, 4, 8) for step in (3, 4, 6, 8, 9)] == [1.0, 1.0, 0.125, 0.0, 0.0]
    assert [excess(step, 4, 4) for step in (3, 4, 5)] == [1.0, 1.0, 0.0], "where the final phase follows the warm-up at once"


def test_one_step_is_looked_at_where_the_final_phase_is_the_whole_run() -> None:
    assert [_phases(Now(steps=20), *shares) for shares in ((0.0, 1.0), (0.2, 0.4), (0.0, 0.0))] == [(0, 1), (4, 12), (0, 19)]


def test_the_penalty_is_a_norm_and_not_its_square() -> None:
    """For [[1, 1]] both are 1, but the gradient of the square would be [[4, 4]]."""
    vector_RI = torch.tensor([[1.0, 1.0]], requires_grad=True)
    far = far_from_orthonormal(vector_RI)
    far.backward()
    assert float(far.detach()) == 1.0 and vector_RI.grad is not None
    torch.testing.assert_close(vector_RI.grad, torch.tensor([[2.0, 2.0]]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("orthogonality", [0.0, 0.3])
def test_the_first_gradients(engine: Any, now: Now, architecture: str, orthogonality: float) -> None:
    """At lambda = 0 its gradient is s diag(P^T G Q^T), and P and Q have that of the penalty alone."""
    model, batch = model_of(architecture), rows_of_eight()
    plain = plain_gradients(model, batch)
    run = engine({"adalora": {"initial_rank": 5, "target_rank": 4, "orthogonality": orthogonality}}, model=model)
    found = gradients(run, split(batch, (5, 3)), now)
    wanted = {}
    free = {n: one.master.detach().clone().requires_grad_(True) for n, one in run.tune.trained.items() if not n.endswith("values")}
    total = torch.zeros((), dtype=torch.float64)
    for own in run.tune.owns:
        gradient_OI = plain[own.place.parameter]
        gradient_OI = gradient_OI.t() if own.place.module in run.tune.parts.transposed else gradient_OI
        tensors = own.masters()
        core_RR = tensors["left"].T @ gradient_OI[own.place.start : own.place.stop] @ tensors["right"].T
        wanted[own.trained["values"].name] = 16 / (5 + 1e-5) * core_RR.diagonal()[:, None]
        left_OR, right_RI = free[own.trained["left"].name], free[own.trained["right"].name]
        for gram_RR in (left_OR.T @ left_OR, right_RI @ right_RI.T):
            total = total + (gram_RR - torch.eye(5, dtype=torch.float64)).square().sum().sqrt()
        assert not own.value.delta(tensors).any()
    (orthogonality * total / len(free)).backward()
    wanted |= {name: one.grad for name, one in free.items() if one.grad is not None}
    assert gap(found, wanted) < 1e-9
    if not orthogonality:
        assert not any(found[name].any() for name in free)


def test_scores_pair_the_old_gradient_with_the_new_value(engine: Any, now: Now) -> None:
    """At the first step lambda is 0 before and not after: scored before the step it would have no sensitivity."""
    run = engine({"adalora": SMALL}, model=model_of(), optimizer="adamw")
    batch = rows_of_eight()
    arrived = gradients(run, [batch], now)
    run.step([batch], now._replace(learning_rate=0.1))
    state = run.states["adalora"]
    for name, one in run.tune.trained.items():
        torch.testing.assert_close(state[f"sensitivity {name}"], 0.15 * (one.master.detach() * arrived[name]).abs())
    assert all(state[f"sensitivity {name}"].any() for name in values_of(run))


def test_scores_see_clipped_gradients_summed_over_micro_batches(engine: Any, now: Now) -> None:
    batch = rows_of_eight()
    run = engine({"adalora": SMALL}, model=model_of(), optimizer=[{"clip": {"norm": 1e-3}}, "adamw"])
    arrived = gradients(run, [batch], now)
    norm = torch.cat([one.flatten() for one in arrived.values()]).norm()
    run.step(split(batch, (3, 1, 4)), now._replace(learning_rate=0.1))
    for name, one in run.tune.trained.items():
        wanted = 0.15 * (one.master.detach() * arrived[name]).abs() * 1e-3 / (norm + 1e-6)
        torch.testing.assert_close(run.states["adalora"][f"sensitivity {name}"], wanted)


def test_the_budget_is_met_at_every_step_and_the_last_choice_is_fixed(engine: Any, now: Now) -> None:
    """Four matrices: 12 triplets at first, 8 in the end. Twenty steps, the first 4 and the last 8 without a new choice."""
    run = engine({"adalora": {**SMALL, "warmup": 0.2, "final": 0.4}}, model=model_of(), optimizer="adamw")
    counts, last = [], []
    for i in range(20):
        go(run, now, 1, first=i)
        counts.append(int(stays(run).sum()))
        if i == 11:
            scores = copy.deepcopy(run.states["adalora"])
        last += [stays(run)] if i >= 12 else []
    assert counts == [int(8 + 4 * excess(i, 4, 12)) for i in range(20)]
    assert counts[:5] == [12] * 5 and counts[5] == 10 and counts[12:] == [8] * 8
    assert all(torch.equal(one, last[0]) for one in last)
    looked = {name: value for name, value in run.states["adalora"].items() if isinstance(value, Tensor)}
    assert looked and all(torch.equal(value, scores[name]) for name, value in looked.items())
    ranks = [int((values != 0).sum()) for values in values_of(run).values()]
    assert len(set(ranks)) > 1, "the budget is shared by all matrices, and not by each alone"
    for own in run.tune.owns:
        assert all(row.any() for row in own.masters()["right"]) and all(column.any() for column in own.masters()["left"].T)


def test_pruned_triplets_may_come_back_before_the_final_phase(engine: Any, now: Now) -> None:
    run = engine({"adalora": {**SMALL, "warmup": 0.0, "final": 0.0, "every": 3}}, model=model_of(), optimizer="adamw")
    go(run, now, 4)
    assert int(stays(run).sum()) == int(8 + 4 * excess(3, 0, 20)) < 12
    go(run, now, 1, first=4)
    assert int(stays(run).sum()) == 12


def test_steps_without_rows_move_no_pruning(engine: Any, now: Now) -> None:
    """Every third step, of which 0 and 3 are not heard of: nothing goes at 1, and at 4 what was due."""
    run = engine({"adalora": {**SMALL, "warmup": 0.0, "final": 0.0, "every": 3}}, model=model_of(), optimizer="adamw")
    counts = []
    for step in (1, 4):
        go(run, now, 1, first=step)
        counts.append(int(stays(run).sum()))
    assert counts == [12, int(8 + 4 * excess(4, 0, 19))] == [12, 9]


def test_the_final_phase_begins_with_a_pruning(engine: Any, now: Now) -> None:
    """At step 11 of 20, where every third would be 9 and 12; what was pruned at 9 is back at 10."""
    run = engine({"adalora": {**SMALL, "warmup": 0.0, "final": 0.45, "every": 3}}, model=model_of(), optimizer="adamw")
    counts = []
    for step in (9, 10, 11):
        go(run, now, 1, first=step)
        counts.append(int(stays(run).sum()))
    assert counts == [8, 12, 8]


def test_the_end_of_a_run_that_stops_early_prunes_once_more(engine: Any, now: Now) -> None:
    run = engine({"adalora": {**SMALL, "final": 0.0, "every": 3}}, model=model_of(), optimizer="adamw")
    go(run, now, 15)
    assert int(stays(run).sum()) > 8
    before = values_of(run)
    end(run, now)
    assert int(stays(run).sum()) == 8
    for name, values in values_of(run).items():
        assert all(float(value) in (0.0, float(old)) for value, old in zip(values, before[name], strict=True))


def test_ties_leave_exactly_the_budget(engine: Any, now: Now) -> None:
    """Where all scores are equal, a threshold would prune every triplet; the first ones stay, however many there are."""
    run = engine({"adalora": {**SMALL, "initial_rank": 6}}, model=model_of())
    run.tune.set({name: torch.ones_like(values) for name, values in values_of(run).items()})
    services = run.services("adalora", now)
    state: State = {}
    for tensors in triplets(services).values():
        for one in tensors.values():
            look(state, one, 0.85, 0.85)
    prune(state, services, 5)
    assert stays(run).tolist() == [True] * 5 + [False] * 19


def test_what_stays_is_most_important_over_all_places(engine: Any, now: Now) -> None:
    """Five of twelve triplets, by the product of two random scores for every number."""
    run = engine({"adalora": SMALL}, model=model_of())
    run.tune.set({name: torch.ones_like(values) for name, values in values_of(run).items()})
    rng = torch.Generator().manual_seed(0)
    state: State = {
        f"{kind} {name}": torch.rand(one.master.shape, generator=rng, dtype=torch.float64)
        for name, one in run.tune.trained.items()
        for kind in ("sensitivity", "uncertainty")
    }
    prune(state, run.services("adalora", now), 5)
    scores = []
    for own in run.tune.owns:
        left_OR, values_R1, right_RI = (
            state[f"sensitivity {name}"] * state[f"uncertainty {name}"]
            for name in (own.trained[part].name for part in ("left", "values", "right"))
        )
        scores += (values_R1[:, 0] + left_OR.mean(0) + right_RI.mean(1)).tolist()
    assert stays(run).tolist() == [score >= sorted(scores)[-5] for score in scores]


def test_the_target_as_initial_rank_prunes_nothing(engine: Any, now: Now) -> None:
    """What is left is a delta P diag(lambda) Q with a penalty."""
    options = {**SMALL, "initial_rank": 2, "warmup": 0.0, "final": 0.5}
    run = engine({"adalora": options}, model=model_of(), optimizer="adamw")
    bare = engine({"adalora": options}, model=model_of(), optimizer="adamw")
    bare.callbacks.clear()
    go(run, now, 20)
    go(bare, now, 20)
    end(run, now)
    assert all(torch.equal(one.master, bare.tune.trained[name].master) for name, one in run.tune.trained.items())
    assert stays(run).all()


def test_dropping_pruned_triplets_changes_nothing(engine: Any, now: Now) -> None:
    run = engine({"adalora": {**SMALL, "target_rank": 1}}, model=model_of(), optimizer="adamw")
    go(run, now, 20)
    emptied = run.tune.owns[0]
    run.tune.set({emptied.trained["values"].name: torch.zeros(3, 1)})
    folded = model_of()
    ranks = []
    for own in run.tune.owns:
        down_RI, up_OR = own.value.factors(own.masters())
        ranks.append(len(down_RI))
        assert len(down_RI) == int((own.masters()["values"] != 0).sum()) == up_OR.shape[1]
        torch.testing.assert_close(up_OR @ down_RI, own.value.delta(own.masters()))
        folded.get_parameter(own.place.parameter).data += up_OR @ down_RI
    assert ranks[0] == 0 and 0 < sum(ranks) <= 4
    torch.testing.assert_close(logits_of(run.tune.model, rows_of_eight()), logits_of(folded, rows_of_eight()))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"initial_rank": 4}, "the initial rank is 4, below the target rank of 8"),
        ({"target_rank": 0}, "`target_rank` is 0"),
        ({"every": 0}, "`every` is 0"),
        ({"warmup": 0.6}, "are no shares of one run"),
        ({"final": -0.1}, "are no shares of one run"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": 0.0}, "beta2 is 0.0"),
        ({"orthogonality": -1.0}, "the orthogonality is -1"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], what: str) -> None:
    with pytest.raises(LuthierError, match=what):
        adalora(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"initial_rank": 8},
        {"initial_rank": 1, "target_rank": 1},
        {"warmup": 0.25, "final": 0.75},
        {"warmup": 1.0, "final": 0.0},
        {"warmup": 0.0, "final": 1.0},
        {"beta1": 0.01, "beta2": 0.99},
        {"beta1": 0.99, "beta2": 0.01},
        {"orthogonality": 0.0},
        {"orthogonality": 0.01},
    ],
)
def test_options_at_the_edge_of_their_range_are_taken(options: dict[str, Any]) -> None:
    adalora(**options)


@pytest.mark.parametrize(("final", "border"), [(0.0, 19), (0.01, 19), (0.3, 14), (1.0, 0)])
def test_its_penalty_teaches_nothing_and_its_last_phase_has_a_step(final: float, border: int) -> None:
    _, term, _, freezing = adalora(final=final, warmup=0.0, orthogonality=0.3)
    assert (term.weight, term.unit, term.penalty) == (0.3, "step", True)
    assert freezing.borders(20) == [border]


def test_vectors_start_normal_and_singular_values_at_zero() -> None:
    """A standard deviation of 0.02 for P and Q, to four standard errors; other vectors for each place."""
    weight_delta = adalora(initial_rank=24)[0]
    services: Any = SimpleNamespace(rng=lambda key: torch.Generator().manual_seed(len(key)))
    place = Place("hand", "weight", "mlp_up", 0)
    tensors = weight_delta.start(place, torch.zeros(64, 96), services)
    assert {name: tuple(one.shape) for name, one in tensors.items()} == {"right": (24, 96), "values": (24, 1), "left": (64, 24)}
    assert not tensors["values"].any()
    for name in ("right", "left"):
        count = tensors[name].numel()
        assert float(tensors[name].std()) == pytest.approx(0.02, rel=4 * (2 * count) ** -0.5)
        assert abs(float(tensors[name].mean())) < 4 * 0.02 * count**-0.5
    other = weight_delta.start(place._replace(module="another"), torch.zeros(64, 96), services)
    assert not torch.equal(other["right"], tensors["right"])


def test_gradients_one_at_a_time_are_refused_by_name(engine: Any) -> None:
    with pytest.raises(LuthierError, match="`adalora` needs all gradients at once, and `per_layer` gives them one at a time"):
        engine({"adalora": SMALL}, model=model_of(), gradient_estimator="per_layer")
