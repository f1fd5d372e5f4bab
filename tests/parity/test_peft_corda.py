"""CorDA here and in PEFT: the same covariance gives the same factors and the same logits after they have moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.kinds import Now
from luthier.methods.weight_delta._covariance import RESCALES, covariances, single_rows
from luthier.methods.weight_delta.corda import corda
from luthier.models import map_parts, tiny
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import calibration
from tests.tolerance import TINY, assert_rounded

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

IDS = torch.arange(6, 46).reshape(2, 20)
MODULES = {"llama": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"], "gpt2": ["attn.c_proj", "c_fc", "mlp.c_proj"]}
ROLES = {
    "llama": ("attention_query", "attention_key", "attention_output", "mlp_up", "mlp_down"),
    "gpt2": ("attention_output", "mlp_up", "mlp_down"),
}
"""Without GPT-2's query, key and value, which are one matrix there."""
METHODS = {"instruction_previewed": "ipm", "knowledge_preserved": "kpm"}


def theirs_of(architecture: str, mode: str) -> Any:
    """PEFT's model, with the covariances that it takes itself from the calibration rows, one by one and without padding. Covariances and
    components are made in fp64: in fp32 the inverse magnifies, and components of nearly equal size are not well determined. The factors
    are kept in fp32, since PEFT takes no wider model."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model = tiny(architecture)

    def run() -> None:
        for batch in calibration(8, ""):
            for ids_T, attend_T in zip(batch.token_ids_BT, batch.attend_BT, strict=True):
                model(input_ids=ids_T[attend_T][None])

    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights="corda",
        target_modules=MODULES[architecture],
        fan_in_fan_out=architecture == "gpt2",
        corda_config=CordaConfig(corda_method=METHODS[mode], prune_temporary_fields=False),
    )
    with pytest.MonkeyPatch.context() as patch:
        # PEFT widens to fp32 whatever it is given.
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        preprocess_corda(model, config, run_model=run)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("mode", METHODS)
@pytest.mark.parametrize("architecture", MODULES)
def test_the_same_covariance_gives_the_same_factors(architecture: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = theirs_of(architecture, mode)
    modules = dict(theirs.base_model.model.named_modules())
    model = tiny(architecture).double()
    base = tiny(architecture)(IDS).logits.detach()
    tune = Tune(model, map_parts(model))
    services = RunServices(tune, "corda", Now(), calibration)
    places = tune.parts.select(target_modules=ROLES[architecture])
    covariance = covariances(services, list(single_rows(services.batches(8))), places, RESCALES["maximum"])
    theirs_II = {name: modules[name].base_layer.covariance_matrix for name in covariance}
    for name, covariance_II in covariance.items():
        # Their inputs come out of a model in fp32.
        assert_rounded(covariance_II, theirs_II[name], TINY, dtype=torch.float32, what=name)
    # The inverse magnifies the digits in which their inputs differ.
    monkeypatch.setattr("luthier.methods.weight_delta.corda.covariances", lambda *asked: theirs_II)
    value = corda(rank=4, alpha=8.0, mode=mode, rescale="maximum", calibration_rows=8, target_modules=ROLES[architecture])
    tune.add("corda", value, services, {})
    assert len(tune.owns) == len(places) == 2 * len(MODULES[architecture])
    for own in tune.owns:
        assert own.place is not None
        layer, tensors = modules[own.place.module], own.masters()
        up_OR, down_RI = (getattr(layer, name)["default"].weight.detach().double() for name in ("lora_B", "lora_A"))
        # Only their factors are rounded, and of each the sign is open.
        assert_rounded(tensors["up_start"] @ tensors["down_start"], up_OR @ down_RI, 2, dtype=torch.float32, what=own.place)
        # Ours to the same factors; then both are moved alike.
        for theirs_name, name in (("lora_A", "down"), ("lora_B", "up")):
            parameter = getattr(layer, theirs_name)["default"].weight
            own.frozen[f"{name}_start"] = parameter.data.double()
            change = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.data += change
            tune.set({own.trained[f"{name}_change"].name: change})
    with torch.no_grad():
        ours, other = model(IDS).logits, theirs(IDS).logits
    assert float((ours - base).abs().max()) > 0.1
    assert_rounded(ours, other, TINY, dtype=torch.float32)
