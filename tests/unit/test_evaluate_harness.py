"""The evaluation harness on a model in memory: its numbers are the likelihoods of the model as it is."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.evaluate.harness import Score, _scores, harness
from luthier.kinds import Now, Prompt
from luthier.methods.weight_delta.lora import lora
from luthier.models import map_parts, tiny, tiny_tokenizer
from luthier.runs.train import train
from luthier.training.services import RunServices
from luthier.tune import Tune

ROWS = [
    {"question": f"The {word} one is", "choices": [" red", " tan", " sky"], "answer": number % 3}
    for number, word in enumerate(["first", "second", "third", "fourth", "fifth", "last"])
]


def task_folder(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "colors.yaml").write_text(
        "task: colors\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "target_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def tuned(*techniques: Any) -> Tune:
    tune = Tune(tiny(), map_parts(tiny()), keep_base=True)
    for number, technique in enumerate(techniques):
        tune.add(f"slot{number}", technique, RunServices(tune, f"slot{number}", Now(seed=0)), {})
    rng = torch.Generator().manual_seed(3)
    tune.set({key: 1.0 * torch.randn(one.master.shape, generator=rng) for key, one in tune.trained.items()})
    return tune


def right(tune: Tune) -> list[bool]:
    """Whether the right choice is the most likely one, row by row, from the model's own logits."""
    tokenizer = tiny_tokenizer()
    found = []
    for row in ROWS:
        scores = []
        # Choices of one length, so that none wins by being short.
        for choice in row["choices"]:
            prompt, answer = tokenizer(row["question"])["input_ids"], tokenizer(choice)["input_ids"]
            with torch.no_grad():
                log_p = tune.model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(answer)))
        found.append(scores.index(max(scores)) == row["answer"])
    return found


def test_accuracy_is_that_of_the_logits_with_and_without_what_is_attached(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tune, folder = tuned(lora(rank=3)), task_folder(tmp_path)
    for expected, found in (
        (right(tune), harness(tune, tiny_tokenizer(), ["colors"], folder)),
        (right(tuned()), _at_base(tune, folder)),
    ):
        share = sum(expected) / len(ROWS)
        # The standard error of a mean of six zeros and ones.
        stderr = (share * (1 - share) / (len(ROWS) - 1)) ** 0.5
        assert found == {"colors": {"acc": Score(pytest.approx(share), pytest.approx(stderr))}}
    assert right(tune) != right(tuned())
    draws = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    few = harness(tune, tiny_tokenizer(), ["colors"], folder, limit=2)
    assert (random.getstate(), np.random.get_state()[2]) == draws[:2] and torch.equal(torch.get_rng_state(), draws[2])
    assert few["colors"]["acc"].value == sum(right(tune)[:2]) / 2


def _at_base(tune: Tune, folder: Path) -> Any:
    with tune.at("base"):
        return harness(tune, tiny_tokenizer(), ["colors"], folder)


def test_a_run_is_scored_before_and_after_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"text": row["question"] + row["choices"][row["answer"]]} for row in ROWS]
    run = train(
        {
            "model": "tiny:llama",
            "rows": {"train": rows},
            "tune": "full",
            "train": {"steps": 60, "batch_rows": 6, "device": "cpu", "learning_rate": 0.01, "precision": "fp32"},
            "out": str(tmp_path / "runs"),
        }
    )
    folder = task_folder(tmp_path)
    command = ["eval", str(run.folder), "--harness", "colors", "--tasks-folder", str(folder)]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    base = sum(right(tuned())) / len(ROWS)
    assert found["before"]["colors"]["acc"]["value"] == pytest.approx(base)
    assert found["after"]["colors"]["acc"] == {"value": 1.0, "stderr": 0.0} and base < 1.0
    plain = CliRunner().invoke(app, command)
    assert plain.exit_code == 0 and "colors" in plain.output and "±" in plain.output


def test_scores_by_hand() -> None:
    found = {"alias": "colors", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.2, "f1_stderr,strict": "N/A"}
    assert _scores(found) == {"acc": Score(0.5, 0.1), "f1,strict": Score(0.2, None)}


def test_without_the_harness_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LuthierError, match=r'pip install "luthier\[lm-eval\]"'):
        harness(tuned(), tiny_tokenizer(), ["colors"], tmp_path)


def test_tasks_that_are_not_there_or_cannot_run_are_named(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = task_folder(tmp_path)
    with pytest.raises(LuthierError, match=r"(?s)`colours`.*`colors`"):
        harness(tuned(), tiny_tokenizer(), ["colours"], folder)
    (folder / "rows.jsonl").unlink()
    with pytest.raises(LuthierError, match="cannot run"):
        harness(tuned(), tiny_tokenizer(), ["colors"], folder)


def test_a_trained_prompt_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    prompt = Prompt(lambda table_VD, services: {"rows": table_VD[:2].clone()}, lambda tensors, ids, embeds: embeds, 2)
    with pytest.raises(LuthierError, match="trained prompt"):
        harness(tuned(prompt), tiny_tokenizer(), ["colors"], task_folder(tmp_path))
