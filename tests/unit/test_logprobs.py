"""Columns against plain float64 softmax, whatever the chunks; the causal shift, done once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from luthier import draws
from luthier.columns import losses
from luthier.columns.chunked import COLUMNS, Other, compute, resolve
from luthier.columns.losses import nll
from luthier.columns.targets import find_targets
from luthier.errors import LuthierError
from luthier.kinds import Batch, Chunk, Column, Now
from luthier.training.services import view_of
from tests.conftest import make_batch, split
from tests.toys.helpers import model_of, rows_of_eight

N, D, V = 23, 6, 11
NAMES = ["nll", "entropy", "differentiable_entropy", "right", "kl", "kl_forward", "reference_nll"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def columns(
    limit_bytes: int, dtype: torch.dtype = torch.float64, names: list[str] = NAMES
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    hidden_ND = draw(N, D).to(dtype).requires_grad_(True)
    weight_VD, base_VD = draw(V, D, seed=1).to(dtype).requires_grad_(True), draw(V, D, seed=2).to(dtype)
    label_N = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
    found = compute(
        hidden_ND,
        label_N,
        lambda h: h @ weight_VD.T,
        resolve(names),
        others={"base": Other(draw(N, D, seed=4).to(dtype), lambda h: h @ base_VD.T)},
        vocabulary=V,
        limit_bytes=limit_bytes,
    )
    return found, hidden_ND, weight_VD


def test_columns_equal_plain_softmax_in_float64() -> None:
    found, hidden_ND, weight_VD = columns(10**9)
    label_N = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
    log_NV = (hidden_ND @ weight_VD.T).log_softmax(-1)
    base_NV = (draw(N, D, seed=4) @ draw(V, D, seed=2).T).log_softmax(-1)
    each = torch.arange(N)
    expected = {
        "nll": -log_NV[each, label_N],
        "entropy": -(log_NV.exp() * log_NV).sum(-1),
        "differentiable_entropy": -(log_NV.exp() * log_NV).sum(-1),
        "right": (log_NV.argmax(-1) == label_N).double(),
        "kl": functional.kl_div(base_NV, log_NV, log_target=True, reduction="none").sum(-1),
        "kl_forward": functional.kl_div(log_NV, base_NV, log_target=True, reduction="none").sum(-1),
        "reference_nll": -base_NV[each, label_N],
    }
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value, rtol=1e-12, atol=1e-12), name
    assert not found["entropy"].requires_grad and found["differentiable_entropy"].requires_grad
    assert not found["right"].requires_grad and not found["reference_nll"].requires_grad
    assert 0 < found["right"].sum() < N


@pytest.mark.parametrize("limit_bytes", [1, 8 * V * 16, 8 * V * 100])
def test_fault_5_chunks_change_neither_values_nor_gradients(limit_bytes: int) -> None:
    """Fault 5: the chunked loss equals the plain one, values and gradients."""
    mixed = draw(4, seed=9)
    results = []
    for limit in (10**9, limit_bytes):
        found, hidden_ND, weight_VD = columns(limit)
        total = sum(
            (w * found[name]).sum() for w, name in zip(mixed, ("nll", "differentiable_entropy", "kl", "kl_forward"), strict=True)
        )
        results.append((found, torch.autograd.grad(total, (hidden_ND, weight_VD))))
    (plain, plain_gradients), (chunked, chunked_gradients) = results
    assert all(torch.allclose(plain[n], chunked[n], rtol=1e-13, atol=1e-13) for n in NAMES)
    for left, right in zip(plain_gradients, chunked_gradients, strict=True):
        assert torch.allclose(left, right, rtol=1e-12, atol=1e-13)


def rows_a_call(count: int, names: list[str], *, backward: bool = False, **options: Any) -> list[int]:
    """How many positions the head gets at a time, of some in fp64."""
    calls = []

    def head(hidden_ND: Tensor) -> Tensor:
        calls.append(len(hidden_ND))
        return hidden_ND

    hidden_ND = draw(count, 4).requires_grad_(True)
    others = {"base": Other(draw(count, 4, seed=1), lambda hidden: hidden)} if "kl" in names else {}
    found = compute(hidden_ND, torch.zeros(count, dtype=torch.int64), head, resolve(names), others=others, **options)
    if backward:
        found["nll"].sum().backward()
    return calls


def test_chunks_take_as_many_positions_as_their_bytes_allow() -> None:
    four = 4 * 4 * 8
    assert rows_a_call(9, ["nll"], vocabulary=4, limit_bytes=four + 31) == [4, 4, 1]
    # The other pass has logits, too.
    assert rows_a_call(9, ["nll", "kl"], vocabulary=4, limit_bytes=four + 31) == [2, 2, 2, 2, 1]
    assert [rows_a_call(count, ["nll"], vocabulary=4, limit_bytes=1) for count in (0, 1, 3)] == [[0], [1], [1, 1, 1]]
    # 1 MiB a position.
    assert rows_a_call(300, ["nll"], vocabulary=2**17) == [256, 44]


def test_one_chunk_is_kept_for_backward_and_several_are_made_again() -> None:
    four = 4 * 4 * 8
    assert rows_a_call(4, ["nll"], backward=True, vocabulary=4, limit_bytes=four) == [4]
    assert sorted(rows_a_call(5, ["nll"], backward=True, vocabulary=4, limit_bytes=four)) == [1, 1, 4, 4]


def test_a_head_gets_its_gradient_where_the_hidden_states_need_none() -> None:
    hidden_ND, weight_VD = draw(5, D), draw(V, D, seed=1).requires_grad_(True)
    label_N = torch.tensor([3, 0, 7, 10, 2])
    found = compute(hidden_ND, label_N, lambda h: h @ weight_VD.T, resolve(["nll"]), vocabulary=V, limit_bytes=8 * V * 2)
    (gradient,) = torch.autograd.grad(found["nll"].sum(), weight_VD)
    (expected,) = torch.autograd.grad(functional.cross_entropy(hidden_ND @ weight_VD.T, label_N, reduction="sum"), weight_VD)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-13)


def test_a_column_that_no_loss_uses_adds_nothing_to_the_gradient() -> None:
    """Not even where its own slope is infinite: zero times that would be no number."""
    logits = draw(3, 4).requires_grad_(True)
    wanted = [
        Column("used", lambda chunk: chunk.logits_CV[:, 1]),
        Column("unused", lambda chunk: (0.0 * chunk.logits_CV).sum(-1).sqrt()),
    ]
    found = compute(logits, torch.zeros(3, dtype=torch.int64), lambda hidden: hidden, wanted, vocabulary=4)
    found["used"].sum().backward()
    assert logits.grad is not None and torch.equal(logits.grad, functional.one_hot(torch.ones(3, dtype=torch.int64), 4).double())


@pytest.mark.parametrize("rows", [1, 3])
def test_slices_change_neither_values_nor_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows, one or three at a time, with what cannot come in some."""
    logits_CV, label_C = draw(7, 5), torch.tensor([3, 0, 4, 1, 2, 2, 0])
    logits_CV[[1, 6], 4] = float("-inf")
    log_CV = logits_CV.log_softmax(-1)
    expected = log_CV.exp()
    expected[torch.arange(7), label_C] -= 1.0
    monkeypatch.setitem(losses._SLICE_BYTES, "cpu", rows * 5 * 4)
    leaf = logits_CV.clone().requires_grad_(True)
    found_C, entropy_C = losses.nll_and_entropy(leaf, label_C)
    slope_C = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    found_C.backward(slope_C)
    assert torch.allclose(found_C, -log_CV[torch.arange(7), label_C], rtol=1e-12, atol=1e-13)
    assert torch.allclose(entropy_C, -(log_CV.exp() * log_CV.clamp(min=-1e300)).sum(-1), rtol=1e-12, atol=1e-13)
    assert leaf.grad is not None and torch.allclose(leaf.grad, slope_C[:, None] * expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(nll(logits_CV, label_C), found_C)


def test_slices_are_as_long_as_their_bytes_allow() -> None:
    """In fp32: 6 MiB on a processor, 64 MiB elsewhere, and one row at least."""
    row, elsewhere = torch.zeros(1), torch.device("meta")
    sizes = [losses.rows_of_slice(row.expand(1, words)) for words in (0, 1, 2**16, 2**20, 2**21, 2**24)]
    assert sizes == [6 * 2**18, 6 * 2**18, 24, 1, 1, 1]
    assert [losses.rows_of_slice(torch.empty(1, words, device=elsewhere)) for words in (2**16, 2**20, 2**25)] == [256, 16, 1]


def test_gradients_equal_finite_differences() -> None:
    label_N = torch.tensor([1, 0, 3])
    other_NV = draw(3, 4, seed=7)

    def total(logits_NV: Tensor) -> Tensor:
        chunk = Chunk(logits_NV, label_N, label_N, {"base": other_NV})
        return torch.stack([COLUMNS[n].value(chunk) for n in ("nll", "differentiable_entropy", "kl", "kl_forward")])

    assert torch.autograd.gradcheck(total, (draw(3, 4, seed=8).requires_grad_(True),), atol=1e-7)


def test_logits_in_bf16_give_fp32_losses_close_to_float64() -> None:
    logits_CV = (draw(200, 50) * 4).to(torch.bfloat16)
    label_C = torch.randint(0, 50, (200,), generator=torch.Generator().manual_seed(1))
    found = nll(logits_CV, label_C)
    expected = functional.cross_entropy(logits_CV.double(), label_C, reduction="none")
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=2e-6, atol=2e-6)
    leaf = logits_CV.clone().requires_grad_(True)
    nll(leaf, label_C).sum().backward()
    wide = logits_CV.double().requires_grad_(True)
    functional.cross_entropy(wide, label_C, reduction="sum").backward()
    assert leaf.grad is not None and wide.grad is not None
    assert torch.allclose(leaf.grad.double(), wide.grad, rtol=2**-7, atol=1e-6)
    assert {columns(10**9, torch.bfloat16)[0][name].dtype for name in NAMES} == {torch.float32}


