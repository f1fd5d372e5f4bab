"""Exports: checked before they appear, nothing half-written, no trace of this machine, refusals by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.delta import Delta
from luthier.errors import LuthierError
from luthier.export import export_model, export_peft, load_peft
from luthier.export.model import PROBES, outputs
from luthier.kinds import Now, Prompt, RepresentationEdit
from luthier.methods.selective.full import full
from luthier.methods.weight_delta.lora import lora
from luthier.models import fingerprint, map_parts, tiny, tiny_tokenizer
from luthier.models.attention import use_attention
from luthier.training.services import RunServices
from luthier.tune import Tune

IDS = [[5, 9, 200, 31, 77, 8]]


def tuned(model: Any, **techniques: Any) -> Tune:
    tune = Tune(model, map_parts(model))
    for slot, technique in techniques.items():
        tune.add(slot, technique, RunServices(tune, slot, Now(seed=0)), {})
    rng = torch.Generator().manual_seed(3)
    tune.set({key: 0.1 * torch.randn(one.master.shape, generator=rng) for key, one in tune.trained.items()})
    return tune


def prompt() -> Prompt:
    return Prompt(lambda table_VD, services: {"rows": table_VD[:2].clone()}, lambda tensors, ids, embeds: embeds, 2)


def biased_edit() -> RepresentationEdit:
    """An edit whose fold needs a bias."""

    def fold(tensors: dict[str, Tensor], weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
        return 2.0 * weight_OI, tensors["shift"]

    return RepresentationEdit(
        lambda place, width_in, width_out, services: {"shift": torch.zeros(width_out)},
        lambda tensors, x, y: 2.0 * y + tensors["shift"],
        ("mlp_down",),
        fold,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral", "gemma2"])
def test_plain_transformers_loads_the_folder(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tune = tuned(tiny(architecture, dtype=dtype), lora=lora(rank=3))
    found = export_model(tune, tiny_tokenizer(), tmp_path / "deep" / "model")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "deep" / "model", experts_implementation="eager" if architecture == "mixtral" else None
    )
    assert reloaded.dtype == dtype and found["dtype"] == str(dtype).removeprefix("torch.")
    assert found["max_logit_difference"] == 0.0
    assert 0.0 <= abs(found["merge_kl"]) < (1e-10 if dtype == torch.float32 else 1e-2)
    tune.merge()
    assert torch.equal(outputs(reloaded, IDS)[0], outputs(tune.model, IDS)[0])
    live: Any = tune.model
    assert reloaded.generation_config.eos_token_id == live.generation_config.eos_token_id


def test_an_encoder_is_exported_without_a_divergence(tmp_path: Path) -> None:
    found = export_model(tuned(tiny("bert"), lora=lora(rank=3)), tiny_tokenizer(), tmp_path / "model")
    assert found["max_logit_difference"] == 0.0 and found["merge_kl"] is None


def test_a_run_in_double_precision_keeps_its_digits(tmp_path: Path) -> None:
    tune = tuned(tiny(dtype=torch.float64), lora=lora(rank=3))
    before = outputs(tune.model, IDS)[0]
    tune.merge()
    torch.testing.assert_close(outputs(tune.model, IDS)[0], before, rtol=1e-12, atol=1e-12)


def test_a_merged_tune_stays_merged(tmp_path: Path) -> None:
    tune = tuned(tiny(), lora=lora(rank=3))
    tune.merge()
    found = export_model(tune, tiny_tokenizer(), tmp_path / "model")
    assert tune.merged is not None and found["merge_kl"] is None


def test_the_folder_says_nothing_of_this_machine(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert use_attention(model)
    tokenizer: Any = transformers.AutoTokenizer
    tokenizer = tokenizer.from_pretrained(tmp_path / "base")
    tune = tuned(model, lora=lora(rank=3))
    export_model(tune, tokenizer, tmp_path / "model")
    export_peft(tune, tmp_path / "adapter", str(tmp_path / "base"))
    for path in [*(tmp_path / "model").glob("*.json"), *(tmp_path / "adapter").glob("*.json")]:
        text = path.read_text()
        assert str(tmp_path) not in text and "luthier" not in text, path.name


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    tune = tuned(tiny(), lora=lora(rank=3))
    with pytest.raises(LuthierError, match="exists already"):
        export_model(tune, tiny_tokenizer(), tmp_path)
    with pytest.raises(LuthierError, match="exists already"):
        export_peft(tune, tmp_path, "tiny:llama")
    assert list(tmp_path.iterdir()) == [] and tune.merged is None


def damaged_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, file, {"format": "pt"})


def damaged_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_theta": 10.0, "rope_type": "default"}}))


@pytest.mark.parametrize(("damage", "said"), [(damaged_weight, "tensors differ"), (damaged_config, "other outputs")])
def test_a_model_that_reads_back_differently_is_not_kept(
    damage: Callable[[Path], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = tuned(tiny(), lora=lora(rank=3))
    before = tune.model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    save: Any = tune.model.save_pretrained

    def save_and_damage(folder: Path) -> None:
        save(folder)
        damage(folder)

    monkeypatch.setattr(tune.model, "save_pretrained", save_and_damage)
    with pytest.raises(LuthierError, match=said):
        export_model(tune, tiny_tokenizer(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == [] and tune.merged is None
    assert torch.equal(tune.model.state_dict()["model.layers.0.mlp.up_proj.weight"], before)


def other_template(folder: Path) -> None:
    """The same tokens from a template of other text."""
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + "{# changed #}")


def other_cuts(folder: Path) -> None:
    """The same template, and a tokenizer that puts a space before every text."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    file.write_text(json.dumps({**tokenizer, "pre_tokenizer": {**tokenizer["pre_tokenizer"], "add_prefix_space": True}}))


