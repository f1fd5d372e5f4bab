"""Context-aware prompt tuning: it begins as in-context learning, weighs targets by example, and stays within its balls."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from luthier.columns.chunked import resolve
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, View
from luthier.methods.loss_term._coverage import coverage_factor
from luthier.methods.prompt.cpt import at_width, context_of, cpt, project
from luthier.models.parts import map_parts
from luthier.training.engine import with_context
from luthier.training.services import RunServices, view_of
from luthier.tune import Tune
from luthier.tune.forward import hidden
from tests.conftest import make_batch, split
from tests.tolerance import TINY, assert_rounded
from tests.toys.helpers import model_of, rows_of_eight

BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])
ROWS = make_batch([(5, 1), (7, 2), (6, 1)], seed=3)
"""The rows of a few-shot run."""


def rows(count: int, source: str) -> list[Batch]:
    """What techniques see of them, in two batches."""
    return split(ROWS, (1, 2))


def real(batch: Batch, b: int) -> tuple[Tensor, Tensor]:
    """Token ids and targets of one row."""
    return batch.token_ids_BT[b, batch.attend_BT[b]], batch.label_BT[b, batch.attend_BT[b]]


def in_context(batch: Batch, b: int, examples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of the context and one row, their targets, and the example each token is from."""
    pieces = [*(real(ROWS, i) for i in range(examples)), real(batch, b)]
    example = [torch.full_like(ids, i) for i, (ids, _) in enumerate(pieces)]
    return torch.cat([ids for ids, _ in pieces]), torch.cat([label for _, label in pieces]), torch.cat(example)


def weighed(model: Any, batch: Batch, examples: int, decay: float) -> tuple[float, int]:
    """The sum of weighted losses by hand, from plain logits of texts one behind the other, and the number of targets."""
    total, count = 0.0, 0
    for b in range(len(batch.row_ids)):
        ids_T, label_T, example_T = in_context(batch, b, examples)
        with torch.no_grad():
            nll_T = functional.cross_entropy(model(ids_T[None]).logits[0, :-1], label_T[1:], reduction="none")
        weight_T = decay ** (examples - example_T[1:]).double()
        total += float((nll_T * weight_T)[label_T[1:] >= 0].sum())
        count += int((label_T[1:] >= 0).sum())
    return total, count


@BOTH
def test_it_begins_as_in_context_learning(architecture: str) -> None:
    model = model_of(architecture)
    plain = copy.deepcopy(model)
    tune = Tune(model, map_parts(model))
    tune.add("cpt", cpt(examples=3)[0], RunServices(tune, "cpt", Now(), rows), {})
    batch = make_batch([(6, 2), (6, 1)], seed=8)
    with torch.no_grad():
        found = hidden(tune, batch).values
        backbone = plain.get_submodule(tune.parts.backbone)
        for b in range(2):
            ids_T, _, _ = in_context(batch, b, 3)
            assert_rounded(found[b], backbone(ids_T[None], use_cache=False).last_hidden_state[0, -6:], TINY)


@BOTH
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_the_loss_weighs_targets_by_example_and_is_divided_by_their_number(
    engine: Any, now: Now, architecture: str, decay: float
) -> None:
    model = model_of(architecture)
    batch = make_batch([(6, 2), (9, 1), (4, 3)], seed=8)
    total, count = weighed(copy.deepcopy(model), batch, 2, decay)
    assert count == 6 + 3 * 3
    for sizes in ((3,), (1, 2)):
        run = engine({"cpt": {"examples": 2, "decay": decay}}, model=copy.deepcopy(model), calibration=rows)
        assert math.isclose(run.step(split(batch, sizes), now).loss, total / count, rel_tol=1e-10)


