"""Probes by name: runs, models and adapters against their base, from Python and from the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

import luthier
from luthier import registry
from luthier.cli import app
from luthier.delta import Delta
from luthier.delta.weights import Weights, of_delta, of_models
from luthier.errors import LuthierError
from luthier.kinds import Drawing, Finding, Line
from luthier.models.load import load_model
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.registry import kinds_under
from luthier.report.probe import draw, found, write_figure
from luthier.results.folder import Run
from luthier.runs.export import export
from luthier.runs.probe import compare_weights
from tests.tolerance import assert_rounded

ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three", "four")]


def run_of(out: Path, tune: Any, learning_rate: float, steps: int = 20, **more: Any) -> Run:
    train = {"steps": steps, "batch_rows": 4, "precision": "fp32", "learning_rate": learning_rate, **more}
    return luthier.train({"model": "tiny:llama", "rows": {"train": ROWS}, "tune": tune, "train": train, "out": str(out)})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def lora(out: Path) -> str:
    """A run of rank 1."""
    return str(run_of(out, {"lora": {"rank": 1}}, 0.1).folder)


@pytest.fixture(scope="module")
def full(out: Path) -> str:
    """A run of all weights."""
    return str(run_of(out, "full", 3e-3).folder)


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: object) -> dict[str, str]:
    result = call(*words, "--json")
    assert result.exit_code == 2, result.output
    found: dict[str, str] = json.loads(result.stdout)
    return found


def same(left: Finding, right: Finding) -> None:
    """Two findings that agree but for rounding."""
    assert left.numbers["intruders"] == right.numbers["intruders"]
    for one, other in zip(left.rows, right.rows, strict=True):
        assert (one["matrix"], one["intruders"]) == (other["matrix"], other["intruders"])
        assert one["lowest_similarity"] == pytest.approx(other["lowest_similarity"], abs=1e-4)
        assert one["effective_rank"] == pytest.approx(other["effective_rank"], rel=1e-3)


def test_a_low_rank_run_has_intruders_and_a_full_one_none(lora: str, full: str) -> None:
    low, whole = luthier.probe("intruder_dimensions", lora), luthier.probe("intruder_dimensions", full, k=3)
    assert low.numbers["matrices"] == whole.numbers["matrices"] == 14
    assert low.numbers["intruders"] >= 5 and low.numbers["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    assert whole.numbers["intruders"] == 0 and whole.numbers["effective_rank"] > 10
    assert whole.notes == ["changed but not compared: 1 embedding, 2 attention_norm, 2 mlp_norm, 1 final_norm, 1 head"]


def test_a_run_its_folder_its_adapter_and_its_merged_model_agree(lora: str, tmp_path: Path) -> None:
    by_run = luthier.probe("intruder_dimensions", "tiny:llama", lora)
    export(lora, tmp_path / "plain")
    export(lora, tmp_path / "adapter", form="peft")
    (tmp_path / "plain" / "tokenizer.json").unlink()
    for other in (tmp_path / "plain", tmp_path / "adapter"):
        same(luthier.probe("intruder-dimensions", "tiny:llama", str(other)), by_run)
    assert luthier.probe("intruder_dimensions", lora) == by_run


def test_deltas_and_models_tell_the_same_change(full: str) -> None:
    base, run = load_model("tiny:llama"), Path(full)
    tuned = load_model("tiny:llama")
    delta = Delta.load(run / "delta.safetensors")
    delta.apply(tuned)
    parts = map_parts(base)
    one, other = Weights(base, parts, of_delta(delta)), Weights(base, parts, of_models(base, parts, tuned, map_parts(tuned)))
    assert one.changed == other.changed == parts.places
    for place in one.changed:
        assert torch.equal(one.change(place), other.change(place)) and torch.equal(one.base(place), parts.view(base, place))
        assert_rounded(one.tuned(place), parts.view(tuned, place), 2, what=place)


def test_rounding_to_bf16_is_no_change_of_a_low_rank_run(out: Path) -> None:
    run = run_of(out, {"lora": {"rank": 1}}, 0.01, steps=2, precision="bf16")
    finding = luthier.probe("intruder_dimensions", str(run.folder))
    assert finding.numbers["effective_rank"] == pytest.approx(1.0, abs=1e-3)


def test_a_run_beside_another_base_or_run_is_compared_whole(lora: str, full: str) -> None:
    weights = compare_weights(full, lora)
    parts = weights.parts
    assert weights.changed == parts.places
    place = parts.select("mlp_up", [0])[0]
    own, from_base = compare_weights(lora), compare_weights("tiny:llama", full)
    assert torch.allclose(weights.change(place), own.change(place) - from_base.change(place), atol=1e-5)
    assert not compare_weights(lora, lora).changed


def test_what_stands_beside_the_weights_is_said_not_to_be_compared(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_METHODS", str(Path(__file__).parent.parent / "toys"))
    run = run_of(out, "plain_prompt", 1e-3, steps=1)
    finding = luthier.probe("intruder_dimensions", str(run.folder))
    assert finding.numbers["matrices"] == 0 and "beside the weights" in finding.notes[-1]


def test_the_command_prints_tables_json_and_a_figure(lora: str, tmp_path: Path) -> None:
    figure = tmp_path / "curve.svg"
    shown = call("probe", "intruder-dimensions", lora, "--figure", figure)
    assert shown.exit_code == 0 and "intruder dimensions in" in shown.stdout and "mlp_down" in shown.stdout
    found = json.loads(call("probe", "intruder_dimensions", "tiny:llama", lora, "k=3", "epsilon=0.4", "--json").stdout)
    assert "(k = 3, epsilon = 0.4)" in found["sentence"] and len(found["rows"]) == 14
    assert found["tables"].keys() == {"by role", "by block", "intruders"} and len(found["figure"]["lines"][0]["points"]) == 21
    root = ElementTree.parse(figure).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.attrib["width"]


def test_the_catalogue_lists_probes() -> None:
    (card,) = json.loads(call("techniques", "--kind", "probe", "--json").stdout)
    assert (card["name"], card["kind"], card["row"]) == ("intruder_dimensions", "probe", 24)
    assert call("techniques", "intruder_dimensions").exit_code == 0


def test_mistakes_are_named(lora: str, tmp_path: Path) -> None:
    assert "did you mean `intruder_dimensions`" in refused("probe", "intruder_dimension", lora)["fix"]
    assert "did you mean `epsilon`" in refused("probe", "intruder_dimensions", lora, "epsilom=1")["fix"]
    assert "no option `out`" in refused("probe", "intruder_dimensions", lora, "out=x")["error"]
    assert "is no run" in refused("probe", "intruder_dimensions", "tiny:llama")["error"]
    assert "3 models" in refused("probe", "intruder_dimensions", lora, lora, lora)["error"]
    assert "gpt2" in refused("probe", "intruder_dimensions", "tiny:gpt2", lora)["error"]
    assert "bert encoder" in refused("probe", "intruder_dimensions", "tiny:llama", "tiny:bert")["error"]
    assert "not found" in refused("probe", "intruder_dimensions", "tiny:llama", tmp_path / "nowhere")["error"]
    assert "SVG" in refused("probe", "intruder_dimensions", lora, "--figure", tmp_path / "curve.png")["error"]
    assert not (tmp_path / "curve.png").exists()


def test_other_shapes_are_refused_by_name() -> None:
    base, wide = tiny("llama"), tiny("llama", vocabulary=400)
    with pytest.raises(LuthierError, match=r"shapes differ: \(259, 32\) in the base, \(400, 32\)") as error:
        of_models(base, map_parts(base), wide, map_parts(wide))
    assert error.value.where == "model.embed_tokens.weight"
    deep = tiny("llama", layers=3)
    with pytest.raises(LuthierError, match="the base lacks this parameter"):
        of_models(base, map_parts(base), deep, map_parts(deep))


def test_a_changed_base_is_noticed(out: Path, tmp_path: Path) -> None:
    export(str(run_of(out, "full", 1e-3, steps=1).folder), tmp_path / "base")
    recipe = {"model": str(tmp_path / "base"), "rows": {"train": ROWS}, "train": {"steps": 1, "precision": "fp32"}, "out": str(out)}
    run = luthier.train(recipe)
    assert luthier.probe("intruder_dimensions", str(run.folder)).numbers["matrices"] == 14
    other = luthier.train({**recipe, "model": "tiny:llama", "tune": "full"})
    export(str(other.folder), tmp_path / "other")
    (tmp_path / "base" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(LuthierError, match="no longer the model"):
        luthier.probe("intruder_dimensions", str(run.folder))


@pytest.mark.parametrize(("key", "kinds"), [("tune", kinds_under("tune")), ("keep", ("callback",))])
def test_recipes_hold_no_probes(key: str, kinds: tuple[str, ...]) -> None:
    with pytest.raises(LuthierError) as error:
        registry.make("intruder_dimensions", kinds, where=key)
    assert error.value.fix == "its kind is probe: it takes no part in training; use `luthier probe intruder_dimensions`"


def test_a_narrow_terminal_cuts_names_and_no_numbers() -> None:
    rows = [
        {"role": "attention_output", "block": None, "lowest_similarity": 0.123, "matrix": "model.layers.0.self_attn.o_proj"}
    ] * 25
    console = Console(width=50, record=True, file=io.StringIO())
    console.print(found(Finding("One sentence.", {}, rows, notes=["left out"])))
    text = console.export_text()
    assert text.count(" 0.123 ") == 20 and " - " in text and "None" not in text
    assert "and 5 more rows" in text and "note: left out" in text


def test_a_drawing_is_escaped_and_names_its_lines(tmp_path: Path) -> None:
    lines = [Line("<b>one</b>", [(0.0, 0.0), (1.0, 2.0)]), Line("two", [(0.0, 1.0)], dots=True)]
    drawing = Drawing("<script>", "x", "y", lines)
    text = ElementTree.tostring(draw(drawing), encoding="unicode")
    assert "<script>" not in text and "<b>" not in text and text.count("<polyline") == 2 and text.count("<circle") == 1
    draw(Drawing("empty", "x", "y", []))
    with pytest.raises(LuthierError, match="draws no figure"):
        write_figure(Finding("", {}, []), tmp_path / "a.svg")
