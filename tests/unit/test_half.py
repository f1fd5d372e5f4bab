"""Half Fine-Tuning against the paper's rule: how many train, what never moves, and what it comes down to."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.delta import Delta
from luthier.errors import LuthierError
from luthier.kinds import Now, Place, Select
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.registry import make
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import split
from tests.toys.helpers import gradients, logits_of, rows_of_eight
from tests.toys.mixtures import mixture

CATEGORIES = {"attention": "attention", "mlp": "mlp", "expert": "mlp"}


def category(place: Place) -> str:
    return "norm" if place.role.endswith("norm") else CATEGORIES[place.role.split("_")[0]]


def chosen_by(model: Any, *, seed: int = 0, stage: int = 0, **options: Any) -> dict[Place, Select]:
    """What one draw frees, by place."""
    parts = map_parts(model)
    (value,) = make({"half": options}, ("selective",)).values
    services = RunServices(Tune(model, parts), "half", Now(seed=seed, stage=stage, stages=2))
    return dict(value.choose(parts, services))


def drawn(model: Any, **options: Any) -> list[Place]:
    """The places one draw frees."""
    return list(chosen_by(model, **options))


def counts(places: list[Place]) -> Counter[tuple[int, str]]:
    return Counter((p.block, category(p)) for p in places if p.block is not None and p.tensor != "bias")


@pytest.mark.parametrize("seed", range(5))
def test_four_blocks_train_21_of_39_tensors(seed: int) -> None:
    model = tiny("llama", layers=4, tied=False)
    places = drawn(model, seed=seed)
    found = counts(places)
    assert [found[b, "attention"] for b in range(4)] == [2, 2, 2, 2]
    assert [found[b, "norm"] for b in range(4)] == [1, 1, 1, 1]
    assert sorted(found[b, "mlp"] for b in range(4)) == [1, 1, 2, 2]
    assert {str(p) for p in places if p.block is None} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    }
    assert len(places) == 21 and len(list(model.parameters())) == 39


@pytest.mark.parametrize("seed", range(5))
def test_an_odd_number_of_blocks_rounds_as_the_paper_does(seed: int) -> None:
    found = counts(drawn(tiny("llama", layers=5), seed=seed))
    assert sum(found[b, "attention"] for b in range(5)) == 10
    assert sorted(found[b, "mlp"] for b in range(5)) == [1, 1, 2, 2, 2]
    assert sum(found[b, "norm"] for b in range(5)) == 5


def test_every_tensor_is_drawn_about_half_of_the_time() -> None:
    model = tiny("llama", layers=2)
    seen = Counter(str(p) for seed in range(400) for p in drawn(model, seed=seed) if p.block is not None)
    assert len(seen) == 18
    # Five standard errors of a fair coin.
    assert all(abs(count - 200) < 5 * 10 for count in seen.values())


def test_frozen_weights_keep_every_bit_where_zeroed_gradients_shrink_them(engine: Any, now: Now) -> None:
    model = tiny("llama", seed=1, layers=4, tied=False)
    base = {name: one.detach().clone() for name, one in model.named_parameters()}
    run = engine("half", model=model, optimizer={"adamw": {"weight_decay": 0.1}}, dtype=torch.float32)
    look_alike = {name: one.clone().requires_grad_(True) for name, one in base.items()}
    torchs = torch.optim.AdamW(list(look_alike.values()), lr=0.01, weight_decay=0.1)
    trained = {one.place.parameter for one in run.tune.trained.values()}
    frozen = set(base) - trained
    assert len(trained) == 21 and len(frozen) == 18
    for i in range(20):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))
        for one in look_alike.values():
            one.grad = torch.zeros_like(one)
        torchs.step()
    live = dict(model.named_parameters())
    for name in frozen:
        assert torch.equal(live[name], base[name])
        ratio = look_alike[name].detach().double().norm() / base[name].double().norm()
        assert abs(float(ratio) - 0.999**20) < 1e-5 and abs(0.999**20 - 0.98019) < 1e-5
    assert all(not torch.equal(live[name], base[name]) for name in trained)
    assert set(run.chain.state["adamw"]) == set(run.tune.trained) and len(run.chain.state["adamw"]) == 21


def test_the_draw_depends_on_seed_and_stage_alone() -> None:
    model = tiny("llama", layers=4)
    first = drawn(model)
    torch.manual_seed(99)
    assert drawn(copy.deepcopy(model)) == first
    assert drawn(model, seed=1) != first != drawn(model, stage=1)


def test_a_share_of_one_is_full_fine_tuning_bit_for_bit(engine: Any, now: Now) -> None:
    found = []
    for tune in ({"half": {"share": 1.0}}, "full"):
        model = tiny("llama", seed=1, layers=4)
        run = engine(tune, model=model, optimizer={"adamw": {"weight_decay": 0.1}}, dtype=torch.float32)
        losses = [run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01)).loss for i in range(4)]
        found.append((losses, {name: one.detach().clone() for name, one in model.named_parameters()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_other_shares_round_over_the_model(seed: int, share: float) -> None:
    found = counts(drawn(tiny("llama", layers=4), seed=seed, share=share))
    for kind, size in (("attention", 4), ("mlp", 3), ("norm", 2)):
        each = [found[b, kind] for b in range(4)]
        assert sum(each) == int(share * 4 * size + 0.5)
        assert max(each) - min(each) <= 1


def numbers(model: Any, places: list[Place]) -> int:
    def size(p: Place) -> int:
        tensor = model.get_parameter(p.parameter)
        rows = tensor.numel() if p.start is None else tensor.numel() * (p.stop - p.start) // max(tensor.shape)  # type: ignore[operator]
        return int(rows)

    return sum(size(p) for p in places)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_balance_by_parameters_is_within_one_tensor_of_the_share(seed: int, share: float) -> None:
    model = tiny("llama", layers=4, width=64)
    everything = drawn(model, share=1.0)
    chosen = drawn(model, seed=seed, share=share, balance="parameters")
    for kind in ("attention", "mlp", "norm"):
        of_kind = [p for p in everything if p.block is not None and category(p) == kind]
        trained = numbers(model, [p for p in chosen if p in of_kind])
        largest = max(numbers(model, [p]) for p in of_kind)
        assert abs(trained - share * numbers(model, of_kind)) <= largest


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        # Two norms of 32 numbers a block: 16 are owed, then 0, 16 and 0; half a norm is enough.
        (0.25, [1, 0, 1, 0]),
        # 15.75 owed are too little for one, 31.5 are not; then 15.25 and 31.
        (0.25 - 1 / 256, [0, 1, 0, 1]),
        # 12.8 are more than a third of a norm.
        (0.2, [0, 1, 0, 1]),
    ],
)
def test_balance_by_parameters_by_hand(share: float, wanted: list[int]) -> None:
    found = counts(drawn(tiny("llama", layers=4), share=share, balance="parameters"))
    assert [found[b, "norm"] for b in range(4)] == wanted


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(LuthierError, match="the share is") as error:
        make({"half": {"share": share}}, ("selective",))
    assert error.value.where == "half: share"


def test_half_by_tensors_is_not_half_by_parameters_with_narrow_keys() -> None:
    """Width 64 with keys and values of 32: 2 of 4 attention matrices are 1/3, 1/2 or 2/3 of their numbers."""
    model = tiny("llama", layers=2, width=64)
    all_of = numbers(model, [p for p in drawn(model, share=1.0) if p.block == 0 and category(p) == "attention"])
    shares = {
        round(numbers(model, [p for p in drawn(model, seed=s) if p.block == 0 and category(p) == "attention"]) / all_of, 4)
        for s in range(60)
    }
    assert shares == {0.3333, 0.5, 0.6667}


def test_the_level_of_layers_draws_whole_blocks() -> None:
    places = drawn(tiny("llama", layers=4), level="layer")
    blocks = Counter(p.block for p in places if p.block is not None)
    assert sorted(blocks.values()) == [9, 9]
    assert drawn(tiny("llama", layers=5), level="layer", share=0.5) != []


def test_the_level_of_the_model_draws_anywhere() -> None:
    model = tiny("llama", layers=4)
    spread = []
    for seed in range(6):
        places = [p for p in drawn(model, seed=seed, level="model") if p.block is not None]
        assert len(places) == 18
        spread.append(tuple(sorted(Counter(p.block for p in places).values())))
    assert len(set(spread)) > 1


def test_fused_projections_are_drawn_in_parts_and_biases_follow(engine: Any, now: Now) -> None:
    model = tiny("gpt2", seed=1, layers=4)
    places = drawn(model)
    found = counts(places)
    assert [found[b, "attention"] for b in range(4)] == [2] * 4 and [found[b, "mlp"] for b in range(4)] == [1] * 4
    assert [found[b, "norm"] for b in range(4)] == [1] * 4
    weights = {(p.module, p.start) for p in places if p.tensor == "weight" and p.block is not None}
    biases = {(p.module, p.start) for p in places if p.tensor == "bias" and p.block is not None}
    assert weights == biases
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    run = engine("half", model=model, optimizer={"adamw": {"weight_decay": 0.1}}, dtype=torch.float32)
    for i in range(3):
        run.step([rows_of_eight()], now._replace(step=i, learning_rate=0.01))
    chosen = {(one.place.module, one.place.start) for one in run.tune.trained.values()}
    for b in range(4):
        name = f"transformer.h.{b}.attn.c_attn"
        for start in (0, 32, 64):
            same = [
                torch.equal(
                    model.get_parameter(f"{name}.{t}")[..., start : start + 32],
                    before[f"{name}.{t}"][..., start : start + 32],
                )
                for t in ("weight", "bias")
            ]
            assert same == ([False, False] if (name, start) in chosen else [True, True])


def test_interleaved_projections_count_as_one_matrix() -> None:
    found = counts(drawn(tiny("gpt_neox", layers=4)))
    assert [found[b, "attention"] for b in range(4)] == [1] * 4 and [found[b, "mlp"] for b in range(4)] == [1] * 4


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("balance", ["tensors", "parameters"])
def test_half_of_the_experts_matrices_train(family: str, balance: str) -> None:
    """Each expert of a stack has matrices of its own, 8 in a block: one of two stacks would be all experts' gates and ups, or none."""
    model = mixture(family)
    experts: Counter[int] = Counter()
    of_one: set[str] = set()
    for place, select in chosen_by(model, seed=1, balance=balance).items():
        if place.role != "expert":
            continue
        assert (select.form == "rows" and select.index is not None) or select.form == "whole"
        mine = [0, 1, 2, 3] if select.index is None else select.index.tolist()
        if place.tensor.endswith("bias"):
            of_one.add(f"{place.module} {place.tensor.removesuffix('_bias')} {mine}")
        else:
            assert place.block is not None
            experts[place.block] += len(mine)
            of_one.add(f"{place.module} {place.tensor} {mine}")
    matrices = sum(1 for place in chosen_by(model, share=1.0) if place.role == "expert" and not place.tensor.endswith("bias"))
    assert matrices == 4 and all(select.form == "whole" for select in chosen_by(model, share=1.0).values())
    assert experts == {0: 4, 1: 4} if balance == "tensors" else 2 <= min(experts.values()) <= max(experts.values()) <= 6
    assert len(of_one) <= matrices, "a bias trains with its own expert's matrix"


