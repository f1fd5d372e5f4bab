"""Losses over pairs: their numbers by hand, what they are compared with, and what else learns from the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.columns.targets import find_targets
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, PairLoss, Pairs, Reference, Side, TokenWeight, View
from luthier.methods.pair_loss._odds import log_odds, log_rest
from luthier.methods.pair_loss.wpo import SQUARES, likely_now
from luthier.models.attention import use_attention
from luthier.training.pairs import BASE_REFERENCE, CHOSEN, as_term, warnings_of
from luthier.training.services import view_of
from tests.conftest import make_batch, split
from tests.objectives import drawn, view_on
from tests.toys.helpers import gap, gradients, model_of, rows_of_pairs


def side(likely: Sequence[float], reference: Sequence[float] | None, tokens: Sequence[int]) -> Side:
    likely_P = torch.tensor(likely, dtype=torch.float64, requires_grad=True)
    base_P = torch.zeros_like(likely_P) if reference is None else torch.tensor(reference, dtype=torch.float64)
    return Side.of(likely_P, base_P.detach(), torch.tensor(tokens))


def pairs_with(chosen: Side, rejected: Side, **columns: Sequence[float]) -> Pairs:
    rows = [*range(len(chosen.targets_P))]
    batch = make_batch([(3, 1)] * len(rows))._replace(columns={name: torch.tensor(value) for name, value in columns.items()})
    view = View(batch, {}, label_N=torch.zeros(0), row_N=torch.zeros(0), position_N=torch.zeros(0))
    return Pairs(chosen, rejected, view, torch.tensor(rows), torch.tensor(rows), chosen.gained_P - rejected.gained_P)


def loss_of(name: str, pairs: Pairs, **options: Any) -> Tensor:
    part = registry.make({name: options}, ("pair_loss",))
    (value,) = (value for value in part.values if isinstance(value, PairLoss))
    return value.loss(pairs)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


GAINED = (1.2, -0.7)
"""By what the two answers of one pair gained on the reference, which found them at -20 and -31 nats."""
WANTED: list[tuple[str, dict[str, Any], float]] = [
    ("dpo", {"beta": 0.3}, -log_sigmoid(0.57)),
    ("dpo", {"beta": 0.3, "label_smoothing": 0.2}, -0.8 * log_sigmoid(0.57) - 0.2 * log_sigmoid(-0.57)),
    ("dpo", {"beta": 5.0, "length_normalized": True}, -log_sigmoid(5.0 * (1.2 / 4 + 0.7 / 8))),
    ("robust", {"beta": 0.3, "wrong": 0.2}, (0.2 * log_sigmoid(-0.57) - 0.8 * log_sigmoid(0.57)) / 0.6),
    ("ipo", {"beta": 0.4}, (1.2 / 4 + 0.7 / 8 - 1.25) ** 2),
    ("ipo", {"beta": 0.4, "length_normalized": False}, (1.9 - 1.25) ** 2),
    ("hinge", {"beta": 0.3}, 0.43),
    ("hinge", {"beta": 0.6}, 0.0),
    ("apo_zero", {"beta": 0.3}, 1 - 1 / (1 + math.exp(-0.36)) + 1 / (1 + math.exp(0.21))),
    ("apo_down", {"beta": 0.3}, 1 / (1 + math.exp(-0.36)) + 1 - 1 / (1 + math.exp(-0.57))),
    (
        "exo",
        {"beta": 0.3, "label_smoothing": 0.1},
        (log_sigmoid(0.57) - math.log(0.9)) / (1 + math.exp(-0.57)) + (log_sigmoid(-0.57) - math.log(0.1)) / (1 + math.exp(0.57)),
    ),
    ("nca", {"beta": 0.3}, -log_sigmoid(0.36) - 0.5 * log_sigmoid(-0.36) - 0.5 * log_sigmoid(0.21)),
    ("sppo_hard", {"beta": 0.25}, (1.2 - 2.0) ** 2 + (-0.7 + 2.0) ** 2),
    (
        "discopop",
        {"beta": 0.3, "temperature": 0.5},
        -log_sigmoid(0.57) * (1 - 1 / (1 + math.exp(-1.14))) + math.exp(-0.57) / (1 + math.exp(-1.14)),
    ),
    ("f_dpo", {"beta": 0.3, "divergence": "reverse_kl"}, -log_sigmoid(0.57)),
    ("f_dpo", {"beta": 0.3, "divergence": "forward_kl"}, -log_sigmoid(0.3 * (math.exp(0.7) - math.exp(-1.2)))),
    (
        "f_dpo",
        {"beta": 0.3, "divergence": "jensen_shannon"},
        -log_sigmoid(0.3 * (log_sigmoid(1.2) - log_sigmoid(-0.7))),
    ),
    (
        "f_dpo",
        {"beta": 0.3, "divergence": "alpha", "alpha": 0.25},
        -log_sigmoid(0.3 * ((1 - math.exp(-0.3)) - (1 - math.exp(0.175))) / 0.25),
    ),
    ("odpo", {"beta": 0.3, "scale": 2.0}, -log_sigmoid(0.57 - 1.0)),
    ("rpo", {"beta": 0.3, "eta": 0.4}, -log_sigmoid(0.57) + 0.4 * 18.8 / 4),
    ("rpo", {"beta": 0.3, "eta": 0.4, "form": "cumulative"}, -log_sigmoid(0.57) + 0.4 * 0.3 * 18.8),
]


@pytest.mark.parametrize(
    ("name", "options", "wanted"), WANTED, ids=lambda value: str(value) if not isinstance(value, float) else ""
)
def test_losses_with_a_reference_by_hand(name: str, options: dict[str, Any], wanted: float) -> None:
    chosen, rejected = side([-20.0 + GAINED[0]], [-20.0], [4]), side([-31.0 + GAINED[1]], [-31.0], [8])
    found = loss_of(name, pairs_with(chosen, rejected, margin=[0.5]), **options)
    assert found.tolist() == [pytest.approx(wanted, rel=1e-12)]


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    # Tokens that the model would draw have a mean log-probability of -0.5 here.
    [*WANTED, ("wpo", {"beta": 0.3}, -log_sigmoid(0.57) * math.exp(-18.8 / 4 - 31.7 / 8 + 2 * 0.5))],
    ids=lambda value: str(value) if not isinstance(value, float) else "",
)
def test_losses_with_a_reference_ask_for_it(name: str, options: dict[str, Any], wanted: float) -> None:
    """The same numbers from likelihoods of tokens, and rewards of beta times the gain."""
    (value,) = (one for one in registry.make({name: options}, ("pair_loss",)).values if isinstance(one, PairLoss))
    batch = make_batch([(6, 4), (9, 8)])._replace(groups=((0, 1),), columns={"margin": torch.tensor([0.5, 0.5])})
    where = find_targets(batch)
    base_N = torch.tensor([5.0] * 4 + [31.0 / 8] * 8, dtype=torch.float64)
    gained_N = torch.tensor([GAINED[0] / 4] * 4 + [GAINED[1] / 8] * 8, dtype=torch.float64)
    columns = {"nll": base_N - gained_N, "reference_nll": base_N, "log_sum_of_squares": torch.full_like(base_N, -0.5)}
    view = View(batch, columns, label_N=where.label_N, row_N=where.row_N, position_N=where.source_N + 1)
    assert as_term(value, BASE_REFERENCE).total(view, {}).item() == pytest.approx(wanted, rel=1e-9)
    told = [float(view.notes[name][0]) for name in ("reward chosen", "reward rejected")]
    assert told == pytest.approx([options["beta"] * one for one in GAINED], rel=1e-9)


@pytest.mark.parametrize(
    ("divergence", "logit"),
    [
        ("forward_kl", 1.0 - math.exp(50.0)),
        ("alpha", (1.0 - math.exp(0.3 * 50.0)) / 0.3),
        ("reverse_kl", -60.0),
        ("jensen_shannon", math.log(2.0) - 60.0),
    ],
)
def test_ratios_are_bounded_where_their_exponential_counts(divergence: str, logit: float) -> None:
    """Of a chosen answer that lost 60 nats; the rejected one is as likely as it was."""
    pairs = pairs_with(side([-80.0], [-20.0], [4]), side([-31.0], [-31.0], [8]))
    found = loss_of("f_dpo", pairs, beta=2.0, divergence=divergence, alpha=0.3)
    assert found.item() == pytest.approx(-2.0 * logit, rel=1e-12)


def test_losses_without_a_reference_by_hand() -> None:
    chosen, rejected = side([-2.0], None, [4]), side([-8.0], None, [8])
    pairs = pairs_with(chosen, rejected)
    assert loss_of("simpo", pairs, beta=2.0, margin=0.3).item() == pytest.approx(-log_sigmoid(2.0 * 0.5 - 0.3), rel=1e-12)
    assert loss_of("cpo", pairs, beta=0.1, label_smoothing=0.2).item() == pytest.approx(
        -0.8 * log_sigmoid(0.6) - 0.2 * log_sigmoid(-0.6), rel=1e-12
    )
    # The term of the odds, and both gradients, at mean log-likelihoods of -0.5 and -1.
    odds = loss_of("orpo", pairs)
    assert odds.item() == pytest.approx(0.320300, abs=1e-6)
    absolute = loss_of("absolute_likelihood", pairs, beta=0.1)
    assert absolute.item() == pytest.approx(0.595868, abs=1e-6)


def test_absolute_likelihoods_pull_apart() -> None:
    """The chosen answer's gradient does not depend on the rejected one; that of the rejected one is its odds."""
    for likely in (-8.0, -80.0, -0.8):
        chosen, rejected = side([-2.0], None, [4]), side([likely], None, [8])
        found = loss_of("absolute_likelihood", pairs_with(chosen, rejected), beta=0.1)
        of_chosen, of_rejected = torch.autograd.grad(found.sum(), [chosen.log_likelihood_P, rejected.log_likelihood_P])
        odds = math.exp(likely / 8) / (1 - math.exp(likely / 8))
        assert of_chosen.item() == pytest.approx(-1.1 / 4, rel=1e-12)
        assert of_rejected.item() == pytest.approx(0.1 * odds / 8, rel=1e-9)


