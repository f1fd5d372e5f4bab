"""Losses over pairs beside those of TRL's DPOTrainer: its own code, given the same likelihoods of the same tokens."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.kinds import Now, PairLoss, Pairs, Reference, RowTable, Side, StepLoss, TokenWeight, View
from luthier.training.pairs import pairs_of
from tests.conftest import make_batch

trl = pytest.importorskip("trl", minversion="1.14", reason="TRL comes with the extra `test`")
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402

PAIRS, TOKENS = 5, 7
OURS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dpo", {}, {"loss": "sigmoid"}),
    ("dpo", {"length_normalized": True}, {"loss": "sigmoid_norm"}),
    ("robust", {"wrong": 0.15}, {"loss": "robust", "label_smoothing": 0.15}),
    ("ipo", {}, {"loss": "ipo"}),
    ("hinge", {}, {"loss": "hinge"}),
    ("exo", {"label_smoothing": 0.02}, {"loss": "exo_pair", "label_smoothing": 0.02}),
    ("nca", {}, {"loss": "nca_pair"}),
    ("bco", {"shift": False}, {"loss": "bco_pair"}),
    ("sppo_hard", {}, {"loss": "sppo_hard"}),
    ("aot", {"label_smoothing": 0.1}, {"loss": "aot", "label_smoothing": 0.1}),
    ("aot_unpaired", {"label_smoothing": 0.1}, {"loss": "aot_unpaired", "label_smoothing": 0.1}),
    ("apo_zero", {}, {"loss": "apo_zero"}),
    ("apo_down", {}, {"loss": "apo_down"}),
    ("discopop", {"temperature": 0.3}, {"loss": "discopop", "tau": 0.3}),
    ("f_dpo", {"divergence": "forward_kl"}, {"loss": "sigmoid", "divergence": "forward_kl"}),
    ("f_dpo", {"divergence": "jensen_shannon"}, {"loss": "sigmoid", "divergence": "js_divergence"}),
    ("f_dpo", {"divergence": "alpha", "alpha": 0.3}, {"loss": "sigmoid", "divergence": "alpha_divergence", "alpha": 0.7}),
    ("wpo", {}, {"loss": "sigmoid", "weighted": True}),
]


class Drawn:
    """Log-likelihoods of the tokens of some answers, the chosen ones first, and under a reference."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        rng = torch.Generator().manual_seed(3)
        self.mask_BT = torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (2 * PAIRS, 1), generator=rng)
        self.log_BT = (-3 * torch.rand(2 * PAIRS, TOKENS, generator=rng, dtype=dtype)).masked_fill(~self.mask_BT, 0.0)
        self.square_BT = (-2 * torch.rand(2 * PAIRS, TOKENS, generator=rng, dtype=dtype)).masked_fill(~self.mask_BT, 0.0)
        noise_BT = torch.randn(2 * PAIRS, TOKENS, generator=rng, dtype=dtype) / TOKENS**0.5
        self.base_BT = (self.log_BT + noise_BT).masked_fill(~self.mask_BT, 0.0)
        self.base_B = self.base_BT.sum(-1)
        self.log_BT.requires_grad_(True)


