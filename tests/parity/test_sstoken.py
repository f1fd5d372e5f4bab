"""ssToken: the card's numbers by hand, the rule written out, and what reaches the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Now, TokenWeight, View
from luthier.methods.token_weight._ranks import span_in_rows, top_in_rows
from luthier.methods.token_weight.sstoken import FLOOR, kept
from luthier.models.modes import evaluating
from luthier.registry import Part
from luthier.training.services import view_of
from tests.conftest import make_batch, split
from tests.objectives import view_on
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight, toys  # noqa: F401

LATE = Now(step=4, steps=20)
"""The first step in which excess losses count."""


def weight_of(**options: Any) -> TokenWeight:
    value = registry.part("sstoken", **options).values[0]
    assert isinstance(value, TokenWeight)
    return value


def logits_for(losses: Sequence[float]) -> Tensor:
    """Logits of two words under which the first has these losses."""
    return torch.tensor([[-math.log(math.expm1(loss)), 0.0] for loss in losses], dtype=torch.float64)


def view_with(
    losses: Sequence[float],
    history: Sequence[float],
    attention: Sequence[float],
    *,
    rows: Sequence[int] | None = None,
    now: Now = LATE,
) -> View:
    """Targets with these losses of the model and of its history, and these shares of attention on the prompt."""
    logits, before = logits_for(losses), {"base": logits_for(history)}
    view = view_on(logits, [0] * len(losses), ["nll", "reference_nll"], rows=rows, others=before, now=now)
    view.columns["context_attention"] = torch.tensor(attention, dtype=torch.float64)
    return view


def weights(view: View, **options: Any) -> list[float]:
    weigh = weight_of(**options).weigh
    assert weigh is not None
    return weigh(view).tolist()  # type: ignore[no-any-return]


def scores(view: View, **options: Any) -> list[float]:
    """The scores of all targets: what is logged when all are kept."""
    weights(view, share=1.0, **options)
    return view.notes["kept_score"].tolist()  # type: ignore[no-any-return]


NOW, THEN, PROMPT = [1.0, 2.0, 0.5], [3.0, 2.0, 1.0], [0.1, 0.9, 0.2]


def test_three_targets_by_hand() -> None:
    """REL [2, 0, 0.5], scaled [1, 0, 0.25]; the other way round another pair is kept."""
    view = view_with(NOW, THEN, PROMPT)
    assert scores(view) == pytest.approx([0.55, 0.45, 0.225], abs=1e-8)
    assert weights(view) == [1.0, 1.0, 0.0]
    assert weights(view, gamma=1.0) == [1.0, 0.0, 1.0]
    assert float(view.notes["excess_span"].mean()) == pytest.approx(2.0, abs=1e-12)
    swapped = view_with(THEN, NOW, PROMPT)
    assert scores(swapped) == pytest.approx([0.05, 0.95, 0.475], abs=1e-8)
    assert weights(swapped) == [0.0, 1.0, 1.0]


def test_the_mean_score_of_kept_targets_is_logged() -> None:
    view = view_with(NOW, THEN, PROMPT)
    for share, mean in ((0.6, (0.55 + 0.45) / 2), (0.3, 0.55)):
        weights(view, share=share)
        assert float(view.notes["kept_score"].mean()) == pytest.approx(mean, abs=1e-12)


def test_gamma_zero_looks_at_attention_alone_and_gamma_one_at_losses_alone() -> None:
    for history in (THEN, [0.1, 5.0, 0.3]):
        assert weights(view_with(NOW, history, PROMPT), gamma=0.0) == [0.0, 1.0, 1.0]
    for attention in (PROMPT, [0.9, 0.1, 0.0]):
        assert weights(view_with(NOW, THEN, attention), gamma=1.0, attention_only=0.0) == [1.0, 0.0, 1.0]
    assert weight_of(gamma=0.0).columns == ("nll", "context_attention")
    assert weight_of(gamma=1.0, attention_only=0.0).columns == ("nll", "reference_nll")
    assert weight_of(gamma=1.0).columns == ("nll", "reference_nll", "context_attention")


@pytest.mark.parametrize(
    ("share", "targets", "count"),
    [(0.6, 5, 3), (0.55, 100, 55), (0.6, 1, 1), (0.01, 3, 1), (1e-12, 4, 1), (0.6, 0, 0), (1.0, 7, 7), (0.7, 10, 7), (0.5, 3, 2)],
)
def test_the_share_is_rounded_up(share: float, targets: int, count: int) -> None:
    assert kept(torch.tensor([targets, 2]), share)[0] == count


def test_a_row_of_five_keeps_three_whatever_stands_beside_it() -> None:
    rng = torch.Generator().manual_seed(5)
    losses, history = (torch.rand(17, generator=rng, dtype=torch.float64) * scale + 0.1 for scale in (1.0, 3.0))
    attention = torch.rand(17, generator=rng, dtype=torch.float64)
    rows = [0] * 5 + [1] * 7 + [2] * 5
    together = torch.tensor(weights(view_with(losses.tolist(), history.tolist(), attention.tolist(), rows=rows)))
    for row, count in ((0, 3), (1, 5), (2, 3)):
        mine = torch.tensor(rows) == row
        alone = weights(view_with(losses[mine].tolist(), history[mine].tolist(), attention[mine].tolist()))
        assert together[mine].tolist() == alone and sum(alone) == count


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_rule_written_out(gamma: float) -> None:
    """Rows of many lengths against the card's steps, one row and one number at a time."""
    rng = torch.Generator().manual_seed(7)
    rows = [row for row, count in enumerate((1, 2, 9, 30)) for _ in range(count)]
    values = [(torch.rand(len(rows), generator=rng, dtype=torch.float64) + 0.05).tolist() for _ in range(3)]
    found = weights(view_with(*values, rows=rows), gamma=gamma, share=0.55)
    expected: list[float] = []
    for row in range(4):
        loss, history, attention = ([one for one, r in zip(value, rows, strict=True) if r == row] for value in values)
        excess = [h - c for h, c in zip(history, loss, strict=True)]
        scaled = [(e - min(excess)) / (max(excess) - min(excess) + 1e-8) for e in excess]
        score = [gamma * n + (1 - gamma) * a for n, a in zip(scaled, attention, strict=True)]
        order = sorted(range(len(score)), key=lambda i: (-score[i], i))[: math.ceil(0.55 * len(score) - 1e-9)]
        expected += [float(i in order) for i in range(len(score))]
    assert found == expected