@pytest.mark.parametrize("likely", [0.0, -1e-9, -0.6931, -0.6932, -60.0, -800.0])
def test_odds_are_finite_where_an_answer_is_certain_or_impossible(likely: float) -> None:
    for name in ("orpo", "absolute_likelihood"):
        for chosen, rejected in ((likely, -1.0), (-1.0, likely)):
            one, other = side([chosen], None, [1]), side([rejected], None, [1])
            found = loss_of(name, pairs_with(one, other))
            slopes = torch.autograd.grad(found.sum(), [one.log_likelihood_P, other.log_likelihood_P])
            assert bool(found.isfinite().all()) and all(bool(slope.isfinite().all()) for slope in slopes), (name, chosen, rejected)


@pytest.mark.parametrize("log_p", [-1e-7, -1e-4, -0.1, -0.6931, -0.6932, -1.0, -5.0, -36.0, -60.0])
def test_odds_keep_all_digits(log_p: float) -> None:
    """From either end, against 50 digits; a certain answer has the odds of one at -1e-7."""
    with localcontext() as context:
        context.prec = 50
        rest = (1 - Decimal(log_p).exp()).ln()
        wanted = float(rest), float(Decimal(log_p) - rest)
    given_P = torch.tensor([log_p], dtype=torch.float64)
    assert log_rest(given_P).item() == pytest.approx(wanted[0], rel=1e-14, abs=0.0)
    assert log_odds(given_P).item() == pytest.approx(wanted[1], rel=1e-14, abs=1e-15)
    if log_p == -1e-7:
        certain_P = torch.tensor([-1e-9, 0.0], dtype=torch.float64)
        assert log_rest(certain_P).tolist() == pytest.approx([wanted[0]] * 2, rel=1e-14)