def batch_of(ids: list[int], label: list[int], attend: list[bool] | None = None) -> Batch:
    one = torch.tensor([ids])
    attend_BT = torch.ones_like(one, dtype=torch.bool) if attend is None else torch.tensor([attend])
    return Batch(one, attend_BT, torch.arange(len(ids))[None], torch.tensor([label]), ("row",))


def test_fault_7_the_shift_is_done_once() -> None:
    """Fault 7: each target is predicted from the position before it, the last one too."""
    where = find_targets(batch_of([10, 11, 12, 13], [10, -100, 12, 13]))
    assert where.source_N.tolist() == [1, 2] and where.label_N.tolist() == [12, 13]
    assert find_targets(batch_of([10, 11], [-100, 11])).source_N.tolist() == [0]
    # The token with number 0 is one as any other.
    assert find_targets(batch_of([10, 0, 1], [-100, 0, 1])).label_N.tolist() == [0, 1]
    assert len(find_targets(batch_of([10], [10])).label_N) == 0


def test_the_first_real_token_of_a_left_padded_row_is_no_target() -> None:
    batch = batch_of([0, 0, 12, 13], [-100, -100, 12, 13], [False, False, True, True])
    assert find_targets(batch).source_N.tolist() == [2] and batch.supervised == 1


def test_no_targets_give_empty_columns_and_no_nan(engine: Any, now: Now) -> None:
    run = engine(model=model_of(), keep_base=True)
    view = view_of(run.tune, make_batch([(5, 0), (3, 0)]), resolve(NAMES), now)
    assert all(view[name].shape == (0,) for name in NAMES)
    assert float(view["nll"].sum()) == 0.0


