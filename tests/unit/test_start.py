"""Training on from what an earlier run learnt: `model: RUN`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import luthier
from luthier.errors import LuthierError
from luthier.lab.cache import stage_key
from luthier.models.fingerprint import fingerprint
from luthier.recipe import make_recipe
from luthier.results.folder import read_run
from luthier.results.opened import open_base, open_model, open_run
from luthier.results.start import find_start, is_run
from luthier.runs.probe import compare_weights
from luthier.sweep.grid import Variant
from luthier.sweep.runs import job_of
from luthier.tune import Tune
from tests.recipes.test_recipes import recipe

IDS = torch.tensor([[5, 80, 90, 100, 110, 7]])


def logits(tune: Tune) -> Tensor:
    with torch.no_grad():
        return tune.model(IDS).logits  # type: ignore[operator,no-any-return]


def train(tmp_path: Path, **keys: Any) -> luthier.Run:
    return luthier.train(recipe(tmp_path, **keys))


@pytest.mark.parametrize(("first", "second"), [("lora", "full"), ("full", "lora"), ("lora", "lora")])
def test_a_run_begins_where_another_ended(tmp_path: Path, first: str, second: str) -> None:
    """The base of the second run is the result of the first, which it names; opened again it is what it was, and so is its export."""
    one = train(tmp_path, name="one", tune=first)
    two = train(tmp_path, name="two", tune=second, model="one-1")
    facts = two.facts["model"]
    assert facts["name"] == "one-1" and facts["ancestors"][0]["run"] == str(one.folder)
    assert facts["ancestors"][0]["weights_sha256"] == one.facts["weights_sha256"]
    assert "tiny:llama" in facts["origin"] and "run one-1" in facts["origin"]
    assert "run one-1" in two.report.read_text()
    base, first_again = open_base(read_run(two.folder))[0], open_run(one.folder)[0]
    assert torch.equal(logits(base), logits(first_again)) and fingerprint(base.model) == facts["fingerprint"]
    again = open_run(two.folder)[0]
    assert torch.allclose(logits(again), logits(two.tune), atol=1e-5)
    assert not torch.allclose(logits(again), logits(base), atol=1e-4)
    two.export(tmp_path / "written")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert torch.allclose(written(IDS).logits, logits(two.tune), atol=1e-5)
    assert torch.allclose(logits(open_model("two-1", out=str(tmp_path))[0]), logits(again))
    # What the second changed, not both.
    assert set(compare_weights("", str(two.folder)).changed) == set(compare_weights(str(one.folder), str(two.folder)).changed)


def test_three_runs_follow_each_other_and_may_move_together(tmp_path: Path) -> None:
    for name, model in (("a", "tiny:llama"), ("b", "a-1"), ("c", "b-1")):
        train(tmp_path / "runs", name=name, model=model, tune="lora", out=str(tmp_path / "runs"))
    before = logits(open_run(tmp_path / "runs" / "c-1")[0])
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    start = find_start("c-1", str(tmp_path / "elsewhere"))
    assert [run.folder.name for run in start.runs] == ["a-1", "b-1", "c-1"] and start.source.name == "tiny:llama"
    assert torch.equal(logits(open_run(tmp_path / "elsewhere" / "c-1")[0]), before)


def test_a_run_in_bf16_is_gone_on_with_in_fp32(tmp_path: Path) -> None:
    """Each change is put into weights of the type in which it was made."""
    train(tmp_path, name="one", tune="full", train={"precision": "bf16"})
    two = train(tmp_path, name="two", tune="lora", model="one-1")
    one = open_run(tmp_path / "one-1")[0]
    base = open_base(read_run(two.folder))[0]
    assert base.model.dtype == torch.float32 and one.model.dtype == torch.bfloat16
    for (name, mine), theirs in zip(base.model.named_parameters(), one.model.parameters(), strict=True):
        assert torch.equal(mine, theirs.float()), name


def test_what_is_more_than_weights_is_refused(tmp_path: Path) -> None:
    train(tmp_path, name="prompted", tune="prompt_tuning")
    train(tmp_path, name="codes", tune="lora", quantize="nf4")
    for name, words, fix in (("prompted-1", "prompt_tuning", "--weights-only"), ("codes-1", "quantized", "luthier export")):
        with pytest.raises(LuthierError, match=words) as refused:
            train(tmp_path, model=name)
        assert fix in refused.value.fix
    with pytest.raises(LuthierError, match="has no revisions"):
        train(tmp_path, model="prompted-1", revision="main")


def test_an_adapter_of_a_run_on_a_run_is_refused(tmp_path: Path) -> None:
    """Its base has no name under which others could load it."""
    train(tmp_path, name="one", tune="lora")
    two = train(tmp_path, name="two", model="one-1", tune="lora")
    with pytest.raises(LuthierError, match="began with what one-1 learnt") as refused:
        two.export(tmp_path / "adapter", form="peft")
    assert "--as model" in refused.value.fix and not (tmp_path / "adapter").exists()


def test_a_run_that_is_its_own_start_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path, name="one", tune="lora")
    facts = json.loads((run.folder / "run.json").read_text())
    facts["recipe"]["model"] = str(run.folder)
    (run.folder / "run.json").write_text(json.dumps(facts))
    with pytest.raises(LuthierError, match="starts from itself"):
        open_run(run.folder)


def test_keys_of_sweeps_follow_the_content_of_the_runs_they_name(tmp_path: Path) -> None:
    """A teacher or a start that was trained anew makes other runs, and is found from where the sweep's runs go."""
    first = train(tmp_path, name="one", tune="lora")
    asked = make_recipe(recipe(tmp_path, model="one-1", objective="distill", models={"teacher": "one-1"}))
    job = job_of(Variant("variant", {}, asked), 1e-3, 0, tmp_path / "sweep")
    assert job.recipe["model"] == job.recipe["models"]["teacher"] == str(first.folder) and is_run(job.recipe["model"], "elsewhere")
    keys = {stage_key(asked, "base", "cpu")}
    taught = make_recipe(recipe(tmp_path, objective="distill", models={"teacher": str(first.folder)}))
    keys.add(stage_key(taught, "base", "cpu"))
    delta = first.folder / "delta.safetensors"
    delta.write_bytes(delta.read_bytes()[:-1] + b"x")
    keys.add(stage_key(taught, "base", "cpu"))
    assert len(keys) == 3


def test_what_a_run_began_with_is_named_where_it_is_gone_or_another(tmp_path: Path) -> None:
    """The error spoke of a model on the hub, offered the run itself, or asked for another number type."""
    for name, model in (("one", "tiny:llama"), ("two", "one-1"), ("other", "tiny:gpt2")):
        train(tmp_path, name=name, model=model, tune="lora")
    shutil.move(tmp_path / "one-1", tmp_path / "away")
    with pytest.raises(LuthierError, match="two-1 began with `one-1`") as gone:
        open_run(tmp_path / "two-1")
    assert gone.value.where == str(tmp_path / "two-1") and "bring `one-1` back" in gone.value.fix
    shutil.move(tmp_path / "away", tmp_path / "one-1")
    shutil.copy(tmp_path / "other-1" / "delta.safetensors", tmp_path / "one-1" / "delta.safetensors")
    with pytest.raises(LuthierError, match="what one-1 learnt does not fit what tiny:llama is now") as changed:
        open_run(tmp_path / "two-1")
    assert changed.value.where == str(tmp_path / "one-1") and "bring tiny:llama back" in changed.value.fix
