"""NoiseFiT: the card's numbers by hand, the noise and the choice of blocks, and what it becomes without noise."""

from __future__ import annotations

from math import e, exp, pi, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import luthier
from luthier import registry
from luthier.columns.chunked import resolve
from luthier.errors import LuthierError
from luthier.kinds import Batch, Callback, Column, Disturbed, LossTerm, Now, TokenWeight
from luthier.methods.loss_term._noise import absolute_scale, relative_scale, signal_to_noise
from luthier.models.attention import use_attention
from luthier.training.disturb import disturbance
from luthier.training.services import view_of
from tests.conftest import make_batch, split
from tests.objectives import gradient_of, loss_of, total_of
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight, toys  # noqa: F401

FIRST, SECOND, SOFT, CONSISTENCY = "noisefit first", "noisefit second", "noisefit soft", "noisefit consistency"
ONE_TOKEN = torch.tensor([[[0.0, 1.0, 2.0, 3.0, 10.0]]], dtype=torch.float64)
ALONE = torch.ones(1, 1, dtype=torch.bool)


def noisefit(**options: Any) -> dict[str, Any]:
    return {"noisefit": {"layers": 2, **options}}


def term_of(**options: Any) -> tuple[LossTerm, Callback]:
    term, callback = registry.part("noisefit", **options).values
    return term, callback


def noisy(first: list[float], second: list[float]) -> dict[str, Tensor]:
    return {FIRST: torch.tensor([first], dtype=torch.float64), SECOND: torch.tensor([second], dtype=torch.float64)}


def test_the_divergences_point_the_right_way() -> None:
    """KL(clean || noisy) = ln((1 + e) / 2) - 1/2 and KL(second || first) the same; reversed it is 0.110944."""
    others = noisy([1.0, 0.0], [0.0, 0.0])
    assert loss_of("noisefit", [[0.0, 0.0]], [0], others=others) == pytest.approx(0.388614, abs=1e-6)
    assert loss_of({"noisefit": {"mix": 0.0, "consistency": 0.0}}, [[0.0, 0.0]], [0], others=others) == pytest.approx(
        0.060057, abs=1e-6
    )
    alone = loss_of({"noisefit": {"mix": 1.0, "consistency": 1.0}}, [[0.0, 0.0]], [0], others=others)
    assert alone - loss_of("cross_entropy", [[0.0, 0.0]], [0]) == pytest.approx(0.120115, abs=1e-6)
    turned = loss_of({"noisefit": {"mix": 1.0, "consistency": 1.0}}, [[0.0, 0.0]], [0], others=noisy([0.0, 0.0], [1.0, 0.0]))
    assert turned - loss_of("cross_entropy", [[0.0, 0.0]], [0]) == pytest.approx(0.110944, abs=1e-6)


@pytest.mark.parametrize(("detach", "slope"), [(True, 0.134471), (False, 0.036165)])
def test_the_clean_prediction_is_left_alone_unless_asked_for(detach: bool, slope: float) -> None:
    objective, others = {"noisefit": {"detach_clean": detach}}, noisy([0.0, 0.0], [0.0, 0.0])
    assert loss_of(objective, [[1.0, 0.0]], [0], others=others) == pytest.approx(0.212103, abs=1e-6)
    assert gradient_of(objective, [[1.0, 0.0]], [0], others=others)[0] == pytest.approx([-slope, slope], abs=1e-6)


@pytest.mark.parametrize("temperature", [2.0, 0.4])
def test_the_temperature_is_the_targets_alone(temperature: float) -> None:
    """At T = 2 the target of (2, 0) is that of (1, 0), whatever the noise; equal logits then no longer cost nothing."""
    others = noisy([2.0, 0.0], [2.0, 0.0])
    only_soft = {"mix": 0.0, "consistency": 0.0}
    assert loss_of({"noisefit": only_soft}, [[2.0, 0.0]], [0], others=others) == 0.0
    p, q = 1 / (1 + exp(-2 / temperature)), e**2 / (1 + e**2)
    wanted = p * (torch.tensor(p / q).log()) + (1 - p) * torch.tensor((1 - p) / (1 - q)).log()
    found = loss_of({"noisefit": {**only_soft, "temperature": temperature}}, [[2.0, 0.0]], [0], others=others)
    assert found == pytest.approx(float(wanted), abs=1e-7) and found > 0.05


