"""Prompts, prefixes and factors of channels as adapters: what is exported computes the same logits in PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from luthier.errors import LuthierError
from luthier.export import export_peft, peft_prefix
from luthier.kinds import Now
from luthier.models import map_parts, tiny
from luthier.registry import kind_of, kinds_under, make_all, slots
from luthier.results.folder import read_run
from luthier.results.opened import open_run
from luthier.runs.export import export
from luthier.runs.train import train
from luthier.training.services import RunServices
from luthier.tune import Tune
from luthier.tune.forward import hidden
from tests.conftest import calibration, make_batch
from tests.tolerance import TINY, assert_rounded, rounding

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

BATCH = make_batch([(20, 2), (14, 3)], seed=4)
LENGTH = 5
PROMPT = {"prompt_tuning": {"length": LENGTH}}
PREFIX = {"prefix_tuning": {"length": LENGTH, "hidden": 12}}
DIRECT = {"prefix_tuning": {"length": LENGTH, "reparameterization": "none"}}


def tuned(spec: Any, model: Any) -> Tune:
    """A model with techniques attached as a recipe names them, and what trains moved away from the start."""
    tune = Tune(model, map_parts(model), keep_base=True)
    for slot, part in slots(make_all(spec, "tune")):
        for value in part.values:
            if kind_of(value) in kinds_under("tune"):
                tune.add(slot, value, RunServices(tune, slot, Now(), calibration), {})
    rng = torch.Generator().manual_seed(5)
    tune.set({name: one.master.detach() + 0.2 * torch.randn(one.master.shape, generator=rng) for name, one in tune.trained.items()})
    return tune


def logits_here(tune: Tune) -> Tensor:
    """Logits [N, V] at the real tokens."""
    with torch.no_grad():
        model: Any = tune.model
        logits_BTV = model.get_output_embeddings()(hidden(tune, BATCH).values)
    return logits_BTV[BATCH.attend_BT]  # type: ignore[no-any-return]


def logits_there(folder: Path, model: Any) -> Tensor:
    theirs = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        found = theirs(input_ids=BATCH.token_ids_BT, attention_mask=BATCH.attend_BT.long()).logits
    return found[:, -BATCH.token_ids_BT.shape[1] :][BATCH.attend_BT]  # type: ignore[no-any-return]


def assert_same_in_peft(tune: Tune, fresh: Callable[[], Any], folder: Path) -> dict[str, Any]:
    """The exported adapter on a fresh base computes what the tune computes. Returns its configuration."""
    found = export_peft(tune, folder, "tiny:model")
    here, there = logits_here(tune), logits_there(folder, fresh())
    assert float((here - logits_here(Tune(fresh(), tune.parts))).abs().max()) > 0.1
    assert_rounded(there, here, TINY)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == found["peft_type"] and config["base_model_name_or_path"] is None
    return config


@pytest.mark.parametrize(
    ("spec", "architecture"),
    [
        (PROMPT, "llama"),
        (PROMPT, "gpt2"),
        (PROMPT, "gemma"),
        (PROMPT, "opt"),
        ({"cpt": {"examples": 3}}, "llama"),
        ({"cpt": {"examples": 3}}, "gpt2"),
        ({"promot": {"length": LENGTH}}, "llama"),
    ],
)
def test_prompts_give_the_same_logits(spec: Any, architecture: str, tmp_path: Path) -> None:
    tune = tuned(spec, tiny(architecture))
    config = assert_same_in_peft(tune, lambda: tiny(architecture), tmp_path / "adapter")
    (values,) = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert config["num_virtual_tokens"] == tune.prompt_length == len(values)
    if "cpt" not in spec:
        assert torch.equal(values, next(iter(tune.trained.values())).master.detach())


@pytest.mark.parametrize("spec", [PREFIX, DIRECT])
@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "phi", "phi3", "gpt_neox", "mixtral"]
)
def test_prefixes_give_the_same_logits_where_positions_are_rotations(spec: Any, architecture: str, tmp_path: Path) -> None:
    # Every fourth block of SmolLM3 turns nothing.
    config = assert_same_in_peft(
        tuned(spec, tiny(architecture, layers=4)), lambda: tiny(architecture, layers=4), tmp_path / "adapter"
    )
    assert config["prefix_projection"] is False and config["num_virtual_tokens"] == LENGTH


def stretched(**parameters: Any) -> Any:
    """A tiny Llama with other rotations."""
    plain = tiny()
    config = copy.deepcopy(plain.config)
    config.rope_parameters = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128, **parameters}
    model = type(plain)(config).eval()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize(
    "parameters",
    [{"rope_type": "yarn"}, {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, {"rope_type": "linear"}],
)
def test_prefixes_give_the_same_logits_where_rotations_are_scaled(parameters: dict[str, Any], tmp_path: Path) -> None:
    assert_same_in_peft(tuned(DIRECT, stretched(**parameters)), lambda: stretched(**parameters), tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_prefixes_leave_in_every_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    tune = tuned(PREFIX, tiny(dtype=dtype))
    export_peft(tune, tmp_path / "adapter", "tiny:llama")
    here, there = logits_here(tune), logits_there(tmp_path / "adapter", tiny(dtype=dtype))
    if dtype == torch.float64:
        # Rotations are computed in fp32 everywhere.
        assert_rounded(there, here, TINY, dtype=torch.float32)
    else:
        # The network computes in the model's precision here. Single logits are off by much in bf16, all of them together are not.
        assert float((there - here).norm() / here.norm()) < rounding(dtype)
        assert float((here - logits_here(Tune(tiny(dtype=dtype), tune.parts))).norm() / here.norm()) > 4 * rounding(dtype)


def test_keys_are_turned_by_the_length_and_laid_out_as_peft_reads_them(tmp_path: Path) -> None:
    """Channel pairs (i, i + W/2) of a key are complex numbers, multiplied by exp(i P theta^(-2i/W))."""
    tune = tuned(DIRECT, tiny())
    export_peft(tune, tmp_path / "adapter", "tiny:llama")
    blocks, heads, width = tune.parts.blocks, tune.parts.key_value_heads, tune.parts.head_width
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    key_PLHW, value_PLHW = found.reshape(LENGTH, blocks, 2, heads, width).unbind(2)
    key_LHPW, value_LHPW = (tune.trained[f"prefix_tuning.{name}"].master.detach() for name in ("key", "value"))
    assert torch.equal(value_PLHW.permute(1, 2, 0, 3), value_LHPW)
    theta = tune.model.config.rope_parameters["rope_theta"]  # type: ignore[union-attr,index]
    angle = LENGTH * float(theta) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turned = torch.complex(*key_LHPW.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(
        key_PLHW.permute(1, 2, 0, 3).double(), torch.cat([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tiny("gpt2"), "other positions.*where: gpt2.*prompt_tuning"),
        (lambda: tiny("opt"), "other positions.*where: opt"),
        (lambda: tiny("gemma3_text"), "look back a part of the row"),
        (lambda: stretched(rope_type="dynamic"), "type `dynamic`"),
    ],
)
def test_prefixes_are_refused_where_positions_matter(make: Callable[[], Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=f"(?s){said}"):
        export_peft(tuned(DIRECT, make()), tmp_path / "adapter", "tiny:model")
    assert list(tmp_path.iterdir()) == []


def test_a_window_without_kinds_of_blocks_is_refused(tmp_path: Path) -> None:
    model = tiny("mistral")
    model.config.sliding_window = 8
    with pytest.raises(LuthierError, match="look back a part of the row"):
        export_peft(tuned(DIRECT, model), tmp_path / "adapter", "tiny:mistral")


def test_a_prefix_that_peft_would_read_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_prefix, "_turned", lambda tune, key_LHPW: key_LHPW)
    with pytest.raises(LuthierError, match="other logits"):
        export_peft(tuned(DIRECT, tiny()), tmp_path / "adapter", "tiny:llama")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "architecture", "layers"),
    [
        ({}, "llama", 2),
        # PEFT shortens longer lists of names.
        ({}, "llama", 12),
        ({}, "gpt2", 2),
        ({}, "phi3", 2),
        ({"outputs": ("attention_output", "mlp_up"), "inputs": ("attention_query", "mlp_gate", "mlp_down")}, "llama", 2),
        ({"outputs": ("head",), "inputs": ()}, "gpt2", 2),
        ({"outputs": (), "inputs": ("mlp_down",)}, "gpt2", 2),
    ],
)
def test_factors_of_channels_give_the_same_logits(options: Any, architecture: str, layers: int, tmp_path: Path) -> None:
    tune = tuned({"ia3": options}, tiny(architecture, layers=layers))
    config = assert_same_in_peft(tune, lambda: tiny(architecture, layers=layers), tmp_path / "adapter")
    assert set(config["feedforward_modules"]) <= set(config["target_modules"])


def test_parts_of_a_fused_projection_leave_the_others_alone(tmp_path: Path) -> None:
    tune = tuned({"ia3": {}}, tiny("gpt2"))
    export_peft(tune, tmp_path / "adapter", "tiny:gpt2")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    factor_O1 = tensors["base_model.model.transformer.h.1.attn.c_attn.ia3_l"]
    name = "ia3/transformer.h.1.attn.c_attn.weight"
    key_O, value_O = (tune.trained[f"{name}[{start}:{start + 32}].scale"].master.detach() for start in (32, 64))
    assert torch.equal(factor_O1, torch.cat([torch.ones(32), 1.0 + key_O, 1.0 + value_O])[:, None])
    factor_1I = tensors["base_model.model.transformer.h.1.mlp.c_proj.ia3_l"]
    assert torch.equal(factor_1I, 1.0 + tune.trained["ia3/transformer.h.1.mlp.c_proj.weight.scale"].master.detach()[None])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"dept": {"rank": 2}}, "no form for `dept`.*--weights-only"),
        ("serial_adapter", "no form for `serial_adapter`.*--weights-only"),
        ("lofit", "no form for `lofit`"),
        ("mam", "no form for `mam`.*--weights-only"),
        ("ssf", "no form for `ssf`.*export the model, which holds it"),
        ([PROMPT, "lora"], "`prompt_tuning` and `lora` were trained together.*--weights-only"),
        (["promot", "full"], "`promot` and `full` were trained together.*--weights-only"),
        ([PREFIX, "ia3"], "`prefix_tuning` and `ia3` were trained together"),
        ({"ia3": {"outputs": ("mlp_down",)}}, "reads or what it returns, not both.*mlp.down_proj.*export the model"),
        ({"ia3": {"outputs": ("norm",)}}, "linear maps only.*norm"),
    ],
)
def test_what_peft_has_no_form_for_is_refused_by_name(spec: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=f"(?s){said}"):
        export_peft(tuned(spec, tiny()), tmp_path / "adapter", "tiny:llama")
    assert list(tmp_path.iterdir()) == []


def run_of(spec: Any, folder: Path) -> Path:
    """A short run's folder."""
    rows = [{"prompt": f"Say {number}.", "completion": f" {number}"} for number in range(4)]
    settings = {"steps": 2, "batch_rows": 4, "device": "cpu", "precision": "fp32", "learning_rate": 0.05}
    run = train({"model": "tiny:llama", "rows": {"train": rows}, "tune": spec, "train": settings, "out": str(folder)})
    return Path(run.folder)