def test_without_weights_of_the_context_the_loss_still_counts_its_targets(engine: Any, now: Now) -> None:
    model, context, batch = model_of(), make_batch([(5, 1), (7, 1)], seed=3), make_batch([(6, 1)], seed=8)
    ids_T = torch.cat([*(real(context, b)[0] for b in range(2)), batch.token_ids_BT[0]])
    with torch.no_grad():
        own = float(functional.cross_entropy(model(ids_T[None]).logits[0, -2], ids_T[-1]))
    run = engine({"cpt": {"examples": 2, "decay": 0.0}}, model=model, calibration=lambda count, source: [context])
    # Two examples with one target each: the row's own loss counts a third.
    assert math.isclose(run.step([batch], now).loss, own / 3, rel_tol=1e-10)


@pytest.mark.parametrize("sizes", [(8,), (3, 1, 4)])
def test_a_term_over_rows_is_of_the_rows_own_targets(engine: Any, now: Now, sizes: tuple[int, ...]) -> None:
    """The context's targets counted into each row's mean and probability, and a row without targets became one with those."""
    batch = rows_of_eight()
    run = engine({"cpt": {"examples": 3}}, model=model_of(), objective="poft", calibration=rows)
    view = view_of(run.tune, with_context(batch, run.tune.prompt_labels), resolve(["nll"]), now)
    own_N = view.position_N >= run.tune.prompt_length
    has_B = batch.targets_by_row() > 0
    sums_B = torch.zeros(8, dtype=torch.float64).index_add(0, view.row_N[own_N], view["nll"].detach()[own_N])
    margin_B = -sums_B / batch.targets_by_row().clamp(min=1) - batch.columns["aligned_log_likelihood"]
    wanted = float(-(functional.logsigmoid(margin_B) * has_B).sum() / has_B.sum())
    weight = float((torch.sigmoid(-margin_B) * batch.targets_by_row()).sum() / batch.supervised)
    result = run.step(split(batch, sizes), now)
    assert result.loss == pytest.approx(wanted, rel=1e-6)
    assert result.notes["poft weight"] == pytest.approx(weight, rel=1e-6)
    # As likely as not, of one token: far from 0 for the row, and 0 with the context's targets in it.
    run = engine({"cpt": {"examples": 3}}, model=model_of(), objective={"dco": {"samples": 4}}, calibration=rows)
    factor_B = coverage_factor(sums_B, 4)
    wanted = float((factor_B * sums_B).sum() / has_B.sum())
    assert run.step(split(batch, sizes), now).loss == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("sizes", [(8,), (3, 1, 4)])
@pytest.mark.parametrize("weight", ["row_balance", {"answer_coverage": {"samples": 9}}], ids=str)
def test_other_weights_leave_the_contexts_targets_as_they_are(engine: Any, now: Now, sizes: tuple[int, ...], weight: Any) -> None:
    """Rules counted the context's targets into each row, and rows without targets had those."""
    batch = rows_of_eight()
    run = engine({"cpt": {"examples": 3}}, model=model_of(), token_weight=weight, calibration=rows)
    plain = engine(model=model_of(), token_weight=weight)
    looked = plain._look([batch], now)
    view = view_of(plain.tune, batch, plain.objective.columns(), now)
    own = plain.objective.weights[0].weight
    own_N = looked.keeps[0] if looked is not None else own.weigh(view)  # type: ignore[misc]
    kept = batch if looked is None else looked.batches[0]
    whole = with_context(kept, run.tune.prompt_labels)
    seen = view_of(run.tune, whole, resolve(["nll"]), now)
    virtual_N = seen.position_N < run.tune.prompt_length
    context_N = run.objective.weights[0].weight.weigh(seen.for_technique(run.states["cpt"]))  # type: ignore[misc]
    weight_N = context_N.masked_scatter(~virtual_N, own_N.to(context_N))
    wanted = float((weight_N * seen["nll"].detach()).sum()) / (int(virtual_N.sum()) + int((own_N != 0).sum()))
    assert run.step(split(batch, sizes), now).loss == pytest.approx(wanted, rel=1e-6)