def test_draws_are_keyed_by_token_and_not_by_the_split(engine: Any, now: Now) -> None:
    drawn = Column("drawn", lambda chunk: draws.uniform(chunk.key_C), gradient=False)
    run = engine(model=model_of())
    batch = rows_of_eight()

    def values(batches: list[Batch], when: Now) -> dict[tuple[str, int], float]:
        found = {}
        for one in batches:
            view = view_of(run.tune, one, [drawn], when)
            for row, position, value in zip(view.row_N, view.position_N, view["drawn"], strict=True):
                found[one.row_ids[int(row)], int(position)] = float(value)
        return found

    whole = values([batch], now)
    assert values(split(batch, (3, 5)), now) == whole and len(set(whole.values())) == len(whole) == 30
    assert values([batch], now._replace(step=1)) != whole != values([batch], now._replace(seed=1))


def test_keyed_draws_are_uniform_and_streams_independent() -> None:
    row_N, position_N = torch.arange(40000) // 200, torch.arange(40000) % 200
    key_N = draws.keys(7, 3, row_N, position_N)
    first, second = draws.uniform(key_N), draws.uniform(key_N, stream=1)
    for one in (first, second):
        assert float(one.min()) >= 0.0 and float(one.max()) < 1.0
        # Six standard errors of mean and variance.
        assert abs(float(one.mean()) - 0.5) < 6 * (1 / 12 / 40000) ** 0.5
        assert abs(float(one.var()) - 1 / 12) < 6 * (1 / 180 / 40000) ** 0.5
        counts = torch.histc(one.float(), bins=20, min=0, max=1)
        assert float(((counts - 2000) ** 2 / 2000).sum()) < 60
    pairs = torch.stack([first, second, first.roll(1), first.roll(200)])
    assert float((torch.corrcoef(pairs) - torch.eye(4)).abs().max()) < 6 / 40000**0.5
    assert len(key_N.unique()) == 40000


