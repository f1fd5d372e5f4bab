"""Training on numbers that were stored: the same losses and gradients as with the passes that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import luthier
from luthier import registry
from luthier.columns import chunked, losses
from luthier.kinds import TEACHER, Batch, Chunk, Column, Likeliest, LossTerm, Stored, Tensors, View
from luthier.planning.cuts import too_much
from luthier.planning.plan import Plan
from luthier.training.engine import idle_batch, with_context
from luthier.training.pairs import BASE_REFERENCE
from luthier.training.services import view_of
from tests.conftest import make_batch
from tests.toys.helpers import gap, gradients
from tests.unit.test_numbers import LABELLED, MIXED, MODEL, PAIRS, TURNS, file_of, planned, stored


def divergence(chunk: Chunk) -> Tensor:
    """KL(teacher || model) over the tokens that are stored."""
    top = Likeliest.of(chunk.given)
    mine_CK = chunk.log_probabilities.gather(-1, top.token_id_NK)
    return (top.log_probability_NK.exp() * (top.log_probability_NK - mine_CK)).sum(-1)


DIVERGENCE = Column("stored divergence", divergence, given=TEACHER)


def distilled(weight: float = 1.0) -> LossTerm:
    """What a technique of distillation from a store looks like."""

    def count(batch: Batch) -> float:
        return float(batch.supervised)

    def total(view: View, own: Tensors) -> Tensor:
        return view.of_own()[DIVERGENCE.name].sum()

    return LossTerm(total, count=count, columns=(DIVERGENCE,), weight=weight, penalty=True, stored=Stored("teacher"))


def moved(plan: Plan) -> None:
    """Move all that trains, so that the model is no longer its base."""
    for number, (name, one) in enumerate(plan.engine.tune.trained.items()):
        rng = torch.Generator().manual_seed(number)
        away = torch.randn(one.master.shape, generator=rng, dtype=one.master.dtype)
        plan.engine.tune.set({name: one.master.detach() + 0.05 * away})


def losses_of(plan: Plan) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Parts of the loss and gradients of a step."""
    batches, now = plan.feed.at(0)[1], plan.clock.at(0, 0.0)
    found = gradients(plan.engine, batches, now)
    return plan.engine.step(batches, now).parts, found


def test_stored_likelihoods_are_those_of_the_runs_own_pass(tmp_path: Path) -> None:
    """In fp32 to 1e-6, packed or padded, in other batches than they were made in."""
    source = file_of(tmp_path, PAIRS)
    stored(source)
    for packing in (False, True):
        plan = planned(source, train={"packing": packing, "batch_rows": 5})
        assert plan.engine.tune.packs == packing
        (batch,) = plan.feed.at(0)[1]
        columns = chunked.resolve(["nll", "reference_nll"])
        view = view_of(plan.engine.tune, batch, columns, plan.clock.at(0, 0.0))
        wanted_B, found_B = BASE_REFERENCE.read(view), plan.engine.objective.reference.read(view)
        assert wanted_B.dtype == torch.float32 and bool((wanted_B < -1).all())
        assert torch.allclose(found_B, wanted_B, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("loss", "tune"),
    [("dpo", "full"), ("ipo", "lora"), ({"dpo": {"length_normalized": True}}, "prompt_tuning"), ("aot", "half")],
    ids=str,
)
def test_losses_over_pairs_are_the_same_without_a_reference_pass(tmp_path: Path, loss: Any, tune: str) -> None:
    source = file_of(tmp_path, PAIRS)
    stored(source, precision="fp64")
    keys = {"tune": tune, "train": {"precision": "fp64", "batch_rows": 5, "micro_batch_tokens": 150}}
    found = []
    for objective in ([loss], [loss, "stored_reference"]):
        plan = planned(source, objective=objective, **keys)
        asks = [one.name for one in chunked.passes_of(plan.engine.objective.columns())]
        assert asks == (["base"] if len(objective) == 1 else [])
        moved(plan)
        found.append(losses_of(plan))
    (base, base_slopes), (held, held_slopes) = found
    assert held == pytest.approx(base, rel=1e-9) and any(bool(one.any()) for one in held_slopes.values())
    assert gap(held_slopes, base_slopes) < 1e-9


@pytest.mark.parametrize("last", [False, True])
def test_an_answer_by_itself_is_compared_with_its_stored_likelihood(tmp_path: Path, last: bool) -> None:
    """A store beside rows with labels was found and not read."""
    talk = [{"id": "long", "messages": TURNS, "label": True}] if last else []
    source = file_of(tmp_path, [*LABELLED, *talk])
    stored(source, precision="fp64", options={"loss_on": "last"} if last else {})
    keys = {
        "train": {"precision": "fp64", "batch_rows": 4, "micro_batch_tokens": 150},
        "rows": {"loss_on": "last" if last else "assistant"},
    }
    found = []
    for objective in (["apo_zero_unpaired"], ["apo_zero_unpaired", "stored_reference"]):
        plan = planned(source, objective=objective, **keys)
        asks = [one.name for one in chunked.passes_of(plan.engine.objective.columns())]
        assert asks == (["base"] if len(objective) == 1 else [])
        moved(plan)
        found.append(losses_of(plan))
    (base, base_slopes), (held, held_slopes) = found
    assert held == pytest.approx(base, rel=1e-9) and any(bool(one.any()) for one in held_slopes.values())
    assert gap(held_slopes, base_slopes) < 1e-9