def test_weights_by_hand(engine: Any, now: Now) -> None:
    def loss(examples: list[tuple[int, int]], nll_N: list[float]) -> float:
        """The loss with gamma 0.5 where the targets have these losses, in the order of the text."""
        context = [make_batch(examples, seed=3)]
        run = engine(
            {"cpt": {"examples": len(examples), "decay": 0.5}}, model=model_of(), calibration=lambda count, source: context
        )
        batch = with_context(make_batch([(4, 1)]), run.tune.prompt_labels)
        view = run.services("cpt", now).forward(batch, ["nll"])
        view.columns["nll"] = torch.tensor(nll_N, dtype=torch.float64)
        weight_N = run.objective.weights[0].weight.weigh(view.for_technique(run.states["cpt"]))
        return float((weight_N * view["nll"]).sum()) / batch.supervised

    assert loss([(5, 1), (6, 1)], [1.0, 1.0, 1.0]) == pytest.approx(0.5833333333, abs=1e-9)
    assert loss([(5, 1), (6, 1)], [3.0, 2.0, 1.0]) == pytest.approx(0.9166666667, abs=1e-9)
    assert loss([(5, 2), (6, 1)], [1.0, 1.0, 1.0, 1.0]) == 0.5


def test_a_virtual_token_has_its_own_weight_and_any_other_one() -> None:
    """The id 0 is a token of the row."""
    weigh = cpt()[1].weigh
    batch = make_batch([(5, 1)])._replace(token_ids_BT=torch.tensor([[-1, -2, -3, 0, 7]]))
    row_N = torch.zeros(5, dtype=torch.long)
    view = View(batch, {"nll": torch.ones(5)}, label_N=row_N, row_N=row_N, position_N=torch.arange(5))
    assert weigh is not None
    assert weigh(view.for_technique({"weight_P": torch.tensor([0.25, 0.5, 0.75])})).tolist() == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_context_may_be_a_single_example(engine: Any) -> None:
    run = engine({"cpt": {"examples": 1}}, calibration=rows)
    assert run.tune.prompt_length == len(real(ROWS, 0)[0])


