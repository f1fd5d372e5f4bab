"""Forward passes whose embeddings and blocks' outputs are changed: on whose tokens, in every layout, and in which passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from luthier import draws
from luthier.columns.chunked import resolve
from luthier.columns.losses import nll
from luthier.errors import LuthierError
from luthier.kinds import Column, Disturbed, LossTerm, Now, OtherPass
from luthier.models.attention import use_attention
from luthier.models.modes import evaluating
from luthier.models.tiny import ARCHITECTURES, tiny_kind
from luthier.registry import Part
from luthier.training.engine import with_context
from luthier.training.services import RunServices, view_of
from luthier.tune.forward import hidden
from tests.conftest import split
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight, toys  # noqa: F401

CAUSAL = [name for name in ARCHITECTURES if tiny_kind(name) == "causal"]


def push(one: Disturbed) -> Tensor:
    """Behind block 0 everything moves, also where nothing may."""
    return one.hidden_BTD + one.normal_BTD(0) if one.block == 0 else one.hidden_BTD


def other_nll(name: str, *passes: OtherPass) -> Column:
    return Column(f"nll of {name}", lambda chunk: nll(chunk.others[name], chunk.label_C), passes)


def pushed(*, gradient: bool = True) -> Part:
    """Cross-entropy of a disturbed pass."""
    column = other_nll("pushed", OtherPass("pushed", gradient=gradient, disturb=push))
    return Part("pushed", "loss_term", {}, (LossTerm(lambda view, own: view[column.name].sum(), columns=(column,)),))


@torch.no_grad()
@pytest.mark.parametrize("architecture", CAUSAL)
def test_what_stays_as_it_is_changes_nothing_in_any_family(engine: Any, architecture: str) -> None:
    run, batch = engine("lora", model=model_of(architecture)), rows_of_eight()
    plain = hidden(run.tune, batch).values
    seen: list[int] = []

    def look(block: int, hidden_BTD: Tensor) -> Tensor:
        seen.append(block)
        return hidden_BTD

    assert torch.equal(hidden(run.tune, batch, blocks=look).values, plain) and seen == [0, 1]
    assert torch.equal(hidden(run.tune, batch, embed=lambda embeds_BTD: embeds_BTD).values, plain)
    assert torch.equal(
        hidden(run.tune, batch, embed=lambda embeds_BTD: embeds_BTD + 0.0, blocks=lambda _, h: h + 0.0).values, plain
    )
    moved = hidden(run.tune, batch, blocks=lambda block, hidden_BTD: hidden_BTD + 0.1 * hidden_BTD.roll(1, -1) * block).values
    assert float((moved - plain)[batch.attend_BT].abs().amax(-1).min()) > 1e-6
    assert torch.equal(hidden(run.tune, batch).values, plain)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_blocks_and_embeddings_are_those_of_the_plain_model(engine: Any, architecture: str) -> None:
    run, batch = engine("full", model=model_of(architecture)), rows_of_eight()
    model = run.tune.model
    embeds = model.get_submodule(run.tune.parts.embedding)(batch.token_ids_BT)
    found: dict[int, Tensor] = {}

    def take(block: int, hidden_BTD: Tensor, own_BT: Tensor) -> None:
        assert not hidden_BTD.requires_grad and torch.equal(own_BT, batch.attend_BT)
        found[block] = hidden_BTD

    model.train()
    RunServices(run.tune, "any", Now()).block_outputs([batch], take)
    assert model.training
    model.eval()
    states = model(batch.token_ids_BT, output_hidden_states=True).hidden_states
    assert sorted(found) == [0, 1]
    assert torch.allclose(found[0][batch.attend_BT], states[1][batch.attend_BT], atol=1e-12)
    body = model.get_submodule(run.tune.parts.backbone)
    shift = 0.1 * torch.randn(embeds.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = body(inputs_embeds=embeds + shift).last_hidden_state
    changed = hidden(run.tune, batch, embed=lambda embeds_BTD: embeds_BTD + shift).values
    assert torch.allclose(changed[batch.attend_BT], wanted[batch.attend_BT], atol=1e-12)


@pytest.mark.parametrize("tune", ["lora", "plain_prompt", "plain_prefix", "cpt"])
def test_only_the_rows_own_tokens_change_in_every_layout(engine: Any, tune: str) -> None:
    model = model_of()
    use_attention(model)
    run = engine(tune, model=model)
    batch = with_context(rows_of_eight(), run.tune.prompt_labels)
    own_BT = batch.attend_BT & (batch.token_ids_BT >= 0)
    shift = 1e3 * torch.ones((), dtype=torch.float64)
    seen: dict[str, list[Tensor]] = {}
    found = {}
    for name, pack in (("padded", False), ("packed", True)):

        def blocks(block: int, hidden_BTD: Tensor, name: str = name) -> Tensor:
            assert hidden_BTD.shape[:2] == batch.token_ids_BT.shape
            seen.setdefault(name, []).append(hidden_BTD[own_BT])
            return hidden_BTD + shift if block == 0 else hidden_BTD

        def embed(embeds_BTD: Tensor, name: str = name) -> Tensor:
            seen.setdefault(name, []).append(embeds_BTD[own_BT])
            return embeds_BTD + 0.5

        with torch.no_grad():
            found[name] = hidden(run.tune, batch, pack=pack, embed=embed, blocks=blocks).padded(batch.attend_BT)
    assert torch.allclose(found["packed"][batch.attend_BT], found["padded"][batch.attend_BT], atol=1e-10)
    assert all(torch.allclose(*pair, atol=1e-9) for pair in zip(seen["packed"], seen["padded"], strict=True))
    if tune == "cpt":
        # Virtual tokens before the rows see no token that moved.
        with torch.no_grad():
            plain = hidden(run.tune, batch).values
        assert torch.equal(found["padded"][~own_BT & batch.attend_BT], plain[~own_BT & batch.attend_BT])


def test_a_disturbed_pass_is_the_model_as_it_trains(engine: Any, now: Now) -> None:
    """Its gradient is that of a plain model whose first block has a hook that adds the same draws."""
    batch = rows_of_eight()
    found = gradients(engine(model=model_of(), objective=[pushed()]), [batch], now)
    row_B = torch.tensor([draws.seed_of(row) for row in batch.row_ids])
    key_BT = draws.keys(now.seed, now.step, row_B[:, None], batch.position_BT)
    noise_BTD = draws.normal(draws.features(key_BT, 32), draws.seed_of("pushed", 0, 0, 0))
    run = engine(model=model_of())
    block = run.tune.model.get_submodule(run.tune.parts.block_modules[0])
    block.register_forward_hook(lambda module, arguments, output: output + noise_BTD)
    assert gap(found, gradients(run, [batch], now)) < 1e-10


@pytest.mark.parametrize("tune", ["full", "lora", "plain_prompt", ["scale_shift", "half"]], ids=str)
def test_splits_checkpointing_and_packing_change_no_gradient(engine: Any, now: Now, tune: Any) -> None:
    batch = rows_of_eight()

    def found(sizes: tuple[int, ...], *, checkpointing: bool = False, packs: bool = False) -> dict[str, Tensor]:
        model = model_of()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        use_attention(model)
        run = engine(tune, model=model, objective=["cross_entropy", pushed(), "drop_tokens", "neftune", "kl"])
        run.tune.packs = packs
        model.train()
        return gradients(run, split(batch, sizes), now)

    whole = found((8,))
    assert gap(found((3, 1, 4, 0)), whole) < 1e-10
    assert gap(found((8,), checkpointing=True), whole) == 0.0
    assert gap(found((8,), packs=True), whole) < 1e-10


def test_a_pass_without_gradient_runs_the_weights_that_train_in_evaluation_mode(engine: Any, now: Now) -> None:
    model, batch = model_of(), rows_of_eight()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    use_attention(model)
    run = engine(model=model)
    with evaluating(model):
        wanted = view_of(run.tune, batch, resolve(["nll"]), now)["nll"]
    model.train()
    still, trains = other_nll("still", OtherPass("still")), other_nll("trains", OtherPass("trains", gradient=True))
    view = view_of(run.tune, batch, [*resolve(["nll"]), still, trains], now)
    assert torch.equal(view[still.name], wanted) and model.training
    assert not torch.allclose(view[trains.name], wanted) and not torch.allclose(view["nll"], wanted)
    embedding = next(model.parameters())
    (slope,) = torch.autograd.grad(view[trains.name].sum(), embedding, retain_graph=True)
    assert bool(slope.any())
    assert not torch.autograd.grad(view[still.name].sum(), embedding, allow_unused=True)[0].any()


def test_all_passes_read_what_the_model_reads(engine: Any, now: Now) -> None:
    again = other_nll("again", OtherPass("again", gradient=True))
    found: dict[str, tuple[Tensor, ...]] = {}

    def total(view: Any, own: Any) -> Tensor:
        found["now"] = (view["nll"].detach(), view[again.name].detach(), view["reference_nll"].detach())
        return view["nll"].sum()

    part = Part("seen", "loss_term", {}, (LossTerm(total, columns=("nll", "reference_nll", again)),))
    for name, maps in (("plain", []), ("mapped", ["drop_tokens", "neftune"])):
        gradients(engine(model=model_of(), objective=[part, *maps]), [rows_of_eight()], now)
        found[name] = found["now"]
    for mine, other, base in (found["plain"], found["mapped"]):
        assert torch.equal(mine, other) and torch.equal(base, mine)
    assert not torch.allclose(found["mapped"][0], found["plain"][0])


@pytest.mark.parametrize("deaf", [[1], [0, 1]])
def test_blocks_that_are_told_nothing_are_refused_before_training(engine: Any, now: Now, deaf: list[int]) -> None:
    model = model_of()

    def forget(module: Any, arguments: Any, options: dict[str, Any]) -> Any:
        return arguments, {name: value for name, value in options.items() if name != "luthier"}

    for block in deaf:
        model.model.layers[block].register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.raises(LuthierError, match="does not hand its blocks"):
        engine(model=model, objective={"noisefit": {"layers": 1}})
    run = engine(model=model, objective=[pushed()])
    with pytest.raises(LuthierError, match="does not hand its blocks"):
        run.step([rows_of_eight()], now)


def test_compiled_blocks_are_compiled_once_for_all_disturbed_passes(engine: Any, now: Now) -> None:
    losses: list[list[float]] = []
    torch._dynamo.reset()
    counters.clear()
    for compiled in (False, True):
        model = model_of()
        use_attention(model)
        run = engine(model=model, objective=["cross_entropy", pushed()])
        for layer in model.model.layers if compiled else []:
            layer.compile(backend="eager")
        losses.append([run.step([rows_of_eight()], now._replace(step=i)).loss for i in range(3)])
    assert losses[0] == losses[1]
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], "for clean passes and for disturbed ones"


def test_detaching_takes_the_hooks_off(engine: Any) -> None:
    run = engine("lora", model=model_of())
    hidden(run.tune, rows_of_eight(), blocks=lambda block, hidden_BTD: hidden_BTD)
    hidden(run.tune, rows_of_eight(), blocks=lambda block, hidden_BTD: hidden_BTD)
    blocks = [run.tune.model.get_submodule(name) for name in run.tune.parts.block_modules]
    assert [len(block._forward_hooks) for block in blocks] == [1, 1]
    run.tune.detach()
    assert not any(block._forward_hooks for block in blocks)


def test_keyed_normal_draws_are_normal_and_independent() -> None:
    key_N = draws.keys(7, 3, torch.arange(500) // 50, torch.arange(500) % 50)
    drawn_ND = draws.normal(draws.features(key_N, 80))
    count = drawn_ND.numel()
    assert bool(drawn_ND.isfinite().all())
    for power, (mean, variance) in {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (0.0, 15.0), 4: (3.0, 96.0)}.items():
        assert abs(float(drawn_ND.pow(power).mean()) - mean) < 5 * (variance / count) ** 0.5
    counts = torch.histc(torch.special.ndtr(drawn_ND).float(), bins=20, min=0, max=1)
    assert float(((counts - count / 20) ** 2 / (count / 20)).sum()) < 60
    other_ND = draws.normal(draws.features(key_N, 80), stream=1)
    shifted = [drawn_ND, other_ND, drawn_ND.roll(1, 0), drawn_ND.roll(1, 1), drawn_ND.roll(2, 1), drawn_ND.roll(50, 0)]
    table = torch.corrcoef(torch.stack([one.flatten() for one in shifted]))
    assert float((table - torch.eye(6)).abs().max()) < 5 / count**0.5