def test_regularized_preference_optimization_in_both_forms() -> None:
    """The two forms differ by beta, too; either pulls the chosen answer up however large the margin is."""
    chosen, rejected = side([-6.0], [-8.0], [4]), side([-9.0], [-9.0], [2])
    pairs = pairs_with(chosen, rejected)
    assert loss_of("rpo", pairs, beta=0.1, eta=0.2).item() == pytest.approx(0.898139, abs=1e-6)
    assert loss_of("rpo", pairs, beta=0.1, eta=0.2, form="cumulative").item() == pytest.approx(0.718139, abs=1e-6)
    certain = pairs_with(side([-6.0], [-6000.0], [4]), side([-9000.0], [-9.0], [2]))
    found = loss_of("rpo", certain, beta=0.1, eta=0.2, form="cumulative")
    (slope,) = torch.autograd.grad(found.sum(), [certain.chosen.log_likelihood_P])
    assert slope.item() == pytest.approx(-0.02, rel=1e-12)


def test_a_pair_counts_as_much_as_its_answers_are_likely_now() -> None:
    """Relative to tokens that the model would draw, by a mean over each answer's; here of one target and of three."""
    logits, labels, rows = drawn(4, 5), [1, 4, 0, 2], [0, 1, 1, 1]
    view = view_on(logits, labels, ["nll", SQUARES], rows=rows)
    p_NV = logits.detach().softmax(-1)
    relative = [math.log(p_V[label]) - math.log(p_V.square().sum()) for p_V, label in zip(p_NV, labels, strict=True)]
    pairs = pairs_with(side([-2.0], [-2.0], [1]), side([-3.0], [-3.0], [3]))
    found = likely_now(pairs._replace(view=view, first_P=torch.tensor([0]), second_P=torch.tensor([1])))
    assert found.item() == pytest.approx(math.exp(relative[0] + sum(relative[1:]) / 3), rel=1e-12) and not found.requires_grad