@pytest.mark.parametrize("options", [{"detach_clean": False}, {"detach_clean": False, "temperature": 1.7, "mix": 0.3}])
def test_the_gradient_by_finite_differences(options: dict[str, Any]) -> None:
    rng = torch.Generator().manual_seed(1)
    clean, first, second = (torch.randn(4, 6, dtype=torch.float64, generator=rng).requires_grad_() for _ in range(3))

    def loss(*logits: Tensor) -> Tensor:
        return total_of({"noisefit": options}, logits[0], [0, 5, 2, 2], others={FIRST: logits[1], SECOND: logits[2]})

    assert torch.autograd.gradcheck(loss, (clean, first, second))


def test_token_weights_multiply_all_of_it() -> None:
    others = {
        name: torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate((FIRST, SECOND))
    }
    rows = [[0.3, 1.0, -2.0], [2.0, 0.0, 1.0]]
    second = loss_of("noisefit", rows[1:], [2], others={name: one[1:] for name, one in others.items()})
    weight = TokenWeight(lambda view: torch.tensor([0.0, 3.0], dtype=torch.float64))
    part = registry.Part("some", "token_weight", {}, (weight,))
    assert loss_of("noisefit", rows, [1, 2], others=others, weight=[part]) == pytest.approx(3.0 * second / 2, abs=1e-12)


def test_without_noise_the_soft_losses_are_zero(engine: Any, now: Now) -> None:
    plain = engine(model=model_of()).step([rows_of_eight()], now).loss
    run = engine(model=model_of(), objective=noisefit(noise_std=0.0))
    result = run.step([rows_of_eight()], now)
    assert result.loss == pytest.approx(0.5 * plain, abs=1e-12)
    assert result.notes[SOFT] == result.notes[CONSISTENCY] == 0.0
    warm = engine(model=model_of(), objective=noisefit(noise_std=0.0, temperature=2.0)).step([rows_of_eight()], now)
    assert warm.notes[SOFT] > 1e-3 and warm.notes[CONSISTENCY] == 0.0


def test_without_the_soft_losses_it_is_cross_entropy_bit_for_bit(engine: Any, now: Now) -> None:
    term, callback = term_of(mix=1.0, consistency=0.0)
    assert term.columns == ("nll",) and callback.start is None, "no noisy pass is made, and no block is chosen"
    found = []
    for objective in ("cross_entropy", noisefit(mix=1.0, consistency=0.0), noisefit()):
        run = engine(model=model_of(), objective=objective)
        found.append([run.step([rows_of_eight()], now._replace(step=i)).loss for i in range(3)])
    assert found[0] == found[1] != found[2]


def soft_of(**options: Any) -> Column:
    (one,) = [one for one in term_of(**options)[0].columns if not isinstance(one, str) and one.name == SOFT]
    return one


def disturbed(hidden_BTD: Tensor, now: Now, name: int = 0, **options: Any) -> Tensor:
    """The noise that a pass adds behind block 0."""
    one = soft_of(**options)
    rows = len(hidden_BTD)
    change = disturbance(one.passes[name], make_batch([(1, 0)] * rows), now, {"noise behind block 0": 1})
    assert change is not None
    return change(0, hidden_BTD) - hidden_BTD


def test_the_noise_of_one_token_by_hand(now: Now) -> None:
    """Median 2, median distance 1, standard deviation 3.96232, factor e."""
    wanted = torch.tensor([0.88183, 0.97457, 1.07707, 0.97457, 0.48396], dtype=torch.float64)
    assert torch.allclose(0.1 * absolute_scale(ONE_TOKEN, ALONE)[0, 0], wanted, atol=1e-5)
    assert torch.allclose(0.1 * relative_scale(ONE_TOKEN, ALONE)[0, 0], wanted / 3.96232, atol=1e-5)
    count = 10_000
    noise_BD = disturbed(ONE_TOKEN.expand(count, 1, 5), now)[:, 0]
    assert bool((noise_BD.mean(0).abs() < 4 * wanted / sqrt(count)).all())
    assert torch.allclose(noise_BD.std(0), wanted, rtol=4 / sqrt(2 * count))
    assert float((torch.corrcoef(noise_BD.T) - torch.eye(5)).abs().max()) < 4.5 / sqrt(count)
    twice_BD = disturbed(ONE_TOKEN.expand(count, 1, 5), now, noise_std=0.2)[:, 0]
    assert torch.allclose(twice_BD, 2 * noise_BD, rtol=1e-10)
    other_BD = disturbed(ONE_TOKEN.expand(count, 1, 5), now, name=1)[:, 0]
    assert abs(float(torch.corrcoef(torch.stack([noise_BD.flatten(), other_BD.flatten()]))[0, 1])) < 4.5 / sqrt(5 * count)