def test_equal_scores_keep_the_first() -> None:
    score_N, row_N = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 3.0]), torch.tensor([0, 0, 0, 2, 2, 2, 2])
    kept_N = top_in_rows(score_N, row_N, torch.tensor([2, 5, 3]))
    assert kept_N.tolist() == [True, False, True, True, True, False, True]
    low_B, span_B = span_in_rows(score_N, row_N, 3)
    assert (low_B[[0, 2]].tolist(), span_B[[0, 2]].tolist()) == ([1.0, 0.0], [1.0, 3.0])
    assert not len(top_in_rows(score_N[:0], row_N[:0], torch.tensor([2])))
    # So many that a sort which need not keep their order does not.
    ties_N = torch.ones(99)
    assert top_in_rows(ties_N, ties_N.long() - 1, torch.tensor([40])).nonzero()[:, 0].tolist() == list(range(40))


def test_differences_that_are_rounding_do_not_decide() -> None:
    """Below 0.05 nats a row goes by attention alone, from there on by both; another row beside it does not matter."""
    rows, attention = [0] * 3 + [1] * 3, PROMPT * 2
    below, above = ([1.0, 1.0 - by, 1.0 - by / 2] for by in (0.045, 0.055))
    view = view_with([1.0] * 3 + NOW, below + THEN, attention, rows=rows)
    assert scores(view) == pytest.approx([*PROMPT, 0.55, 0.45, 0.225], abs=1e-12)
    view = view_with([1.0] * 3, above, PROMPT)
    assert scores(view) == pytest.approx([0.55, 0.45, 0.35], abs=1e-9)
    view.columns |= {"nll": torch.zeros(3).double(), "reference_nll": torch.tensor([0.05, 0.0, 0.025], dtype=torch.float64)}
    assert scores(view) == pytest.approx([0.55, 0.45, 0.35], abs=1e-9)
    assert weights(view_with(NOW, NOW, PROMPT)) == [0.0, 1.0, 1.0]