def alone(batch: Batch, places: Sequence[int]) -> Batch:
    return batch.take(torch.tensor(places))._replace(groups=())


def test_other_objectives_learn_from_the_chosen_answer_alone(engine: Any, now: Now) -> None:
    """Beside a loss over pairs cross-entropy would teach the rejected answers, too."""
    batch = rows_of_pairs()
    both = engine(objective=[{"dpo": {"weight": 0.0}}, "cross_entropy"])
    plain = engine()
    wanted = gradients(plain, [alone(batch, [0, 2, 4, 6])], now)
    assert gap(gradients(both, split(batch, (4, 4)), now), wanted) < 1e-12
    result = both.step([batch], now)
    assert result.nll == pytest.approx(plain.step([alone(batch, [0, 2, 4, 6])], now).nll, rel=1e-12)


def test_a_pair_is_what_it_is_whatever_stands_beside_it(engine: Any, now: Now) -> None:
    """Margins do not depend on the other pairs, on padding, on the mate's length or on packing, and are 0 before training."""
    batch, model = rows_of_pairs(), model_of()
    use_attention(model)
    run = engine(objective="dpo", model=model)
    first = run.step([batch], now._replace(learning_rate=0.05))
    assert first.loss == pytest.approx(math.log(2.0), rel=1e-12) and first.notes["reward margin"] == 0.0
    assert first.notes["reward accuracy"] == 0.5
    margins = []
    for packs, some in ((False, (batch,)), (True, (batch,)), (False, split(batch, (2, 2, 2, 2)))):
        run.tune.packs = packs
        seen = [run.objective.see(run.tune, one, now, services_of=lambda slot: run.services(slot, now)) for one in some]
        margins.append([run.objective.terms[0].term.total(one, {}) for one in seen])
    totals = [float(sum(one)) for one in margins]
    assert totals[0] != pytest.approx(4 * math.log(2.0), rel=1e-3)
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-10)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("packs", [False, True])
def test_in_bf16_too_nothing_was_gained_before_the_first_step(engine: Any, now: Now, tune: str, packs: bool) -> None:
    """On a processor short rows had another form of attention in passes without gradients, the reference's among them: a margin of zero was
    a rounding difference."""
    model = model_of()
    use_attention(model)
    run = engine(tune, model=model, objective="dpo", dtype=torch.bfloat16)
    run.tune.packs = packs
    found = run.step([rows_of_pairs()], now)
    assert found.loss == pytest.approx(math.log(2.0), rel=1e-6) and found.notes["reward margin"] == 0.0


