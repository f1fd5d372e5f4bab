"""Losses over single answers with a verdict beside those of TRL's KTOTrainer: its own code, given the same likelihoods."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.kinds import Now, RowTable, StepLoss

trl = pytest.importorskip("trl", minversion="1.14", reason="TRL comes with the extra `test`")
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402

ROWS, TOKENS = 6, 5
LIKED = (True, False, False, True, True, False)
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.6}


def theirs(loss: str, log_BT: Tensor, base_B: Tensor, other_BT: Tensor, other_base_B: Tensor, beta: float) -> Tensor:
    """What TRL makes of log-likelihoods of tokens, of the rows' own answers and of those to other prompts."""
    model = torch.nn.Identity()
    ids = torch.ones(ROWS, TOKENS + 1, dtype=torch.long)
    alone = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda one: one)
    trainer = SimpleNamespace(
        model=model,
        accelerator=alone,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss == "kto",
        loss_type=loss,
        beta=beta,
        desirable_weight=WEIGHTS["desirable_weight"],
        undesirable_weight=WEIGHTS["undesirable_weight"],
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    nothing = torch.zeros_like(log_BT)

    def run(**given: Any) -> SimpleNamespace:
        found_BT = other_BT if bool((given["input_ids"] == 2).all()) else log_BT
        return SimpleNamespace(log_probs=found_BT, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    own = {"input_ids": ids, "attention_mask": ids, "completion_mask": ids, "label": torch.tensor(LIKED), "ref_logps": base_B}
    other = {"KL_input_ids": 2 * ids, "KL_attention_mask": ids, "KL_completion_mask": ids, "ref_KL_logps": other_base_B}
    found: Tensor = KTOTrainer._compute_loss(trainer, run, own | other, False)
    return found


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_losses_and_gradients_are_trls(name: str, beta: float) -> None:
    rng = torch.Generator().manual_seed(5)
    log_BT, other_BT = (-3 * torch.rand(ROWS, TOKENS, generator=rng, dtype=torch.float64) for _ in range(2))
    base_B, other_base_B = (
        # Of the others lower: a mean below 0 would be taken for 0.
        one_BT.sum(-1) + torch.randn(ROWS, generator=rng, dtype=torch.float64) - lower
        for one_BT, lower in ((log_BT, 0.0), (other_BT, 1.0))
    )
    log_BT.requires_grad_(True)
    wanted = theirs(name, log_BT, base_B, other_BT, other_base_B, beta)
    value = next(
        one for one in registry.make({name: {"beta": beta, **WEIGHTS}}, ("step_loss",)).values if isinstance(one, StepLoss)
    )
    label_B = torch.tensor(LIKED, dtype=torch.float64)
    gained_B, other_B = log_BT.sum(-1) - base_B, other_BT.sum(-1) - other_base_B
    if name == "kto":
        groups = tuple((place, place + ROWS) for place in range(ROWS))
        table = RowTable(torch.cat([gained_B, other_B]), groups, {"label": label_B.repeat(2)}, Now())
    else:
        table = RowTable(gained_B, (), {"label": label_B}, Now())
    found = value.loss(table) / ROWS
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)
    slope_BT, wanted_BT = (torch.autograd.grad(one, log_BT, retain_graph=True)[0] for one in (found, wanted))
    assert torch.allclose(slope_BT, wanted_BT, rtol=1e-12, atol=1e-12)