def test_every_experts_matrices_are_drawn_about_half_of_the_time() -> None:
    model, rounds = mixture("mixtral"), 100
    seen: Counter[tuple[str, int]] = Counter()
    for seed in range(rounds):
        for place, select in chosen_by(model, seed=seed, target_modules=["expert"], embeddings="freeze").items():
            seen.update((str(place), expert) for expert in (range(4) if select.index is None else select.index.tolist()))
    assert len(seen) == 2 * 2 * 4
    # Five standard errors of a fair coin.
    assert all(abs(count - rounds / 2) < 5 * rounds**0.5 / 2 for count in seen.values())


def test_what_trains_of_a_stack_has_the_gradient_of_the_whole_and_the_rest_stays(engine: Any, now: Now) -> None:
    for family in ("mixtral", "gpt_oss"):
        model = mixture(family)
        whole = engine({"full": {}}, model=mixture(family), optimizer="sgd")
        run = engine({"half": {"target_modules": ["expert"], "embeddings": "freeze"}}, model=model, optimizer="sgd", keep_base=True)
        wanted, found = (gradients(one, split(rows_of_eight(), (5, 3)), now) for one in (whole, run))
        assert any(one.form == "rows" for one in run.tune.trained.values())
        for one in run.tune.trained.values():
            assert one.place is not None
            every = run.tune.parts.outputs(one.place, wanted[f"full/{one.place.parameter}"])
            mine = every if one.index is None else every[one.index]
            if one.form == "whole":
                mine = wanted[f"full/{one.place.parameter}"]
            assert float(mine.abs().max()) > 0.0
            torch.testing.assert_close(found[one.name], mine, rtol=1e-10, atol=1e-14)
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        run.step([rows_of_eight()], now)
        for one in run.tune.trained.values():
            assert one.place is not None
            moved = run.tune.region(one.place) != run.tune.parts.outputs(one.place, before[one.place.parameter])
            stays = [e for e in range(4) if one.index is not None and e not in one.index.tolist()]
            assert not bool(moved[stays].any()) and bool(moved.any())
        tuned = logits_of(model, rows_of_eight())
        with run.tune.off():
            assert torch.equal(logits_of(model, rows_of_eight()), logits_of(mixture(family), rows_of_eight()))
        assert torch.equal(logits_of(model, rows_of_eight()), tuned)
        other = mixture(family)
        Delta.of(run.tune).apply(other)
        assert torch.equal(logits_of(other, rows_of_eight()), tuned)


