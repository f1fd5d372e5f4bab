"""Losses of a whole step: by hand, whatever micro-batches its rows are in, and the rows that they need."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from luthier import registry
from luthier.columns.targets import find_targets
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, Reference, RowMap, RowTable, StepLoss, View
from luthier.rows.encode import encode_all
from luthier.rows.read import read
from luthier.training.pairs import BASE_REFERENCE
from luthier.training.whole import as_term, part, slopes_of
from luthier.training.whole import value_of as value_of_rows
from luthier.training.world import World
from tests.conftest import make_batch, split
from tests.contracts.fixtures import shake
from tests.toys.helpers import gap, gradients, model_of, rows_of_pairs, toys  # noqa: F401
from tests.unit.test_rows_encode import tiny_tokenizer


def value_of(name: str, **options: Any) -> StepLoss:
    return next(one for one in registry.make({name: options}, ("step_loss",)).values if isinstance(one, StepLoss))


def table(value: list[Any], **columns: list[float]) -> RowTable:
    groups = tuple((place, place + 1) for place in range(0, len(value), 2))
    numbers = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    return RowTable(torch.tensor(value, dtype=torch.float64, requires_grad=True), groups, numbers, Now())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_kahneman_tversky_by_hand() -> None:
    """Gains of 3 (liked) and 1 (disliked) nats against a mean gain of 0.5 on other answers; no gradient goes through that."""
    rows = table([3.0, 1.5, 1.0, -0.5], label=[1.0, 1.0, 0.0, 0.0])
    found = value_of("kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5).loss(rows)
    assert found.item() == pytest.approx(1.5 * (1 - sigmoid(0.2 * 2.5)) + 0.5 * (1 - sigmoid(-0.2 * 0.5)), rel=1e-12)
    (slope,) = torch.autograd.grad(found, rows.value)
    up, down = sigmoid(0.5), sigmoid(-0.1)
    assert slope.tolist() == pytest.approx([-1.5 * 0.2 * up * (1 - up), 0.0, 0.5 * 0.2 * down * (1 - down), 0.0], rel=1e-12)


def test_the_model_is_not_taken_to_have_moved_backwards() -> None:
    rows = table([3.0, -4.0], label=[1.0, 1.0])
    assert value_of("kto", beta=0.2).loss(rows).item() == pytest.approx(1 - sigmoid(0.6), rel=1e-12)


def test_a_small_gain_of_other_answers_counts() -> None:
    """A mean of 0.2 nats, of 1.4 and -1, against which a liked answer gained 2.8 and a disliked one nothing."""
    rows = table([3.0, 1.4, 0.2, -1.0], label=[1.0, 1.0, 0.0, 0.0])
    found = value_of("kto", beta=0.5).loss(rows).item()
    assert found == pytest.approx((1 - sigmoid(0.5 * 2.8)) + (1 - sigmoid(0.0)), rel=1e-12)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_either_verdict_may_count_for_nothing_but_not_both(name: str) -> None:
    for liked, disliked in ((0.0, 1.0), (1.0, 0.0), (0.3, 0.2), (2.0, 2.0)):
        assert value_of(name, desirable_weight=liked, undesirable_weight=disliked).weight == 1.0
    for liked, disliked in ((0.0, 0.0), (-0.1, 1.0), (1.0, -0.1)):
        with pytest.raises(LuthierError, match=f"the weights are {liked} and {disliked}"):
            value_of(name, desirable_weight=liked, undesirable_weight=disliked)


def test_unpaired_answers_are_held_to_the_reference_one_by_one() -> None:
    """Gains of 3 (liked), 1 (disliked) and -2 nats (liked): no answer counts in another's loss."""
    rows = table([3.0, 1.0, -2.0], label=[1.0, 0.0, 1.0])._replace(groups=())
    found = value_of("apo_zero_unpaired", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5).loss(rows)
    wanted = 1.5 * (1 - sigmoid(0.6)) + 0.5 * sigmoid(0.2) + 1.5 * (1 - sigmoid(-0.4))
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    (slope,) = torch.autograd.grad(found, rows.value)
    slopes = [-1.5 * 0.2, 0.5 * 0.2, -1.5 * 0.2]
    assert slope.tolist() == pytest.approx(
        [one * sigmoid(x) * (1 - sigmoid(x)) for one, x in zip(slopes, (0.6, 0.2, -0.4), strict=True)], rel=1e-12
    )


