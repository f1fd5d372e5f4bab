"""The models that come with luthier: what is in the package is small, loads everywhere, and can be built again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from luthier import disk
from luthier.errors import LuthierError
from luthier.lab import benchmark, workshop
from luthier.models.load import load_model, load_tokenizer, resolve
from luthier.models.packaged import PACKAGED, folder_of

LIMITS = {"workshop": 5_000_000, "workshop-small": 1_000_000}


def stated(name: str) -> dict[str, float]:
    """The scores of a model card, by skill."""
    card = (folder_of(name) / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (\w+): .*\| ([\d.]+)( %)? \|$", card, re.MULTILINE)
    return {skill: float(number) / (100 if percent else 1) for skill, number, percent in found}


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_model_is_small_and_loads_by_plain_transformers(name: str) -> None:
    folder = folder_of(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert model.num_parameters() <= LIMITS[name]
    assert model.dtype == torch.bfloat16
    assert load_model(name).num_parameters() == model.num_parameters()
    assert resolve(name).origin == "comes with luthier"
    assert list(transformers.AutoTokenizer.from_pretrained(folder).get_vocab()) != []


def test_all_packaged_models_together_take_less_than_ten_megabytes() -> None:
    sizes = [path.stat().st_size for name in PACKAGED for path in folder_of(name).rglob("*")]
    assert 1e6 < sum(sizes) < 10e6


def test_a_new_tokenizer_is_the_same_each_time_and_gives_every_text_back() -> None:
    first, second, packaged = workshop.make_tokenizer(), workshop.make_tokenizer(), load_tokenizer("workshop")
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert first.chat_template == packaged.chat_template
    texts = [
        row.get("text") or row["completion"] for skill in benchmark.SKILLS for row in benchmark.rows(skill, "train", 5, seed=3)
    ]
    for text in [*texts, "ünïcode ☃\n\ttabs"]:
        assert first.decode(first(text)["input_ids"]) == text
        assert packaged.decode(packaged(text)["input_ids"]) == text


def test_names_of_the_world_are_one_token() -> None:
    tokenizer = load_tokenizer("workshop")
    assert [len(tokenizer(f" {word}")["input_ids"]) for word in ("Mira", "Tolen", "Ravik", "baker", "violin")] == [1] * 5


@pytest.mark.parametrize(("name", "skills"), [("workshop", ("sentiment", "translate", "copy")), ("workshop-small", ("sentiment",))])
def test_scores_are_those_of_the_model_card(name: str, skills: tuple[str, ...]) -> None:
    found = workshop.score(name, skills)
    for skill in skills:
        assert found[skill].value == pytest.approx(stated(name)[skill], abs=0.021)


def test_the_card_states_what_learning_and_forgetting_need() -> None:
    scores = {skill: value for skill, value in stated("workshop").items() if benchmark.SKILLS[skill].metric != "loss"}
    assert sum(value >= 0.8 for value in scores.values()) >= 6
    assert sum(value < 0.2 for value in scores.values()) >= 2
    assert all(value < 0.2 for skill, value in scores.items() if not benchmark.SKILLS[skill].pretrained)


def test_a_build_gives_the_same_bytes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workshop, "COUNTS", {"topic": 60, "stories": 20})
    monkeypatch.setattr(workshop, "ITEMS", 2)
    steps = ["train.epochs=1", "train.threads=1"]
    built = [workshop.build("small", tmp_path / str(number) / "model", tmp_path / str(number), steps) for number in range(2)]
    sums = [{path.name: disk.sha256(path) for path in folder.iterdir()} for folder in built]
    assert sums[0] == sums[1]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(sums[0])
    with pytest.raises(LuthierError, match="there already"):
        workshop.build("small", built[0], tmp_path)


def test_a_model_that_was_not_built_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    with pytest.raises(LuthierError) as caught:
        resolve("workshop-large")
    assert "luthier.lab.workshop --size large" in caught.value.fix
    with pytest.raises(LuthierError, match="has no revisions"):
        resolve("workshop", revision="main")


def test_the_large_model_is_twice_as_large_as_the_main_one(tmp_path: Path) -> None:
    sizes = {}
    for size in ("main", "large"):
        folder = workshop.write_start(workshop.SIZES[size], tmp_path / size)
        sizes[size] = transformers.AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert 1.9 <= sizes["large"] / sizes["main"] <= 2.3
    assert json.loads((tmp_path / "main" / "config.json").read_text())["tie_word_embeddings"]
