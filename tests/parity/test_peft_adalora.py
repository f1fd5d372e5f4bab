"""AdaLoRA here and in PEFT: from the same start, step by step the same losses, importances, budgets and pruned triplets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from luthier.kinds import Now
from luthier.methods.weight_delta._sensitivity import importance, triplets
from tests.conftest import make_batch
from tests.toys.helpers import model_of

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

MODULES = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["attn.c_proj", "c_fc"]}
ROLES = {"llama": ("attention_query", "attention_value", "mlp_down"), "gpt2": ("attention_output", "mlp_up")}
TENSORS = {"lora_A": "right", "lora_E": "values", "lora_B": "left"}
STEPS, WARMUP, FINAL = 12, 0.25, 0.25
ROWS = [(9, 8), (9, 8), (9, 8), (9, 8)]


def theirs_of(architecture: str) -> Any:
    """PEFT's AdaLoRA in fp64 on the same tiny model."""
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=16,
        tinit=round(WARMUP * STEPS),
        tfinal=round(FINAL * STEPS),
        deltaT=1,
        beta1=0.85,
        beta2=0.85,
        orth_reg_weight=0.1,
        total_step=STEPS,
        target_modules=MODULES[architecture],
        fan_in_fan_out=architecture == "gpt2",
        task_type="CAUSAL_LM",
    )
    model = model_of(architecture)
    model.loss_function = plain_loss
    return peft.get_peft_model(model, config).double().train()


def plain_loss(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
    """The models' own loss, which they would compute in fp32."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("architecture", MODULES)
def test_training_and_pruning_are_the_same(engine: Any, architecture: str) -> None:
    theirs = theirs_of(architecture)
    options = {"initial_rank": 4, "target_rank": 2, "warmup": WARMUP, "final": FINAL, "target_modules": ROLES[architecture]}
    run = engine({"adalora": options}, model=model_of(architecture), optimizer={"adamw": {"weight_decay": 0.1}})
    run.tune.model.train()
    parameters = {name: one for name, one in theirs.named_parameters() if "lora_" in name}
    pairs = {}
    for own in run.tune.owns:
        assert own.place is not None
        for tensor, ours in TENSORS.items():
            name = f"base_model.model.{own.place.module}.{tensor}.default"
            pairs[name] = own.trained[ours]
            parameters[name].data.copy_(own.trained[ours].master.detach())
    assert pairs.keys() == parameters.keys() and len(pairs) == 6 * len(MODULES[architecture])
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.02, weight_decay=0.1)
    allocator, counts = theirs.base_model.rankallocator, []
    for step in range(STEPS):
        batch = make_batch(ROWS, seed=step)
        loss = theirs(input_ids=batch.token_ids_BT, labels=batch.label_BT).loss
        loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        ours = run.step([batch], Now(step=step, steps=STEPS, learning_rate=0.02))
        assert abs(ours.loss - float(loss.detach())) < 1e-9
        for name, one in pairs.items():
            torch.testing.assert_close(one.master.detach(), parameters[name].data, rtol=1e-7, atol=1e-10)
        if allocator.exp_avg_ipt:
            # They forget their scores when the choice is fixed.
            for name, one in pairs.items():
                short = name.removeprefix("base_model.model.")
                for score, their_scores in (("sensitivity", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
                    torch.testing.assert_close(run.states["adalora"][f"{score} {one.name}"], their_scores[short].detach())
        counts.append(sum(int((one.master != 0).sum()) for name, one in pairs.items() if ".lora_E." in name))
    matrices = len(pairs) // 3
    assert counts[3] == 4 * matrices and counts[4] < 4 * matrices and counts[-1] == 2 * matrices
    scores = [importance(run.states["adalora"], one) for one in triplets(run.services("adalora", Now())).values()]
    assert torch.cat(scores).unique().numel() == 4 * matrices


@pytest.mark.parametrize("architecture", MODULES)
def test_the_same_tensors_give_the_same_logits(engine: Any, architecture: str) -> None:
    theirs = theirs_of(architecture).eval()
    run = engine(
        {"adalora": {"initial_rank": 4, "target_rank": 2, "target_modules": ROLES[architecture]}}, model=model_of(architecture)
    )
    rng = torch.Generator().manual_seed(3)
    parameters = dict(theirs.named_parameters())
    for own in run.tune.owns:
        assert own.place is not None
        for tensor, ours in TENSORS.items():
            values = torch.randn(own.trained[ours].master.shape, generator=rng, dtype=torch.float64)
            run.tune.set({own.trained[ours].name: values})
            parameters[f"base_model.model.{own.place.module}.{tensor}.default"].data.copy_(values)
    ids_BT = make_batch(ROWS).token_ids_BT
    with torch.no_grad():
        base, ours_BTV = model_of(architecture)(ids_BT).logits, run.tune.model(ids_BT).logits
        torch.testing.assert_close(ours_BTV, theirs(ids_BT).logits, rtol=1e-9, atol=1e-9)
    assert float((ours_BTV - base).abs().max()) > 0.1