def test_token_weights_count_in_both_likelihoods(engine: Any, now: Now) -> None:
    """A weight counted in the model's likelihood and not in the reference's: the margin before training was not 0."""
    run = engine(objective="dpo", token_weight="dft")
    found = run.step([rows_of_pairs()], now)
    assert found.loss == pytest.approx(math.log(2.0), rel=1e-12) and found.notes["chosen log-likelihood"] > -1.0


def test_what_the_longer_answer_has_beyond_the_shorter_counts_less(engine: Any, now: Now) -> None:
    """Answers of 4 and 2 targets, and of 2 and 3, whose rows stand in turn: the first so many count, whichever answer is longer."""
    (value,) = registry.make({"length_desensitization": {"alpha": 0.3}}, ("token_weight",)).values
    assert isinstance(value, TokenWeight) and value.weigh is not None and value.check is not None
    batch = make_batch([(6, 4), (4, 2), (5, 2), (7, 3)])._replace(groups=((0, 1), (2, 3)))
    row_N = torch.tensor([1, 0, 0, 3, 0, 1, 2, 3, 0, 2, 3])
    view = View(batch, {}, label_N=row_N, row_N=row_N, position_N=row_N, weight_N=torch.ones(11, dtype=torch.float64))
    assert value.weigh(view).tolist() == [1, 1, 1, 1, 0.3, 1, 1, 1, 0.3, 1, 0.3]
    with pytest.raises(LuthierError, match="needs rows with a chosen and a rejected answer"):
        value.check(make_batch([(5, 2)]))
    with pytest.raises(RuntimeError, match="reads the reference without asking for it"):
        view.gains()
    rows, found = rows_of_pairs(), {}
    for alpha in (0.0, 0.3, 1.0, None):
        weight = {} if alpha is None else {"token_weight": {"length_desensitization": {"alpha": alpha}}}
        # GPT-2 alone computes everything in the type of its weights.
        run = engine(objective="dpo", model=model_of("gpt2"), **weight)
        assert run.step([rows], now._replace(learning_rate=0.0)).loss == pytest.approx(math.log(2.0), rel=1e-12), (
            "weights count in the reference, too"
        )
        found[alpha] = gradients(run, split(rows, (2, 4, 2)), now)
    assert gap(found[1.0], found[None]) == 0.0
    # At the start a gradient is linear in the weights.
    wanted = {name: 0.7 * found[0.0][name] + 0.3 * found[1.0][name] for name in found[1.0]}
    assert gap(found[0.3], wanted) < 1e-7 and gap(found[0.3], found[1.0]) > 0.01


def test_a_stored_reference_is_the_base_where_it_holds_the_bases_numbers(engine: Any, now: Now) -> None:
    batch = rows_of_pairs()
    view = engine().services("full", now).forward(batch, ["nll"])
    likely_B = -view.sum_rows(view["nll"])
    chosen_B, rejected_B = likely_B[0::2].repeat_interleave(2), likely_B[1::2].repeat_interleave(2)
    held = batch._replace(columns={**batch.columns, "reference_chosen": chosen_B, "reference_rejected": rejected_B})
    found = []
    for objective in ("dpo", ["dpo", "stored_reference"]):
        run = engine(objective=objective)
        for step in range(3):
            run.step([held], now._replace(step=step))
        found.append(gradients(run, [held], now))
    assert gap(found[1], found[0]) < 1e-9