@pytest.mark.parametrize("embeddings", ["train", "freeze"])
def test_a_tied_embedding_is_one_decision(engine: Any, now: Now, embeddings: str) -> None:
    model = tiny("llama", seed=1, layers=4, tied=True)
    base = model.model.embed_tokens.weight.detach().clone()
    run = engine({"half": {"embeddings": embeddings}}, model=model, optimizer="adamw", dtype=torch.float32)
    outside = [one.place.role for one in run.tune.trained.values() if one.place.block is None]
    assert outside == (["embedding", "final_norm"] if embeddings == "train" else [])
    run.step([rows_of_eight()], now)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, base) == (embeddings == "freeze")


def test_half_reset_returns_every_block_and_nothing_else(engine: Any, now: Now) -> None:
    model = tiny("llama", seed=1, layers=4, tied=False)
    base = {name: one.detach().clone() for name, one in model.named_parameters()}
    run = engine("half", model=model, optimizer="adamw", dtype=torch.float32, keep_base=True)
    for i in range(3):
        run.step([rows_of_eight()], now._replace(step=i, learning_rate=0.01))
    reset: dict[str, Tensor] = {name: one.start for name, one in run.tune.trained.items() if one.place.block is not None}
    run.tune.set(reset)
    for name, one in model.named_parameters():
        assert torch.equal(one, base[name]) == ("layers" in name)
