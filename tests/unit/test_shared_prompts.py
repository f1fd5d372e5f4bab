"""What rows of a group begin with alike is run once: the same states and gradients as rows run apart, and apart where they must be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.columns.chunked import resolve
from luthier.columns.targets import find_targets
from luthier.errors import LuthierError
from luthier.kinds import Batch, Column, Now, OtherPass, WeightDelta
from luthier.models import attention
from luthier.models.attention import Shared, use_attention
from luthier.models.modes import evaluating
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.rows.batches import collate
from luthier.rows.encode import Encoded
from luthier.training.engine import with_context
from luthier.training.services import view_of
from luthier.tune import Tune
from luthier.tune.forward import hidden
from luthier.tune.packed import common_beginnings, pack
from tests.conftest import calibration, split
from tests.tolerance import Exactly
from tests.toys.helpers import gap, gradients, model_of, rows_of_pairs, toys  # noqa: F401
from tests.unit.test_packing import PACKED, reference_varlen

CLOSE = 1e-11
"""What rounding in fp64 may do to gradients, relative to the largest of each tensor."""
GROUPS: Sequence[Sequence[str]] = (
    ("the prompt|answers", "the prompt|an other"),
    ("q|a", "q|bbbbb", "q|ba", "q|", "q|a longer answer"),
    ("alone with no mate",),
    ("nothing", "in common"),
    ("a|", "a|"),
    ("same", "same", "sam"),
    ("ends", "ends later"),
)
"""Groups of rows, a character a token: what stands behind the bar are targets. Some share a prompt, some nothing, some begin their answers
alike; answers are empty, the same, or the beginning of another."""
RUN = (17 + 6) + (2 + 5 + 2 + 0 + 14) + 18 + (7 + 9) + (1 + 0) + (4 + 0 + 0) + (4 + 6)
"""Tokens that are run of them, by hand: of each group's other rows what does not begin the first."""
PAIRS_RUN = (9 + 2) + (12 + 3) + (7 + 9) + (8 + 1)
"""Those of `rows_of_pairs`, which share prompts alone."""


def encoded(groups: Sequence[Sequence[str]] = GROUPS) -> list[Encoded]:
    def row(name: str, text: str) -> Encoded:
        ids = tuple(5 + (ord(one) * 7) % 200 for one in text.replace("|", ""))
        start = text.index("|") if "|" in text else 1
        return Encoded(name, ids, tuple(i >= start for i in range(len(ids))), name, {}, 0, "members")

    rows = [[row(f"{number}/{place}", text) for place, text in enumerate(group)] for number, group in enumerate(groups)]
    return [Encoded(**{**vars(first), "mates": tuple(mates)}) for first, *mates in rows]


def batch_of_groups(groups: Sequence[Sequence[str]] = GROUPS, *, side: Any = "right") -> Batch:
    return collate(encoded(groups), side=side)


def tune_of(architecture: str = "llama", **options: Any) -> Tune:
    model = tiny(architecture, dtype=torch.float64, **options)
    assert use_attention(model)
    return Tune(model, map_parts(model))


@pytest.fixture(autouse=True)
def exactly() -> Iterator[None]:
    """Sums of gradients are rounded before or behind the sum: in fp32 that would hide mistakes of a millionth."""
    with Exactly():
        yield