def test_a_reference_is_stored_with_answers_that_stand_by_themselves(engine: Any, now: Now) -> None:
    """It was taken for 0 where rows are no pairs, without a word."""
    batch = rows_of_pairs()._replace(groups=(), columns={"label": torch.tensor([1.0, 0.0] * 4)})
    view = engine().services("full", now).forward(batch, ["nll"])
    held = batch._replace(columns={**batch.columns, "reference_chosen": view.log_likelihoods()})
    run = engine(objective=["apo_zero_unpaired", "stored_reference"])
    assert run.step(split(held, (3, 5)), now).loss == pytest.approx(0.5, rel=1e-12)
    (check,) = (one.term.check for one in run.objective.terms if one.term.check is not None)
    check(held)
    with pytest.raises(LuthierError, match="has no log-likelihood `reference_chosen`"):
        check(batch)


def test_a_reference_follows_at_its_steps(engine: Any, now: Now) -> None:
    """The margin is 0 again right behind a step at which the whole model becomes the reference, and not before."""
    run = engine(objective=["dpo", {"following_reference": {"sync_every": 3, "mix": 1.0}}])
    margins = [run.step([rows_of_pairs()], now._replace(step=step)).notes["reward margin"] for step in range(7)]
    assert [margin > 0.0 for margin in margins] == [False, True, True, False, True, True, False] and margins[3] == 0.0
    half = engine(objective=["dpo", {"following_reference": {"sync_every": 1, "mix": 0.25}}])
    still = engine(objective=["dpo", {"following_reference": {"sync_every": 1, "mix": 0.0}}])
    base = engine(objective="dpo")
    for step in range(2):
        told = [one.step([rows_of_pairs()], now._replace(step=step)).notes["reward margin"] for one in (half, still, base)]
    assert told[1] == pytest.approx(told[2], rel=1e-12) and 0.5 * told[2] < told[0] < 0.8 * told[2]


def test_a_reference_that_never_moves_stands_beside_what_comes_and_goes(engine: Any) -> None:
    """There is no average of numbers that are exchanged, but where the reference stays there is none to form."""
    engine("spiel", objective=["dpo", {"following_reference": {"mix": 0.0}}])
    with pytest.raises(LuthierError, match="an average over time"):
        engine("spiel", objective=["dpo", {"following_reference": {"mix": 0.5}}])


@pytest.mark.parametrize("options", [{"sync_every": 0}, {"mix": -0.1}, {"mix": 1.1}], ids=str)
def test_references_that_cannot_follow_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LuthierError, match=r"every 0 steps|the share is"):
        registry.make({"following_reference": options}, ("reference",))


@pytest.mark.parametrize(
    ("reference", "column"), [("following_reference", "following_nll"), ("model_reference", "nll of reference")]
)
def test_a_reference_is_a_constant_to_the_loss(engine: Any, now: Now, reference: str, column: str) -> None:
    """So that backward does not make its likelihoods again."""
    run = engine(objective=["dpo", reference], model=model_of())
    view = view_of(run.tune, rows_of_pairs(), run.objective.columns(), now)
    assert view["nll"].requires_grad and not view[column].requires_grad