def theirs(drawn: Drawn, beta: float, setting: Mapping[str, Any]) -> Tensor:
    """What TRL makes of them."""
    mask_BT = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.bool), drawn.mask_BT], dim=1).long()
    nothing = torch.zeros_like(drawn.log_BT)
    told = SimpleNamespace(
        log_probs=drawn.log_BT, log_sum_sq_probs=drawn.square_BT, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False  # type: ignore[assignment]
    alone = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda one: one, gather=lambda one: one)
    trainer = SimpleNamespace(
        model=model,
        ref_model=lambda **given: SimpleNamespace(log_probs=drawn.base_BT),
        accelerator=alone,
        aux_loss_enabled=False,
        ld_alpha=setting.get("desensitized"),
        precompute_ref_logps="desensitized" not in setting,
        f_divergence_type=setting.get("divergence", "reverse_kl"),
        f_alpha_divergence_coef=setting.get("alpha", 0.5),
        loss_types=[setting["loss"]],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=setting.get("label_smoothing", 0.0),
        use_weighting=setting.get("weighted", False),
        args=SimpleNamespace(discopop_tau=setting.get("tau", 0.05), gradient_checkpointing_kwargs=None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen_P, rejected_P = drawn.base_B.chunk(2)
    inputs = {
        "input_ids": torch.ones_like(mask_BT),
        "attention_mask": torch.ones_like(mask_BT),
        "completion_mask": mask_BT,
        "ref_chosen_logps": chosen_P,
        "ref_rejected_logps": rejected_P,
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer, lambda **given: told, inputs, False)
    return loss


def ours(drawn: Drawn, beta: float, name: str, options: Mapping[str, Any]) -> Tensor:
    """What luthier makes of them."""
    kind = "step_loss" if name in registry.names("step_loss") else "pair_loss"
    values = registry.make({name: {"beta": beta, **options}}, (kind,)).values
    value = next(one for one in values if isinstance(one, PairLoss | StepLoss))
    likely_B, targets_B = drawn.log_BT.sum(-1), drawn.mask_BT.sum(-1)
    if isinstance(value, StepLoss):
        numbers = torch.stack([likely_B, drawn.base_B], -1) if name == "aot" else likely_B - drawn.base_B
        groups = tuple((place, place + PAIRS) for place in range(PAIRS))
        return value.loss(RowTable(numbers, groups, {}, Now())) / PAIRS
    sides = [Side.of(*(one.chunk(2)[place] for one in (likely_B, drawn.base_B, targets_B))) for place in (0, 1)]
    row_N, place_N = drawn.mask_BT.nonzero(as_tuple=True)
    columns = {"nll": -drawn.log_BT[row_N, place_N], "log_sum_of_squares": drawn.square_BT[row_N, place_N]}
    batch = make_batch([(TOKENS, 1)] * 2 * PAIRS)._replace(groups=tuple((place, place + PAIRS) for place in range(PAIRS)))
    view = View(batch, columns, label_N=row_N, row_N=row_N, position_N=place_N)
    return value.loss(
        Pairs(*sides, view, torch.arange(PAIRS), torch.arange(PAIRS) + PAIRS, sides[0].gained_P - sides[1].gained_P)
    ).mean()


@pytest.mark.parametrize(
    ("file", "least"),
    [("trainer/dpo_trainer.py", 15), ("trainer/kto_trainer.py", 2), ("experimental/cpo/cpo_trainer.py", 4)],
)
def test_the_page_names_every_loss_of_trl(file: str, least: int) -> None:
    """Ours, or why there is none."""
    text = (Path(trl.__file__).parent / file).read_text(encoding="utf-8")
    names = set(re.findall(r"""loss_type == "(\w+)":\n(?! +raise)""", text))
    page = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text(encoding="utf-8").partition("## The names of TRL")[2]
    assert len(names) >= least and {name for name in names if f"`{name}`" not in page} == set()


def desensitized(drawn: Drawn, beta: float, name: str, alpha: float) -> Tensor:
    """What luthier makes of them where the longer answer's surplus counts less."""
    (pair,) = registry.make({name: {"beta": beta}}, ("pair_loss",)).values
    (weight,) = registry.make({"length_desensitization": {"alpha": alpha}}, ("token_weight",)).values
    assert isinstance(pair, PairLoss) and isinstance(weight, TokenWeight) and weight.weigh is not None
    row_N, place_N = drawn.mask_BT.nonzero(as_tuple=True)
    columns = {"nll": -drawn.log_BT[row_N, place_N], "base_nll": -drawn.base_BT[row_N, place_N]}
    batch = make_batch([(TOKENS, 1)] * 2 * PAIRS)._replace(groups=tuple((place, place + PAIRS) for place in range(PAIRS)))
    ones_N = torch.ones(len(row_N), dtype=torch.float64)
    view = View(batch, columns, label_N=row_N, row_N=row_N, position_N=place_N, weight_N=ones_N)
    view.weight_N = weight.weigh(view)
    return pair.loss(pairs_of(view, Reference(lambda view: view.log_likelihoods("base_nll")))).mean()


@pytest.mark.parametrize(("name", "loss", "alpha"), [("dpo", "sigmoid", 0.3), ("dpo", "sigmoid", 0.0), ("ipo", "ipo", 0.6)])
def test_what_is_longer_counts_less_as_in_trl(name: str, loss: str, alpha: float) -> None:
    drawn = Drawn()
    found, wanted = desensitized(drawn, 0.4, name, alpha), theirs(drawn, 0.4, {"loss": loss, "desensitized": alpha})
    plain = theirs(drawn, 0.4, {"loss": loss})
    assert float(found) == pytest.approx(float(wanted), rel=1e-12) and float(plain) != pytest.approx(float(wanted), rel=1e-3)
    slope_BT, wanted_BT = (torch.autograd.grad(one, drawn.log_BT, retain_graph=True)[0] for one in (found, wanted))
    assert torch.allclose(slope_BT * drawn.mask_BT, wanted_BT * drawn.mask_BT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options", "setting"), OURS, ids=lambda value: str(value))
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_losses_and_gradients_are_trls(name: str, options: dict[str, Any], setting: dict[str, Any], beta: float) -> None:
    drawn = Drawn(torch.float32 if setting.get("divergence") == "alpha_divergence" else torch.float64)
    found, wanted = ours(drawn, beta, name, options), theirs(drawn, beta, setting)
    # TRL holds the smoothing of EXO in fp32.
    close = {"rel": 1e-5 if drawn.log_BT.dtype == torch.float32 else 1e-6 if name == "exo" else 1e-12}
    assert float(found) == pytest.approx(float(wanted), **close)
    slope_BT, wanted_BT = (torch.autograd.grad(loss, drawn.log_BT, retain_graph=True)[0] for loss in (found, wanted))
    assert torch.allclose(slope_BT * drawn.mask_BT, wanted_BT * drawn.mask_BT, rtol=close["rel"], atol=1e-9)
