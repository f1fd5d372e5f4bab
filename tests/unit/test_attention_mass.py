"""The attention that goes to the context: transformers' own weights summed, in every layout, and only where it was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.columns.chunked import resolve
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, StepTable, TokenLoss, TokenWeight, View
from luthier.models import attention
from luthier.models.attention import use_attention
from luthier.models.modes import evaluating
from luthier.models.parts import map_parts
from luthier.models.tiny import ARCHITECTURES, tiny, tiny_kind
from luthier.training.dryrun import peak_of
from luthier.training.services import view_of
from luthier.tune import Tune
from luthier.tune.forward import hidden
from tests.conftest import make_batch, split
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight, toys  # noqa: F401

ROWS = [(9, 4), (3, 1), (80, 5), (1, 0), (4, 3)]
"""Tokens and targets of rows; one is longer than the sliding window of 64 that some families have."""
SEES = [name for name in ARCHITECTURES if tiny_kind(name) == "causal" and name != "gemma2"]
MASS = resolve(["context_attention"])


def tune_of(architecture: str, dtype: torch.dtype = torch.float32, **options: Any) -> Tune:
    model = tiny(architecture, dtype=dtype, **options)
    assert use_attention(model)
    return Tune(model, map_parts(model))


def mass_of(tune: Tune, batch: Batch, now: Now = Now(), **options: Any) -> Tensor:
    with evaluating(tune.model):
        return view_of(tune, batch, MASS, now, **options)["context_attention"]


def eager_of(model: Any, batch: Batch) -> Tensor:
    """The weights [B, T, K] that transformers' eager attention returns for the last block, a mean over heads."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=batch.token_ids_BT, attention_mask=batch.attend_BT.long(), output_attentions=True).attentions[-1]
    model.set_attn_implementation(before)
    return weights.mean(1)  # type: ignore[no-any-return]