@pytest.mark.parametrize(
    ("objective", "rows", "words"),
    [
        ("dpo", make_batch([(5, 2), (6, 3)]), "needs rows with a chosen and a rejected answer"),
        ("odpo", rows_of_pairs()._replace(columns={}), "has no number `margin`"),
        (["dpo", "stored_reference"], rows_of_pairs()._replace(columns={}), "has no log-likelihood `reference_chosen`"),
        (
            ["dpo", "stored_reference"],
            rows_of_pairs()._replace(columns={"reference_chosen": -torch.ones(8), "reference_rejected": torch.full((8,), 0.25)}),
            "has no log-likelihood `reference_rejected`",
        ),
    ],
    ids=str,
)
def test_rows_that_lack_what_a_loss_over_pairs_reads_are_refused(engine: Any, objective: Any, rows: Batch, words: str) -> None:
    checks = [one.term.check for one in engine(objective=objective).objective.terms if one.term.check is not None]
    with pytest.raises(LuthierError, match=words):
        for check in checks:
            check(rows)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"objective": ["cross_entropy", "stored_reference"]}, "nothing compares them"),
        ({"objective": ["dpo", "stored_reference", "following_reference"]}, "are both the reference"),
        ({"objective": ["simpo", "following_reference"]}, "nothing compares them"),
    ],
    ids=str,
)
def test_references_that_nothing_reads_are_refused(engine: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(LuthierError, match=words):
        engine(**keys)


def test_rules_over_a_step_do_not_choose_between_two_answers(engine: Any, now: Now) -> None:
    run = engine(objective="dpo", token_weight="random_step_rows", model=model_of())
    with pytest.raises(LuthierError, match="these rows belong together"):
        run.step([rows_of_pairs()], now)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {"beta": 0.0}),
        ("dpo", {"label_smoothing": 0.5}),
        ("robust", {"wrong": -0.1}),
        ("robust", {"wrong": 0.5}),
        ("exo", {"label_smoothing": 0.0}),
        ("exo", {"label_smoothing": 0.5}),
        ("f_dpo", {"alpha": 0.0}),
        ("f_dpo", {"alpha": 1.0}),
        ("discopop", {"temperature": 0.0}),
        ("length_desensitization", {"alpha": 1.5}),
        ("apo_zero_unpaired", {"undesirable_weight": -1.0}),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(LuthierError, match=f"{next(iter(options.values()))}"):
        registry.make({name: options}, ("pair_loss", "step_loss", "token_weight"))


def test_a_run_whose_chosen_answers_fall_is_told() -> None:
    """By the means of its first and its last tenth, whatever single steps had."""

    def history(values: Sequence[float]) -> list[dict[str, Any]]:
        return [{"step": step, "notes": {CHOSEN: value}} for step, value in enumerate(values)]

    falling = [-9.0, -11.0] + [-3.0] * 16 + [-13.0, -12.0]
    (said,) = warnings_of(history(falling))
    assert "-10.0 nats in the first steps, -12.5 in the last" in said
    assert len(warnings_of(history([-1.0, -2.0]))) == 1
    for one in (falling[::-1], [-1.0], [-1.0, -1.0], [-2.0, -1.0]):
        assert not warnings_of(history(one))
    assert not warnings_of([{"step": 1}])


def view_of_pairs(nll: Sequence[float], reference: Sequence[float]) -> View:
    """Two pairs of answers of 1 and 2 targets, and of 2 and 1."""
    batch = make_batch([(3, 1), (3, 2), (4, 2), (3, 1)])._replace(groups=((0, 1), (2, 3)))
    where = find_targets(batch)
    columns = {
        "nll": torch.tensor(nll, dtype=torch.float64, requires_grad=True),
        "reference_nll": torch.tensor(reference, dtype=torch.float64),
    }
    return View(batch, columns, label_N=where.label_N, row_N=where.row_N, position_N=where.source_N + 1)


