"""Packed rows: the same numbers as alone, and no row sees another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.columns.chunked import resolve
from luthier.kinds import Batch, Now
from luthier.models import attention
from luthier.models.attention import Context, use_attention
from luthier.models.parts import map_parts
from luthier.models.tiny import ARCHITECTURES, tiny, tiny_kind
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.recipe.parts import completed
from luthier.rows.batches import padding_share, plan_epoch
from luthier.training import packing
from luthier.training.build import build_engine
from luthier.training.packing import obstacle
from luthier.training.services import view_of
from luthier.tune import Tune
from luthier.tune.forward import hidden
from tests.conftest import make_batch
from tests.tolerance import TINY, assert_rounded
from tests.toys.helpers import TOYS

CAUSAL = [name for name in ARCHITECTURES if tiny_kind(name) == "causal"]
EXPERTS = ("mixtral", "qwen3_moe")
PACKED = [name for name in CAUSAL if name != "gemma2"]
ROWS = [(9, 4), (3, 1), (6, 5), (1, 0), (4, 2)]
"""Tokens of each row, and how many of the last are targets."""


def tune_of(architecture: str, *, keep_base: bool = False, dtype: torch.dtype = torch.float64) -> Tune:
    model = tiny(architecture, dtype=dtype)
    use_attention(model)
    return Tune(model, map_parts(model), keep_base=keep_base)


def states(tune: Tune, batch: Batch, *, pack: bool) -> list[Tensor]:
    """The hidden states of each row's real tokens."""
    rows_BTD = hidden(tune, batch, pack=pack).padded(batch.attend_BT)
    return [row_TD[attend_T] for row_TD, attend_T in zip(rows_BTD, batch.attend_BT, strict=True)]


@pytest.mark.parametrize(("form", "close"), [("sdpa", 1e-9), ("eager", 1e-5)])
@pytest.mark.parametrize("architecture", PACKED)
def test_fault_6_packed_rows_equal_rows_alone(architecture: str, form: str, close: float) -> None:
    """Fault 6: positions restart, and every state is what the row gets by itself from transformers' own attention (its eager
    form has its softmax in fp32)."""
    tune, batch = tune_of(architecture), make_batch(ROWS)
    packed = states(tune, batch, pack=True)
    tune.model.set_attn_implementation(form)  # type: ignore[operator]
    for i, (length, targets) in enumerate(ROWS):
        alone = make_batch([(length, targets)])._replace(
            token_ids_BT=batch.token_ids_BT[i : i + 1, :length], position_BT=torch.arange(length)[None]
        )
        torch.testing.assert_close(packed[i], states(tune, alone, pack=False)[0], rtol=close, atol=close)


@pytest.mark.parametrize("architecture", PACKED)
def test_fault_6_no_row_sees_its_neighbor(architecture: str) -> None:
    """Fault 6: other tokens in one row leave the states of all others as they were, bit for bit; where tokens choose experts, but for
    rounding, since each expert then takes another number of tokens, and products of other shapes round otherwise."""
    tune, batch = tune_of(architecture, dtype=torch.float32), make_batch(ROWS)
    before = states(tune, batch, pack=True)
    ids_BT = batch.token_ids_BT.clone()
    ids_BT[2] = ids_BT[2].flip(0) * batch.attend_BT[2]
    after = states(tune, batch._replace(token_ids_BT=ids_BT), pack=True)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if architecture in EXPERTS and i != 2:
            assert_rounded(new, old, TINY)
        else:
            assert torch.equal(old, new) == (i != 2)


def test_fault_6_the_first_token_of_a_row_is_not_predicted_from_the_row_before() -> None:
    """Fault 6: a label at a row's first token has nothing before it, packed or not."""
    batch = make_batch([(4, 3), (4, 3), (2, 1)])
    label_BT = batch.label_BT.clone()
    label_BT[:, 0] = batch.token_ids_BT[:, 0]
    tune = tune_of("llama")
    view = view_of(tune, batch._replace(label_BT=label_BT), resolve(["nll"]), Now(), pack=True)
    assert view.position_N.tolist() == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("window", [2, 3])
