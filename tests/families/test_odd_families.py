"""Families whose blocks differ: other heads in some blocks, none in others, sinks, recurrent states; and what does not fit is refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from luthier.errors import LuthierError
from luthier.generation.generate import generate
from luthier.kinds.parts import Heads
from luthier.models import attention
from luthier.models.attention import replace_sdpa
from luthier.models.faithful import check_forward
from luthier.models.faithful import own_logits as probed
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny_tokenizer
from luthier.training.build import build_engine
from luthier.training.packing import obstacle
from luthier.training.services import RunServices
from luthier.tune import Tune
from luthier.tune.forward import head_now, hidden
from tests.conftest import calibration, make_batch, parts_of
from tests.families.trying import BATCH, NOW, SAME, apart, base, logits, own_logits, untouched

HYBRIDS = ("Qwen3-Next", "LFM2", "Falcon-H1", "Granite 4 hybrid")


def test_each_block_is_cut_by_its_own_heads() -> None:
    parts = untouched("Gemma 4").parts
    assert [parts.heads_of(block) for block in range(4)] == [Heads(4, 2, 8), Heads(4, 1, 16), Heads(4, 2, 8), Heads(4, 1, 16)]
    assert [place.block for place in parts.select("attention_query")] == [0, 1, 2, 3]
    assert [place.block for place in parts.select("attention_key")] == [0, 1], "the last two read the keys of the first"


def with_technique(family: str, technique: Any) -> Any:
    tune = untouched(family)
    parts = parts_of(tune=technique, objective="cross_entropy", optimizer="sgd", gradient_estimator="backprop")
    return build_engine(tune.model, tune.parts, parts, now=NOW, calibration=calibration)


@pytest.mark.parametrize("family", ["Gemma 4", "Qwen3-Next", "Nemotron-H", "Llama 4", "Recurrent Gemma"])
@pytest.mark.parametrize("technique", ["serial_adapter", "prompt_tuning"])
def test_adapters_and_prompts_train(family: str, technique: str) -> None:
    engine = with_technique(family, technique)
    before = [one.master.detach().clone() for one in engine.tune.trained.values()]
    engine.step([BATCH], NOW)
    assert all(torch.isfinite(one.master).all() for one in engine.tune.trained.values())
    assert any(not torch.equal(one.master, old) for one, old in zip(engine.tune.trained.values(), before, strict=True))
    engine.tune.detach()
    assert apart(logits(Tune(engine.tune.model, engine.tune.parts)), own_logits(base(family))) < 1e-6


def test_slices_train_of_what_a_model_changes_in_place() -> None:
    """Llama 4 adds its experts' output to that of the shared expert, on the spot."""
    engine = with_technique("Llama 4", {"neuroada": {"target_modules": ["mlp_down"]}})
    engine.step([BATCH], NOW)
    assert all(one.master.any() for one in engine.tune.trained.values())


def test_an_adapter_edits_experts_that_return_all_tokens_in_one_row() -> None:
    engine = with_technique("Llama 4", {"adapter": {"place": "mlp", "width": 2, "init": "bert"}})
    tune, block = engine.tune, engine.tune.parts.sublayer("mlp", 1)
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0])

    handle = tune.model.get_submodule(block).register_forward_hook(keep)
    with torch.no_grad():
        tune.model(input_ids=BATCH.token_ids_BT)
        with tune.off():
            tune.model(input_ids=BATCH.token_ids_BT)
    handle.remove()
    assert found[0].shape == found[1].shape == (BATCH.token_ids_BT.numel(), 32)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_a_body_that_adds_up_in_fp32_feeds_a_head_in_bf16() -> None:
    model = copy.deepcopy(base("Mamba 2")).to(torch.bfloat16)
    tune = Tune(model, map_parts(model))
    expected = own_logits(model).float()
    assert apart(logits(tune).float(), expected) < 0.02
    states_TD = hidden(tune, BATCH).padded(BATCH.attend_BT)[BATCH.attend_BT]
    assert apart(head_now(tune)(states_TD).float(), expected) < 0.02


@pytest.mark.parametrize(
    ("family", "technique", "said"),
    [
        ("Gemma 4", "prefix_tuning", "needs the same heads in every block, and blocks 2, 3 have no keys and values of their own"),
        ("Qwen3-Next", "prefix_tuning", "blocks 0 have no keys and values of their own"),
        ("Mamba 2", "serial_adapter", "finds no place with the module types attention_layer"),
        ("DeepSeek-V3", "ia3", "this model has embedding, attention_latent, attention_output"),
        ("Nemotron-H", "greentrainer", "does not know what `mixer_input` costs"),
    ],
)
def test_what_needs_another_model_is_refused(family: str, technique: Any, said: str) -> None:
    with pytest.raises(LuthierError, match=said):
        with_technique(family, technique).step([BATCH], NOW)


