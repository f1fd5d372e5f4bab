"""LoFiT against its algebra: which heads are chosen, what trains in each phase, and what offsets come to."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Freezing, Now
from luthier.methods.representation_edit._heads import top_heads
from luthier.methods.representation_edit.ia3 import ia3
from luthier.methods.representation_edit.lofit import lofit
from luthier.training.checkpoint import restore, save
from tests.conftest import make_batch, split
from tests.toys.helpers import gradients, logits_of, model_of, plain_gradients, rows_of_eight
from tests.unit.test_kinds_resume import assert_equal, everything

BATCH = make_batch([(7, 3), (7, 4)])
NOW = Now(steps=6, learning_rate=0.01)
HEADS, WIDTH = 4, 8
"""Of the tiny models, which are 32 wide."""


def go(run: Any, first: int, last: int, now: Now = NOW) -> None:
    run.tune.model.train()
    for i in range(first, last):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i))


def offsets_only(engine: Any, architecture: str = "gpt2", share: float = 1.0, **options: Any) -> Any:
    """A run at the beginning of the second phase, with a first phase that did not move."""
    run = engine(lofit(share=share, **options), model=model_of(architecture), optimizer="adamw")
    run.tune.refresh(
        lambda slot: run.services(slot, NOW._replace(step=2, learning_rate=0.0)), NOW._replace(step=2, learning_rate=0.0)
    )
    assert all(name.endswith(".offset") for name in run.tune.trained)
    return run


def moved(run: Any, seed: int = 3) -> Any:
    rng = torch.Generator().manual_seed(seed)
    run.tune.set({name: 0.5 * torch.randn(one.master.shape, generator=rng).double() for name, one in run.tune.trained.items()})
    return run


def test_neither_scales_nor_offsets_decay(engine: Any) -> None:
    """Weight decay acted on offsets, which stand in a matrix, one vector for each head."""
    run = engine(lofit(share=0.5), model=model_of(), optimizer={"adamw": {"weight_decay": 0.5}})
    assert [one.decay for one in run.tune.trained.values()] == [False, False]
    later = NOW._replace(step=2, learning_rate=0.0)
    run.tune.refresh(lambda slot: run.services(slot, later), later)
    offsets = list(run.tune.trained.values())
    for one in offsets:
        run.tune.set({one.name: torch.ones_like(one.master)})
        one.gradient = torch.zeros_like(one.master)
    run.chain.step(NOW._replace(learning_rate=0.1))
    assert offsets and all(bool((one.master == 1.0).all()) for one in offsets)


def test_heads_are_ordered_by_the_l2_norm_over_all_layers() -> None:
    rows = torch.tensor([[3.0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0]])
    assert top_heads([rows], 3, 0.0) == [(0, 0), (0, 2), (0, 1)]
    assert rows.abs().sum(-1).argsort().tolist() == [0, 1, 2], "by L1 the first row would be the last"
    assert top_heads([rows, 2 * rows], 3, 0.0) == [(1, 0), (1, 2), (1, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert top_heads([torch.ones(1, 9)], 1, 2.0) == [(0, 0)], "3 is half a step of 2 on each of 9 numbers, and no noise"
    with pytest.warns(UserWarning, match="the largest is 3") as told:
        top_heads([torch.ones(1, 9)], 1, 2.01)
    assert told[0].filename == __file__, "told of whoever asked"
    # Sorts that are not stable exchange equal numbers from 17 on.
    assert top_heads([torch.ones(12, 4), torch.ones(12, 4)], 24, 0.0) == [divmod(i, 12) for i in range(24)], "ties go to the first"


def test_both_phases_train_as_many_numbers_as_the_paper(engine: Any) -> None:
    run = engine(lofit(share=0.25, selection=0.5), model=model_of(), optimizer="adamw")
    assert run.tune.numbers() == 2 * HEADS * WIDTH
    go(run, 0, 2)
    assert run.tune.numbers() == 2 * HEADS * WIDTH, "the third of six steps still selects"
    go(run, 2, 3)
    assert run.tune.numbers() == round(0.25 * 2 * HEADS) * WIDTH
    # The paper's counts for Llama 2 7B: 32 layers of 32 heads of 128, of which 32 are kept.
    assert (32 * 32 * 128, 32 * 128) == (131_072, 4_096) and round(1 / 32 * 32 * 32) == 32


def test_the_heads_that_moved_most_are_kept_and_the_scales_are_dropped(engine: Any) -> None:
    model = model_of()
    wanted = logits_of(copy.deepcopy(model), BATCH)
    run = engine(lofit(share=0.4), model=model, optimizer="adamw")
    assert torch.equal(logits_of(model, BATCH), wanted)
    go(run, 0, 2)
    assert float((logits_of(model, BATCH) - wanted).abs().max()) > 1e-4
    # The last step of the phase moves the scales once more before they are compared.
    scores, take = {}, run.chain.step

    def remember(now: Now, only: Any = None) -> None:
        take(now, only)
        scores.update({one.place.block: one.master.detach().norm(dim=-1) for one in run.tune.trained.values()})

    run.chain.step = remember
    go(run, 2, 3)
    order = torch.cat([scores[0], scores[1]]).argsort(descending=True)[:3].tolist()
    assert run.states["representation_edit"]["heads"].tolist() == [list(divmod(one, HEADS)) for one in order]
    assert torch.equal(logits_of(model, BATCH), wanted), "the offsets start at zero and the scales are gone"
    for own in run.tune.owns:
        chosen = sorted(head for layer, head in run.states["representation_edit"]["heads"].tolist() if layer == own.place.block)
        assert sorted(own.frozen.get("heads", torch.zeros(0)).tolist()) == chosen
        assert own.trained.keys() == ({"offset"} if chosen else set())


def test_only_what_the_chosen_heads_give_moves(engine: Any) -> None:
    model = model_of()
    run = engine(lofit(share=0.125, selection=0.5), model=model, optimizer="adamw")
    ((layer, head),) = _chosen_after(run)
    go(run, 3, 6)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for i, block in enumerate(model.model.layers):
        inner = block.self_attn.o_proj
        # The first hook sees what enters, luthier's own runs behind it, and the module reads what comes out.
        inner.register_forward_pre_hook(lambda m, a, i=i: seen.update({i: (a[0], a[0])}), prepend=True)
        inner.register_forward_hook(lambda m, a, y, i=i: seen.update({i: (seen[i][0], a[0])}))
    logits_of(model, BATCH)
    for i, (before, after) in seen.items():
        difference = (after - before).detach().unflatten(-1, (HEADS, WIDTH))
        for h in range(HEADS):
            if (i, h) == (layer, head):
                (offset,) = run.tune.trained.values()
                assert torch.allclose(difference[..., h, :], offset.master[0].expand(2, 7, -1), rtol=0, atol=1e-14)
                assert bool(offset.master.abs().min() > 0)
            else:
                assert not difference[..., h, :].any()


def _chosen_after(run: Any) -> list[tuple[int, int]]:
    go(run, 0, 3)
    return [tuple(one) for one in run.states["representation_edit"]["heads"].tolist()]


def test_the_gradient_of_an_offset_is_that_of_a_bias_seen_through_the_map(engine: Any) -> None:
    batch = make_batch([(9, 4), (9, 8)])
    plain = plain_gradients(model_of("gpt2"), batch)
    run = offsets_only(engine)
    found = gradients(run, [batch], NOW)
    for own in run.tune.owns:
        bias = plain[f"{own.place.module}.bias"]
        weight_OI = run.tune.region(own.place)
        for k, head in enumerate(own.frozen["heads"].tolist()):
            expected = weight_OI[:, head * WIDTH : (head + 1) * WIDTH].T @ bias
            assert torch.allclose(found[own.trained["offset"].name][k], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_gradient_of_a_scale_is_that_of_the_maps_columns(engine: Any, architecture: str) -> None:
    # o = W (1 + A) z: the sum over tokens of z dz' is the sum of W dW over the rows.
    batch = make_batch([(9, 4), (9, 8)])
    plain = plain_gradients(model_of(architecture), batch)
    run = engine(lofit(), model=model_of(architecture))
    found = gradients(run, [batch], NOW)
    for own in run.tune.owns:
        gradient = plain[own.place.parameter]
        gradient_OI = gradient.T if own.place.module in run.tune.parts.transposed else gradient
        expected = (run.tune.region(own.place) * gradient_OI).sum(0).reshape(HEADS, WIDTH)
        assert torch.allclose(found[own.trained["scale"].name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1, 0, 4, 3)])
def test_the_penalty_is_the_sum_of_all_scales_once_a_step(engine: Any, sizes: tuple[int, ...]) -> None:
    runs = [moved(engine(lofit(penalty=penalty), model=model_of())) for penalty in (0.0, 0.7)]
    plain, pulled = (gradients(run, split(rows_of_eight(), sizes), NOW) for run in runs)
    for name, one in runs[0].tune.trained.items():
        assert torch.allclose(pulled[name] - plain[name], 0.7 * one.master.detach().sign(), rtol=0, atol=1e-12)
    losses = [run.step(split(rows_of_eight(), sizes), NOW).loss for run in (moved(run) for run in runs)]
    total = sum(float(one.master.detach().abs().sum()) for one in moved(runs[0]).tune.trained.values())
    assert abs(losses[1] - losses[0] - 0.7 * total) < 1e-10


def test_offsets_are_not_penalized(engine: Any) -> None:
    found = [gradients(moved(offsets_only(engine, penalty=penalty)), [rows_of_eight()], NOW) for penalty in (0.0, 0.7)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_offsets_stand_behind_scales() -> None:
    edit, _, _ = lofit()
    rng = torch.Generator().manual_seed(0)
    z, scale, offset = (torch.randn(shape, generator=rng).double() for shape in ((5, 6), (3, 2), (1, 2)))
    tensors = {"scale": scale, "heads": torch.tensor([1]), "offset": offset}
    placed = torch.cat([torch.zeros(2), offset[0], torch.zeros(2)])
    expected = (1 + scale.flatten()) * z + placed
    assert torch.allclose(edit.apply(tensors, z, z), expected, rtol=0, atol=1e-14)
    weight, bias = torch.randn(4, 6, generator=rng).double(), torch.randn(4, generator=rng).double()
    assert edit.fold is not None
    new_weight, new_bias = edit.fold(tensors, weight, bias)
    assert torch.allclose(z @ new_weight.T + new_bias, expected @ weight.T + bias, rtol=0, atol=1e-13)


def test_offsets_fold_into_the_bias_and_scales_into_the_map(engine: Any) -> None:
    for run in (
        moved(offsets_only(engine)),
        moved(engine(lofit(), model=model_of("gpt2"))),
        moved(engine(lofit(), model=model_of())),
    ):
        model = run.tune.model
        base = {name: one.detach().clone() for name, one in model.named_parameters()}
        wanted = logits_of(model, BATCH)
        run.tune.merge()
        assert torch.allclose(logits_of(model, BATCH), wanted, rtol=1e-11, atol=1e-11)
        changed = {name.rpartition(".")[2] for name, one in model.named_parameters() if not torch.equal(one, base[name])}
        assert changed == ({"bias"} if next(iter(run.tune.trained)).endswith("offset") else {"weight"})
        run.tune.unmerge()
        assert all(torch.equal(one, base[name]) for name, one in model.named_parameters())


@pytest.mark.parametrize("offsets_first", [True, False])
def test_edits_in_front_of_the_same_map_fold_whatever_their_order(engine: Any, offsets_first: bool) -> None:
    values = [lofit(share=1.0), ia3(outputs=("attention_output",), inputs=("attention_output",))]
    run = engine(values if offsets_first else values[::-1], model=model_of("gpt2"), optimizer="adamw")
    run.tune.refresh(
        lambda slot: run.services(slot, NOW._replace(step=2, learning_rate=0.0)), NOW._replace(step=2, learning_rate=0.0)
    )
    moved(run)
    assert {name.rpartition(".")[2] for name in run.tune.trained} == {"offset", "scale"}
    wanted = logits_of(run.tune.model, BATCH)
    run.tune.merge()
    assert torch.allclose(logits_of(run.tune.model, BATCH), wanted, rtol=1e-11, atol=1e-11)


def test_offsets_of_a_model_without_that_bias_are_kept_beside_it(engine: Any) -> None:
    with pytest.raises(LuthierError, match="needs a bias that this model lacks"):
        moved(offsets_only(engine, "llama")).tune.merge()


def test_offsets_at_all_heads_are_any_bias_of_the_map(engine: Any) -> None:
    run = offsets_only(engine)
    biased = model_of("gpt2")
    rng = torch.Generator().manual_seed(1)
    for own in run.tune.owns:
        added = torch.randn(32, generator=rng).double()
        biased.get_submodule(own.place.module).bias.data += added
        offset_HW = torch.linalg.solve(run.tune.region(own.place), added).reshape(HEADS, WIDTH)
        run.tune.set({own.trained["offset"].name: offset_HW[own.frozen["heads"]]})
    assert torch.allclose(logits_of(run.tune.model, BATCH), logits_of(biased, BATCH), rtol=1e-9, atol=1e-9)


def test_the_paper_starts_and_rates(engine: Any) -> None:
    run = engine(lofit(deviation=1e-3), model=model_of())
    values = torch.cat([one.master.detach().flatten() for one in run.tune.trained.values()])
    assert len(values) == 64 and abs(float(values.std()) - 1e-3) < 3e-4
    assert {one.rate for one in run.tune.trained.values()} == {1.0}
    offsets = offsets_only(engine, deviation=1e-3, learning_rate_factor=3.0)
    values = torch.cat([one.master.detach().flatten() for one in offsets.tune.trained.values()])
    assert len(values) == 64 and abs(float(values.std()) - 1e-3) < 3e-4
    assert {one.rate for one in offsets.tune.trained.values()} == {3.0}


def test_the_schedule_begins_again_with_the_second_phase() -> None:
    freezings = [value for value in lofit(selection=0.3) if isinstance(value, Freezing)]
    assert [(value.ends, value.restart) for value in freezings] == [((0.3,), True)]


def test_a_penalty_that_drowns_the_loss_is_told(engine: Any) -> None:
    """With a large penalty all scores fall to the optimizer's noise, and what is chosen means nothing."""

    def scores(penalty: float) -> None:
        run = engine(lofit(penalty=penalty, selection=0.95), model=model_of(layers=1), optimizer="adamw")
        run.tune.model.train()
        for i in range(40):
            rate = 5e-3 * (1 - i / 38) if i < 38 else 5e-3
            run.step([rows_of_eight()], Now(step=i, steps=40, learning_rate=rate))

    with pytest.warns(UserWarning, match="scores are noise"):
        scores(10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores(0.0)


def test_adamw_holds_two_numbers_for_each_that_trains(engine: Any) -> None:
    run = engine(lofit(share=0.25), model=model_of(), optimizer="adamw")
    for last in (2, 5):
        go(run, 0 if last == 2 else 2, last)
        held = [one.numel() for path, one in run.chain.tensors().items() if not path.endswith("|age") and isinstance(one, Tensor)]
        assert sum(held) == 2 * run.tune.numbers()


def test_killed_in_either_phase_and_resumed(engine: Any, tmp_path: Path) -> None:
    def build() -> Any:
        return engine(lofit(share=0.25, deviation=1e-3), model=model_of(), optimizer="adamw")

    run, saved = build(), []
    for k in range(6):
        saved.append((k, save(tmp_path / f"step-{k}", run, {"step": k}), everything(run)))
        go(run, k, k + 1)
    wanted = everything(run)
    for k, folder, then in saved:
        fresh = build()
        assert restore(folder, fresh) == {"step": k}
        assert_equal(everything(fresh), then)
        go(fresh, k, 6)
        assert_equal(everything(fresh), wanted)


@pytest.mark.parametrize("selection", [0.01, 0.99])
def test_a_run_too_short_for_both_phases_is_refused(engine: Any, selection: float) -> None:
    with pytest.raises(LuthierError, match="a run of 20 steps has 20 for `lofit`, which are too few for its 2 phases"):
        engine({"lofit": {"selection": selection}}, model=model_of())


def test_heads_that_do_not_explain_the_map_are_refused(engine: Any) -> None:
    edit, _, _ = lofit()
    run = engine("full", model=model_of())
    place = run.tune.parts.select(target_modules="attention_output")[0]
    with pytest.raises(LuthierError, match="reads 33 channels, not 4 heads of 8"):
        edit.start(place, 33, 32, run.services("lofit", NOW))


@pytest.mark.parametrize(
    "options",
    [{"share": 0.0}, {"share": 1.01}, {"selection": 1.0}, {"penalty": -1.0}, {"learning_rate_factor": 0.0}, {"deviation": -1.0}],
)
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LuthierError, match=f"{next(iter(options.values()))}"):
        lofit(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"share": 0.01},
        {"share": 1.0},
        {"selection": 0.01},
        {"selection": 0.99},
        {"penalty": 0.0},
        {"learning_rate_factor": 0.01},
        {"deviation": 0.0},
    ],
)
def test_settings_at_the_edge_of_what_is_possible_are_taken(options: dict[str, Any]) -> None:
    edit, term, freezing = lofit(**options)
    assert term.penalty, "it teaches nothing by itself"
    assert edit.rates == {"offset": options.get("learning_rate_factor", 2.0)} and freezing.ends == (options.get("selection", 0.5),)
