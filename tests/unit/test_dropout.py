"""Dropout of techniques: drawn by seed, step, row and position, and only where the run learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from luthier import draws
from luthier.draws import drawing, dropout
from luthier.errors import LuthierError
from luthier.kinds import Now, RepresentationEdit
from luthier.models.attention import use_attention
from luthier.models.modes import drops
from luthier.models.tiny import tiny
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.registry import Part
from luthier.training.world import World
from tests.conftest import make_batch, split
from tests.toys.helpers import gap, gradients, logits_of, model_of, rows_of_eight, toys  # noqa: F401

TUNES: dict[str, Any] = {
    "lora": {"lora": {"rank": 2, "dropout": 0.5}},
    "loca": {"loca": {"coefficients": 8, "dropout": 0.5}},
    "adapter": {"adapter": {"width": 4, "dropout": 0.5, "init": "bert"}},
}


def stirred(run: Any) -> Any:
    """The run with everything that trains moved, so that a delta is not zero."""
    for name, one in run.tune.trained.items():
        rng = torch.Generator().manual_seed(len(name))
        run.tune.set({name: one.master.detach() + 0.1 * torch.randn(one.master.shape, generator=rng)})
    return run


def test_as_many_numbers_are_dropped_as_was_said_and_the_others_are_scaled() -> None:
    key_N = draws.keys(0, 3, torch.arange(64).repeat_interleave(32), torch.arange(32).repeat(64))
    ones = torch.ones(2048, 256)
    with drawing(key_N, "a"):
        found = dropout(ones, 0.3)
        again, other_stream = dropout(ones, 0.3), dropout(ones, 0.3, stream=1)
        # Rows of one width: the shape in which the tokens come does not matter.
        assert torch.equal(dropout(ones.view(64, 32, 256), 0.3).view(2048, 256), found)
    with drawing(key_N, "b"):
        other_name = dropout(ones, 0.3)
    assert torch.equal(found, again) and set(found.unique().tolist()) == {0.0, ones.div(0.7)[0, 0].item()}
    gone = (found == 0).double()
    assert float(gone.mean()) == pytest.approx(0.3, abs=4 * (0.21 / gone.numel()) ** 0.5)
    # Neither tokens nor features have more in common than chance.
    for values in (gone, gone.T):
        scaled = (values - 0.3) / 0.21**0.5
        together = (scaled @ scaled.T / scaled.shape[1]).fill_diagonal_(0.0)
        assert float(together.abs().max()) < 6 / scaled.shape[1] ** 0.5
    for other in (other_stream, other_name):
        both = ((other == 0) & (found == 0)).double().mean()
        assert float(both) == pytest.approx(0.09, abs=0.003)


def test_nothing_is_dropped_where_nobody_draws() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert dropout(x, 0.5) is x
    with drawing(None, "a"):
        assert dropout(x, 0.5) is x
    with drawing(torch.arange(3), "a"):
        assert dropout(x, 0.0) is x
        with pytest.raises(LuthierError, match="dropout knows no tokens here: 2 vectors stand for the 3 tokens"):
            dropout(x[:2], 0.5)
    assert dropout(x, 0.5) is x


@pytest.mark.parametrize("tune", TUNES)
def test_any_split_and_packing_drop_the_same(engine: Any, now: Now, tune: str) -> None:
    run = stirred(engine(TUNES[tune], model=model_of(layers=1)))
    run.tune.model.train()
    batch = rows_of_eight()
    whole = gradients(run, [batch], now)
    assert gap(gradients(run, split(batch, (3, 1, 4)), now), whole) < 1e-12
    use_attention(run.tune.model)
    run.tune.packs = True
    assert gap(gradients(run, split(batch, (5, 3)), now), whole) < 1e-9
    run.tune.packs = False
    assert gap(gradients(run, [batch], now._replace(step=1)), whole) > 1e-2
    run.tune.model.eval()
    assert gap(gradients(run, [batch], now), whole) < 1e-12, "the model's own mode is the model's own affair"


def test_a_prompt_before_the_rows_draws_for_itself(engine: Any, now: Now) -> None:
    both = [{"prompt_tuning": {"length": 3}}, TUNES["lora"]]
    run = stirred(engine(both, model=model_of(layers=1)))
    whole = gradients(run, [rows_of_eight()], now)
    assert gap(gradients(run, split(rows_of_eight(), (3, 5)), now), whole) < 1e-12


@pytest.mark.parametrize("tune", TUNES)
def test_who_looks_at_the_model_with_gradients_sees_no_dropout(engine: Any, now: Now, tune: str) -> None:
    """Dropout was switched by whether gradients were wanted: two looks at the same gradients differed, each by its own draws."""
    run = stirred(engine(TUNES[tune], model=model_of(layers=1)))
    services = run.services("x", now)
    batch, places = rows_of_eight(), run.tune.parts.select(target_modules="mlp_down")
    run.tune.model.train()
    first, second = (services.gradients([batch], places) for _ in range(2))
    plain = {name: {**options, "dropout": 0.0} for name, options in TUNES[tune].items()}
    undropped = stirred(engine(plain, model=model_of(layers=1))).services("x", now).gradients([batch], places)
    for place in places:
        assert torch.equal(first[place], second[place])
        assert torch.allclose(first[place], undropped[place], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tune", TUNES)
def test_a_model_that_is_only_run_drops_nothing(engine: Any, now: Now, tune: str) -> None:
    """A forward pass of one's own drops nothing, in either mode, with gradients or without, before a step and behind one."""
    run = stirred(engine(TUNES[tune], model=model_of(layers=1)))
    batch = rows_of_eight()
    run.tune.model.train()
    for _ in range(2):
        wanted = logits_of(run.tune.model, batch)
        found = run.tune.model(input_ids=batch.token_ids_BT, attention_mask=batch.attend_BT.long()).logits
        again = run.tune.model(input_ids=batch.token_ids_BT, attention_mask=batch.attend_BT.long()).logits
        assert torch.equal(found, again)
        assert torch.allclose(found[batch.attend_BT], wanted[batch.attend_BT], rtol=0, atol=1e-12)
        run.step([batch], now)