def test_the_noise_is_added(now: Now) -> None:
    """Three standard deviations up, where all that is drawn is 3."""
    drawn_BTD = torch.full_like(ONE_TOKEN, 3.0)
    for other in soft_of().passes:
        assert other.disturb is not None
        # The block's first stream of numbers.
        found_BTD = other.disturb(Disturbed(0, ONE_TOKEN, ALONE, lambda s: (drawn_BTD,)[s], now, {"noise behind block 0": 1}))
        assert torch.allclose(found_BTD, ONE_TOKEN + 0.3 * absolute_scale(ONE_TOKEN, ALONE), rtol=1e-12)


def test_the_spread_of_the_row_has_no_gradient() -> None:
    hidden_BTD = ONE_TOKEN.clone().requires_grad_()
    absolute, relative = (
        torch.autograd.grad(scale(hidden_BTD, ALONE).sum(), hidden_BTD)[0] for scale in (absolute_scale, relative_scale)
    )
    assert torch.allclose(absolute, 3.96232 * relative, rtol=1e-5, atol=1e-5) and relative.abs().max() > 0.1


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1, 5), (3, 4, 8)])
def test_the_absolute_noise_grows_with_the_deviation_of_a_rows_numbers(shape: tuple[int, int, int]) -> None:
    """Over one less than there are, down to two numbers."""
    hidden_BTD = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    own_BT = torch.ones(shape[:2], dtype=torch.bool)
    spread_B = hidden_BTD.flatten(1).std(1)
    assert torch.allclose(
        absolute_scale(hidden_BTD, own_BT), relative_scale(hidden_BTD, own_BT) * spread_B[:, None, None], rtol=1e-12
    )


def test_a_token_of_equal_numbers_has_noise_by_its_length() -> None:
    """Median distances of 0: a millionth of each token's norm takes their place, whatever the other token is."""
    tokens = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 20.0], [4.0, 4.0, 4.0, 4.0, 4.0]]], dtype=torch.float64)
    scale_TD = relative_scale(tokens, torch.ones(1, 2, dtype=torch.bool))[0]
    # The first token's variance is 80, and twice the mean of 80 and 0: above the limit of ln 5.
    assert scale_TD[0].tolist() == pytest.approx([5 * 20e-6] * 4 + [0.0], rel=1e-12, abs=1e-300)
    assert scale_TD[1].tolist() == pytest.approx([4e-6 * sqrt(5.0)] * 5, rel=1e-12)