def test_what_is_told_of_pairs_by_hand() -> None:
    """The first pair is told apart as it should be, and the second not at all, by likelihood or by gain."""
    view = view_of_pairs([1.0, 1.5, 2.5, 3.0, 1.0, 4.0], [3.0, 1.0, 1.0, 4.5, 1.5, 6.0])
    term = as_term(PairLoss(lambda pairs: pairs.margin_P, reference=True, reward_scale=0.25), BASE_REFERENCE)
    assert term.total(view, {}).item() == pytest.approx(4.0 + 0.0, rel=1e-12)
    assert {name: one.tolist() for name, one in view.notes.items()} == {
        "chosen log-likelihood": [-1.0, -4.0],
        "rejected log-likelihood": [-4.0, -4.0],
        "reward margin": [1.0, 0.0],
        "reward accuracy": [1.0, 0.5],
        "preference accuracy": [1.0, 0.5],
        "reward chosen": [0.5, 0.5],
        "reward rejected": [-0.5, 0.5],
        "chosen tokens": [1, 2],
        "rejected tokens": [2, 1],
    }
    worse = view_of_pairs([5.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0] * 6)
    term.total(worse, {})
    assert worse.notes["preference accuracy"].tolist() == [0.0, 0.0] and worse.notes["reward accuracy"].tolist() == [0.0, 0.5]


def test_nothing_is_learnt_through_the_reference() -> None:
    """Also where it is made of the model's own numbers."""
    view = view_of_pairs([1.0, 1.5, 2.5, 3.0, 1.0, 4.0], [0.0] * 6)
    own = Reference(lambda view: 3.0 * view.log_likelihoods(), columns=("nll",))
    term = as_term(PairLoss(lambda pairs: pairs.margin_P, reference=True), own)
    (slope_N,) = torch.autograd.grad(term.total(view, {}), view["nll"])
    assert slope_N.tolist() == [-1.0, 1.0, 1.0, -1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "options", "other", "others"),
    [
        ("robust", {"wrong": 0.0}, "dpo", {}),
        ("rpo", {"beta": 0.1, "eta": 0.0}, "dpo", {}),
        ("f_dpo", {"divergence": "reverse_kl"}, "dpo", {}),
        ("odpo", {"scale": 0.0}, "dpo", {}),
        ("wpo", {}, "dpo", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_becomes_something_simpler(name: str, options: dict[str, Any], other: str, others: dict[str, Any]) -> None:
    """As its card says: at the option that does nothing, and of a model that finds every token equally likely."""
    sides = side([-12.0, -9.0], [-13.0, -8.0], [4, 3]), side([-6.0, -15.0], [-7.0, -13.0], [2, 5])
    pairs = pairs_with(*sides, margin=[0.7, 0.1])
    even = torch.full((14,), math.log(1 / 250), dtype=torch.float64)
    batch = make_batch([(6, 4), (4, 2), (5, 3), (7, 5)])._replace(groups=((0, 1), (2, 3)))
    rows = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3])
    view = View(batch, {"nll": -even, "log_sum_of_squares": even}, label_N=rows, row_N=rows, position_N=rows)
    uniform = pairs._replace(view=view, first_P=torch.tensor([0, 2]), second_P=torch.tensor([1, 3]))
    found = loss_of(name, uniform if name == "wpo" else pairs, **options)
    assert found.tolist() == pytest.approx(loss_of(other, pairs, **others).tolist(), rel=1e-12)


def test_without_their_own_part_they_are_cross_entropy(engine: Any, now: Now) -> None:
    """Of the chosen answers: ORPO of weight 0 over the step's tokens, absolute likelihood of beta 0 over each answer's."""
    batch = rows_of_pairs()
    first = alone(batch, [0, 2, 4, 6])
    assert gap(gradients(engine(objective={"orpo": {"weight": 0.0}}), [batch], now), gradients(engine(), [first], now)) < 1e-12
    found = gradients(engine(objective={"absolute_likelihood": {"beta": 0.0}}), [batch], now)
    weight = engine(token_weight="row_balance")
    wanted = gradients(weight, [first], now)
    size = {name: float(found[name].norm() / wanted[name].norm()) for name in wanted if float(wanted[name].norm()) > 1e-9}
    assert max(size.values()) == pytest.approx(min(size.values()), rel=1e-9), "each answer counts alike"