@pytest.mark.parametrize(
    ("tune", "packing", "rows"),
    [("full", False, MIXED[:3]), ("lora", True, MIXED[:3]), ("prompt_tuning", False, MIXED[:3]), ("half", True, PAIRS)],
    ids=["full", "lora, packed", "prompt_tuning", "half, pairs"],
)
def test_a_stored_teacher_is_the_teacher(tmp_path: Path, tune: str, packing: bool, rows: list[dict[str, Any]]) -> None:
    """Forward KL to all stored probabilities is that to the base's own pass, and so are its gradients; of pairs it is of the chosen
    answers alone, as every other term is."""
    source = file_of(tmp_path, rows)
    stored(source, "teacher", precision="fp64", top_k=10**6)
    beside = ["simpo"] if rows is PAIRS else []
    keys = {"tune": tune, "train": {"precision": "fp64", "batch_rows": 5, "micro_batch_tokens": 150, "packing": packing}}
    found = []
    for term in ({"kl": {"weight": 1.0}}, distilled()):
        plan = planned(source, objective=[*beside, term], **keys)
        moved(plan)
        parts, slopes = losses_of(plan)
        found.append((parts.get("kl", parts.get("loss_term")), slopes))
    (exact, exact_slopes), (held, held_slopes) = found
    assert exact is not None and exact > 1e-3
    assert held == pytest.approx(exact, abs=1e-6)
    assert gap(held_slopes, exact_slopes) < 2e-6


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("top_k", [7, 10**6])
def test_distillation_from_a_store_is_that_from_the_teacher(tmp_path: Path, direction: str, top_k: int) -> None:
    """The same loss and gradients as with the teacher beside the model: over all tokens, and over the likeliest and the rest."""
    source = file_of(tmp_path, MIXED[:3])
    stored(source, "teacher", precision="fp64", top_k=top_k)
    keys = {"train": {"precision": "fp64", "batch_rows": 5, "micro_batch_tokens": 150}, "models": {"teacher": MODEL}}
    options = {"divergence": direction, "top_k": top_k if top_k < 10 else None}
    found = []
    for objective in ([{"distill": options}], [{"distill_stored": {"direction": direction}}]):
        plan = planned(source, objective=objective, **keys)
        moved(plan)
        batches, now = plan.feed.at(0)[1], plan.clock.at(0, 0.0)
        slopes = gradients(plan.engine, batches, now)
        found.append((plan.engine.step(batches, now).loss, slopes))
    assert found[0][0] > 1e-3 and found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert gap(found[0][1], found[1][1]) < 1e-5


def test_a_stored_teacher_says_nothing_of_virtual_tokens() -> None:
    (value,) = registry.part("distill_stored").values
    batch = make_batch([(4, 3)])._replace(token_ids_BT=torch.tensor([[5, -1, 5, 6]]))
    found = {value.columns[0].name: torch.tensor([7.0, 2.0, 3.0])}
    view = View(batch, found, label_N=torch.arange(3), row_N=torch.zeros(3).long(), position_N=torch.arange(1, 4))
    assert value.loss(view).tolist() == [0.0, 2.0, 3.0]


def test_what_is_stored_is_seen_at_the_targets(tmp_path: Path) -> None:
    """By views as by columns, in rows that are padded and have mates; and where no target is there is none of it."""
    rows = file_of(tmp_path, MIXED[3:4], "pairs.jsonl")
    held = stored(rows, "teacher")
    plan = planned(rows, objective=["simpo", distilled()])
    (batch,) = plan.feed.at(0)[1]
    view = view_of(plan.engine.tune, batch, chunked.resolve(["nll", DIVERGENCE]), plan.clock.at(0, 0.0))
    top, arrays = view.likeliest(), held.arrays(0)
    assert top.token_id_NK.dtype == torch.int64
    for seen, name in zip(top, TEACHER, strict=True):
        assert seen.tolist() == arrays[name].tolist()
    assert view.targets_by_row().tolist() == list(map(len, (" red and old.!", " blue.!")))
    first = view.of_first()
    assert first.likeliest().rest_N.tolist() == arrays[TEACHER[2]][: int(view.targets_by_row()[0])].tolist()
    nothing = view_of(plan.engine.tune, idle_batch(), chunked.resolve(["nll", DIVERGENCE]), plan.clock.at(0, 0.0))
    assert len(nothing[DIVERGENCE.name]) == 0 and nothing.likeliest().log_probability_NK.shape == (0, 1)


def test_rows_that_carry_nothing_stop_a_column_that_reads_it(tmp_path: Path) -> None:
    plan = planned(file_of(tmp_path, MIXED[:3]), objective=["cross_entropy"])
    (batch,) = plan.feed.at(0)[1]
    with pytest.raises(RuntimeError, match="the rows carry no `teacher_log_probability` for each token"):
        view_of(plan.engine.tune, batch, chunked.resolve([DIVERGENCE]), plan.clock.at(0, 0.0))


