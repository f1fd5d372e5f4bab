"""Intruder dimensions: the definition and the repair in numbers, on matrices made by hand, and on small models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier import registry
from luthier.delta.weights import Weights, effective_rank, of_models, summed
from luthier.errors import LuthierError
from luthier.kinds import Finding, Place
from luthier.kinds.parts import Parts
from luthier.methods.probe.intruder_dimensions import Spectrum, _finding, repaired, spectrum
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny

BASE = torch.diag(torch.arange(64.0, 0.0, -1.0))
SPREAD = torch.ones(64) / 8
"""A direction equally far from all of the base's."""
FIRST = torch.eye(64)[0]


def intruders(base_OI: Tensor, tuned_OI: Tensor, k: int = 10, epsilon: float = 0.5) -> int:
    return int((spectrum(base_OI, tuned_OI, k).similarity_K < epsilon).sum())


def look(base: nn.Module, change: Callable[[nn.Module, Parts], None], **options: Any) -> tuple[Finding, Weights]:
    """What the probe finds between a model and a changed copy."""
    tuned, parts = copy.deepcopy(base), map_parts(base)
    with torch.no_grad():
        change(tuned, parts)
    weights = Weights(base, parts, of_models(base, parts, tuned, map_parts(tuned)))
    return registry.part("intruder_dimensions", **options).values[0].look(weights), weights