def test_a_sliding_window_stays_within_the_row(window: int) -> None:
    """Rows longer than the window look back no further than alone."""
    model = tiny("mistral", dtype=torch.float64)
    model.config.sliding_window = window
    for block in model.model.layers:
        block.self_attn.sliding_window = window
    batch = make_batch(ROWS)
    use_attention(model)
    tune = Tune(model, map_parts(model))
    for packed, padded in zip(states(tune, batch, pack=True), states(tune, batch, pack=False), strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"tune": "lora"},
        {"tune": "half"},
        {"tune": "plain_prompt"},
        {"tune": "plain_prefix"},
        {"tune": ["lora", "plain_prefix"]},
        {"token_weight": "drop_easiest"},
        {"objective": ["cross_entropy", "extra_head"]},
        {"token_weight": "beats_reference"},
    ],
    ids=str,
)
def test_fault_5_packing_leaves_gradients_as_they_are(setting: dict[str, Any], toys: None) -> None:
    """Fault 5: packed and padded micro-batches give the same gradients, to 1e-9 in fp64, whatever is combined."""
    found = []
    for packs in (False, True):
        model = tiny("llama", dtype=torch.float64)
        engine = build_engine(
            model,
            map_parts(model),
            completed(
                {
                    "tune": setting.get("tune", "full"),
                    "objective": setting.get("objective", "cross_entropy"),
                    "token_weight": setting.get("token_weight"),
                    "optimizer": "sgd",
                    "gradient_estimator": "backprop",
                }
            ),
            now=Now(steps=1),
        )
        use_attention(model)
        engine.tune.packs = packs
        result = engine.step([make_batch(ROWS), make_batch([(5, 2), (2, 1)], first=30)], Now(steps=1, learning_rate=1.0))
        found.append((result.loss, {name: one.master.detach().clone() for name, one in engine.tune.trained.items()}))
    (loss, padded), (packed_loss, packed) = found
    assert packed_loss == pytest.approx(loss, rel=1e-9)
    for name, value in padded.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-9, atol=1e-9)


@pytest.fixture
def toys() -> Any:
    """The toy techniques."""
    registry.add_folder(TOYS)
    yield
    registry.remove_folder(TOYS)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_what_cannot_be_packed_is_told(architecture: str) -> None:
    """Every family packs but the one whose attention is its own."""
    assert bool(obstacle(tune_of(architecture, dtype=torch.float32))) == (architecture == "gemma2")


def test_a_leak_between_rows_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that forgets where rows end is found out before anything trains."""
    plain = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def forgets(module: Any, query: Tensor, key: Tensor, value: Tensor, context: Context, **options: Any) -> Tensor:
        return plain(module, query, key, value, None, **options)[0]

    monkeypatch.setattr(attention, "_row_by_row", forgets)
    assert "neighbors" in obstacle(tune_of("llama", dtype=torch.float32))


def test_positions_that_do_not_restart_are_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that counts positions itself would count through the rows."""
    tune = tune_of("gpt2", dtype=torch.float32)
    backbone = tune.model.get_submodule(tune.parts.backbone)
    ran = backbone.forward

    def counts_itself(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Any = None, **options: Any) -> Any:
        return ran(input_ids, attention_mask=attention_mask, position_ids=torch.arange(input_ids.shape[1])[None], **options)

    monkeypatch.setattr(backbone, "forward", counts_itself)
    assert "differ" in obstacle(tune)