def test_a_liked_and_a_disliked_answer_are_half_of_a_pair(engine: Any, now: Now) -> None:
    """As its card says, of a model that has moved from the reference."""
    pairs = rows_of_pairs()
    verdicts = {"label": torch.tensor([1.0, 0.0] * 4)}
    batches = {"apo_zero": pairs, "apo_zero_unpaired": pairs._replace(groups=(), columns=verdicts)}
    found, losses = {}, {}
    for objective, batch in batches.items():
        run = engine(objective=objective, optimizer="sgd")
        shake(run)
        found[objective] = gradients(run, split(batch, (4, 4)), now)
        losses[objective] = run.step(split(batch, (4, 4)), now).loss
    assert losses["apo_zero"] != pytest.approx(1.0, rel=1e-3)
    assert losses["apo_zero_unpaired"] == pytest.approx(losses["apo_zero"] / 2, rel=1e-12)
    assert gap(found["apo_zero_unpaired"], {name: one / 2 for name, one in found["apo_zero"].items()}) < 1e-9


def test_optimal_transport_compares_quantiles() -> None:
    """Two pairs whose margins are 4 and 1, and 2 and 3 under the reference: sorted, 1 beside 2 and 4 beside 3."""
    rows = table([[-10.0, -10.0], [-14.0, -12.0], [-6.0, -6.0], [-7.0, -9.0]])
    wanted = -math.log(sigmoid(-0.5)) - math.log(sigmoid(0.5))
    assert value_of("aot", beta=0.5).loss(rows).item() == pytest.approx(wanted, rel=1e-12)
    softer = sum(-0.9 * math.log(sigmoid(x)) - 0.1 * math.log(sigmoid(-x)) for x in (-0.5, 0.5))
    assert value_of("aot", beta=0.5, label_smoothing=0.1).loss(rows).item() == pytest.approx(softer, rel=1e-12)
    unpaired = table([2.0, 3.0, 1.0, -1.0])
    wanted = -math.log(sigmoid(0.5 * 2)) - math.log(sigmoid(-0.5 * 1))
    assert value_of("aot_unpaired", beta=0.5).loss(unpaired).item() == pytest.approx(wanted, rel=1e-12)


def test_each_answer_stands_beside_its_likelihood_under_the_reference() -> None:
    batch = make_batch([(3, 1), (4, 2), (3, 1)])
    where = find_targets(batch)
    columns = {"nll": torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)}
    view = View(batch, columns, label_N=where.label_N, row_N=where.row_N, position_N=where.source_N + 1)
    view.reference_B = torch.tensor([-7.0, -8.0, -9.0], dtype=torch.float64)
    assert value_of("aot").value(view, {}).tolist() == [[-1.0, -7.0], [-2.5, -8.0], [-4.0, -9.0]]
    assert value_of("aot_unpaired").value(view, {}).tolist() == [6.0, 5.5, 5.0]


def test_answers_are_classified_against_the_middle_of_the_step() -> None:
    rows = table([2.0, 1.0, 4.0, -2.0])
    middle = 0.1 * (3.0 - 0.5) / 2
    wanted = -sum(math.log(sigmoid(0.1 * x - middle)) for x in (2, 4)) - sum(math.log(sigmoid(middle - 0.1 * x)) for x in (1, -2))
    found = value_of("bco", beta=0.1).loss(rows)
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    (slope,) = torch.autograd.grad(found, rows.value)
    assert slope[0].item() == pytest.approx(-0.1 * sigmoid(middle - 0.2), rel=1e-12), "a gradient went through the middle"
    plain = -sum(math.log(sigmoid(x)) for x in (0.2, 0.4, -0.1, 0.2))
    assert value_of("bco", beta=0.1, shift=False).loss(rows).item() == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_one_pair_a_step_is_dpo(engine: Any, now: Now, name: str) -> None:
    pair = split(rows_of_pairs(), (2, 6))[0]
    found = []
    for objective in (name, "dpo"):
        run = engine(objective=objective, optimizer="sgd")
        told = [run.step([pair], now._replace(step=step)).loss for step in range(3)]
        found.append((told, gradients(run, [pair], now)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)


def test_the_loss_that_is_told_is_that_of_the_whole_step(engine: Any, now: Now) -> None:
    """Parts of micro-batches add up to it, however the step is split, also where the model drops numbers while it learns."""
    losses = []
    for sizes in ((8,), (2, 4, 2), (2, 2, 2, 2)):
        run = engine(objective="kto", optimizer="sgd")
        batch = rows_of_pairs()
        batch = batch._replace(columns={"label": torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])})
        losses.append([run.step(split(batch, sizes), now._replace(step=step)).loss for step in range(3)])
    assert losses[0][2] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12) and losses[2] == pytest.approx(losses[0], rel=1e-12)
    assert losses[0][0] == pytest.approx(0.5, rel=1e-12)