def test_projection_scales_what_is_too_long_and_nothing_else() -> None:
    offset_PD = torch.tensor([[0.3, 0.4], [0.03, 0.04], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = project(offset_PD, torch.tensor([0.1, 0.1, 0.1, 0.0]))
    assert torch.allclose(found[0], torch.tensor([0.06, 0.08], dtype=torch.float64), atol=1e-8)
    assert torch.equal(found[1:], offset_PD[1:])


def test_a_radius_grows_with_the_root_of_the_width() -> None:
    assert at_width(0.1, 8192) == 0.2 and at_width(0.1, 2048) == 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("step", ["sgd", {"adamw": {"weight_decay": 0.1}}])
def test_after_every_step_offsets_lie_in_their_balls_and_targets_have_none(
    engine: Any, now: Now, step: Any, dtype: torch.dtype
) -> None:
    run = engine({"cpt": {"examples": 3}}, model=model_of(), optimizer=step, calibration=rows, dtype=dtype)
    _, label_P, _ = context_of(rows(3, ""), 3)
    is_target_P = label_P >= 0
    assert int(is_target_P.sum()) == 4 and list(run.tune.trained) == ["cpt.offset_PD"]
    length = 0.1 * math.sqrt(32 / 2048)
    for i in range(4):
        run.step([ROWS], now._replace(step=i))
        offset_PD = run.tune.trained["cpt.offset_PD"].master.detach()
        assert not offset_PD[is_target_P].any()
        norm_P = offset_PD[~is_target_P].norm(dim=1)
        assert bool((norm_P > 0).all()) and float(norm_P.max()) <= length + 1e-6
    assert float(norm_P.max()) == pytest.approx(length, rel=1e-5)


def test_targets_with_the_first_id_do_not_move_either(engine: Any) -> None:
    first = ROWS._replace(token_ids_BT=ROWS.token_ids_BT.masked_fill(ROWS.label_BT >= 0, 0), label_BT=ROWS.label_BT.clamp(max=0))
    run = engine({"cpt": {"examples": 3}}, calibration=lambda count, source: [first])
    context_P = run.tune.prompt_labels == -100
    assert int((~context_P).sum()) == 4
    for moves_P in (run.tune.owns[0].masters()["moves_P1"][:, 0], run.states["cpt"]["moves_P"]):
        assert torch.equal(moves_P, context_P)


def test_of_a_model_in_bf16_only_the_sum_of_embedding_and_offset_is_rounded(engine: Any) -> None:
    """Embeddings and offsets were rounded before they were added, and their sum once more."""
    run = engine({"cpt": {"examples": 3}}, model=model_of(), calibration=rows, dtype=torch.bfloat16)
    (own,) = run.tune.owns
    offset_PD = torch.randn(run.tune.prompt_length, 32, generator=torch.Generator().manual_seed(0))
    run.tune.set({"cpt.offset_PD": offset_PD})
    held = own.masters()
    wanted_PD = (held["context_PD"].float() + offset_PD * held["moves_P1"]).bfloat16()
    ids_BT = -1 - torch.arange(run.tune.prompt_length)[None]
    (_, prompt) = run.tune.site(run.tune.parts.embedding).prompts[0]
    found_BTD = prompt.apply(own.tensors(torch.bfloat16), ids_BT, torch.zeros(1, len(wanted_PD), 32, dtype=torch.bfloat16))
    assert torch.equal(found_BTD[0], wanted_PD)


def test_a_radius_towards_zero_stays_in_context_learning(engine: Any, now: Now) -> None:
    batch = make_batch([(6, 2)], seed=8)
    found = []
    for radius in (1e-12, 0.1):
        run = engine({"cpt": {"examples": 2, "radius": radius}}, model=model_of(), optimizer="adamw", calibration=rows)
        before = hidden(run.tune, batch).values.detach()
        for i in range(3):
            run.step([ROWS], now._replace(step=i))
        found.append(float((hidden(run.tune, batch).values.detach() - before).abs().max()))
    assert found[0] < 1e-8 and found[1] > 1e-4


def test_a_context_is_rows_one_behind_the_other() -> None:
    first, second = (make_batch(shape, seed=s) for s, shape in ((0, [(3, 1)]), (1, [(4, 4), (2, 1)])))
    found = context_of([first, second], 2)
    assert torch.equal(found.token_ids_P, torch.cat([first.token_ids_BT[0], second.token_ids_BT[0]]))
    assert found.example_P.tolist() == [0, 0, 0, 1, 1, 1, 1]
    # A row's first token has nothing before it that could predict it.
    assert found.label_P.tolist() == [-100, -100, int(first.token_ids_BT[0, 2]), -100, *second.token_ids_BT[0, 1:].tolist()]
    assert len(context_of([first, second], 9).label_P) == 9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"examples": 0}, "0 examples"),
        ({"radius": 0.0}, "the radius is 0"),
        ({"decay": 1.5}, "the decay is 1.5"),
        ({"decay": -0.1}, "the decay is -0.1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(LuthierError, match=says):
        cpt(**options)


@pytest.mark.parametrize("objective", ["kl", "asft", "f_divergence"])
def test_what_compares_with_the_base_is_refused_by_name(engine: Any, objective: str) -> None:
    """The base reads no virtual tokens, so it has nothing to say of those that are targets."""
    with pytest.raises(LuthierError, match=f"`{objective}` compares with the base") as caught:
        engine({"cpt": {"examples": 3}}, model=model_of(), objective=["cross_entropy", objective], calibration=rows)
    assert "prompt_tuning" in caught.value.fix
    engine("prompt_tuning", model=model_of(), objective=["cross_entropy", objective], calibration=rows)
