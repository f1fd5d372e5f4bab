"""S2FT against the paper's rule: which heads and channels train, that their slices see full gradients, and that deltas add."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.delta import Delta, Sparse
from luthier.delta.forms import bits
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, Place, Select
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.training.checkpoint import restore, save
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import CALIBRATION, calibration, make_batch, split
from tests.tolerance import assert_rounded
from tests.toys.helpers import gradients, logits_of, model_of, plain_gradients, rows_of_eight
from tests.unit.selective_oracles import dense_of, live, mask_of, untouched
from tests.unit.test_kinds_resume import assert_equal, build, everything, go

SHARES = {"value": 0.5, "output": 0.25, "up": 0.1, "down": 0.1}
FORMS = {"attention_value": "rows", "attention_output": "cols", "mlp_up": "rows", "mlp_down": "cols"}


def chosen(model: Any, *, seed: int = 0, **options: Any) -> dict[Place, Select]:
    """What one choice frees."""
    parts = map_parts(model)
    (value,) = registry.make({"s2ft": options}, ("selective",)).values
    found: dict[Place, Select] = value.choose(parts, RunServices(Tune(model, parts), "s2ft", Now(seed=seed), calibration))
    return found


def units_of(found: dict[Place, Select], role: str, width: int = 1) -> list[tuple[int, int]]:
    """Block and number of each unit; all of its rows or columns must be there."""
    pairs = []
    for place, select in found.items():
        if place.role == role:
            assert select.index is not None and place.block is not None
            groups = select.index.reshape(-1, width)
            assert bool((groups == groups[:, :1] + torch.arange(width)).all()) and bool((groups[:, 0] % width == 0).all())
            pairs += [(place.block, number) for number in (groups[:, 0] // width).tolist()]
    return sorted(pairs)


def steps(run: Any, now: Now, count: int = 3) -> None:
    for i in range(count):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))


def test_the_papers_setting_counts_channels_over_the_whole_model() -> None:
    model = tiny("llama", layers=4, width=64)
    channels = model.config.intermediate_size * 4
    found = chosen(model)
    assert {(place.role, select.form) for place, select in found.items()} == {("mlp_down", "cols")}
    assert len(units_of(found, "mlp_down")) == int(0.03 * channels)
    numbers = sum(len(select.index) * 64 for select in found.values() if select.index is not None)
    assert numbers == int(0.03 * channels) * 64


@pytest.mark.parametrize(("share", "blocks", "count"), [(0.03, 4, 30), (0.29, 1, 29), (1.0, 2, 200)])
def test_shares_round_down(share: float, blocks: int, count: int) -> None:
    """An example of 4 blocks of 256 channels, a product that binary numbers put below 29, and all."""
    model = tiny("opt", layers=blocks, width=16)
    inner = 256 if blocks == 4 else 100
    for layer in model.model.decoder.layers:
        layer.fc1, layer.fc2 = torch.nn.Linear(16, inner), torch.nn.Linear(inner, 16)
    assert len(units_of(chosen(model, down=share), "mlp_down")) == count


def test_random_units_are_drawn_evenly_from_the_pool_of_all_blocks() -> None:
    model = tiny("llama", layers=2, width=8)
    seen: Counter[tuple[int, int]] = Counter()
    in_a_block: set[int] = set()
    for seed in range(600):
        units = units_of(chosen(model, seed=seed, down=0.25), "mlp_down")
        assert len(set(units)) == 12
        in_a_block.add(sum(block == 0 for block, _ in units))
        seen.update(units)
    # Five standard errors of 600 draws with odds of one quarter; each block's number varies.
    assert len(seen) == 48 and all(abs(count - 150) < 5 * 10.7 for count in seen.values())
    assert len(in_a_block) > 3


def test_a_block_without_a_drawn_unit_stays_plain() -> None:
    model = tiny("llama", layers=4)
    found = chosen(model, down=0.0, value=0.125)
    assert len(found) == 1 and len(units_of(found, "attention_value", 8)) == 1


def test_each_projection_draws_for_itself_and_by_the_seed_alone() -> None:
    model = tiny("gpt2", layers=2)
    first = chosen(model, up=0.1, down=0.1)
    assert units_of(first, "mlp_up") != units_of(first, "mlp_down")
    torch.manual_seed(99)
    again = chosen(copy.deepcopy(model), up=0.1, down=0.1)
    assert all(torch.equal(first[place].index, again[place].index) for place in first) and first.keys() == again.keys()
    assert units_of(chosen(model, seed=1), "mlp_down") != units_of(chosen(model), "mlp_down")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "qwen2"])
def test_units_are_heads_and_channels(architecture: str) -> None:
    """Under grouped-query attention there are fewer heads of values than columns of heads in the output."""
    model = tiny(architecture, layers=2)
    parts = map_parts(model)
    found = chosen(model, **SHARES)
    assert {place.role: select.form for place, select in found.items()} == FORMS
    assert all(place.tensor == "weight" for place in found)
    assert len(units_of(found, "attention_value", parts.head_width)) == parts.key_value_heads
    assert len(units_of(found, "attention_output", parts.head_width)) == parts.heads // 2
    assert parts.key_value_heads == (4 if architecture == "gpt2" else 2) and parts.heads == 4


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "qwen2"])
def test_slices_see_the_gradient_of_full_fine_tuning_and_step_like_it(engine: Any, now: Now, architecture: str) -> None:
    model, batch = model_of(architecture), rows_of_eight()
    base, wanted, dense = live(model), logits_of(copy.deepcopy(model), batch), plain_gradients(model, batch)
    run = engine({"s2ft": SHARES}, model=model)
    assert torch.equal(logits_of(model, batch), wanted)
    found = gradients(run, split(batch, (5, 3)), now)
    run.step([batch], now)
    expected = {name: value.clone() for name, value in base.items()}
    for name, one in run.tune.trained.items():
        slope = dense_of(run, one, dense)
        part = slope[one.index] if one.form == "rows" else slope[:, one.index]
        assert float((found[name] - part).abs().max()) < 1e-10
        dense_of(run, one, expected).sub_(mask_of(one, slope.shape) * slope * now.learning_rate)
    assert max(float((one - expected[name]).abs().max()) for name, one in live(model).items()) < 1e-12
    assert untouched(run, base)
    for one in run.tune.trained.values():
        change = run.tune.region(one.place) - dense_of(run, one, base)
        assert 0 < int(torch.linalg.matrix_rank(change)) <= len(one.index)


@pytest.mark.parametrize("name", ["value", "output", "up", "down"])
def test_a_share_of_one_is_the_whole_projection(engine: Any, now: Now, name: str) -> None:
    role = {"value": "attention_value", "output": "attention_output", "up": "mlp_up", "down": "mlp_down"}[name]
    found = []
    for tune in ({"s2ft": {"down": 0.0, name: 1.0}}, {"full": {"target_modules": [role]}}):
        model = model_of()
        steps(engine(tune, model=model, optimizer="adamw"), now)
        found.append(live(model))
    assert max(float((value - found[1][name]).abs().max()) for name, value in found[0].items()) < 1e-12


def test_weight_decay_pulls_towards_the_base(engine: Any, now: Now) -> None:
    """Decay drew the selected slices to zero, where the paper's slices, which begin at zero, are drawn back to the base."""
    run = engine({"s2ft": {"down": 0.5}}, model=model_of(), optimizer={"adamw": {"weight_decay": 0.5}})
    (one, *_) = run.tune.trained.values()
    base = one.master.detach().clone()
    for moved, wanted in ((0.0, 0.0), (1.0, 0.95)):
        run.tune.set({one.name: base + moved})
        one.gradient = torch.zeros_like(base)
        run.chain.step(now._replace(learning_rate=0.1))
        assert torch.allclose(one.master.detach() - base, torch.full_like(base, wanted), atol=1e-12)