def test_attention_decides_alone_in_the_first_steps() -> None:
    for step, together in ((0, False), (3, False), (4, True), (19, True)):
        view = view_with(NOW, THEN, PROMPT, now=Now(step=step, steps=20))
        assert weights(view) == ([1.0, 1.0, 0.0] if together else [0.0, 1.0, 1.0])
    assert weights(view_with(NOW, THEN, PROMPT, now=Now(step=0, steps=20)), attention_only=0.0) == [1.0, 1.0, 0.0]
    assert weights(view_with(NOW, THEN, PROMPT, now=Now(step=19, steps=20)), attention_only=1.0) == [0.0, 1.0, 1.0]


def moved(run: Any) -> Any:
    """A run whose model is not its history any more."""
    for name, one in run.tune.trained.items():
        rng = torch.Generator().manual_seed(len(name))
        run.tune.set({name: one.master.detach() + 0.1 * torch.randn(one.master.shape, generator=rng)})
    return run


def test_reduces_to_cross_entropy_when_all_is_kept(engine: Any, now: Now) -> None:
    batches = split(rows_of_eight(), (5, 3))
    plain, all_kept = (
        engine("lora", model=model_of(), token_weight=weight)
        for weight in (None, {"sstoken": {"share": 1.0, "attention_only": 0.0}})
    )
    assert gap(gradients(moved(all_kept), batches, now), gradients(moved(plain), batches, now)) == 0.0
    assert all_kept.step(batches, now).loss == pytest.approx(plain.step(batches, now).loss, abs=1e-12)


def test_the_loss_is_a_mean_over_what_is_kept_and_the_score_has_no_gradient(engine: Any) -> None:
    """Weights written down as numbers give the same gradient, bit for bit."""
    batch = rows_of_eight()
    run = moved(engine("full", model=model_of(), token_weight="sstoken"))
    weigh = run.objective.weights[0].weight.weigh
    view = view_of(run.tune, batch, run.objective.columns(), LATE)
    with torch.enable_grad():
        kept_N = weigh(view)
    assert not kept_N.requires_grad and int(kept_N.sum()) == 3 + 3 + 2 + 4 + 6 + 1 + 2
    fixed = TokenWeight(lambda view: kept_N, (), lambda batch: kept_N.new_zeros(8).index_add(0, view.row_N, kept_N))
    other = moved(engine("full", model=model_of(), token_weight=[Part("fixed", "token_weight", {}, (fixed,))]))
    found, plain = (gradients(one, [batch], LATE) for one in (run, other))
    assert gap(found, plain) == 0.0
    expected = float((view["nll"].detach() * kept_N).sum() / kept_N.sum())
    result = run.step(split(batch, (3, 1, 4)), LATE)
    assert result.loss == pytest.approx(expected, abs=1e-12)
    assert result.weights.weighted_share == pytest.approx(21 / 30) and result.notes["excess_span"] > FLOOR


def test_every_half_of_the_score_changes_what_is_kept(engine: Any) -> None:
    run = moved(engine("full", model=model_of(), token_weight="sstoken"))
    batch = make_batch([(40, 30)] * 4)
    with evaluating(run.tune.model):
        view = view_of(run.tune, batch, run.objective.columns(), LATE)
    chosen = {gamma: tuple(weights(view, gamma=gamma)) for gamma in (0.0, 0.5, 1.0)}
    assert len(set(chosen.values())) == 3


