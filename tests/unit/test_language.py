"""A toy model that gets rows in English says that it knows none; and a run's model is saved with what it learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import luthier
from luthier.lab import benchmark
from luthier.models.load import load_tokenizer, resolve
from luthier.planning.language import unknown_language
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.rows.shapes import Row

ENGLISH = ["How do you cancel a subscription, please, without losing money?", "The printer ignores my computer after restarting."]


class Letters:
    """A tokenizer that knows `river` whole and spells all else."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert text[0] == " " and not add_special_tokens
        return {"input_ids": [1] if text == " river" else list(range(len(text)))}


def rows(*texts: Any) -> list[Row]:
    return [Row(str(place), "text", {"text": text}, "here") for place, text in enumerate(texts)]


def test_the_share_of_words_in_pieces_decides() -> None:
    tokenizer: Any = Letters()
    (said,) = unknown_language("workshop", tokenizer, rows("a river and then water"))
    # Of `river`, `then` and `water` one is known; a word stands behind another one, and is of four letters at least.
    assert said.startswith("`workshop` is a toy model") and "67% of the rows' words" in said
    assert unknown_language("workshop", tokenizer, rows("the river, river and rivers")), "half of them is enough"
    assert not unknown_language("workshop", tokenizer, rows("a river", "Then 1234 abc the river")), "capitals, numbers, short words"
    assert not unknown_language("smollm2-135m-instruct", tokenizer, rows("a river and then water"))
    assert not unknown_language("workshop", tokenizer, rows(*["a river"] * 200, "of other words")), "the first rows are looked at"
    assert unknown_language("workshop", tokenizer, rows([{"content": "of other words"}])), "texts inside are found"


@pytest.mark.parametrize("name", ["workshop", "workshop-small"])
def test_english_is_told_from_the_toy_models_own_world(name: str) -> None:
    tokenizer = load_tokenizer(resolve(name))
    (said,) = unknown_language(name, tokenizer, rows(*ENGLISH))
    assert "no English" in said
    for skill in benchmark.SKILLS:
        own = rows(*(one["fields"] for one in ({"fields": row} for row in benchmark.rows(skill, "train", 20, seed=1))))
        assert unknown_language(name, tokenizer, own) == [], skill


def test_the_plan_warns() -> None:
    train = [{"prompt": ENGLISH[0], "completion": ENGLISH[1]}]
    recipe = {"model": "workshop-small", "rows": {"train": train}, "train": {"steps": 1, "batch_rows": 1}, "tune": "lora"}
    assert sum("knows the synthetic benchmark and no English" in one for one in make_plan(make_recipe(recipe)).warnings()) == 1


def test_a_run_is_saved_with_what_it_learnt(tmp_path: Path) -> None:
    train = {"steps": 2, "batch_rows": 1, "precision": "fp32", "learning_rate": 0.05}
    recipe = luthier.Recipe(
        model="tiny:llama",
        rows={"train": [{"prompt": "a", "completion": "b"}]},
        tune="lora",
        train=train,
        out=str(tmp_path / "runs"),
    )
    run = luthier.train(recipe)
    run.save(tmp_path / "plain")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        live = run.model(ids).logits
        assert torch.allclose(saved(ids).logits, live, atol=1e-4)
        base, _ = luthier.open_model("tiny:llama", precision="fp32")
        assert not torch.allclose(base.model(ids).logits, live, atol=1e-3)
    for way in (run, run.folder, str(run.folder)):
        opened, _ = luthier.open_run(way)
        with torch.no_grad():
            assert torch.allclose(opened.model(ids).logits, live, atol=1e-4)
