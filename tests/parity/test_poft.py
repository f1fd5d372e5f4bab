"""Preference-oriented fine-tuning: the paper's loss by hand, its gradient as weighted cross-entropy, and what it refuses."""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Now, RowLikelihood
from luthier.registry import part
from luthier.rows.read import read
from luthier.rows.select import score_rows
from tests.conftest import split
from tests.objectives import gradient_of, loss_of, view_on
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight

SCORE = "aligned_log_likelihood"
RANDOM = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
LABELS = [i % 7 for i in range(9)]
ROWS = [0, 0, 0, 0, 1, 1, 2, 2, 2]


def scored(*scores: float, name: str = SCORE) -> dict[str, Any]:
    return {"columns": {name: torch.tensor(scores, dtype=torch.float64)}}


def logits_with(*losses: float) -> list[list[float]]:
    """Logits of two words, of which the first has these losses."""
    return [[-loss - log(1 - exp(-loss)), 0.0] for loss in losses]


def row_means(logits: Tensor) -> Tensor:
    """Each row's mean loss."""
    loss_N = functional.cross_entropy(logits, torch.tensor(LABELS), reduction="none")
    row_N = torch.tensor(ROWS)
    return torch.stack([loss_N[row_N == row].mean() for row in range(3)])


def slope(total: Any) -> Tensor:
    leaf = RANDOM.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    return gradient


def own_slope(*scores: float, **options: Any) -> Tensor:
    found = gradient_of({"poft": options}, RANDOM.tolist(), LABELS, rows=ROWS, **scored(*scores))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("beta", "gamma", "score", "loss", "weight"),
    [
        (1.0, 0.0, -0.5, 0.974077, 0.622459),
        (2.0, 0.0, -0.5, 1.313262, 1.462117),
        (1.0, 0.0, -1.0, log(2), 0.5),
        (0.4, 0.0, -1.0, log(2), 0.2),
        # u = 2 * (-1 + 0.5) + 1 = 0.
        (2.0, 1.0, -0.5, log(2), 1.0),
        # The score of two models is -1.5 on average.
        (1.0, 0.0, -1.5, 0.474077, 0.377541),
    ],
)
def test_a_mean_loss_of_one_nat_by_hand(beta: float, gamma: float, score: float, loss: float, weight: float) -> None:
    """Two targets, 0.4 and 1.6 nats. What the reversed preference would give, -0.377541, has another sign."""
    logits, spec = logits_with(0.4, 1.6), {"poft": {"beta": beta, "gamma": gamma}}
    assert loss_of(spec, logits, [0, 0], **scored(score)) == pytest.approx(loss, abs=1e-6)
    plain = torch.tensor(gradient_of("cross_entropy", logits, [0, 0]))
    found = torch.tensor(gradient_of(spec, logits, [0, 0], **scored(score)))
    assert torch.allclose(found, weight * plain, atol=1e-6)


def test_several_models_are_averaged_before_the_sigmoid() -> None:
    """Scores -0.5 and -2.5: the mean of two losses would be 0.587745."""
    by_model = {"one": RowLikelihood(-5.0, 10, 20), "two": RowLikelihood(-5.0, 2, 20)}
    pool = [{"prompt": "a", "completion": "b"}]
    spec = {"likelihood": {"models": list(by_model)}}
    (score,) = score_rows(pool, spec, likely=lambda model, rows: [by_model[model]] * len(rows)).scores
    assert score == -1.5
    assert loss_of("poft", logits_with(1.0), [0], **scored(score)) == pytest.approx(0.474077, abs=1e-6)


def test_far_scores_are_cross_entropy_and_nothing() -> None:
    plain = slope(lambda leaf: row_means(leaf).mean())
    assert torch.allclose(own_slope(1e3, 1e3, 1e3), plain, atol=1e-15)
    assert not own_slope(-1e3, -1e3, -1e3).any()
    huge = loss_of("poft", RANDOM.tolist(), LABELS, rows=ROWS, **scored(1e5, 1e5, 1e5))
    assert huge == pytest.approx(1e5 + float(row_means(RANDOM).mean()), rel=1e-12), "logarithm and sigmoid in one"


def test_the_gradient_is_that_of_weighted_row_means() -> None:
    scores = torch.tensor([-2.5, -1.0, -3.0], dtype=torch.float64)
    weight = 1.7 * torch.sigmoid(1.7 * (row_means(RANDOM) + scores) - 0.3)
    assert torch.allclose(
        own_slope(*scores.tolist(), beta=1.7, gamma=0.3), slope(lambda leaf: (weight * row_means(leaf)).mean()), atol=1e-15
    )
    for row in range(3):
        chosen = torch.tensor(ROWS) == row
        one = own_slope(*scores.tolist())[chosen].flatten()
        plain = slope(lambda leaf, row=row: row_means(leaf)[row])[chosen].flatten()
        assert float(functional.cosine_similarity(one, plain, dim=0)) == pytest.approx(1.0, abs=1e-12)


def test_finite_differences() -> None:
    scores, step = (-2.5, -1.0, -3.0), 1e-6
    found = own_slope(*scores, beta=2.0, gamma=-0.5)
    for place in ((0, 0), (4, 3), (8, 6)):
        sides = []
        for sign in (1, -1):
            moved = RANDOM.clone()
            moved[place] += sign * step
            spec = {"poft": {"beta": 2.0, "gamma": -0.5}}
            sides.append(loss_of(spec, moved.tolist(), LABELS, rows=ROWS, **scored(*scores)))
        assert float(found[place]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-9)