def test_what_did_not_turn_is_no_intruder() -> None:
    for tuned in (BASE, 3.0 * BASE):
        found = spectrum(BASE, tuned, 64)
        assert torch.allclose(found.similarity_K, torch.ones(64, dtype=torch.float64), atol=1e-5)
    rng = torch.Generator().manual_seed(0)
    rough = torch.randn(48, 32, generator=rng)
    assert torch.allclose(spectrum(rough, 0.5 * rough, 10).similarity_K, torch.ones(10, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize(("strength", "count", "first"), [(1.0, 0, None), (30.0, 1, 0.344), (100.0, 1, 0.171), (1000.0, 1, 0.129)])
def test_a_strong_new_direction_is_one_intruder(strength: float, count: int, first: float | None) -> None:
    tuned = BASE + strength * torch.outer(SPREAD, SPREAD)
    assert intruders(BASE, tuned) == count
    if first is not None:
        assert float(spectrum(BASE, tuned, 10).similarity_K[0]) == pytest.approx(first, abs=5e-4)


def test_the_output_side_is_compared() -> None:
    tuned = BASE + 300.0 * torch.outer(FIRST, SPREAD)
    assert intruders(BASE, tuned) == 0
    assert float(spectrum(BASE, tuned, 1).similarity_K) == pytest.approx(0.994, abs=5e-4)
    assert intruders(BASE.T, tuned.T) == 1, "on the input side the same change is an intruder"
    assert float(spectrum(BASE.T, tuned.T, 1).similarity_K) == pytest.approx(0.319, abs=5e-4)


def test_the_repair_scales_intruders_and_nothing_else() -> None:
    tuned = BASE + 100.0 * torch.outer(SPREAD, SPREAD)
    left, values, right = torch.linalg.svd(tuned)
    along = lambda weight: float(left[:, 0] @ weight @ right[0])  # noqa: E731
    assert along(tuned) == pytest.approx(135.889, abs=1e-3)
    assert along(repaired(BASE, tuned, 0.75)) == pytest.approx(101.917, abs=1e-3), "0.75 is what stays, not what goes"
    assert along(repaired(BASE, tuned, 1.5)) == pytest.approx(1.5 * 135.889, abs=2e-3)
    assert torch.equal(repaired(BASE, tuned, 1.0), tuned)
    gone = repaired(BASE, tuned, 0.0)
    assert along(gone) == pytest.approx(0.0, abs=1e-3)
    assert torch.allclose(gone, tuned - values[0] * torch.outer(left[:, 0], right[0]), atol=1e-3)
    assert torch.equal(repaired(BASE, BASE, 0.0), BASE), "without intruders there is nothing to scale"


def turned(first: int) -> Tensor:
    """The base with eight neighboring directions turned into each other: each is as far, 0.354, from the nearest of the base."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    left = torch.eye(64)
    left[first : first + 8, first : first + 8] = torch.kron(torch.kron(two, two), two) / 8**0.5
    return left @ BASE


def test_the_repair_looks_at_as_many_directions_as_the_probe() -> None:
    """The eleventh is an intruder, the ten before it are the base's."""
    tuned = turned(10)
    assert intruders(BASE, tuned) == 0 and intruders(BASE, tuned, 12) == 2
    assert torch.equal(repaired(BASE, tuned, 0.0), tuned)
    assert float((repaired(BASE, tuned, 0.0, k=12) - tuned).norm()) == pytest.approx((54**2 + 53**2) ** 0.5, rel=1e-4)


def test_a_direction_as_far_as_epsilon_is_no_intruder() -> None:
    tuned = turned(2)
    nearest = float(spectrum(BASE, tuned, 10).similarity_K[2:].min())
    assert nearest == pytest.approx(8**-0.5, abs=1e-4)
    assert not torch.equal(repaired(BASE, tuned, 0.0, epsilon=nearest + 1e-3), tuned)
    assert torch.equal(repaired(BASE, tuned, 0.0, epsilon=nearest), tuned)
    place, similarity_K = Place("up", "weight", "mlp_up", 3), torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    found = {place: Spectrum(torch.tensor([9.0, 8.0, 7.0]), similarity_K, torch.eye(3), torch.eye(3))}
    finding = _finding(found, {place: 2.5}, 3, 0.5, [])
    assert finding.tables["intruders"] == [{"matrix": "up.weight", "position": 2, "singular_value": 7.0, "similarity": 0.25}]
    assert finding.rows[0]["intruders"] == finding.numbers["intruders"] == finding.tables["by block"][0]["intruders"] == 1
    assert finding.figure is not None
    curve = dict(finding.figure.lines[0].points)
    assert [curve[threshold] for threshold in (0.25, 0.3, 0.5, 0.55, 1.0)] == [0, 1, 1, 2, 2]


def test_what_the_base_does_not_reach_is_new() -> None:
    """A tall matrix has fewer directions than outputs; one beside all of them is an intruder."""
    base = torch.zeros(4, 3).fill_diagonal_(1.0) * torch.tensor([3.0, 2.0, 1.0])
    tuned = base + 100.0 * torch.outer(torch.eye(4)[3], torch.ones(3))
    assert intruders(base, tuned, 1) == 1 and float(spectrum(base, tuned, 1).similarity_K) < 0.03


def test_every_intruder_is_taken_out_at_strength_zero() -> None:
    rng = torch.Generator().manual_seed(1)
    base = torch.randn(40, 24, generator=rng, dtype=torch.float64)
    tuned = base + 4.0 * torch.randn(40, 3, generator=rng, dtype=torch.float64) @ torch.randn(
        3, 24, generator=rng, dtype=torch.float64
    )
    found, gone = spectrum(base, tuned, 10), repaired(base, tuned, 0.0)
    left, values, right = torch.linalg.svd(tuned, full_matrices=False)
    new = found.similarity_K < 0.5
    assert int(new.sum()) >= 2
    kept = torch.einsum("or,oi,ri->r", left[:, :10], gone, right[:10])
    assert torch.allclose(kept[new], torch.zeros(int(new.sum()), dtype=torch.float64), atol=1e-10)
    assert torch.allclose(kept[~new], values[:10][~new], atol=1e-10)


def test_signs_and_order_of_the_base_directions_do_not_matter() -> None:
    rng = torch.Generator().manual_seed(2)
    base = torch.randn(32, 32, generator=rng, dtype=torch.float64)
    tuned = base + 9.0 * torch.outer(*torch.randn(2, 32, generator=rng, dtype=torch.float64))
    left, values, right = torch.linalg.svd(base)
    turned = (left.flip(1) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(16)) @ torch.diag(values) @ right
    plain = spectrum(base, tuned, 10).similarity_K
    assert torch.allclose(spectrum(turned, tuned, 10).similarity_K, plain, atol=1e-9)
    assert torch.allclose(spectrum(base, -tuned, 10).similarity_K, plain, atol=1e-9)


def test_the_count_grows_with_epsilon_and_k() -> None:
    rng = torch.Generator().manual_seed(3)
    base = torch.randn(32, 24, generator=rng)
    tuned = base + 3.0 * torch.randn(32, 4, generator=rng) @ torch.randn(4, 24, generator=rng)
    counts = [[intruders(base, tuned, k, step / 10) for step in range(1, 11)] for k in (1, 3, 10, 24, 99)]
    assert all(row == sorted(row) for row in counts)
    assert all(list(column) == sorted(column) for column in zip(*counts, strict=True))
    assert counts[0][0] < counts[-1][-1] and counts[-1] == counts[-2], "there are no more directions than columns"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_compared_in_fp32(dtype: torch.dtype) -> None:
    tuned = (BASE + 100.0 * torch.outer(SPREAD, SPREAD)).to(dtype)
    assert intruders(BASE.to(dtype), tuned) == 1
    assert repaired(BASE.to(dtype), tuned, 0.5).dtype == torch.float32


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(torch.zeros(5, 7)) == 0.0
    assert effective_rank(torch.outer(torch.ones(5), torch.ones(7))) == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(torch.eye(6)) == pytest.approx(6.0, abs=1e-5)
    # Shares 3/4 and 1/4: exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 4 / 3 ** 0.75.
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75, abs=1e-5)


def test_a_table_is_summed_by_one_column() -> None:
    rows = [{"role": "a", "n": 2}, {"role": "b", "n": 1}, {"role": "a", "n": 3}]
    assert summed(rows, "role", "n") == [{"role": "a", "places": 2, "n": 5}, {"role": "b", "places": 1, "n": 1}]


def hand_made(change_OI: Tensor) -> tuple[nn.Module, Callable[[nn.Module, Parts], None]]:
    """GPT-2, whose linear maps are stored [I, O], with the base above in its first attention output, and a change of it."""
    model, name = tiny("gpt2", width=64), "transformer.h.0.attn.c_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).copy_(BASE.T)

    def change(tuned: nn.Module, parts: Parts) -> None:
        tuned.get_parameter(name).add_(change_OI.T)

    return model, change


def test_weights_stored_the_other_way_are_turned() -> None:
    out = look(*hand_made(300.0 * torch.outer(SPREAD, FIRST)))[0]
    assert out.numbers["intruders"] == 1 and out.numbers["matrices"] == 1
    assert out.tables["intruders"][0]["similarity"] == pytest.approx(0.319, abs=5e-4)
    assert look(*hand_made(300.0 * torch.outer(FIRST, SPREAD)))[0].numbers["intruders"] == 0


def test_a_finding_counts_by_matrix_role_block_and_threshold() -> None:
    finding, _ = look(*hand_made(100.0 * torch.outer(SPREAD, SPREAD)))
    assert finding.sentence == "1 intruder dimension in 1 of 1 changed matrix (k = 10, epsilon = 0.5)."
    (row,) = finding.rows
    assert (row["role"], row["block"], row["intruders"]) == ("attention_output", 0, 1)
    assert row["lowest_similarity"] == pytest.approx(0.171, abs=5e-4) and row["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    assert finding.tables["by role"] == [{"role": "attention_output", "places": 1, "intruders": 1}]
    assert finding.tables["by block"] == [{"block": 0, "places": 1, "intruders": 1}]
    (intruder,) = finding.tables["intruders"]
    assert intruder["position"] == 0 and intruder["singular_value"] == pytest.approx(135.889, abs=1e-3)
    assert finding.figure is not None
    curve = dict(finding.figure.lines[0].points)
    assert (curve[0.0], curve[0.15], curve[0.2], curve[0.5]) == (0, 0, 1, 1) and len(curve) == 21
    assert list(curve.values()) == sorted(curve.values())


def test_a_matrix_without_intruders_is_no_hit() -> None:
    model, turn = hand_made(100.0 * torch.outer(SPREAD, SPREAD))

    def change(tuned: nn.Module, parts: Parts) -> None:
        turn(tuned, parts)
        parts.view(tuned, parts.select("mlp_up", (1,))[0]).mul_(2.0)

    finding, _ = look(model, change)
    assert finding.sentence.startswith("1 intruder dimension in 1 of 2 changed matrices")
    assert (finding.numbers["matrices_with_intruders"], finding.numbers["intruders_per_matrix"]) == (1, 0.5)
    ranks = [row["effective_rank"] for row in finding.rows]
    assert finding.numbers["effective_rank"] == pytest.approx(sum(ranks) / 2) and ranks[1] > 2 * ranks[0]


def test_of_a_fused_projection_only_the_changed_part_is_compared() -> None:
    def change(tuned: nn.Module, parts: Parts) -> None:
        tuned.get_parameter("transformer.h.1.attn.c_attn.weight")[:, 64:].add_(0.1)

    finding, weights = look(tiny("gpt2"), change)
    assert [str(place) for place in weights.changed] == ["transformer.h.1.attn.c_attn.weight[64:96]"]
    assert [row["role"] for row in finding.rows] == ["attention_value"]
    assert weights.change(weights.changed[0]).shape == (32, 32)


def test_grouped_keys_have_their_own_shape() -> None:
    def change(tuned: nn.Module, parts: Parts) -> None:
        for place in parts.select("attention"):
            parts.view(tuned, place).mul_(1.5)

    finding, weights = look(tiny("llama"), change, k=100, epsilon=1.0)
    shapes = {place.role: tuple(weights.change(place).shape) for place in weights.changed}
    assert shapes["attention_key"] == (16, 32) and shapes["attention_query"] == (32, 32)
    assert finding.numbers["matrices"] == 8
    assert all(row["lowest_similarity"] > 0.999 for row in finding.rows)


def test_tied_weights_count_once_and_what_is_left_out_is_said() -> None:
    def change(tuned: nn.Module, parts: Parts) -> None:
        tuned.get_parameter("transformer.wte.weight").add_(0.3)

    nothing, weights = look(tiny("gpt2"), change)
    assert [place.role for place in weights.changed] == ["embedding"]
    assert nothing.notes == ["changed but not compared: 1 embedding"]
    assert nothing.rows == [] and "nothing is known" in nothing.sentence and "effective_rank" not in nothing.numbers
    assert nothing.figure is not None and not any(count for _, count in nothing.figure.lines[0].points)
    once, _ = look(tiny("gpt2"), change, target_modules=("embedding", "head"))
    assert [row["role"] for row in once.rows] == ["embedding"]


def test_a_cut_tie_is_a_change_of_the_head() -> None:
    def change(tuned: nn.Module, parts: Parts) -> None:
        table = tuned.get_parameter("transformer.wte.weight").detach()
        tuned.register_module("lm_head", nn.Linear(32, len(table), bias=False))
        tuned.lm_head.weight.copy_(2 * table)

    _, weights = look(tiny("gpt2"), change)
    assert [(place.role, place.parameter) for place in weights.changed] == [("head", "lm_head.weight")]


def test_only_some_roles_and_blocks() -> None:
    def change(tuned: nn.Module, parts: Parts) -> None:
        for place in parts.places:
            parts.view(tuned, place).mul_(1.1)

    finding, _ = look(tiny("llama"), change, target_modules=("mlp_up",), blocks=(1,))
    assert [(row["role"], row["block"]) for row in finding.rows] == [("mlp_up", 1)]
    assert finding.notes and "1 mlp_up" in finding.notes[0]
    with pytest.raises(LuthierError, match="no block 7"):
        look(tiny("llama"), change, blocks=(7,))


def test_the_strongest_direction_alone_may_be_looked_at() -> None:
    finding, _ = look(*hand_made(100.0 * torch.outer(SPREAD, SPREAD)), k=1)
    assert finding.sentence == "1 intruder dimension in 1 of 1 changed matrix (k = 1, epsilon = 0.5)."
    assert [row["position"] for row in finding.tables["intruders"]] == [0]


def test_encoders_are_compared_too() -> None:
    finding, _ = look(tiny("bert"), lambda tuned, parts: [parts.view(tuned, p).mul_(2) for p in parts.select("linear")] and None)
    assert finding.numbers["intruders"] == 0 and finding.numbers["matrices"] == 12


@pytest.mark.parametrize("options", [{"k": 0}, {"epsilon": 0.0}, {"epsilon": 1.1}, {"target_modules": ["mlp_upp"]}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LuthierError):
        registry.part("intruder_dimensions", **options)
