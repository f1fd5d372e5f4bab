"""What the model runs of a batch: which tokens are its rows' own, what prompts draw by, and the head as it is now."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier import draws
from luthier.kinds import Batch, Now
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.tune import Tune
from luthier.tune.forward import head_now, hidden, without_virtual
from tests.conftest import make_batch
from tests.toys.helpers import model_of, toys  # noqa: F401


def test_neither_padding_nor_virtual_tokens_are_the_rows_own() -> None:
    ids_BT, attend_BT = torch.tensor([[-2, -1, 0, 7, 0]]), torch.tensor([[True, True, True, True, False]])
    batch = Batch(ids_BT, attend_BT, torch.arange(5)[None], torch.full((1, 5), -100), ("row",))
    own_BT = torch.tensor([[False, False, True, True, False]])
    assert torch.equal(batch.own_tokens(), own_BT)
    plain_BT, attended_BT = without_virtual(ids_BT, attend_BT)
    assert plain_BT.tolist() == [[0, 0, 0, 7, 0]] and torch.equal(attended_BT, own_BT)


@pytest.mark.parametrize("pack", [False, True])
def test_tokens_of_a_prompt_draw_by_places_below_zero(engine: Any, now: Now, pack: bool) -> None:
    tune = engine({"plain_prompt": {"length": 3}}, model=model_of(layers=1)).tune
    batch, at = make_batch([(4, 1), (2, 1)]), now._replace(step=5, seed=2)
    hidden(tune, batch, pack=pack, draws_at=at)
    place_BT = torch.tensor([[-1, -2, -3, 0, 1, 2, 3], [-1, -2, -3, 0, 1, 0, 0]])
    key_BT = draws.keys(2, 5, draws.seeds_of(batch.row_ids, torch.device("cpu"))[:, None], place_BT)
    run_BT = torch.cat([torch.ones(2, 3, dtype=torch.bool), batch.attend_BT], dim=1)
    assert torch.equal(tune.drawing, key_BT[run_BT] if pack else key_BT.flatten())


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_moment_has_no_graph_and_does_not_train_on(engine: Any, tied: bool) -> None:
    tune = engine({"full": {"target_modules": ["embedding" if tied else "head"]}}, model=model_of(layers=1, tied=tied)).tune
    hidden_ND = torch.linspace(-1.0, 1.0, 2 * tune.parts.width, dtype=torch.float64).view(2, -1)
    head = head_now(tune)
    before_NV = head(hidden_ND)
    assert tune.trained and not before_NV.requires_grad
    tune.set({name: one.master + 1.0 for name, one in tune.trained.items()})
    assert torch.equal(head(hidden_ND), before_NV) and not torch.equal(head_now(tune)(hidden_ND), before_NV)


def test_the_head_of_the_base_is_the_bases_where_some_rows_of_it_train(engine: Any) -> None:
    tune = engine({"some_rows": {"target_modules": ["head"]}}, model=model_of(layers=1, tied=False), keep_base=True).tune
    hidden_ND = torch.linspace(-1.0, 1.0, 2 * tune.parts.width, dtype=torch.float64).view(2, -1)
    base_NV = tune.model.lm_head(hidden_ND).detach()
    tune.set({name: one.master + 1.0 for name, one in tune.trained.items()})
    with tune.off():
        head = head_now(tune)
    assert torch.equal(head(hidden_ND), base_NV) and not torch.equal(head_now(tune)(hidden_ND), base_NV)


def test_what_stands_at_an_embedding_leaves_the_first_token_of_the_vocabulary_alone(engine: Any) -> None:
    """Ids below zero are virtual, and 0 is the first that is not."""
    model, ids_BT = model_of(layers=1), torch.tensor([[0, 1, 0, 7]])
    expected = model(input_ids=ids_BT).logits
    engine({"some_rows": {"target_modules": ["embedding"]}}, model=model)
    assert torch.equal(model(input_ids=ids_BT).logits, expected)


def test_encoders_count_places_in_their_own_way() -> None:
    """The places of RoBERTa begin behind its padding token's number."""
    model = tiny("roberta", layers=1, dtype=torch.float64)
    tune, batch = Tune(model, map_parts(model)), make_batch([(5, 0), (3, 0)])
    ids_BT = batch.token_ids_BT.masked_fill(~batch.attend_BT, model.config.pad_token_id)
    body = model.get_submodule(tune.parts.backbone)
    expected_BTD = body(input_ids=ids_BT, attention_mask=batch.attend_BT.long()).last_hidden_state
    found_BTD = hidden(tune, batch._replace(token_ids_BT=ids_BT)).values
    assert torch.equal(found_BTD[batch.attend_BT], expected_BTD[batch.attend_BT])


def test_by_itself_nothing_is_kept_and_masters_are_wide() -> None:
    """A plain `Tune` keeps no base, and rows run with their padding."""
    model = tiny("llama", layers=1, dtype=torch.bfloat16)
    tune = Tune(model, map_parts(model))
    own = tune.add_free("beside", {"scale": torch.ones(2)})
    assert (tune.masters, tune.keep_base, tune.packs, tune.prompt_length) == ("fp32", False, False, 0)
    assert own.trained["scale"].rate == 1.0 and own.trained["scale"].form == "free" and not own.trained["scale"].changes
    assert hidden(tune, make_batch([(3, 1), (2, 1)])).place_BT is None
