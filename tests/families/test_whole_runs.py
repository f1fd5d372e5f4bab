"""Models as folders: loaded whole, planned, trained, opened again and exported, with what text does not reach left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import luthier
from luthier.errors import LuthierError
from luthier.export import export_model
from luthier.models.classes import auto_class_name
from luthier.models.load import load_model
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.results.opened import open_run
from tests.families.trying import base

ROWS = [{"prompt": f"The mill number {number} is", "completion": " old."} for number in range(3)]


def folder_of(family: str, where: Path) -> str:
    base(family).save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return str(where)


def recipe_of(family: str, where: Path, **keys: Any) -> Any:
    train = {"steps": 1, "device": "cpu", "precision": "fp32", **keys.pop("train", {})}
    return make_recipe(
        {"model": folder_of(family, where / "model"), "rows": {"train": ROWS}, "out": str(where / "runs"), "train": train, **keys}
    )


def test_the_language_model_of_one_that_reads_images_trains(tmp_path: Path) -> None:
    recipe = recipe_of("Qwen2-VL", tmp_path, tune="full")
    model = base("Qwen2-VL")
    assert type(load_model(recipe.model)) is type(model)
    said = "\n".join(make_plan(recipe).lines())
    assert "map           parameters that are `other_modality`: 31, frozen: rows of text do not reach them (model.visual)" in said
    luthier.train(recipe)
    (run,) = (tmp_path / "runs").iterdir()
    tune, tokenizer = open_run(run, out=recipe.out)
    before = dict(model.named_parameters())
    still = {name for name, values in tune.model.named_parameters() if torch.equal(values, before[name])}
    assert still == {name for name in before if name.startswith("model.visual.")}
    export_model(tune, tokenizer, tmp_path / "exported")
    exported = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    assert all(torch.equal(values, tune.model.get_parameter(name)) for name, values in exported.named_parameters())


def test_what_text_does_not_reach_cannot_be_asked_to_train(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="rows of text do not reach what has the module type other_modality"):
        make_plan(recipe_of("LLaVA", tmp_path, tune={"full": {"target_modules": ["other_modality"]}}))
    # The encoder's own maps are called q_proj as well.
    plan = make_plan(recipe_of("LLaVA", tmp_path, tune={"lora": {"target_modules": ["q_proj"]}}))
    assert {one.place.block for one in plan.engine.tune.trained.values() if one.place is not None} == {0, 1}


def test_the_plan_counts_what_has_no_name(tmp_path: Path) -> None:
    said = make_plan(recipe_of("Gemma 3n", tmp_path, tune="lora")).lines()
    assert [line for line in said if "linear maps that are" in line] == [
        "map           linear maps that are `linear_other`: 20 (altup.modality_router, laurel.linear_left, laurel.linear_right, "
        "per_layer_input_gate, ...)"
    ]
    assert any("linear_other" in line and "in 40" in line for line in said if not line.startswith("map")), "two factors beside each"


@pytest.mark.parametrize("family", ["Qwen3-Next", "Falcon-H1"])
def test_hybrids_are_padded_and_the_plan_says_why(family: str, tmp_path: Path) -> None:
    recipe = recipe_of(family, tmp_path, rows={"train": [{"text": "word " * (40 + number)} for number in range(3)]})
    plan = make_plan(recipe)
    assert not plan.engine.tune.packs and not plan.feed.packed
    assert any("padding: a row would see its neighbors" in line for line in plan.lines())
    with pytest.raises(LuthierError, match="rows cannot be packed: a row would see its neighbors"):
        make_plan(recipe_of(family, tmp_path, train={"packing": True}))


@pytest.mark.parametrize(
    ("model_type", "saved", "causal", "name"),
    [
        ("llama", ["LlamaForCausalLM"], True, "AutoModelForCausalLM"),
        ("bert", ["BertForMaskedLM"], False, "AutoModel"),
        ("qwen2_vl", [], True, "AutoModelForImageTextToText"),
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], True, "AutoModelForImageTextToText"),
        ("qwen3_5", ["Qwen3_5ForCausalLM"], True, "AutoModelForCausalLM"),
        ("a_type_of_its_own", ["OwnForCausalLM"], True, "AutoModelForCausalLM"),
    ],
)
def test_a_model_is_loaded_by_the_class_that_was_saved(model_type: str, saved: list[str], causal: bool, name: str) -> None:
    assert auto_class_name(model_type, saved, causal=causal) == name