def reference_varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, longest: int, most: int, **options: Any
) -> Tensor:
    """What the kernel promises, row by row in fp64: the last query of a row stands beside its last key."""
    assert longest == int(starts.diff().max()) and most == int(key_starts.diff().max())
    left, right = options["window_size"]
    assert right == 0
    pieces = []
    for number, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        first, last = key_starts[number : number + 2].tolist()
        q = query[start:end].transpose(0, 1).double()
        k, v = (part[first:last].transpose(0, 1).double() for part in (key, value))
        k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
        gap = torch.arange(last - first - (end - start), last - first)[:, None] - torch.arange(last - first)[None]
        seen = (gap >= 0) & ((gap <= left) | (left < 0))
        score = (q @ k.transpose(1, 2) * options["scale"]).masked_fill(~seen, float("-inf"))
        pieces.append((score.softmax(-1) @ v).transpose(0, 1))
    assert last == len(key) == len(value)
    return torch.cat(pieces).to(query.dtype)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_kernel_for_rows_of_any_length_gets_what_it_needs(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths, window, scale and grouped heads reach the kernel: against its definition, on a processor."""
    tune, batch = tune_of(architecture), make_batch(ROWS)
    expected = states(tune, batch, pack=True)
    monkeypatch.setattr(attention, "_has_varlen", lambda query, context, options: True)
    monkeypatch.setattr(attention, "varlen_attn", reference_varlen)
    for one, other in zip(states(tune, batch, pack=True), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_packed_micro_batches_count_real_tokens() -> None:
    """Each is filled to the limit, a longer row stands alone, every row comes once, and steps are the same."""
    lengths: Sequence[int] = [5, 1, 9, 3, 4, 12, 2, 6]
    plans = [
        plan_epoch(lengths, micro_batch_tokens=10, batch_tokens=25, seed=1, epoch=0, packed=packed) for packed in (False, True)
    ]
    for step, other in zip(*plans, strict=True):
        assert sorted(chain(*step)) == sorted(chain(*other))
        for i, group in enumerate(other):
            filled = sum(lengths[row] for row in group)
            assert filled <= 10 or len(group) == 1
            if i + 1 < len(other):
                assert filled + lengths[other[i + 1][0]] > 10
    assert sorted(row for step in plans[1] for group in step for row in group) == list(range(8))
    assert padding_share(plans[1], lengths) > 0


@pytest.mark.parametrize(
    ("packing", "words", "packs"), [("auto", 3, False), ("auto", 60, True), (True, 3, True), (False, 60, False)]
)
def test_short_rows_run_side_by_side_unless_asked_otherwise(packing: bool | str, words: int, packs: bool) -> None:
    """On processors rows of a few words are quicker padded; the plan says so."""
    rows = [{"prompt": "word " * (words + i), "completion": " word"} for i in range(4)]
    recipe = {"model": "tiny:llama", "rows": {"train": rows}, "train": {"packing": packing, "device": "cpu", "steps": 1}}
    plan = make_plan(make_recipe(recipe))
    assert (plan.engine.tune.packs, plan.feed.packed) == (packs, packs)
    said = " ".join(plan.lines())
    assert ("packed, without padding" in said) == packs
    assert ("quicker side by side" in said) == (packing == "auto" and not packs)


def told_of(apart: float, beside: float, *, dtype: torch.dtype = torch.float32, experts: bool = False) -> tuple[str, list[Batch]]:
    """What is said of a model whose packed rows are so far from padded ones, and from those beside another row; and what it ran."""
    model = torch.nn.Linear(1, 1)
    text = SimpleNamespace(layer_types=["full_attention"])
    model.config = SimpleNamespace(_attn_implementation=attention.NAME, get_text_config=lambda: text)  # type: ignore[assignment]
    parts = SimpleNamespace(causal=True, vocabulary=250, select=lambda **wanted: ["expert"] if experts else [])
    tune: Any = SimpleNamespace(model=model, parts=parts)
    ran: list[Batch] = []
    packs: list[bool] = []

    def states(tune: Any, batch: Batch, *, pack: bool) -> list[Tensor]:
        ran.append(batch)
        packs.append(pack)
        factors = [1.0, 1.0 + apart, (1.0 + apart) * (1.0 + beside)][len(ran) - 1]
        # Of the row in front other words have other states.
        return [torch.full((4, 5), row * (factors if row != 1 or len(ran) < 3 else 9.0), dtype=dtype) for row in (1.0, 2.0, 3.0)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "_states", states)
        said = obstacle(tune)
    assert packs == [False, True, True]
    return said, ran


@pytest.mark.parametrize(
    ("apart", "beside", "options", "said"),
    [
        (0.0005, 0.0, {}, ""),
        (0.0015, 0.0, {}, "its numbers would differ from those of padded rows"),
        (0.0, 0.0005, {}, "a row would see its neighbors"),
        (0.0, 0.0005, {"experts": True}, ""),
        (0.0, 0.0015, {"experts": True}, "a row would see its neighbors"),
        (0.03, 0.0, {"dtype": torch.bfloat16}, ""),
        (0.08, 0.0, {"dtype": torch.bfloat16}, "its numbers would differ from those of padded rows"),
    ],
    ids=str,
)
def test_how_far_apart_packed_rows_may_be(apart: float, beside: float, options: dict[str, Any], said: str) -> None:
    assert told_of(apart, beside, **options)[0] == said


def test_packing_is_tried_on_three_rows_of_which_two_begin_alike() -> None:
    padded, packed, other = told_of(0.0, 0.0)[1]
    assert all(torch.equal(one, two) for one, two in zip(padded[:4], packed[:4], strict=True))
    assert padded.attend_BT.sum(1).tolist() == [7, 4, 5] and padded.attend_BT.equal(other.attend_BT)
    assert padded.groups == ((0,), (1, 2)) and (padded.label_BT == -100).all()
    first_T, second_T, third_T = padded.token_ids_BT
    assert second_T[:2].equal(third_T[:2]) and (second_T[2:4] != third_T[2:4]).all()
    assert (other.token_ids_BT[0] != first_T).all() and other.token_ids_BT[1:].equal(padded.token_ids_BT[1:])
    assert padded.position_BT.tolist() == [list(range(7))] * 3 and not padded.token_ids_BT[~padded.attend_BT].any()