def test_moving_selected_channels_together_is_the_same_mathematics() -> None:
    """The paper's form: channels {1, 4} of up and {4, 7, 9} of down, moved to the front, train as one dense slice each."""
    rng = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(10, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    down = torch.randn(6, 10, generator=rng, dtype=torch.float64)
    x, target = (torch.randn(5, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    order = torch.tensor([1, 4, 7, 9, 0, 2, 3, 5, 6, 8])

    def forward(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()

    full_up, full_down = up.clone().requires_grad_(True), down.clone().requires_grad_(True)
    y = forward(gate, full_up, full_down)
    (y * target).sum().backward()
    assert full_up.grad is not None and full_down.grad is not None
    moved_up, moved_down = up[order].requires_grad_(True), down[:, order].requires_grad_(True)
    moved = forward(gate[order], moved_up, moved_down)
    slice_up, slice_down = torch.autograd.grad((moved * target).sum(), (moved_up, moved_down))
    assert float((moved - y).detach().abs().max()) < 1e-12
    assert float((slice_up[0:2] - full_up.grad[[1, 4]]).abs().max()) < 1e-12
    assert float((slice_down[:, 1:4] - full_down.grad[:, [4, 7, 9]]).abs().max()) < 1e-12
    # Gathered inputs give the slice's change of the output without moving anything.
    hidden = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
    change = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    merged = down.index_add(1, torch.tensor([4, 7, 9]), change)
    assert float((hidden @ down.t() + hidden[:, [4, 7, 9]] @ change.t() - hidden @ merged.t()).abs().max()) < 1e-12


def plain_inputs(model: Any, batch: Any, names: list[str]) -> dict[str, Tensor]:
    """What modules read at real tokens of a batch, by plain hooks."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: seen.__setitem__(name, arguments[0][batch.attend_BT])
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=batch.token_ids_BT, attention_mask=batch.attend_BT.long())
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("prefer", ["smallest", "largest"])
@pytest.mark.parametrize("by", ["weight", "activation", "weight_activation", "gradient"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rankings_against_brute_force(architecture: str, by: str, prefer: str) -> None:
    model = model_of(architecture)
    parts, batch = map_parts(model), make_batch(CALIBRATION, first=100)
    slopes = plain_gradients(model, batch)
    readers = {(p.block, p.role): p.module for p in parts.select(target_modules=("attention_output", "mlp_down"))}
    read = plain_inputs(model, batch, list(readers.values()))
    queries, width = parts.heads // parts.key_value_heads, parts.head_width
    found = chosen(model, by=by, prefer=prefer, **SHARES)
    for role, form in FORMS.items():
        size = {"attention_value": width, "attention_output": width}.get(role, 1)
        scores: dict[tuple[int, int], float] = {}
        for place in parts.select(target_modules=(role,)):
            assert place.block is not None
            weight = parts.view(model, place).detach()
            whole = slopes[place.parameter]
            slope = (whole.t() if place.module in parts.transposed else whole)[place.start : place.stop]
            x = read[readers[place.block, "attention_output" if role.startswith("attention") else "mlp_down"]]
            for unit in range(weight.shape[0 if form == "rows" else 1] // size):
                mine = slice(unit * size, (unit + 1) * size)
                heads = slice(unit * size * queries, (unit + 1) * size * queries) if role == "attention_value" else mine
                sizes = {
                    "weight": float((weight[mine] if form == "rows" else weight[:, mine]).norm()),
                    "gradient": float((slope[mine] if form == "rows" else slope[:, mine]).norm()),
                    "activation": float(x[:, heads].norm()),
                }
                sizes["weight_activation"] = sizes["weight"] * sizes["activation"]
                scores[place.block, unit] = sizes[by]
        ranked = sorted(scores, key=lambda pair: scores[pair], reverse=prefer == "largest")
        share = SHARES[{"attention_value": "value", "attention_output": "output", "mlp_up": "up", "mlp_down": "down"}[role]]
        assert units_of(found, role, size) == sorted(ranked[: int(share * len(scores))])


def test_adamw_holds_two_numbers_for_each_that_trains(engine: Any, now: Now) -> None:
    run = engine({"s2ft": SHARES}, optimizer="adamw")
    steps(run, now)
    held = sum(value.numel() for key, value in run.chain.tensors().items() if not key.endswith("|age"))
    assert held == 2 * run.tune.numbers() < 0.2 * sum(one.numel() for one in run.tune.model.parameters())


def test_backward_of_columns_keeps_the_selected_inputs_alone(engine: Any) -> None:
    """What the paper's partial backward saves: of the inputs of down, the selected channels."""
    run = engine({"s2ft": {"down": 0.05}}, model=model_of(layers=1))
    (one,) = run.tune.trained.values()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):
        run.tune.model(input_ids=torch.arange(5, 12)[None])
    assert (1, 7, len(one.index)) in kept
    assert (1, 7, run.tune.region(one.place).shape[1]) not in kept


def tuned(engine: Any, now: Now, base: Any, seed: int, dtype: torch.dtype) -> Delta:
    """A delta of a few steps from a base, with its own units and rows."""
    model = copy.deepcopy(base)
    run = engine({"s2ft": {"down": 0.2, "output": 0.125}}, model=model, optimizer="adamw", dtype=dtype, seed=seed)
    for i in range(3):
        run.step([rows_of_eight(seed=10 * seed + i)], now._replace(step=i, learning_rate=0.01, seed=seed))
    return Delta.between(base, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_deltas_of_one_base_switch_and_fuse(engine: Any, now: Now, tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny("llama", seed=1, dtype=dtype)
    before = live(base)
    first, second = (tuned(engine, now, base, seed, dtype) for seed in (1, 2))
    for name, delta in (("first", first), ("second", second)):
        delta.save(tmp_path / f"{name}.safetensors")
    first, second = (Delta.load(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    assert all(isinstance(form, Sparse) for delta in (first, second) for forms in delta.changes.values() for form in forms)

    model = copy.deepcopy(base)
    for delta in (first, second, first):
        delta.apply(model)
        assert any(not torch.equal(bits(one), bits(before[name])) for name, one in live(model).items())
        delta.remove(model)
        assert all(torch.equal(bits(one), bits(before[name])) for name, one in live(model).items())

    fused = 0.25 * first + 0.75 * second
    overlap = 0
    for name in before:
        sides = [
            delta.spread(name).float() if name in delta.changes else torch.zeros(before[name].shape) for delta in (first, second)
        ]
        overlap += int(((sides[0] != 0) & (sides[1] != 0)).sum())
        found = fused.spread(name) if name in fused.changes else torch.zeros(before[name].shape)
        assert_rounded(found, 0.25 * sides[0] + 0.75 * sides[1], 2, what=name)
    assert overlap, "the two deltas train nothing in common: the test does not reach sums"

    fused.apply(model)
    for name, one in live(model).items():
        added = before[name] if name not in fused.changes else (before[name].float() + fused.spread(name)).to(dtype)
        assert torch.equal(one, added)


@pytest.mark.parametrize("by", ["random", "weight_activation", "gradient"])
def test_fault_27_a_resumed_run_selects_the_same(engine: Any, now: Now, tmp_path: Path, by: str) -> None:
    """Fault 27: the selection is made again from the base, and training goes on to the same bits."""
    setting: dict[str, Any] = {"tune": {"s2ft": {**SHARES, "by": by}}, "dtype": torch.bfloat16}
    run = build(engine, **setting)
    go(run, now, 0, 2)
    folder = save(tmp_path / "step-2", run, {})
    go(run, now, 2, 4)
    fresh = build(engine, **setting)
    restore(folder, fresh)
    go(fresh, now, 2, 4)
    assert_equal(everything(fresh), everything(run))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"down": 1.5}, "the share is 1.5"),
        ({"value": -0.1}, "the share is -0.1"),
        ({"down": 0.0}, "nothing trains"),
        ({"calibration_rows": 0}, "there are 0 rows"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LuthierError, match=message):
        registry.make({"s2ft": options}, ("selective",))


def test_a_ranking_may_look_at_one_row() -> None:
    asked: list[tuple[int, str]] = []

    def look(rows: int, source: str) -> list[Batch]:
        asked.append((rows, source))
        return calibration(rows, source)

    parts = map_parts(model := tiny("llama", layers=1))
    options = {"by": "activation", "down": 0.5, "calibration_rows": 1, "calibration_source": "other"}
    (value,) = registry.make({"s2ft": options}, ("selective",)).values
    value.choose(parts, RunServices(Tune(model, parts), "s2ft", Now(), look))
    assert set(asked) == {(1, "other")}


def test_a_share_too_small_for_one_unit_is_refused() -> None:
    with pytest.raises(LuthierError, match="of 8 units is none") as error:
        chosen(tiny("llama", layers=2), output=0.1)
    assert error.value.where == "s2ft: output" and "0.125" in str(error.value.fix)


@pytest.mark.parametrize(("architecture", "options"), [("gpt_neox", {"value": 0.5}), ("mixtral", {"down": 0.5})])
def test_weights_whose_units_are_not_known_are_refused(architecture: str, options: dict[str, Any]) -> None:
    """GPT-NeoX interleaves queries, keys and values; a mixture's experts are one tensor."""
    with pytest.raises(LuthierError, match="cannot tell the units"):
        chosen(tiny(architecture), **{"down": 0.0, **options})