def test_columns_read_what_is_theirs_in_every_chunk_and_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are made in chunks that are recomputed, and these in slices: both must cut what the rows carry alike."""
    rng = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(23, 6, dtype=torch.float64, generator=rng)
    weight_VD = torch.randn(11, 6, dtype=torch.float64, generator=rng)
    log_NV = torch.randn(23, 11, dtype=torch.float64, generator=rng).log_softmax(-1)
    top = log_NV.topk(4)
    given = dict(zip(TEACHER, (top.values, top.indices.int(), 1 - top.values.exp().sum(-1)), strict=True))
    rest = Column("rest", lambda chunk: Likeliest.of(chunk.given).rest_N * 2.0, given=TEACHER, gradient=False)
    found = []
    for most, slices in ((2**30, 2**20), (7 * 11 * 8 * 2, 3 * 11 * 4)):
        monkeypatch.setitem(losses._SLICE_BYTES, "cpu", slices)
        leaf, weight = hidden_ND.clone().requires_grad_(True), weight_VD.clone().requires_grad_(True)
        other = chunked.Other(hidden_ND * 0.5, lambda states_CD: states_CD @ weight_VD.T)
        made = chunked.compute(
            leaf,
            torch.arange(23) % 11,
            lambda states_CD: states_CD @ weight.T,  # noqa: B023
            chunked.resolve(["nll", DIVERGENCE, "kl", rest]),
            others={"base": other},
            given=given,
            vocabulary=11,
            limit_bytes=most,
        )
        slopes = torch.autograd.grad(made[DIVERGENCE.name].sum() + made["kl"].sum(), [leaf, weight])
        found.append({**made, "hidden": slopes[0], "weight": slopes[1]})
    found = [{name: one.detach() for name, one in some.items()} for some in found]
    assert gap(found[1], found[0]) < 1e-12
    mine_NV = (hidden_ND @ weight_VD.T).log_softmax(-1)
    wanted_N = (top.values.exp() * (top.values - mine_NV.gather(-1, top.indices))).sum(-1)
    assert torch.allclose(found[0][DIVERGENCE.name], wanted_N, atol=1e-12)
    assert torch.allclose(found[0]["rest"], 2.0 * given[TEACHER[2]], atol=1e-12)


def test_a_run_on_stored_numbers_has_the_same_weights(tmp_path: Path) -> None:
    """From the recipe to the end, and streamed: a reference that was stored trains as one that is run."""
    source = file_of(tmp_path, PAIRS)
    stored(source, precision="fp64")
    train = {"steps": 3, "batch_rows": 2, "precision": "fp64", "learning_rate": 1e-3}
    found = []
    for objective in ("dpo", ["dpo", "stored_reference"]):
        recipe = {
            "model": MODEL,
            "rows": {"train": str(source)},
            "objective": objective,
            "train": train,
            "out": str(tmp_path / "runs"),
        }
        run = luthier.train(recipe)
        found.append({name: one.detach().clone() for name, one in run.model.named_parameters()})
    assert gap(found[1], found[0]) < 1e-7
    facts = run.facts["rows"]
    assert facts["stored"] == [f"likelihood by tiny:llama (float64), from {source}.stored/likelihood"]


def test_virtual_targets_before_rows_leave_what_is_stored_in_its_place() -> None:
    """A prompt whose virtual tokens are learnt stands before rows, whatever width their numbers have."""
    batch = make_batch([(4, 2), (3, 1)])
    wide_BTK = torch.arange(2 * 4 * 3, dtype=torch.int32).reshape(2, 4, 3)
    longer = with_context(batch._replace(token_columns={"wide": wide_BTK}), torch.tensor([-100, 7]))
    found_BTK = longer.token_columns["wide"]
    assert found_BTK.dtype == torch.int32 and found_BTK.shape == (2, 6, 3)
    assert not found_BTK[:, :2].any() and torch.equal(found_BTK[:, 2:], wide_BTK)


@pytest.mark.usefixtures("counted")
def test_memory_is_estimated_with_what_is_stored(tmp_path: Path) -> None:
    """On shapes alone, and of rows that are cut shorter to see what that saves, of which no more are read than are counted."""
    rows = [{"text": f"{number} " * 90} for number in range(6)]
    source = file_of(tmp_path, rows)
    stored(source, "teacher")
    train = {"packing": False, "micro_batch_tokens": 600, "batch_rows": 4}
    plan = planned(source, objective=["cross_entropy", distilled()], train=train)
    seen: list[int] = []
    (joined,) = plan.rows.rows.joined  # type: ignore[attr-defined]
    read_group = joined.stores[0].arrays
    joined.stores[0].arrays = lambda place: seen.append(place) or read_group(place)
    plain = planned(source, objective=["cross_entropy"], train=train)
    assert plan.estimate.activations > plain.estimate.activations
    said = too_much(plan.recipe, plan.engine, plan.parts, plan.feed, plan.dtype, plan.estimate, 1)
    assert "rows.max_length=" in said and 0 < len(seen) < 24
