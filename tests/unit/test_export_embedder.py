"""Vectors of a tuned model as `sentence-transformers` has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.errors import LuthierError
from luthier.evaluate.readings import readings
from luthier.export.embedder import export_embedder
from luthier.models.load import load_model, load_tokenizer
from luthier.rows.encode import encode_all
from luthier.rows.read import read

QUESTIONS = [{"query": f"{word}?", "positive": f"It is {word} again."} for word in ("warm", "cold and grey", "fine", "dull")]
TEXTS = ["a warm day", "  It was cold and grey\n", "x", "a text that is much longer than any of the others"]


def trained(model: str, out: Path, tune: Any = "lora", **options: Any) -> Any:
    train = {"steps": 2, "batch_rows": 4, "learning_rate": 1e-2, "precision": "fp32"}
    return luthier.train(model=model, rows={"train": QUESTIONS}, tune=tune, objective={"embed": options}, train=train, out=str(out))


@pytest.mark.parametrize(
    ("model", "tune", "pool"),
    [("bert", "full", "mean"), ("roberta", "lora", "first"), ("llama", "lora", "last"), ("gpt2", "half", "mean")],
)
def test_a_folder_gives_the_runs_vectors_in_sentence_transformers(model: str, tune: str, pool: str, tmp_path: Path) -> None:
    found = trained(f"tiny:{model}", tmp_path, tune, pool=pool)
    facts = found.export(tmp_path / "out")
    assert facts["max_vector_difference"] < 1e-5
    said = json.loads((tmp_path / "out/1_Pooling/config.json").read_text())
    assert said["word_embedding_dimension"] == 32
    mode = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken"}[pool]
    assert [name for name, is_on in said.items() if is_on is True] == [f"pooling_mode_{mode}"]
    library = pytest.importorskip("sentence_transformers", reason="it comes with the extra `test`")
    tune_opened, tokenizer = luthier.open_run(found.folder)
    rows = encode_all(list(read([{"text": text} for text in TEXTS])), tokenizer, purpose="read").rows
    theirs = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert theirs.max_seq_length == (511 if model == "roberta" else 512)
    vectors_BD = torch.tensor(theirs.encode(TEXTS))
    torch.testing.assert_close(vectors_BD, readings(tune_opened, rows), atol=1e-5, rtol=0.0)
    assert torch.dist(vectors_BD[0], vectors_BD[3]) > 1e-2


def test_the_folder_is_a_model_again(tmp_path: Path) -> None:
    """It holds no language head, and trains on as any other."""
    trained("tiny:llama", tmp_path).export(tmp_path / "out")
    model = load_model(str(tmp_path / "out"))
    assert type(model).__name__ == "LlamaModel" and load_tokenizer(str(tmp_path / "out")).padding_side == "right"
    again = trained(str(tmp_path / "out"), tmp_path, pool="last")
    assert again.facts["status"] == "finished"


def test_what_differs_is_not_written(tmp_path: Path) -> None:
    """Another state than the one that is described, or one that is broken, and no folder appears."""
    tune, tokenizer = luthier.open_run(trained("tiny:bert", tmp_path).folder)
    assert tune.head is not None
    own, head = tune.head
    tune.head = (own, head._replace(read=lambda own, hidden_BD: 2.0 * head.read(own, hidden_BD)))
    with pytest.raises(LuthierError, match="gives other vectors"):
        export_embedder(tune, tokenizer, tmp_path / "none")
    assert not (tmp_path / "none").exists()