def test_padding_and_other_rows_do_not_matter_to_the_noise() -> None:
    hidden_BTD = torch.randn(3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own_BT = torch.arange(6)[None] < torch.tensor([4, 6, 1])[:, None]
    for scale in (absolute_scale, relative_scale):
        together = scale(hidden_BTD.masked_fill(~own_BT[..., None], 1e9), own_BT)
        for row, length in enumerate((4, 6, 1)):
            alone = scale(hidden_BTD[row : row + 1, :length], torch.ones(1, length, dtype=torch.bool))
            assert torch.allclose(together[row, :length], alone[0], rtol=1e-12)


def test_a_tokens_spread_multiplies_its_noise_up_to_five_and_nothing_is_infinite() -> None:
    base = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    rows = torch.stack([base * 0.01, base * 0.01, base * 0.01, base])[None].requires_grad_()
    scale = relative_scale(rows, torch.ones(1, 4, dtype=torch.bool))
    # Of the variances 15.7 x (0.0001, 0.0001, 0.0001, 1) the last is 3.9988 times the mean.
    assert scale[0, 3, 2].item() == pytest.approx(5.0, abs=1e-12)
    assert scale[0, 0, 2].item() == pytest.approx(0.01 * exp(0.0001 / 0.250075), abs=1e-12)
    (slope,) = torch.autograd.grad(scale.sum(), rows)
    assert bool(slope.isfinite().all())
    for flat in (torch.zeros(1, 2, 5), torch.full((1, 2, 5), 3.0)):
        found = absolute_scale(flat, torch.ones(1, 2, dtype=torch.bool))
        assert float(found.abs().max()) < 1e-20, "what does not vary gets no noise"


def layered(factors: list[float]) -> Any:
    """Services of a model whose blocks give random states of these sizes."""

    def block_outputs(batches: Any, take: Any) -> None:
        for batch in batches:
            rng = torch.Generator().manual_seed(0)
            for block, factor in enumerate(factors):
                take(block, factor * torch.randn(*batch.attend_BT.shape, 512, dtype=torch.float64, generator=rng), batch.attend_BT)

    parts = SimpleNamespace(blocks=len(factors), width=512)
    return SimpleNamespace(parts=parts, block_outputs=block_outputs, batches=lambda rows: [make_batch([(12, 3)] * rows)])


def test_the_signal_to_noise_ratio_of_random_blocks() -> None:
    services = layered([1.0, 1.0, 0.01, 5.0])
    ratios = signal_to_noise(services, services.batches(4), absolute_scale, 0.1)
    # Of wide normal states: median distance 0.6745, a mean weight of 2 exp(a^2 / 2) P(z > a) at a = 0.1 / 0.6745, and the factor e.
    wanted = 1 / (0.1 * 0.6745 * 0.8919 * e)
    assert ratios == pytest.approx([wanted, wanted, 1 / (0.01 / wanted + 1e-6 / (0.01 * sqrt(2 / pi))), wanted / 5], rel=0.02)
    tenth = layered([0.1, 0.1, 0.001, 0.5])
    # But for the 1e-6 beside the noise.
    assert signal_to_noise(tenth, tenth.batches(4), absolute_scale, 0.1)[3] == pytest.approx(10 * ratios[3], rel=1e-3)
    h = torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = torch.ones(2, 5, dtype=torch.bool)
    assert torch.allclose(absolute_scale(0.1 * h, own), 0.01 * absolute_scale(h, own), rtol=1e-10)
    assert torch.allclose(relative_scale(0.1 * h, own), 0.1 * relative_scale(h, own), rtol=1e-10)
    relative = signal_to_noise(services, services.batches(4), relative_scale, 0.1)
    assert relative[2] == pytest.approx(relative[3], rel=0.05), "the size of the states does not matter to it"
    # The expectation is what ten draws come to.
    states = 5.0 * torch.randn(4, 12, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    own = torch.ones(4, 12, dtype=torch.bool)
    draws = 0.1 * absolute_scale(states, own) * torch.randn(10, 4, 12, 64, dtype=torch.float64)
    expected = 0.1 * sqrt(2 / pi) * absolute_scale(states, own).mean()
    assert float(draws.abs().mean()) == pytest.approx(float(expected), rel=0.03)


def test_the_signal_to_noise_ratio_by_hand() -> None:
    """Of the own tokens of two batches: neither padding nor a prompt's virtual token counts, and the vocabulary's first id does."""
    ids_BT = torch.tensor([[-1, 0, 7, 0], [-1, 3, 0, 0]])
    attend_BT = torch.tensor([[True, True, True, False], [True, True, False, False]])
    batch = Batch(ids_BT, attend_BT, ids_BT, ids_BT, ("a", "b"))
    own_BT = torch.tensor([[False, True, True, False], [False, True, False, False]])
    values_BT1 = torch.tensor([[50.0, 1.0, -2.0, 70.0], [50.0, 6.0, 70.0, 70.0]], dtype=torch.float64)[..., None]

    def block_outputs(batches: Any, take: Any) -> None:
        for _ in batches:
            for block in (0, 1):
                take(block, (1.0 + block) * values_BT1.expand(2, 4, 2), own_BT)

    services: Any = SimpleNamespace(parts=SimpleNamespace(blocks=2, width=2), block_outputs=block_outputs)
    found = signal_to_noise(services, [batch, batch], lambda hidden_BTD, own_BT: hidden_BTD.square(), 0.5)
    # The mean of 1, 2 and 6 is 3, that of their squares 41 / 3.
    noise = 0.5 * sqrt(2 / pi) * 41 / 3
    assert found == pytest.approx([3 / (noise + 1e-6), 6 / (4 * noise + 1e-6)], rel=1e-12)


@pytest.mark.parametrize(("choose", "layers", "wanted"), [("highest", 1, {2}), ("lowest", 1, {3}), ("highest", 3, {0, 1, 2})])
def test_blocks_are_chosen_by_it(choose: str, layers: int, wanted: set[int]) -> None:
    _, callback = term_of(choose=choose, layers=layers)
    assert callback.start is not None
    services, asked = layered([1.0, 1.1, 0.01, 5.0]), []
    make = services.batches
    services.batches = lambda rows: (asked.append(rows), make(rows))[1]
    state = callback.start(services)
    assert asked == [4], "the authors' batch"
    assert {block for block in range(4) if state[f"noise behind block {block}"]} == wanted


def test_the_state_says_where_the_noise_is(engine: Any, now: Now) -> None:
    run = engine(objective={"noisefit": {}})
    assert sum(run.states["noisefit"].values()) == 3 and len(run.states["noisefit"]) == 4
    found = []
    for chosen in (0, 3, None):
        run.states["noisefit"].update({f"noise behind block {block}": int(block == chosen) for block in range(4)})
        found.append(run.step([rows_of_eight()], now._replace(learning_rate=0.0)).notes[SOFT])
    assert found[0] > 1e-6 and found[1] > 1e-6 and found[0] != found[1] and found[2] == 0.0


@pytest.mark.parametrize("options", [{}, {"detach_scale": False, "detach_clean": False, "scale": "relative"}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_checkpointing_and_packing_change_no_gradient(engine: Any, now: Now, architecture: str, options: dict[str, Any]) -> None:
    """The noisy states run through the next block, which is computed again in backward."""
    batch = rows_of_eight()
    found = {}
    for name in ("plain", "checkpointed", "packed", "both"):
        model = model_of(architecture, layers=3)
        if name in ("checkpointed", "both"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        use_attention(model)
        run = engine(model=model, objective=noisefit(**{**options, "layers": 2}))
        run.tune.packs = name in ("packed", "both")
        model.train()
        found[name] = gradients(run, [batch], now)
    assert gap(found["checkpointed"], found["plain"]) == 0.0 == gap(found["both"], found["packed"])
    assert gap(found["packed"], found["plain"]) < 1e-10
    model = model_of(architecture, layers=3)
    half = {name: 0.5 * one for name, one in gradients(engine(model=model), [batch], now).items()}
    assert gap(found["plain"], half) > 1e-3


def test_noise_is_new_in_every_step_and_pass(engine: Any, now: Now) -> None:
    run = engine(model=model_of(), objective=noisefit())
    columns = resolve(["nll", *run.objective.columns()])
    states = {FIRST: run.states["noisefit"], SECOND: run.states["noisefit"]}

    def soft(when: Now) -> Tensor:
        return view_of(run.tune, rows_of_eight(), columns, when, remembered=states)[CONSISTENCY].detach()

    first = soft(now)
    assert float(first.min()) > 0.0 and torch.equal(soft(now), first)
    for other in (now._replace(step=1), now._replace(seed=1), now._replace(stage=1)):
        assert not torch.allclose(soft(other), first)


@pytest.mark.parametrize("tune", ["half", "lora", "prompt_tuning", {"spiel": {"every": 3, "gather": 1}}], ids=str)
def test_it_goes_with_every_kind_of_tune(engine: Any, now: Now, tune: Any) -> None:
    found = []
    for sizes in ((8,), (3, 0, 4, 1)):
        run = engine(tune, model=model_of(), objective=noisefit(), token_weight="dft")
        run.tune.model.train()
        batches = split(rows_of_eight(), sizes)
        losses = [run.step(batches, now._replace(step=i)).loss for i in range(2)]
        assert all(0.0 < loss < 1e3 for loss in losses)
        found.append(gradients(run, batches, now._replace(step=2)))
    assert gap(found[1], found[0]) < 1e-8


def test_a_whole_run(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {word}.", "completion": f"{word}, {word}!"} for word in ("one", "two", "three", "four")]
    recipe = {
        "model": "tiny:llama",
        "rows": {"train": rows},
        "tune": "lora",
        "objective": noisefit(),
        "train": {"steps": 2, "batch_rows": 4, "micro_batch_tokens": 100, "gradient_checkpointing": True, "packing": True},
        "evaluate": {"held out": {"rows": rows, "metric": "loss"}},
        "out": str(tmp_path),
    }
    history = luthier.train(recipe).facts["history"]
    assert all(one["notes"][SOFT] > 0.0 for one in history)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"noise_std": -0.1}, "`noise_std` is -0.1"),
        ({"mix": 1.5}, "`mix` is 1.5"),
        ({"consistency": -1.0}, "`consistency` is -1.0"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"temperature": float("inf")}, "`temperature` is inf"),
        ({"noise_std": float("inf")}, "`noise_std` is inf"),
        ({"layers": 0}, "`layers` is 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(LuthierError, match=what):
        term_of(**options)


def test_a_model_of_fewer_blocks_and_a_second_noise_are_refused(engine: Any) -> None:
    with pytest.raises(LuthierError, match="`layers` is 3, and the model has 2 blocks"):
        engine(model=model_of(), objective="noisefit")
    with pytest.raises(LuthierError, match="define the column `noisefit soft` differently"):
        engine(objective=["noisefit", {"noisefit": {"noise_std": 0.2}}])