def test_token_weights_weigh_a_rows_mean() -> None:
    """Dynamic Fine-Tuning weighs each target by its probability p: here 0.5 and 0.1."""
    mean = (0.5 * log(2) + 0.1 * log(10)) / 0.6
    found = loss_of("poft", logits_with(log(2), log(10)), [0, 0], weight="dft", **scored(-1.0))
    assert found == pytest.approx(log(1 + exp(mean - 1.0)), abs=1e-12)


def test_a_row_of_which_a_weight_leaves_nothing_is_not_learnt() -> None:
    """It needs no score, and is told as one that both sides find equally likely."""
    (term,) = part("poft", beta=0.3, gamma=0.4).values
    view = view_on(RANDOM, LABELS, ["nll"], rows=ROWS, **scored(-1.0, float("nan"), -2.0))
    weight_N = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    total = term.total(view.for_technique({}, weight_N), {})
    loss_N = functional.cross_entropy(RANDOM, torch.tensor(LABELS), reduction="none")
    means = [float((weight_N * loss_N)[places].sum() / weight_N[places].sum()) for places in (slice(0, 4), slice(6, 9))]
    margins = [0.3 * (-mean - score) + 0.4 for mean, score in zip(means, (-1.0, -2.0), strict=True)]
    assert total.item() == pytest.approx(sum(log(1 + exp(-one)) for one in margins), rel=1e-12)
    told = [1 / (1 + exp(one)) for one in (margins[0], 0.4, margins[1])]
    assert view.notes["poft weight"].tolist() == pytest.approx([told[row] for row in ROWS], rel=1e-12)


def test_reduces_to_a_mean_over_rows_of_cross_entropy(engine: Any, now: Now) -> None:
    batch = rows_of_eight()
    found = gradients(engine(model=model_of(), objective={"poft": {"gamma": -1000.0}}), [batch], now)
    model: Any = model_of().requires_grad_(True)
    logits = model(input_ids=batch.token_ids_BT).logits[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), batch.label_BT[:, 1:].flatten(), reduction="none").view(8, -1)
    counts = (batch.label_BT[:, 1:] >= 0).sum(-1)
    (loss.sum(-1)[counts > 0] / counts[counts > 0]).mean().backward()
    plain = {name: one.grad for name, one in model.named_parameters()}
    assert found
    for name, one in found.items():
        assert torch.allclose(one, plain[name.partition("/")[2]], atol=1e-12)


@pytest.mark.parametrize("tune", ["half", "lora", "prompt_tuning", {"spiel": {"every": 3, "gather": 1}}])
def test_beside_every_kind_of_tune(engine: Any, now: Now, tune: Any) -> None:
    batches = [split(rows_of_eight(), sizes) for sizes in ((8,), (3, 1, 0, 4))]
    whole, parted = (gradients(engine(tune=tune, objective="poft"), several, now) for several in batches)
    assert gap(parted, whole) < 1e-10
    run = engine(tune=tune, objective="poft")
    told = [run.step(batches[1], now._replace(step=step)) for step in range(2)]
    assert all(0.0 < one.loss < 10.0 and 0.0 < one.notes["poft weight"] < 1.0 for one in told)


def test_what_is_logged_is_the_weight_of_rows(engine: Any, now: Now) -> None:
    """A model that finds each target as likely as the score says: a half."""
    batch = rows_of_eight()
    model = model_of()
    model.get_output_embeddings().weight.data.zero_()
    even = {SCORE: torch.full((8,), -log(model.config.vocab_size), dtype=torch.float64)}
    told = engine(model=model, objective="poft").step([batch._replace(columns=even)], now)
    assert told.notes["poft weight"] == pytest.approx(0.5, abs=1e-12) and told.loss == pytest.approx(log(2), abs=1e-12)


def test_rows_without_targets_need_no_score(engine: Any, now: Now) -> None:
    batch = rows_of_eight()
    without = batch.columns[SCORE].clone()
    without[3] = float("nan")
    whole, bare = (
        gradients(engine(objective="poft"), [batch._replace(columns={SCORE: column})], now)
        for column in (batch.columns[SCORE], without)
    )
    assert gap(bare, whole) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_without_a_finite_score_are_named(engine: Any, now: Now, value: float) -> None:
    batch = rows_of_eight()
    batch.columns[SCORE][[2, 6]] = value
    with pytest.raises(LuthierError, match=f"2 of 7 rows of a micro-batch have no finite number `{SCORE}`") as caught:
        engine(objective="poft").step([batch], now)
    assert caught.value.where == "rows row2, row6"
    assert f"luthier rows score FILE --by likelihood 'models=[NAME]' --column {SCORE}" in caught.value.fix


def test_rows_without_the_column_are_named(engine: Any, now: Now) -> None:
    with pytest.raises(LuthierError, match=r"7 of 7 rows .* `no_such_score`") as caught:
        engine(objective={"poft": {"column": "no_such_score"}}).step([rows_of_eight()], now)
    assert caught.value.where == "rows row0, row1, row2, row4, row5 and 2 more" and "--column no_such_score" in caught.value.fix


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": -1.0}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(LuthierError) as caught:
        part("poft", **options)
    assert caught.value.where == "poft: beta" and "above 0" in caught.value.fix


def test_rows_read_from_a_file_bring_their_score() -> None:
    (row,) = read([{"text": "a", SCORE: -1.25}])
    assert row.columns == {SCORE: -1.25}
