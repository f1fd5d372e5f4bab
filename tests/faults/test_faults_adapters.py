"""Faults of adapters and of saved weights: scales, unmatched names, starts, precision, ties, new rows, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier import registry
from luthier.delta import Delta
from luthier.delta.forms import bits
from luthier.errors import LuthierError
from luthier.export import export_model, export_peft, load_peft
from luthier.export.model import divergence, merged, outputs
from luthier.kinds import Now, Place, Select, Selective, Services, Tensors
from luthier.kinds.parts import Parts
from luthier.methods.selective.full import full
from luthier.methods.weight_delta.lora import lora
from luthier.models import map_parts, tiny, tiny_tokenizer
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.tolerance import TINY, assert_rounded
from tests.toys.helpers import model_of, toys  # noqa: F401

IDS = [[5, 9, 200, 31, 77, 8], [14, 15]]


def tuned(model: Any, train: float = 0.05, **techniques: Any) -> Tune:
    """A tune with techniques by slot; everything that trains moved by noise of a standard deviation of `train`."""
    tune = Tune(model, map_parts(model), keep_base=True)
    for slot, technique in techniques.items():
        tune.add(slot, technique, RunServices(tune, slot, Now(seed=0)), {})
    rng = torch.Generator().manual_seed(3)
    if train:
        noise = {name: train * torch.randn(one.master.shape, generator=rng) for name, one in tune.trained.items()}
        tune.set({name: one.master.detach() + noise[name] for name, one in tune.trained.items()})
    return tune


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def different(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    return [name for name in left if not torch.equal(bits(left[name]), bits(right[name]))]


def test_scale_is_alpha_over_rank_or_over_its_root() -> None:
    """Fault 16: alpha / r and alpha / sqrt(r), nothing else."""
    assert lora(rank=4, alpha=12.0).scale == 3.0
    assert lora(rank=4, alpha=12.0, rank_stabilized=True).scale == 6.0
    for stabilized, scale in ((False, 3.0), (True, 6.0)):
        technique = lora(rank=4, alpha=12.0, rank_stabilized=stabilized)
        tensors = {"down": torch.eye(4, 5), "up": torch.eye(6, 4)}
        assert torch.equal(technique.delta(tensors), scale * torch.eye(6, 5) * (torch.arange(5) < 4))
        x = torch.arange(5.0)[None]
        assert torch.equal(technique.apply(tensors, x), x @ technique.delta(tensors).t())


def test_a_fixed_scale_keeps_the_size_of_the_update_over_ranks() -> None:
    """Fault 16: the first step moves the weight by scale^2 G A^T A; over ranks that is constant when
    rank-stabilized.
    """
    tune = tuned(tiny(), train=0.0)
    services = RunServices(tune, "lora", Now(seed=0))
    place = tune.parts.select("mlp_up")[0]

    def size(rank: int, **options: Any) -> float:
        technique = lora(rank=rank, **options)
        down_RI = technique.start(place, torch.zeros(96, 512), services)["down"]
        return technique.scale**2 * float(down_RI.square().sum())

    stabilized = [size(rank, alpha=16.0, rank_stabilized=True) for rank in (4, 16, 64)]
    assert max(stabilized) / min(stabilized) < 1.1
    plain = [size(rank, alpha=16.0) for rank in (4, 64)]
    assert plain[0] / plain[1] == pytest.approx(16.0, rel=0.1)
    # With alpha in proportion to the rank, the scale itself stays.
    assert lora(rank=4, alpha=8.0).scale == lora(rank=64, alpha=128.0).scale


def test_unmatched_roles_are_an_error() -> None:
    """Fault 18: a role that the model lacks, or that is none, attaches nothing silently."""
    with pytest.raises(LuthierError, match="finds no place with the module types router"):
        tuned(tiny("llama"), lora=lora(target_modules=("router",)))
    with pytest.raises(LuthierError, match=r"q_prj.*no module of this model"):
        tuned(tiny("llama"), lora=lora(target_modules=("q_prj",)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral"])
def test_every_matched_place_gets_its_own_factors(architecture: str) -> None:
    """Fault 18: the matched count of each role is the number of blocks, fused projections included."""
    tune = tuned(tiny(architecture), lora=lora(rank=2))
    counts: dict[str, int] = {}
    for one in tune.owns:
        assert one.place is not None
        counts[one.place.role] = counts.get(one.place.role, 0) + 1
    assert set(counts.values()) == {2}
    assert {"attention_query", "attention_key", "attention_value", "attention_output"} <= counts.keys()


def test_experts_that_no_delta_reaches_are_named() -> None:
    """Fault 18: experts in one three-dimensional tensor, of which a technique knows none, are an error and not a silent gap."""
    pruned = registry.make({"adalora": {"target_modules": ["expert"]}}, ("weight_delta",)).values[0]
    with pytest.raises(LuthierError, match="cannot do at the module type expert") as error:
        tuned(tiny("mixtral"), adalora=pruned)
    assert "experts" in error.value.where
    # A group of linear maps holds no experts: the plan says so.
    tune = tuned(tiny("mixtral"), lora=lora(rank=2))
    assert not any(one.place is not None and one.place.role == "expert" for one in tune.trained.values())


def test_an_adapter_for_other_modules_is_an_error(tmp_path: Path) -> None:
    """Fault 18: an adapter's module that the model does not have is named, with what is close to it."""
    export_peft(tuned(tiny(), lora=lora(rank=2)), tmp_path / "adapter", "tiny:llama")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {name.replace("layers.1.mlp.up_proj", "layers.1.mlp.up_projection"): t for name, t in load_file(file).items()}
    save_file(renamed, file)
    with pytest.raises(LuthierError, match=r"layers\.1\.mlp\.up_projection.*does not have") as error:
        load_peft(tmp_path / "adapter", tuned(tiny()))
    assert "layers.1.mlp.up_proj`" in error.value.fix