@contextmanager
def counted(tune: Tune, module: str = "") -> Iterator[list[int]]:
    """Tokens that the first block, or another module, gets in each pass."""
    seen: list[int] = []

    def look(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = arguments[0] if arguments else named["hidden_states"]
        seen.append(states.shape[:-1].numel())

    handle = tune.model.get_submodule(module or tune.parts.block_modules[0]).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def found_in(tune: Tune, batch: Batch, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The states of all real tokens [N, D], and the gradients of all parameters for a sum that weighs each of their numbers."""
    tune.model.requires_grad_(True)
    states_ND = hidden(tune, batch, pack=True, **options).padded(batch.attend_BT)[batch.attend_BT]
    weight_ND = torch.randn(states_ND.shape, generator=torch.Generator().manual_seed(3), dtype=states_ND.dtype)
    names, values = zip(*tune.model.named_parameters(), strict=True)
    slopes = torch.autograd.grad((states_ND * weight_ND).sum(), values, allow_unused=True)
    return states_ND.detach(), {name: one for name, one in zip(names, slopes, strict=True) if one is not None}


def assert_as_apart(tune: Tune, batch: Batch, *, run: int, close: float = CLOSE) -> None:
    """States and gradients are those of rows that share nothing, of which so many tokens are run."""
    with counted(tune) as seen:
        states_ND, slopes = found_in(tune, batch)
        apart_ND, slopes_apart = found_in(tune, batch._replace(groups=()))
    assert set(seen[: len(seen) // 2]) == {run} and set(seen[len(seen) // 2 :]) == {batch.tokens}
    torch.testing.assert_close(states_ND, apart_ND, rtol=close, atol=close)
    assert far(slopes, slopes_apart) < close


def far(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest number of a tensor, but for such as are zero but for rounding."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max() / right[name].abs().max().clamp(min=1e-2)) for name in left)


@pytest.mark.parametrize("architecture", PACKED)
def test_every_family_gives_the_states_and_gradients_of_rows_apart(architecture: str) -> None:
    """Grouped heads, rotary and learned positions, experts: to 1e-12, with fewer tokens run."""
    batch = batch_of_groups()
    assert_as_apart(tune_of(architecture), batch, run=RUN)
    # Where padding stands does not matter.
    tune, left = tune_of(architecture), batch_of_groups(side="left")
    with torch.no_grad():
        states_ND = hidden(tune, left, pack=True).padded(left.attend_BT)[left.attend_BT]
        plain_ND = hidden(tune, batch._replace(groups=())).padded(batch.attend_BT)[batch.attend_BT]
    torch.testing.assert_close(states_ND, plain_ND, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("window", [3, 12])
def test_a_sliding_window_reaches_into_the_prompt_as_far_as_alone(window: int) -> None:
    model = tiny("mistral", dtype=torch.float64)
    model.config.sliding_window = window
    for block in model.model.layers:
        block.self_attn.sliding_window = window
    use_attention(model)
    tune, batch = Tune(model, map_parts(model)), batch_of_groups()
    assert_as_apart(tune, batch, run=RUN)
    padded_ND = hidden(tune, batch).padded(batch.attend_BT)[batch.attend_BT]
    torch.testing.assert_close(found_in(tune, batch)[0], padded_ND.detach(), rtol=CLOSE, atol=CLOSE)


def test_checkpointing_runs_the_same_again() -> None:
    tune, batch = tune_of("gpt2"), batch_of_groups()
    states_ND, slopes = found_in(tune, batch)
    tune.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    tune.model.train()
    with counted(tune, "transformer.h.0.attn") as seen:
        again_ND, slopes_again = found_in(tune, batch)
    assert seen == [RUN, RUN] and torch.equal(states_ND, again_ND) and far(slopes_again, slopes) < CLOSE


def test_no_answer_sees_another() -> None:
    """Other tokens in one answer leave the prompt and the other answers as they were, bit for bit."""
    tune, batch = tune_of(), batch_of_groups((("the prompt|answers", "the prompt|no", "the prompt|maybe"),))
    prompt = len("the prompt")
    for changed in range(3):
        ids_BT = batch.token_ids_BT.clone()
        ids_BT[changed, prompt:] += batch.attend_BT[changed, prompt:].long()
        both = [hidden(tune, one, pack=True).padded(one.attend_BT) for one in (batch, batch._replace(token_ids_BT=ids_BT))]
        for row in range(3):
            before, after = (states_BTD[row, batch.attend_BT[row]] for states_BTD in both)
            assert torch.equal(before[:prompt], after[:prompt])
            assert torch.equal(before[prompt:], after[prompt:]) == (row != changed)


def test_rows_are_laid_out_as_by_hand() -> None:
    """Two rows that share two tokens, one that is the beginning of the first, and one that stands alone; with padding in front."""
    ids_BT = torch.tensor([[0, 7, 8, 9, 1], [0, 0, 7, 8, 2], [0, 0, 0, 7, 8], [0, 0, 0, 0, 7]])
    attend_BT = ids_BT > 0
    found = pack(ids_BT, attend_BT, ((0, 1, 2), (3,)))
    assert ids_BT[found.run_BT].tolist() == [7, 8, 9, 1, 2, 7]
    assert found.position_BT[found.run_BT].tolist() == [0, 1, 2, 3, 2, 0]
    places = [place_T[attend_T].tolist() for place_T, attend_T in zip(found.place_BT, attend_BT, strict=True)]
    assert places == [[0, 1, 2, 3], [0, 1, 4], [0, 1], [5]]
    assert found.context.lengths == (4, 1, 1) and found.context.shared == (Shared(), Shared(0, 2), Shared())
    apart = pack(ids_BT, attend_BT)
    assert apart.context.lengths == (4, 3, 2, 1) and not apart.context.shared and torch.equal(apart.run_BT, attend_BT)


def test_padding_is_no_token_that_rows_share() -> None:
    """The id that stands where nothing does may be a token, too."""
    ids_BT = torch.tensor([[7, 8, 0, 0], [7, 8, 0, 9], [7, 0, 0, 0]])
    attend_BT = torch.tensor([[True, True, False, False], [True] * 4, [True, False, False, False]])
    for order, lengths in (([0, 1, 2], (2, 2)), ([1, 0, 2], (4,)), ([2, 0, 1], (1, 1, 3))):
        assert pack(ids_BT[order], attend_BT[order], ((0, 1, 2),)).context.lengths == lengths


TUNES: dict[str, Any] = {
    "full": "full",
    "lora": "lora",
    "half": "half",
    "edits at blocks": "bottleneck",
    "adapter": "adapter",
    "prefix": {"plain_prefix": {}},
    "prompt": {"prompt_tuning": {"length": 3}},
    "positions behind a prompt": {"dept": {"length": 3, "rank": 2, "positions": 6}},
    "all": ["lora", "bottleneck", "plain_prefix", {"prompt_tuning": {"length": 2}}],
}


def stirred(run: Any) -> Any:
    """The run with everything that trains moved, so that no delta is zero."""
    for name, one in run.tune.trained.items():
        rng = torch.Generator().manual_seed(len(name))
        run.tune.set({name: one.master.detach() + 0.05 * torch.randn(one.master.shape, generator=rng)})
    return run


def packing(engine: Any, tune: Any = "full", **options: Any) -> Any:
    model = model_of(layers=2)
    use_attention(model)
    run = stirred(engine(tune, model=model, **options))
    run.tune.packs = True
    return run


def both_ways(run: Any, batches: Sequence[Batch], now: Now) -> tuple[Any, Any, int]:
    """A step's gradients packed and with padding, and the tokens that the packed one ran in all its passes."""
    with counted(run.tune) as seen:
        packed = gradients(run, batches, now)
    tokens = sum(seen)
    run.tune.packs = False
    return packed, gradients(run, batches, now), tokens


@pytest.mark.parametrize("name", TUNES)
def test_a_step_over_pairs_has_the_gradients_of_rows_apart(engine: Any, now: Now, name: str) -> None:
    """Whatever trains, with the pass of the base, and split into micro-batches; every pass runs the prompts once."""
    batch = rows_of_pairs()
    run = packing(engine, TUNES[name], objective="dpo", keep_base=True)
    before = run.tune.prompt_length
    packed, padded, tokens = both_ways(run, [batch], now)
    assert gap(packed, padded) < CLOSE
    # The base has no prompt, of which each group runs one.
    assert tokens == 2 * PAIRS_RUN + 4 * before
    run.tune.packs = True
    assert gap(gradients(run, split(batch, (2, 4, 2)), now), packed) < CLOSE


def test_a_context_that_is_learnt_itself_is_shared(engine: Any, now: Now) -> None:
    """Each row counts the targets in front of it, whose states are the same."""
    run = packing(engine, {"cpt": {"examples": 2}}, objective="simpo", calibration=calibration)
    batch = rows_of_pairs()
    whole = with_context(batch, run.tune.prompt_labels)
    length = len(run.tune.prompt_labels)
    packed, padded, tokens = both_ways(run, [whole], now)
    assert gap(packed, padded) < CLOSE and tokens == PAIRS_RUN + 4 * length
    assert whole.supervised > batch.supervised and float(packed["cpt.offset_PD"].abs().sum()) > 0


@pytest.mark.parametrize("objective", ["kto", "aot", "reward_model", ["dpo", "cross_entropy", "kl"]], ids=str)
def test_whole_steps_heads_and_several_losses_share_prompts(engine: Any, now: Now, objective: Any) -> None:
    batch = rows_of_pairs()
    packed, padded, tokens = both_ways(packing(engine, objective=objective, keep_base=True), [batch], now)
    assert gap(packed, padded) < CLOSE and tokens % PAIRS_RUN == 0 < tokens


def test_a_query_with_several_texts_trains_the_same(engine: Any, now: Now) -> None:
    batch = batch_of_groups((("query", "query: right", "queue", "other"), ("ask", "answer", "asked", "a")))
    batch = batch._replace(label_BT=torch.full_like(batch.label_BT, -100))
    packed, padded, tokens = both_ways(packing(engine, objective="embed"), [batch], now)
    assert gap(packed, padded) < CLOSE
    # Each text goes on from what the query begins with, too; the step is looked at once before it is learnt.
    assert tokens == 2 * ((5 + 7 + 2 + 5) + (3 + 5 + 2 + 0))


@pytest.mark.parametrize("tune", ["lora", "adapter", "loca"])
def test_rows_that_draw_for_themselves_run_apart(engine: Any, now: Now, tune: str) -> None:
    """Their dropout is that of padded rows, number by number, and the base runs as they do."""
    run, batch = packing(engine, {tune: {"dropout": 0.3}}, objective="dpo", keep_base=True), rows_of_pairs()
    packed, padded, tokens = both_ways(run, [batch], now)
    assert gap(packed, padded) < CLOSE and tokens == 2 * batch.tokens
    assert not run.shares_beginnings


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_is_compared_is_rounded_alike(engine: Any, now: Now, dropout: float) -> None:
    """A delta of zero: the margin is 0 to the last bit in fp32, whichever way the rows run."""
    model = model_of(layers=2).float()
    use_attention(model)
    run = engine({"lora": {"dropout": dropout}}, model=model, dtype=torch.float32, objective="dpo")
    run.tune.packs = True
    with counted(run.tune) as seen:
        told = run.step([rows_of_pairs()], now)
    assert told.notes["reward margin"] == 0.0 and set(seen) == {PAIRS_RUN if dropout == 0.0 else rows_of_pairs().tokens}


def test_a_model_with_dropout_of_its_own_runs_rows_apart_while_it_trains(engine: Any, now: Now) -> None:
    run, batch = packing(engine, objective="simpo"), rows_of_pairs()
    run.tune.model.model.layers[1].self_attn.attention_dropout = 0.2
    run.tune.model.train()
    assert both_ways(run, [batch], now)[2] == batch.tokens and not run.shares_beginnings
    run.tune.packs = True
    with counted(run.tune) as seen, evaluating(run.tune.model):
        view_of(run.tune, batch, resolve(["nll"]), now)
    assert seen == [PAIRS_RUN]


def test_what_may_differ_between_rows_runs_apart(now: Now) -> None:
    """Changed embeddings and states, attention to the context: each is given for every row, and gets what it gets without packing."""
    tune, batch = tune_of(), rows_of_pairs()
    key_BT1 = torch.linspace(0.9, 1.1, batch.token_ids_BT.numel(), dtype=torch.float64).view(*batch.token_ids_BT.shape, 1)
    changes: list[dict[str, Any]] = [
        {"embed": lambda embeds_BTD: embeds_BTD * key_BT1},
        {"blocks": lambda block, hidden_BTD: hidden_BTD * key_BT1},
        {"context_BT": batch.attend_BT & (batch.label_BT < 0)},
    ]
    for change in changes:
        with counted(tune) as seen, torch.no_grad():
            packed, padded = (hidden(tune, batch, pack=packs, **change) for packs in (True, False))
        assert seen[0] == batch.tokens
        torch.testing.assert_close(
            packed.padded(batch.attend_BT)[batch.attend_BT], padded.values[batch.attend_BT], rtol=CLOSE, atol=CLOSE
        )
    where = find_targets(batch)
    both = [hidden(tune, batch, pack=packs, **changes[-1]).mass_at(where.row_N, where.source_N) for packs in (True, False)]
    torch.testing.assert_close(*both, rtol=CLOSE, atol=CLOSE)


def test_what_the_model_reads_decides_and_not_the_row(engine: Any, now: Now) -> None:
    """A token of one prompt that is read as another: rows share what stands before it."""
    tune, batch = tune_of(), batch_of_groups((("the prompt|answers", "the prompt|an other"),))
    ids_BT = batch.token_ids_BT.clone()
    ids_BT[1, 4] += 1
    read = batch._replace(token_ids_BT=ids_BT)
    with counted(tune) as seen:
        views = [view_of(tune, batch, resolve(["nll"]), now, read=read, pack=packs)["nll"] for packs in (True, False)]
    assert seen[0] == batch.tokens - 4
    torch.testing.assert_close(*views, rtol=CLOSE, atol=CLOSE)


def test_a_disturbed_pass_runs_apart_and_what_it_is_compared_with_as_well(engine: Any, now: Now) -> None:
    def disturb(seen: Any) -> Tensor:
        return seen.hidden_BTD + 0.1 * seen.normal_BTD(0)

    other = OtherPass("noisy", disturb=disturb)
    column = Column("noisy_nll", lambda chunk: chunk.others["noisy"].log_softmax(-1)[:, 0], (other,), gradient=False)
    tune, batch = tune_of(), rows_of_pairs()
    with counted(tune) as seen:
        views = [view_of(tune, batch, (column, *resolve(["nll"])), now, pack=packs) for packs in (True, False)]
    assert seen[:2] == [batch.tokens] * 2
    for name in ("noisy_nll", "nll"):
        torch.testing.assert_close(views[0][name], views[1][name], rtol=CLOSE, atol=CLOSE)


def test_who_draws_without_telling_is_refused(engine: Any, now: Now) -> None:
    """Its numbers would depend on whether rows are packed."""
    run = packing(engine, {"lora": {"dropout": 0.3}}, objective="simpo")
    for site in run.tune.sites.values():
        for addition in site.additions:
            assert isinstance(addition.value, WeightDelta)
            addition.value = addition.value._replace(draws=False)
    with pytest.raises(LuthierError, match="does not tell that it draws"):
        run.step([rows_of_pairs()], now)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_kernel_for_rows_of_any_length_gets_rows_with_fewer_queries_than_keys(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against its definition, in which the last query stands beside the last key."""
    tune, batch = tune_of(architecture), batch_of_groups()
    expected = found_in(tune, batch)
    monkeypatch.setattr(attention, "_has_varlen", lambda query, context, options: True)
    monkeypatch.setattr(attention, "varlen_attn", reference_varlen)
    states_ND, slopes = found_in(tune, batch)
    torch.testing.assert_close(states_ND, expected[0], rtol=CLOSE, atol=CLOSE)
    assert gap(slopes, expected[1]) < CLOSE


def test_the_plain_form_of_short_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its softmax is in fp32."""
    tune, batch = tune_of(), batch_of_groups()
    expected = found_in(tune, batch)
    monkeypatch.setattr(attention, "_is_short", lambda query, key, options: True)
    states_ND, _ = found_in(tune, batch)
    torch.testing.assert_close(states_ND, expected[0], rtol=1e-5, atol=1e-5)


def test_where_every_token_stands_by_hand() -> None:
    """Two groups: one whose rows part in the middle and agree again, and one of a right-padded, a left-padded and a shorter row."""
    ids_BT = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8], [3, 4, 0, 0], [0, 3, 4, 6], [3, 4, 0, 0]])
    attend_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0]]).bool()
    first_B = torch.tensor([0, 0, 2, 2, 2])
    assert common_beginnings(ids_BT, attend_BT, first_B).tolist() == [0, 2, 0, 2, 2]
    # The last token counts once, whichever side its row is padded on.
    longer_BT, real_BT = torch.tensor([[3, 4, 6, 6], [0, 3, 4, 6], [3, 4, 6, 7]]), torch.ones(3, 4, dtype=torch.bool)
    real_BT[1, 0] = False
    assert common_beginnings(longer_BT, real_BT, torch.tensor([0, 0, 0])).tolist() == [0, 3, 3]
    found = pack(ids_BT, attend_BT, [(0, 1), (2, 3, 4)])
    runs = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(found.run_BT, runs)
    assert found.position_BT[attend_BT].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1]
    assert found.place_BT[attend_BT].tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 6, 7, 8, 6, 7]
    assert found.context.lengths == (4, 2, 2, 1)
    assert found.context.shared == (Shared(), Shared(0, 2), Shared(), Shared(2, 2))
    apart = pack(ids_BT, attend_BT)
    assert torch.equal(apart.run_BT, attend_BT) and apart.context.lengths == (4, 4, 2, 3, 2) and apart.context.shared == ()
    assert apart.place_BT[attend_BT].tolist() == list(range(15))