@pytest.mark.parametrize("spec", [PROMPT, {"cpt": {"examples": 2}}, PREFIX, "ia3"])
def test_runs_leave_as_adapters(spec: Any, tmp_path: Path) -> None:
    folder = run_of(spec, tmp_path / "runs")
    export(str(folder), tmp_path / "adapter", form="peft")
    tune, _ = open_run(read_run(str(folder)))
    here = logits_here(tune)
    assert float((here - logits_here(Tune(tiny(), tune.parts))).abs().max()) > 0.01
    assert_rounded(logits_there(tmp_path / "adapter", tiny()), here, TINY)


def test_weights_that_changed_beside_a_prompt_are_not_lost(tmp_path: Path) -> None:
    folder = str(run_of([PROMPT, {"full": {"target_modules": ["norm"]}}], tmp_path / "runs"))
    with pytest.raises(LuthierError, match=r"(?s)numbers of the model itself changed.*--as model --weights-only"):
        export(folder, tmp_path / "adapter", form="peft")
    assert not (tmp_path / "adapter").exists()
    export(folder, tmp_path / "model", form="model", weights_only=True)


def test_a_delta_leaves_without_the_prompt_it_was_trained_with(tmp_path: Path) -> None:
    folder = str(run_of([PROMPT, "lora"], tmp_path / "runs"))
    with pytest.raises(LuthierError, match="trained together"):
        export(folder, tmp_path / "adapter", form="peft")
    export(folder, tmp_path / "adapter", form="peft", weights_only=True)
    tune, _ = open_run(read_run(folder), merged=False, weights_only=True)
    assert_rounded(logits_there(tmp_path / "adapter", tiny()), logits_here(tune), TINY)