def test_a_leftover_tensor_of_an_adapter_is_an_error(tmp_path: Path) -> None:
    """Fault 18: a tensor of an adapter that is no factor is not skipped."""
    export_peft(tuned(tiny(), lora=lora(rank=2)), tmp_path / "adapter", "tiny:llama")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    extra = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    save_file({**load_file(file), extra: torch.ones(96)}, file)
    with pytest.raises(LuthierError, match="lora_magnitude_vector"):
        load_peft(tmp_path / "adapter", tuned(tiny()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_a_zero_start_is_the_base_exactly(architecture: str, dtype: torch.dtype) -> None:
    """Fault 20: at step 0 the logits are the base's, bit for bit."""
    before = outputs(tiny(architecture, dtype=dtype), IDS)
    tune = tuned(tiny(architecture, dtype=dtype), train=0.0, lora=lora(rank=4, target_modules=("linear", "head")))
    assert all(torch.equal(one, other) for one, other in zip(outputs(tune.model, IDS), before, strict=True))


def test_a_start_that_is_taken_out_of_the_base_is_the_base_up_to_rounding() -> None:
    """Fault 20: factors that start at something leave the function alone, and merging gives the base's weights."""
    plain = lora(rank=4)

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        return {**plain.start(place, weight_OI, services), "up": torch.full((len(weight_OI), 4), 0.1)}

    base = tiny()
    tune = tuned(tiny(), train=0.0, started=plain._replace(start=start, subtract=True))
    assert different(state(tune.model), state(base)) != []
    for one, other in zip(outputs(tune.model, IDS), outputs(base, IDS), strict=True):
        assert_rounded(one, other, TINY)
    tune.merge()
    for name, values in state(tune.model).items():
        torch.testing.assert_close(values, state(base)[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_fp32_whatever_the_base_is(dtype: torch.dtype) -> None:
    """Fault 21: values and gradients of factors are fp32 over a narrower base, and are saved as such."""
    tune = tuned(tiny(dtype=dtype), lora=lora(rank=2))
    tune.model(input_ids=torch.tensor([IDS[0]])).logits.float().sum().backward()
    for one in tune.trained.values():
        assert one.master.dtype == torch.float32
        assert one.gradient is not None and one.gradient.dtype == torch.float32
    forms = [form for forms in Delta.of(tune).changes.values() for form in forms]
    assert {form.up_OR.dtype for form in forms} == {torch.float32}  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("technique", ["embedding in place", "delta on the head"])
def test_tied_embeddings_survive_merge_save_and_reload(architecture: str, technique: str, tmp_path: Path) -> None:
    """Fault 22: the reloaded model gives the live model's logits, and its configuration says whether it is tied."""
    value = (
        full(target_modules=("embedding",))
        if technique == "embedding in place"
        else lora(rank=2, target_modules=("linear", "head"))
    )
    tune = tuned(tiny(architecture, tied=True), tuned=value)
    live, before = outputs(tune.model, IDS), state(tune.model)
    found = export_model(tune, tiny_tokenizer(), tmp_path / "model")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for one, other in zip(outputs(reloaded, IDS), live, strict=True):
        assert_rounded(one, other, TINY)
    tied = technique == "embedding in place"
    assert found["untied"] is not tied
    assert reloaded.config.tie_word_embeddings is tied
    assert (reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight) is tied
    # The live model is as it was, tied and unmerged.
    model: Any = tune.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings is True and different(state(model), before) == []
    assert len(model.all_tied_weights_keys) == 1
    assert all(torch.equal(one, other) for one, other in zip(outputs(tune.model, IDS), live, strict=True))


def test_a_delta_on_a_tied_head_leaves_the_embedding_alone() -> None:
    """Fault 22: applied to a tied base, a delta of the head alone unties it instead of changing the embedding as
    well.
    """
    tune = tuned(tiny(tied=True), lora=lora(rank=2, target_modules=("head",)))
    live = outputs(tune.model, IDS)
    model = tiny(tied=True)
    Delta.of(tune).apply(model)
    assert torch.equal(model.model.embed_tokens.weight, tiny(tied=True).model.embed_tokens.weight)
    assert model.config.tie_word_embeddings is False and model.all_tied_weights_keys == {}
    for one, other in zip(outputs(model, IDS), live, strict=True):
        assert_rounded(one, other, TINY)


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_new_rows_of_an_embedding_move(tied: bool, tmp_path: Path) -> None:
    """Fault 23: a delta of new tokens holds their rows and nothing else, also after saving and loading."""
    new = torch.tensor([255, 257])

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {place: Select("rows", new) for place in parts.select(target_modules=["embedding"])}

    tune = tuned(tiny(tied=tied), rows=Selective(choose))
    Delta.of(tune).save(tmp_path / "delta.safetensors")
    model, base = tiny(tied=tied), tiny(tied=tied)
    Delta.load(tmp_path / "delta.safetensors").apply(model)
    moved = (model.model.embed_tokens.weight != base.model.embed_tokens.weight).any(dim=1).nonzero()[:, 0]
    assert torch.equal(moved, new)
    untouched = ["model.embed_tokens.weight", *(["lm_head.weight"] if tied else [])]
    assert different(state(model), state(base)) == untouched
    assert different(state(model), state(tune.model)) == []
    export_model(tune, tiny_tokenizer(), tmp_path / "model")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert different(state(reloaded), state(model)) == []


# In bf16 every weight is rounded to 8 bits, and the merged one is rounded once more.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-10), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gemma2"])
def test_merging_changes_the_distribution_by_rounding_alone(architecture: str, dtype: torch.dtype, bound: float) -> None:
    """Fault 24: KL(merged, unmerged) is small where KL(merged, base) is not."""
    tune = tuned(tiny(architecture, dtype=dtype), lora=lora(rank=4))
    unmerged, base = outputs(tune.model, IDS), outputs(tiny(architecture, dtype=dtype), IDS)
    tune.merge()
    after = outputs(tune.model, IDS)
    assert abs(divergence(after, unmerged)) < bound
    assert divergence(after, base) > 10 * bound


def test_the_divergence_by_hand() -> None:
    """Fault 24: KL between (1/2, 1/2) and (1/4, 3/4) is ln(2) / 2 + ln(2/3) / 2; averaged over positions."""
    half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    expected = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert divergence([half[None]], [quarter[None] + 5.0]) == pytest.approx(float(expected), rel=1e-6)
    assert divergence([half[None], half[None]], [quarter[None], half[None]]) == pytest.approx(float(expected) / 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_unmerging_restores_the_weights_bit_for_bit(architecture: str, dtype: torch.dtype) -> None:
    """Fault 24: nothing is subtracted back; the weights from before return."""
    tune = tuned(tiny(architecture, dtype=dtype), lora=lora(rank=4))
    before, logits = state(tune.model), outputs(tune.model, IDS)
    tune.merge()
    assert different(state(tune.model), before) != []
    tune.unmerge()
    assert different(state(tune.model), before) == []
    assert all(torch.equal(one, other) for one, other in zip(outputs(tune.model, IDS), logits, strict=True))


def test_merging_twice_is_refused() -> None:
    """Fault 24: a delta is added once."""
    tune = tuned(tiny(), lora=lora(rank=4))
    tune.merge()
    once = state(tune.model)
    with pytest.raises(LuthierError, match="merged already"):
        tune.merge()
    with merged(tune):
        assert different(state(tune.model), once) == []
    assert tune.merged is not None and different(state(tune.model), once) == []
    tune.unmerge()
    with pytest.raises(LuthierError, match="not merged"):
        tune.unmerge()


def test_a_merged_model_is_not_taken_for_the_base() -> None:
    """Fault 24: while merged, the weights are not the base's, and asking for the base says so."""
    tune = tuned(tiny(), lora=lora(rank=4))
    tune.merge()
    with pytest.raises(LuthierError, match="does not hold the base"), tune.at("base"):
        pass


def test_token_ids_are_the_same_after_saving(tmp_path: Path) -> None:
    """Fault 15: a conversation is cut into the same tokens before saving and after loading."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'\\n'", "'\\n\\n'")
    export_model(tuned(tiny(), lora=lora(rank=2)), tokenizer, tmp_path / "model")
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert reloaded.chat_template == tokenizer.chat_template
    turns = [{"role": "user", "content": "  Wie? 🎻\n"}, {"role": "assistant", "content": "So."}]
    assert reloaded.apply_chat_template(turns) == tokenizer.apply_chat_template(turns)


def test_a_saved_adapter_is_not_empty(tmp_path: Path) -> None:
    """Fault 25: every factor is in the file, with the trained values."""
    tune = tuned(tiny(), lora=lora(rank=3))
    found = export_peft(tune, tmp_path / "adapter", "tiny:llama")
    assert found["modules"] == 14 and found["ranks"] == {3: 14}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 28 and all(float(tensor.abs().max()) > 0 for tensor in tensors.values())
    name = "model.layers.1.self_attn.v_proj"
    key = f"lora/{name}.weight.up"
    assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], tune.trained[key].master.detach())
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3


@pytest.mark.parametrize("tune", [{"s2ft": {"down": 0.5}}, "full", {"spiel": {"density": 0.1}}], ids=lambda one: next(iter(one)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_an_adapter_takes_out_of_a_weight_stays_out(engine: Any, toys: None, tune: Any, dtype: torch.dtype) -> None:  # noqa: F811
    """Numbers that train in a weight held what it was before an adapter took its start out of it, and wrote that back with their first
    step: the model jumped."""
    run = engine([tune, "svd_start"], model=model_of(layers=1).to(dtype), dtype=dtype)
    before = {name: parameter.data.clone() for name, parameter in run.tune.model.named_parameters()}
    run.tune.set({name: one.master.detach().clone() for name, one in run.tune.trained.items()})
    assert all(torch.equal(parameter.data, before[name]) for name, parameter in run.tune.model.named_parameters())
