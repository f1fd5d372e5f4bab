"""Prompts here and in PEFT: the same embeddings in front give the same logits, losses, gradients and projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from luthier.kinds import Batch, Now
from luthier.methods.prompt.cpt import at_width, context_of, cpt, project
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.training.services import RunServices
from luthier.tune import Tune
from luthier.tune.forward import hidden
from tests.conftest import make_batch
from tests.toys.helpers import gradients

peft = pytest.importorskip("peft")

BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])
CONTEXT = make_batch([(5, 1), (7, 2), (6, 1)], seed=3)
BATCH = make_batch([(8, 2), (8, 3)], seed=4)
OF_PROMPT = 4
"""PEFT's number for a target in its first example; the remainder of 4 says what a token is."""


def rows(count: int, source: str) -> list[Batch]:
    return [CONTEXT]


@BOTH
def test_prompt_tuning_gives_the_same_logits_and_gradients(engine: Any, now: Now, architecture: str) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, prompt_tuning_init="RANDOM")
    theirs = peft.get_peft_model(tiny(architecture, seed=1).double(), config).eval()
    theirs_PD = theirs.prompt_encoder["default"].embedding.weight
    theirs_PD.data = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    run = engine({"prompt_tuning": {"length": 6}}, model=tiny(architecture, seed=1))
    run.tune.set({"prompt_tuning.prompt_PD": theirs_PD.detach()})

    found = theirs(input_ids=BATCH.token_ids_BT, attention_mask=BATCH.attend_BT.long())
    # Their own loss is in fp32.
    loss = functional.cross_entropy(found.logits[:, 6:-1].flatten(0, 1), BATCH.label_BT[:, 1:].flatten())
    with torch.no_grad():
        logits_BTV = run.tune.model.get_output_embeddings()(hidden(run.tune, BATCH).values)
    torch.testing.assert_close(logits_BTV, found.logits[:, 6:], rtol=1e-9, atol=1e-9)
    loss.backward()
    torch.testing.assert_close(gradients(run, [BATCH], now)["prompt_tuning.prompt_PD"], theirs_PD.grad, rtol=1e-8, atol=1e-10)
    assert float(theirs_PD.grad.abs().max()) > 1e-4
    torch.testing.assert_close(run.step([BATCH], now).loss, float(loss.detach()), rtol=1e-10, atol=0.0)


def cpt_of_peft(architecture: str, decay: float) -> Any:
    """PEFT's technique with the same context on the same tiny model."""
    ids_P, label_P, example_P = context_of([CONTEXT], 3)
    kinds_P = 4 * example_P + torch.where(label_P >= 0, OF_PROMPT, 2)
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=ids_P.tolist(),
        cpt_mask=[1] * len(ids_P),
        cpt_tokens_type_mask=kinds_P.tolist(),
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=decay,
        opt_projection_epsilon=0.1,
        opt_projection_format_epsilon=0.1,
    )
    return peft.get_peft_model(tiny(architecture, seed=1).double(), config).eval()


def loss_of_peft(theirs: Any) -> Any:
    # It changes the types it is given, in place.
    kinds_BT = torch.where(BATCH.label_BT >= 0, OF_PROMPT, 2)
    return theirs(
        input_ids=BATCH.token_ids_BT, attention_mask=BATCH.attend_BT.long(), labels=BATCH.token_ids_BT, input_type_mask=kinds_BT
    ).loss


@BOTH
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_cpt_gives_the_same_losses_gradients_and_projections(engine: Any, now: Now, architecture: str, decay: float) -> None:
    theirs = cpt_of_peft(architecture, decay)
    offset = theirs.prompt_encoder["default"].delta_embedding.weight
    run = engine({"cpt": {"examples": 3, "decay": decay}}, model=tiny(architecture, seed=1), optimizer="sgd", calibration=rows)
    ours = run.tune.trained["cpt.offset_PD"]
    assert ours.master.shape == offset.shape == (18, 32)
    for i in range(3):
        loss = loss_of_peft(theirs)
        offset.grad = None
        loss.backward()
        result = run.step([BATCH], now._replace(step=i, learning_rate=0.02))
        # They keep offsets in fp32, and a radius of 1e-10 where we have none.
        torch.testing.assert_close(result.loss, float(loss.detach()), rtol=1e-6, atol=0.0)
        offset.data = offset.data - 0.02 * offset.grad
        offset.data = theirs.prompt_encoder["default"].get_projection()
        torch.testing.assert_close(ours.master.detach().float(), offset.data, rtol=1e-4, atol=1e-7)
    assert 1e-4 < float(offset.detach().norm(dim=1).max()) <= at_width(0.1, 32) + 1e-7


def test_projections_agree_where_offsets_are_long_and_short() -> None:
    theirs = cpt_of_peft("llama", 1.0)
    encoder = theirs.prompt_encoder["default"]
    _, label_P, _ = context_of([CONTEXT], 3)
    moves_P = label_P < 0
    length_P1 = torch.linspace(0.0, 0.03, 18)[:, None]
    direction_PD = functional.normalize(torch.randn(18, 32, generator=torch.Generator().manual_seed(6)), dim=1)
    encoder.delta_embedding.weight.data = direction_PD * length_P1
    ours_PD = project(direction_PD * length_P1, moves_P * at_width(0.1, 32))
    torch.testing.assert_close(ours_PD, encoder.get_projection(), rtol=1e-6, atol=1e-9)
    norm_P = ours_PD[moves_P].norm(dim=1)
    assert float(norm_P.min()) < 0.005 and float(norm_P.max()) == pytest.approx(0.0125, rel=1e-5)


def test_both_begin_with_the_context_as_it_is_written() -> None:
    theirs = cpt_of_peft("llama", 1.0)
    model = tiny("llama", seed=1).double()
    tune = Tune(model, map_parts(model))
    tune.add("cpt", cpt(examples=3)[0], RunServices(tune, "cpt", Now(), rows), {})
    with torch.no_grad():
        logits_BTV = model.get_output_embeddings()(hidden(tune, BATCH).values)
        found = theirs(input_ids=BATCH.token_ids_BT, attention_mask=BATCH.attend_BT.long(), labels=None).logits[:, 18:]
    torch.testing.assert_close(logits_BTV, found, rtol=1e-7, atol=1e-7)