def test_several_draws_a_key_are_uniform_and_independent() -> None:
    """Of each other, of the neighboring keys' and of the single draw; whatever stands beside a key."""
    key_N = draws.keys(7, 3, torch.arange(20000) // 100, torch.arange(20000) % 100)
    found = draws.uniforms(key_N, 6)
    assert found.shape == (20000, 6) and found.dtype == torch.float64
    assert float(found.min()) >= 0.0 and float(found.max()) < 1.0
    # Six standard errors of mean and variance, of all and of each draw.
    for one in (found.flatten(), *found.T):
        assert abs(float(one.mean()) - 0.5) < 6 * (1 / 12 / len(one)) ** 0.5
        assert abs(float(one.var()) - 1 / 12) < 6 * (1 / 180 / len(one)) ** 0.5
    counts = torch.histc(found.float(), bins=20, min=0, max=1)
    assert float(((counts - 6000) ** 2 / 6000).sum()) < 60
    other = draws.uniforms(key_N, 6, stream=1)
    each = torch.cat([found.T, found.roll(1, 0).T, other.T, draws.uniform(key_N)[None], draws.uniform(key_N, 1)[None]])
    assert float((torch.corrcoef(each) - torch.eye(20)).abs().max()) < 6 / 20000**0.5
    assert len(found.unique()) == 120000
    assert torch.equal(draws.uniforms(key_N[50:70], 3), found[50:70, :3])


@pytest.mark.parametrize("limit_bytes", [10**9, 8 * 4 * 80])
def test_columns_share_what_they_make_once(limit_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And backward gets what is kept, in one chunk and in several, which run once more before it."""
    # Slices of 64 rows.
    monkeypatch.setitem(losses._SLICE_BYTES, "cpu", 64 * 4 * 4)
    made: dict[str, list[int]] = {"once": [], "kept": []}

    def shared(chunk: Chunk) -> Tensor:
        def make(name: str) -> Tensor:
            made[name].append(len(chunk.label_C))
            return chunk.logits_CV.exp() if name == "once" else chunk.key_C[:, None] + 1.0

        return chunk.once("shared", lambda: make("once")) * chunk.keep("small", lambda: make("kept"))

    wanted = [Column(name, lambda chunk: shared(chunk).sum(-1)) for name in ("one", "two")]
    logits, key_N = draw(100, 4).requires_grad_(True), torch.arange(100)
    found = compute(
        logits, torch.zeros_like(key_N), lambda hidden: hidden, wanted, key_N=key_N, vocabulary=4, limit_bytes=limit_bytes
    )
    slices = [64, 36] if limit_bytes > 10**6 else [64, 16, 20]
    assert made == {"once": slices, "kept": slices} and torch.equal(found["one"], found["two"])
    (found["one"] + found["two"]).sum().backward()
    again = 1 if len(slices) == 2 else 2
    assert sorted(made["kept"]) == sorted(slices * again) and sorted(made["once"]) == sorted(slices * (again + 1))
    assert torch.allclose(logits.grad, 2 * logits.exp() * (key_N[:, None] + 1.0))  # type: ignore[arg-type]


def test_a_seed_of_names_is_the_same_everywhere() -> None:
    assert draws.seed_of("half", 0) == 3159472100325578948
    assert draws.seed_of("a", "b") != draws.seed_of("ab") and draws.seed_of(1, 11) != draws.seed_of(11, 1)


def test_unknown_and_clashing_columns_are_errors() -> None:
    with pytest.raises(LuthierError, match="did you mean `entropy`"):
        resolve(["entropie"])
    with pytest.raises(LuthierError, match="define the column `mine` differently"):
        resolve([Column("mine", lambda c: c.label_C), Column("mine", lambda c: c.key_C)])
    assert resolve(["nll", "nll", COLUMNS["kl"]]) == (COLUMNS["nll"], COLUMNS["kl"])