def test_rows_stand_beside_the_answer_to_the_next_one() -> None:
    rows = list(
        read(
            [
                {"id": "a", "prompt": "1?", "completion": "one", "label": True},
                {
                    "id": "b",
                    "messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "two"}],
                    "label": False,
                },
            ]
        )
    )
    map_ = next(one for one in registry.make("kto", ("step_loss",)).values if isinstance(one, RowMap))
    first, second = map_.map(rows, None)  # type: ignore[arg-type]
    own, other = first.fields["members"]
    assert (first.id, first.shape, first.columns["label"], second.columns["label"]) == ("a", "members", 1, 0)
    assert own.fields["completion"] == "one" and other.fields["prompt"] == "1?"
    assert other.fields["completion"][0]["content"] == "two" and other.id == "a/other"
    assert second.fields["members"][1].fields["completion"] == "one"


SYSTEM, USER, ASSISTANT = ({"role": role, "content": role} for role in ("system", "user", "assistant"))


def test_the_answer_of_a_conversation_is_its_last_message() -> None:
    """Each of three rows stands beside the answer to the next, the last beside that to the first."""
    conversations = [[SYSTEM, USER, ASSISTANT], [USER, ASSISTANT], [USER, ASSISTANT, USER, ASSISTANT]]
    answers = [[*one[:-1], {**ASSISTANT, "content": f"answer {number}"}] for number, one in enumerate(conversations)]
    rows = list(read([{"id": f"{i}", "messages": one, "label": i % 2, "score": 0.5} for i, one in enumerate(answers)]))
    map_ = next(one for one in registry.make("kto", ("step_loss",)).values if isinstance(one, RowMap))
    for number, row in enumerate(map_.map(rows, None)):  # type: ignore[arg-type]
        own, other = row.fields["members"]
        assert own.fields["prompt"] == other.fields["prompt"] == answers[number][:-1]
        assert own.fields["completion"] == answers[number][-1:]
        assert other.fields["completion"] == answers[(number + 1) % 3][-1:]
        assert "messages" not in own.fields and own.columns == {"score": 0.5} and row.columns["label"] == number % 2


@pytest.mark.parametrize("messages", [[ASSISTANT], [USER], [USER, ASSISTANT, USER]], ids=len)
def test_conversations_without_a_prompt_or_an_answer_are_refused(messages: list[dict[str, str]]) -> None:
    map_ = next(one for one in registry.make("apo_zero_unpaired", ("step_loss",)).values if isinstance(one, RowMap))
    (row,) = read([{"messages": messages, "label": True}])
    with pytest.raises(LuthierError, match="needs rows with a prompt and an answer, and this row is `messages`"):
        map_.map([row], None)  # type: ignore[arg-type]


def test_answers_with_a_verdict_stand_by_themselves() -> None:
    """And none is told to be learnt although it is a bad one: the verdict stands beside it, not in it."""
    rows = list(read([{"id": "a", "prompt": "1?", "completion": "no", "label": False}]))
    map_ = next(one for one in registry.make("apo_zero_unpaired", ("step_loss",)).values if isinstance(one, RowMap))
    mapped = map_.map(rows, None)  # type: ignore[arg-type]
    found = encode_all(mapped, tiny_tokenizer())
    assert [(one.id, one.columns, one.mates) for one in found.rows] == [("a", {"label": 0}, ())] and not found.notes
    assert encode_all(rows, tiny_tokenizer()).notes, "the row as it was is told to be a bad answer"
    with pytest.raises(LuthierError, match="the row has no label `label`"):
        map_.map(list(read([{"prompt": "1?", "completion": "one"}])), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"prompt": "1?", "completion": "one"}] * 2, "the row has no label `label`"),
        ([{"prompt": "1?", "completion": "one", "label": True}], "there is one row"),
        ([{"text": "one", "label": 1}, {"text": "two", "label": 0}], "needs rows with a prompt and an answer"),
    ],
    ids=str,
)
def test_rows_without_a_verdict_or_an_answer_are_refused(records: list[dict[str, Any]], words: str) -> None:
    map_ = next(one for one in registry.make("kto", ("step_loss",)).values if isinstance(one, RowMap))
    with pytest.raises(LuthierError, match=words):
        map_.map(list(read(records)), None)  # type: ignore[arg-type]


def test_sources_without_a_backward_pass_look_at_the_step_again(engine: Any, now: Now, toys: None) -> None:  # noqa: F811
    """A loss at other weights would have been that of the weights before, had the step not been looked at anew."""
    run = engine(objective="kto", gradient_estimator="zeroth_order", optimizer="sgd")
    batch = rows_of_pairs()._replace(columns={"label": torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])})
    found = [run.step([batch], now._replace(step=step)).loss for step in range(2)]
    assert found[0] == pytest.approx(0.5, abs=0.01) and found[1] != found[0]