@contextmanager
def last_block(tune: Tune) -> Iterator[list[Tensor]]:
    """What the softmax of the last block gives in this pass, [B, T, K], made in fp64 from the very query, key and mask."""
    plain, seen = attention.ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if module.layer_idx == tune.parts.blocks - 1:
            many = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).double()
            score = query.double() @ many.transpose(-1, -2) * options["scaling"]
            causal = torch.ones(score.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
            seen.append(score.masked_fill(~causal, float("-inf")).softmax(-1).mean(1))
        return plain(module, query, key, value, mask, **options)

    attention.ALL_ATTENTION_FUNCTIONS.register("sdpa", watched)
    try:
        yield seen
    finally:
        attention.ALL_ATTENTION_FUNCTIONS.register("sdpa", plain)


@pytest.mark.parametrize("architecture", SEES)
def test_it_is_what_eager_attention_gives(architecture: str) -> None:
    """Grouped heads, scaling, sliding windows; padded on either side and packed: to 1e-5."""
    tune, batch = tune_of(architecture), make_batch(ROWS)
    view = view_of(tune, batch, resolve(["nll", "context_attention"]), Now())
    weights_BTK = eager_of(tune.model, batch)
    expected = []
    for row, position in zip(view.row_N.tolist(), view.position_N.tolist(), strict=True):
        is_prompt_K = (batch.label_BT[row] < 0) & batch.attend_BT[row]
        expected.append(weights_BTK[row, position, is_prompt_K].sum())
    expected_N = torch.stack(expected)
    torch.testing.assert_close(view["context_attention"], expected_N, rtol=0, atol=1e-5)
    assert not view["context_attention"].requires_grad and 0.01 < float(expected_N.min()) < float(expected_N.max()) < 0.999
    torch.testing.assert_close(mass_of(tune, batch, pack=True), expected_N, rtol=0, atol=1e-5)
    torch.testing.assert_close(mass_of(tune, on_the_right(batch)), expected_N, rtol=0, atol=1e-5)


def on_the_right(batch: Batch) -> Batch:
    """The same rows with their padding on the left."""
    shift = [batch.attend_BT.shape[1] - int(attend.sum()) for attend in batch.attend_BT]
    moved = [torch.stack([row.roll(by) for row, by in zip(one, shift, strict=True)]) for one in batch[:4]]  # type: ignore[arg-type]
    return Batch(*moved, batch.row_ids)


def test_everything_is_context_and_nothing() -> None:
    tune, batch = tune_of("qwen2", torch.float64), make_batch(ROWS)
    for pack in (False, True):
        found = [
            hidden(tune, batch, pack=pack, context_BT=batch.attend_BT & one)
            for one in (batch.attend_BT, torch.zeros(()).bool(), batch.label_BT < 0, batch.label_BT >= 0)
        ]
        row_N, time_N = batch.attend_BT.nonzero(as_tuple=True)
        every, none, one, other = (states.mass_at(row_N, time_N) for states in found)
        torch.testing.assert_close(every, torch.ones(97, dtype=torch.float64), rtol=0, atol=1e-12)
        assert float(none.abs().max()) == 0.0
        torch.testing.assert_close(one + other, every, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_few_queries_at_a_time_give_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tune, batch = tune_of(architecture, torch.float64), make_batch(ROWS)
    whole = [mass_of(tune, batch, pack=pack) for pack in (False, True)]
    monkeypatch.setattr(attention, "MASS_BYTES", 3 * 5 * 4 * 80 * 8)
    for pack, expected in zip((False, True), whole, strict=True):
        torch.testing.assert_close(mass_of(tune, batch, pack=pack), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tune", ["plain_prefix", "plain_prompt", ["plain_prefix", "plain_prompt", "lora"], "mam"])
def test_trained_prefixes_and_prompts_are_context(engine: Any, now: Now, tune: Any) -> None:
    run, batch = engine(tune, model=model_of("qwen2"), token_weight="sstoken"), make_batch(ROWS[:3])
    with last_block(run.tune) as seen:
        found = mass_of(run.tune, batch, now)
    (weights_BTK,) = seen
    time, keys = batch.attend_BT.shape[1], weights_BTK.shape[2]
    before = keys - time
    assert before > 0
    view = view_of(run.tune, batch, MASS, now)
    for value, row, position in zip(found, view.row_N, view.position_N, strict=True):
        weight_K = weights_BTK[row, position - time]
        expected = weight_K[:before].sum() + weight_K[before:][(batch.label_BT[row] < 0)].sum()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mass_of(run.tune, batch, now, pack=True), found, rtol=0, atol=1e-12)


def test_a_window_hides_tokens_of_packed_rows_but_no_prefix(engine: Any, now: Now) -> None:
    """Without targets, all but the window is lost; what prefixes get stays."""
    model = model_of("mistral")
    model.config.sliding_window = 3
    for block in model.model.layers:
        block.self_attn.sliding_window = 3
    run = engine("plain_prefix", model=model, token_weight="sstoken")
    batch = make_batch([(9, 0), (6, 0), (4, 0)])
    first = torch.zeros_like(batch.attend_BT)
    first[:, 0] = True
    for pack in (False, True):
        with evaluating(model):
            states = [hidden(run.tune, batch, pack=pack, context_BT=one) for one in (first, ~first & batch.attend_BT)]
        row_N, time_N = batch.attend_BT.nonzero(as_tuple=True)
        on_first, on_rest = (one.mass_at(row_N, time_N) for one in states)
        none = torch.zeros_like(first)
        with evaluating(model):
            prefix = hidden(run.tune, batch, pack=pack, context_BT=none).mass_at(row_N, time_N)
        assert torch.equal(on_first[time_N > 2], prefix[time_N > 2]) and bool((on_first[time_N <= 2] > prefix[time_N <= 2]).all())
        torch.testing.assert_close(on_first + on_rest - prefix, torch.ones_like(prefix), rtol=0, atol=1e-12)
        assert float(prefix.min()) > 0


def looks() -> TokenWeight:
    """A weight that is the column itself."""
    return TokenWeight(lambda view: view["context_attention"], ("context_attention",))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_checkpointing_packing_and_splits_leave_the_gradient(engine: Any, now: Now, architecture: str) -> None:
    found = []
    for checkpointing, packs, sizes in ((False, False, (8,)), (True, False, (8,)), (False, True, (3, 1, 4)), (True, True, (5, 3))):
        model = model_of(architecture)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = engine("full", model=model, token_weight=registered(looks()))
        run.tune.packs = packs
        model.train()
        found.append(gradients(run, split(rows_of_eight(), sizes), now))
    assert gap(found[1], found[0]) == 0.0 and gap(found[2], found[0]) < 1e-10 and gap(found[3], found[0]) < 1e-10


def registered(*values: Any) -> list[registry.Part]:
    return [registry.Part(name="looks", kind="token_weight", options={}, values=values)]


def test_terms_and_rules_over_the_step_may_ask(engine: Any, now: Now) -> None:
    """A loss, a weight and a rule read the same numbers; services give them without a graph."""
    batch, tables, views = rows_of_eight(), [], []

    def look(table: StepTable) -> Tensor:
        tables.append(table["context_attention"])
        return torch.ones(len(table))

    def loss(view: View) -> Tensor:
        views.append(view["context_attention"])
        return view["nll"]

    rule, term = TokenWeight(columns=("context_attention",), look=look), TokenLoss(loss, columns=("context_attention",))
    run = engine("lora", model=model_of(), token_weight=registered(rule, looks(), term))
    run.tune.model.train()
    run.step([batch], now)
    # The same rows, sorted by their names' hashes in the rule's table.
    torch.testing.assert_close(tables[0].sort().values, views[0].float().sort().values, rtol=0, atol=1e-7)
    asked = engine("lora", model=model_of(), token_weight=registered(looks())).services("any", now)
    torch.testing.assert_close(asked.forward(batch, ["context_attention"])["context_attention"], views[0], rtol=0, atol=1e-12)


def test_the_pass_over_shapes_goes_through(engine: Any, now: Now) -> None:
    run = engine("lora", model=model_of(), token_weight={"sstoken": {"every": 1, "average": 0.5}})
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    assert peak_of(run, [rows_of_eight()], now).total > 0
    assert all(type(one.master) is Tensor and torch.equal(one.master, before[name]) for name, one in run.tune.trained.items())
    assert all(torch.equal(run.tune.snapshots["sstoken"][f"master|{name}"], one) for name, one in before.items())


def test_attention_that_cannot_be_exchanged_is_refused_by_name(engine: Any) -> None:
    with pytest.raises(LuthierError, match="`sstoken` asks where the model looks, and the attention of gemma2 does not tell"):
        engine("lora", model=model_of("gemma2"), token_weight="sstoken")


def test_a_last_block_of_another_kind_is_refused_before_anything_trains(engine: Any, now: Now) -> None:
    """A block with no attention, or with one that is told more than a softmax of products needs."""
    model = model_of()
    block = model.model.layers[-1].self_attn
    plain = block.forward
    block.forward = lambda hidden_states, luthier=None, **options: plain(hidden_states=hidden_states, **options)
    with pytest.raises(LuthierError, match="the attention of llama does not tell"):
        engine("full", model=model, token_weight="sstoken")
    block.forward = lambda hidden_states, **options: plain(hidden_states=hidden_states, s_aux=torch.zeros(4), **options)
    with pytest.raises(LuthierError, match="the attention of llama does not tell") as told:
        engine("full", model=model, token_weight="sstoken")
    assert "s_aux" in str(told.value.__cause__)


def test_asking_a_model_with_other_attention_in_mid_run_is_an_error_and_not_a_guess(engine: Any, now: Now) -> None:
    with pytest.raises(LuthierError, match="does not tell where it looks"):
        engine("full").services("any", now).forward(rows_of_eight(), ["context_attention"])