@pytest.mark.parametrize("family", HYBRIDS)
def test_states_that_leak_between_packed_rows_are_caught(family: str) -> None:
    tune = untouched(family)
    assert obstacle(tune) == "a row would see its neighbors"
    long = make_batch([(13, 6), (11, 4)], vocabulary=250)
    assert apart(logits(tune, long, pack=True), logits(tune, long)) > 1e-2, "and it does leak"


def test_chunks_are_counted_from_the_beginning_of_what_is_run() -> None:
    """Rows shorter than a chunk would not show it."""
    tune = untouched("Llama 4")
    assert "chunked_attention" in obstacle(tune)
    long = make_batch([(13, 6), (11, 4)], vocabulary=250)
    assert apart(logits(tune, long, pack=True), logits(tune, long)) > 1e-3


@pytest.mark.parametrize("family", ["DeepSeek-V3", "Gemma 3n", "Gemma 4", "gpt-oss", "OLMo 3", "Ministral"])
def test_packed_rows_longer_than_a_window_are_those_of_padded_ones(family: str) -> None:
    tune, long = untouched(family), make_batch([(13, 6), (11, 4), (2, 1)], vocabulary=250)
    assert not obstacle(tune)
    assert apart(logits(tune, long, pack=True), own_logits(base(family), long)) < SAME


def with_sinks(value: float) -> Tune:
    model = copy.deepcopy(base("gpt-oss"))
    for name, values in model.named_parameters():
        if name.endswith("sinks"):
            values.data.fill_(value)
    replace_sdpa(model)
    return Tune(model, map_parts(model))


@pytest.mark.parametrize("pack", [False, True])
def test_sinks_take_part_on_every_path(pack: bool) -> None:
    """A sink that takes all leaves attention nothing, whatever stands before the row."""
    assert apart(logits(untouched("gpt-oss"), pack=pack), own_logits(base("gpt-oss"))) < 1e-6
    silent, usual = with_sinks(1e4), with_sinks(0.0)
    assert apart(logits(usual, pack=pack), logits(silent, pack=pack)) > 1e-2
    for tune, none in ((silent, True), (usual, False)):
        before = logits(tune, pack=pack)
        (value,) = parts_of(tune={"prefix_tuning": {"length": 3, "reparameterization": "none"}})["tune"][0].values
        tune.add("prefix", value, RunServices(tune, "prefix", NOW), {})
        assert (apart(logits(tune, pack=pack), before) < 1e-6) == none


def test_short_rows_in_bf16_keep_their_sinks() -> None:
    """Their form for quick differentiation is another one."""
    model = copy.deepcopy(base("gpt-oss")).to(torch.bfloat16)
    expected = own_logits(model)
    replace_sdpa(model)
    with attention.alike(True):
        assert apart(logits(Tune(model, map_parts(model))).float(), expected.float()) < 0.05


def test_a_head_that_does_more_than_luthier_knows_is_refused() -> None:
    """An encoder's head has a layer of its own in front."""
    for auto, settings in (("bert", {}), ("electra", {"embedding_size": 16})):
        config = transformers.AutoConfig.for_model(
            auto, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=64, **settings
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        with pytest.raises(LuthierError, match="would compute other numbers"):
            check_forward(model, map_parts(model), probed(model, 64))


def test_the_kernel_for_rows_of_any_length_knows_no_sinks() -> None:
    query: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert attention._has_varlen(query, attention.Context(), {})
    assert not attention._has_varlen(query, attention.Context(), {attention.SINKS: torch.zeros(4)})


def test_attention_that_would_drop_sinks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SINKS", "not_what_they_are_called")
    model = copy.deepcopy(base("gpt-oss"))
    parts, expected = map_parts(model), probed(model, 250)
    replace_sdpa(model)
    with pytest.raises(LuthierError, match="would compute other numbers than GptOssForCausalLM itself"):
        check_forward(model, parts, expected)
    (value,) = parts_of(tune="prefix_tuning")["tune"][0].values
    tune = Tune(copy.deepcopy(base("gpt-oss")), parts)
    with pytest.raises(LuthierError, match="a prefix cannot join the attention of gpt_oss"):
        tune.add("prefix", value, RunServices(tune, "prefix", NOW), {})
    assert tune.model.config._attn_implementation == "eager"  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["Mamba 2", "MiniMax", "Qwen3-Next", "LFM2", "Falcon-H1", "Gemma 4", "gpt-oss"])
def test_what_is_written_is_what_the_model_itself_finds_most_likely(family: str) -> None:
    """With what the model kept of the tokens before, where it keeps it in the usual form, and by reading all of them again else."""
    prompts, found = [[9, 30, 41, 50], [77, 12, 3, 5, 8, 100, 101]], {}

    def hear(place: int, ids: Sequence[int]) -> bool:
        found[place] = list(ids)
        # The first prompt's answer ends early, and the rows go on without it.
        return place != 0 or len(ids) < 3

    generate(untouched(family), tiny_tokenizer(), prompts, max_new_tokens=5, ends=(), hear=hear)
    run: Any = base(family)
    for place, prompt in enumerate(prompts):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + (3, 5)[place]:
                ids.append(int(run(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert found[place] == ids[len(prompt) :]