def test_gradients_are_right_by_differences(engine: Any, now: Now) -> None:
    """Of a step in three micro-batches, along the gradient itself."""
    batch = rows_of_pairs()._replace(columns={"label": torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])})
    # GPT-2 alone computes everything in the type of its weights.
    run = engine(objective={"bco": {"shift": False}}, optimizer="sgd", model=model_of("gpt2"))
    run.step([batch], now)
    slopes = gradients(run, split(batch, (2, 4, 2)), now)
    size = math.sqrt(sum(float(one.square().sum()) for one in slopes.values()))
    masters = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}

    def moved(by: float) -> float:
        run.tune.set({name: masters[name] + by * slopes[name] / size for name in masters})
        return float(run.step(split(batch, (2, 4, 2)), now._replace(learning_rate=0.0)).loss)

    assert (moved(1e-5) - moved(-1e-5)) / 2e-5 == pytest.approx(size, rel=1e-6)
    assert gap(gradients(run, [batch], now), gradients(run, split(batch, (4, 4)), now)) < 1e-10


SQUARES = StepLoss(lambda view, own: -view.log_likelihoods(), lambda table: (table.value**2).sum())


def rows_with(numbers: list[float], **options: Any) -> tuple[Batch, torch.Tensor]:
    """A micro-batch of so many rows, one target each, and what a loss made of them."""
    batch = make_batch([(3, 1)] * len(numbers), **options)
    return batch, torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def test_the_parts_of_a_loss_are_together_the_loss_and_its_gradient() -> None:
    """9 + 4 + 1 of rows at 3 in one micro-batch, and at 2 and -1 in another."""
    found = [rows_with([3.0]), rows_with([2.0, -1.0], first=1)]
    slopes = slopes_of(SQUARES, found, Now(), World())
    assert {id: one.item() for id, one in slopes.of_row.items()} == {"row0": 6.0, "row1": 4.0, "row2": -2.0}
    assert slopes.rest == pytest.approx(-14.0)
    views = [View(batch, {}, label_N=one[:0], row_N=one[:0], position_N=one[:0]) for batch, one in found]
    parts = [part(slopes, view, found[i][1], first=i == 0) for i, view in enumerate(views)]
    assert [one.item() for one in parts] == pytest.approx([18.0 - 14.0, 8.0 + 2.0])
    (slope,) = torch.autograd.grad(parts[1], found[1][1])
    assert slope.tolist() == [4.0, -2.0]
    other, numbers = rows_with([7.0], first=9)
    view = View(other, {}, label_N=numbers[:0], row_N=numbers[:0], position_N=numbers[:0])
    assert part(slopes, view, numbers, first=False).item() == 0.0, "a row that takes no part has a slope"


def test_a_step_without_rows_has_no_loss() -> None:
    assert slopes_of(SQUARES, [], Now(), World()) == ({}, 0.0)
    assert slopes_of(SQUARES, [rows_with([])], Now(), World()) == ({}, 0.0)


def test_what_is_missing_to_a_loss_is_told_once_by_all_processes_together() -> None:
    """Two processes run a micro-batch each: half of -14 is told by each of them."""

    class Two:
        def gather_plain(self, value: Any) -> list[Any]:
            return [value, True if isinstance(value, bool) else []]

    two: Any = Two()
    assert slopes_of(SQUARES, [rows_with([3.0, 2.0, -1.0])], Now(), two).rest == pytest.approx(-7.0)


@pytest.mark.parametrize(("unit", "wanted"), [("row", 5.0), ("group", 2.0), ("step", 5.0)])
def test_units_of_a_loss_are_those_that_have_targets(unit: Any, wanted: float) -> None:
    """Of three pairs one has an answer without targets, and of two rows alone one. What is of the step alone counts rows, too: it is
    multiplied with them, so that no split into micro-batches divides it."""
    batch = make_batch([(3, 1), (3, 2), (3, 1), (3, 0), (3, 2), (3, 2), (3, 1), (3, 0)])._replace(groups=((0, 1), (2, 3), (4, 5)))
    count = as_term(SQUARES._replace(unit=unit), BASE_REFERENCE).count
    assert count is not None and count(batch) == wanted
    # Without columns it is made of whatever rows there are.
    bare = as_term(SQUARES._replace(unit=unit, columns=()), BASE_REFERENCE).count
    assert bare is not None and bare(batch) == {"row": 8.0, "group": 3.0, "step": 8.0}[unit]


def test_nothing_is_learnt_through_the_reference_of_a_whole_step() -> None:
    batch, _ = rows_with([0.0, 0.0])
    where = find_targets(batch)
    nll = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    view = View(batch, {"nll": nll}, label_N=where.label_N, row_N=where.row_N, position_N=where.source_N + 1)
    own = Reference(lambda view: 3.0 * view.log_likelihoods(), columns=("nll",))
    gains = value_of_rows(SQUARES._replace(value=lambda view, own: view.gains(), reference=True), view, {}, own)
    assert gains.tolist() == [2.0, 4.0]
    (slope,) = torch.autograd.grad(gains.sum(), nll)
    assert slope.tolist() == [-1.0, -1.0]