def test_the_head_draws_for_the_tokens_that_it_gets(engine: Any, now: Now) -> None:
    """A delta on the head sees some of the tokens, in slices, and again in backward."""
    run = stirred(engine({"lora": {"rank": 2, "dropout": 0.5, "target_modules": ["head"]}}, model=tiny(seed=1, layers=1).double()))
    batch = rows_of_eight()
    whole = gradients(run, [batch], now)
    assert gap(gradients(run, split(batch, (3, 5)), now), whole) < 1e-12
    assert gap(gradients(run, [batch], now._replace(step=1)), whole) > 1e-3


def test_two_points_are_compared_without_dropout(engine: Any, now: Now) -> None:
    """The loss of a step without gradients was taken with dropout: a source that compares two points compared two draws."""
    model = model_of(layers=1)
    run = stirred(engine(TUNES["lora"], model=model, gradient_estimator="zeroth_order"))
    seen: list[float] = []

    def looking(work: Any) -> None:
        seen.extend(work.loss() for _ in range(2))

    run.source = run.source._replace(gradients=looking)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    run.step([rows_of_eight()], now)
    assert model.training
    model.eval()
    assert seen[0] == seen[1] == pytest.approx(loss_of(run, rows_of_eight()), rel=1e-12)


def loss_of(run: Any, batch: Any) -> float:
    logits = logits_of(run.tune.model, batch)[:, :-1]
    return float(functional.cross_entropy(logits.flatten(0, 1), batch.label_BT[:, 1:].flatten(), ignore_index=-100))


def test_draws_follow_the_row_and_its_positions_whatever_stands_beside_it(engine: Any, now: Now) -> None:
    run = stirred(engine(TUNES["lora"], model=model_of(layers=1)))
    alone = make_batch([(9, 4)], first=7)
    beside = make_batch([(5, 0), (9, 4)], first=6)
    ids = beside.token_ids_BT.clone()
    ids[1, :9] = alone.token_ids_BT[0]
    beside = beside._replace(token_ids_BT=ids, label_BT=torch.where(beside.label_BT >= 0, ids, beside.label_BT))
    assert alone.row_ids[0] == beside.row_ids[1]
    assert gap(gradients(run, [alone], now), gradients(run, [beside], now)) < 1e-12


def test_the_models_own_dropout_over_several_processes_is_told(tmp_path: Path) -> None:
    """Its draws follow the process: what it drops in two processes is not what it drops in one."""
    plan = make_plan(make_recipe({"model": "tiny:llama", "rows": {"train": [{"text": "a b c"}] * 3}, "out": str(tmp_path)}))
    words = "the model's own dropout is drawn by every process for itself"

    def told() -> bool:
        return any(words in warning for warning in plan.warnings())

    plan.engine.world = World(2, 0)
    assert not drops(plan.model) and not told()
    attention = plan.model.model.layers[0].self_attn
    attention.attention_dropout = 0.1
    assert drops(plan.model) and told()
    plan.engine.world = World()
    assert not told()
    attention.attention_dropout = 0.0
    plan.model.add_module("dropped", nn.Dropout(0.1))
    assert drops(plan.model)


@pytest.mark.parametrize("of", ["input", "output"])
def test_an_edit_that_does_not_tell_that_it_draws_is_refused(engine: Any, now: Now, of: Any) -> None:
    """Whether a technique tells was asked of edits of outputs alone, by the tests."""
    edit = RepresentationEdit(
        lambda place, i, o, services: {"scale": torch.ones(i)},
        lambda tensors, x, y: dropout(x if of == "input" else y, 0.5),
        ("mlp_down",),
        of=of,
    )
    run = engine(Part("silent", "representation_edit", {}, (edit,)), model=model_of(layers=1))
    with pytest.raises(LuthierError, match="does not tell that it draws"):
        run.step([rows_of_eight()], now)