@pytest.mark.parametrize("damage", [other_template, other_cuts])
def test_a_tokenizer_that_reads_back_differently_is_not_kept(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    save = tokenizer.save_pretrained

    def save_and_damage(folder: Path) -> None:
        save(folder)
        damage(folder)

    monkeypatch.setattr(tokenizer, "save_pretrained", save_and_damage)
    tune = tuned(tiny(), lora=lora(rank=3))
    with pytest.raises(LuthierError, match="cuts text differently"):
        export_model(tune, tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [] and tune.merged is None


def test_what_is_no_change_of_a_weight_is_not_merged(tmp_path: Path) -> None:
    tune = tuned(tiny(), lora=lora(rank=3), prompt=prompt())
    with pytest.raises(LuthierError, match="the prompt `prompt`"):
        export_model(tune, tiny_tokenizer(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == [] and tune.merged is None


def test_a_merge_that_fails_half_way_leaves_the_weights() -> None:
    tune = tuned(tiny(), lora=lora(rank=3), edit=biased_edit())
    before = fingerprint(tune.model)
    with pytest.raises(LuthierError, match="needs a bias"):
        tune.merge()
    assert tune.merged is None and fingerprint(tune.model) == before


@pytest.mark.parametrize(
    ("techniques", "said"),
    [
        (lambda: {"full": full(target_modules=("mlp",))}, "`full`"),
        (lambda: {"lora": lora(rank=2), "norms": full(target_modules=("norm",))}, "`norms`"),
        (lambda: {"lora": lora(rank=2), "prompt": prompt()}, "`prompt`"),
        (lambda: {"lora": lora(rank=2)._replace(subtract=True)}, "`lora`"),
        (lambda: {"lora": lora(rank=2)._replace(pair=None)}, "`lora`"),
        (dict, "nothing low-rank"),
    ],
)
def test_peft_is_refused_what_it_cannot_hold(techniques: Callable[[], dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=said):
        export_peft(tuned(tiny(), **techniques()), tmp_path / "adapter", "tiny:llama")
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_changed_in_place_is_refused(tmp_path: Path) -> None:
    tune = tuned(tiny(), lora=lora(rank=2))
    known = fingerprint(tiny())
    assert export_peft(tune, tmp_path / "good", "tiny:llama", fingerprint=known)["base_fingerprint"] == known
    tune.model.get_parameter("model.norm.weight").data[0] += 1.0
    with pytest.raises(LuthierError, match="changed"):
        export_peft(tune, tmp_path / "bad", "tiny:llama", fingerprint=known)


def test_restored_changes_in_place_are_not_lost_in_an_adapter(tmp_path: Path) -> None:
    tune = tuned(tiny(), lora=lora(rank=2), norms=full(target_modules=("norm",)))
    delta, again = Delta.of(tune, tiny()), tuned(tiny(), lora=lora(rank=2))
    delta.restore(again)
    with pytest.raises(LuthierError, match="changed"):
        export_peft(again, tmp_path / "adapter", "tiny:llama")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("owner/model", "owner/model"),
        ("tiny:llama", None),
        ("/home/me/model", None),
        ("./model", None),
        ("~/model", None),
        ("runs/model-1/model", None),
        ("model.gguf", None),
        ("C:\\models\\model", None),
    ],
)
def test_the_base_is_named_as_others_can_find_it(name: str, written: str | None, tmp_path: Path) -> None:
    export_peft(tuned(tiny(), lora=lora(rank=2, target_modules=("mlp_up",))), tmp_path / "adapter", name)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == written
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_fingerprint"] == fingerprint(tiny())


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path: Path) -> None:
    export_peft(tuned(tiny(), lora=lora(rank=2)), tmp_path / "adapter", "owner/model")
    other = tuned(tiny(seed=1))
    with pytest.raises(LuthierError, match=f"owner/model .{fingerprint(tiny())[:12]}"):
        load_peft(tmp_path / "adapter", other)
    assert load_peft(tmp_path / "adapter", other, force=True).pair == ("down", "up")
    with pytest.raises(LuthierError, match="do not fit a weight"):
        load_peft(tmp_path / "adapter", tuned(tiny(width=64)), force=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"alpha_pattern": {"(": 3}}, "no pattern"),
        ({"lora_alpha": "much"}, "alpha"),
        ({"lora_dropout": "some"}, "dropout"),
        ({"lora_dropout": 1.5}, "dropout"),
    ],
)
def test_adapters_that_are_more_than_two_factors_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    export_peft(tuned(tiny(), lora=lora(rank=2)), tmp_path / "adapter", "tiny:llama")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(LuthierError, match=said):
        load_peft(tmp_path / "adapter", tuned(tiny()))


def test_folders_that_hold_no_adapter_are_refused(tmp_path: Path) -> None:
    tune = tuned(tiny())
    with pytest.raises(LuthierError, match="cannot be read"):
        load_peft(tmp_path, tune)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(LuthierError, match="no LoRA adapter"):
        load_peft(tmp_path, tune)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(LuthierError, match="cannot be read"):
        load_peft(tmp_path, tune)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(LuthierError, match="pickled"):
        load_peft(tmp_path, tune)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LuthierError, match="lacks a factor"):
        load_peft(tmp_path, tune)


def test_the_probes_hold_what_tokenizers_stumble_over() -> None:
    text = "".join(PROBES)
    assert all(sign in text for sign in ("\n", "\t", "  ", "<", "é", "東", "🎻", "7"))