def test_the_history_follows_the_model(engine: Any, now: Now) -> None:
    """Copied every second step, the next step starts without an excess loss; with every step's copy there never is one."""
    spans = {}
    for every, average in ((1, 0.0), (2, 0.0), (1, 0.9), (None, 0.0)):
        options = {"every": every, "average": average, "attention_only": 0.0}
        run = engine("lora", model=model_of(), optimizer="adamw", token_weight={"sstoken": options})
        steps = [run.step([rows_of_eight()], now._replace(step=i, learning_rate=0.02)) for i in range(4)]
        spans[every, average] = [one.notes["excess_span"] for one in steps]
        assert all(one.notes["excess_span"] >= 0 for one in steps)
    assert max(spans[1, 0.0]) < 1e-9
    assert spans[2, 0.0][0] < 1e-9 < FLOOR < spans[2, 0.0][1] and spans[2, 0.0][2] < 1e-9 < FLOOR < spans[2, 0.0][3]
    assert spans[1, 0.9][0] < 1e-9 and FLOOR < spans[1, 0.9][1] < spans[None, 0.0][2] and spans[1, 0.9][3] < spans[None, 0.0][3]


def test_of_the_history_the_average_stays(engine: Any, now: Now) -> None:
    """With 0.9, nine tenths of the history stay at each step and one comes from the model."""
    run = engine("lora", model=model_of(), optimizer="adamw", token_weight={"sstoken": {"every": 1, "average": 0.9}})
    wanted = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    for i in range(2):
        run.step([rows_of_eight()], now._replace(step=i, learning_rate=0.02))
        wanted = {name: 0.9 * wanted[name] + 0.1 * one.master.detach() for name, one in run.tune.trained.items()}
        for name, value in wanted.items():
            assert torch.allclose(run.tune.snapshots["sstoken"][f"master|{name}"], value, atol=1e-12)


def test_numbers_that_come_and_go_are_copied_and_not_averaged(engine: Any) -> None:
    """Which is said before training."""
    for average, refused in ((0.0, False), (0.5, True)):
        with pytest.raises(LuthierError, match="an average over time needs the same numbers") if refused else nullcontext():
            engine({"spiel": {"every": 3, "gather": 1}}, token_weight={"sstoken": {"every": 1, "average": average}})


def test_together_with_another_weight(engine: Any) -> None:
    """Kept targets count as much as the model believes in them; still divided by how many are kept."""
    batch = rows_of_eight()
    run = moved(engine("full", model=model_of(), token_weight=["sstoken", "dft"]))
    view = view_of(run.tune, batch, run.objective.columns(), LATE)
    kept_N, nll_N = run.objective.weights[0].weight.weigh(view), view["nll"].detach()
    expected = float((kept_N * (-nll_N).exp() * nll_N).sum() / kept_N.sum())
    assert run.step(split(batch, (5, 3)), LATE).loss == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tune", ["half", "lora", "prompt_tuning", {"spiel": {"every": 3, "gather": 1}}], ids=str)
def test_beside_whatever_trains(engine: Any, now: Now, tune: Any) -> None:
    """The start model as the history: two steps, and the same gradient for any split."""
    found, batch = [], rows_of_eight()
    for sizes in ((8,), (3, 1, 4)):
        run = moved(engine(tune, model=model_of(), token_weight={"sstoken": {"attention_only": 0.0}}))
        run.tune.model.train()
        losses = [run.step(split(batch, sizes), now._replace(step=i, learning_rate=1e-3)).loss for i in range(2)]
        assert all(math.isfinite(loss) for loss in losses)
        found.append(gradients(run, split(batch, sizes), now._replace(step=2)))
    assert gap(found[1], found[0]) < 1e-7


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"share": 0.0}, "`share` is 0.0"),
        ({"share": 1.5}, "`share` is 1.5"),
        ({"gamma": -0.1}, "`gamma` is -0.1"),
        ({"attention_only": 2.0}, "`attention_only` is 2.0"),
        ({"every": 0}, "`every` is 0"),
        ({"every": 1, "average": 1.0}, "`average` is 1.0"),
        ({"average": 0.5}, "nothing to average"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(LuthierError, match=what):
        registry.part("sstoken", **options)
