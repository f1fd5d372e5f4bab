"""The two real models with short names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import luthier
from luthier.evaluate.readings import readings
from luthier.models import KNOWN, load_model, load_tokenizer, map_parts, resolve
from luthier.rows.embed import pooled
from luthier.rows.encode import encode_all
from luthier.rows.read import read

pytestmark = pytest.mark.realmodel

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = resolve("smollm2-135m-instruct")
    return load_model(source), load_tokenizer(source)


def test_smollm2_is_whole_and_tied(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, _ = smollm2
    assert model.num_parameters() == KNOWN["smollm2-135m-instruct"].parameters == 134_515_008
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    parts = map_parts(model)
    assert parts.ties == {"lm_head": "model.embed_tokens"}
    assert (parts.blocks, parts.heads, parts.key_value_heads, parts.head_width) == (30, 9, 3, 64)
    assert not hasattr(model.config, "quantization_config")


def test_smollm2_tokenizer_is_the_one_it_was_trained_with(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    _, tokenizer = smollm2
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<|im_start|>", *["<|im_end|>"] * 2]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    # Digits stand alone, so the two spaces before them are one token.
    assert tokenizer.tokenize("a  2024") == ["a", "ĠĠ", "2", "0", "2", "4"]
    for text in ("  two\tspaces\n\n\n", "Ünïcödé 日本語 🙂 e\u0301\u00a0", "In 2024: 1,234.5\r\n", "<|im_end|> inside"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_smollm2_answers_in_its_template(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    assert tokenizer.decode(prompt["input_ids"][0]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def test_minilm_knows_what_is_alike() -> None:
    source = resolve("minilm-l6")
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert source.kind == "encoder"
    assert model.num_parameters() == KNOWN["minilm-l6"].parameters
    batch = tokenizer(["A cat sat down.", "The kitten is sitting.", "Interest rates rose."], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden_BTD = model(**batch).last_hidden_state
    attended_BT1 = batch["attention_mask"][..., None]
    mean_BD = (hidden_BTD * attended_BT1).sum(1) / attended_BT1.sum(1)
    near, far = cosine_similarity(mean_BD[0], mean_BD[1:]).tolist()
    assert near > 0.5 > far


def test_minilm_learns_what_belongs_together(tmp_path: Path) -> None:
    """Each question finds its text behind the last step, and the folder has the same vectors in the library that the model comes from."""
    asked = {
        "Who feeds the cats?": "Behind the red barn.",
        "Where is the ladder?": "Twelve loaves and some butter.",
        "When does it snow?": "Ask Mara, the baker.",
        "What is for breakfast?": "The river froze last night.",
        "How deep is the well?": "Green, with a white door.",
        "Which house is yours?": "In late March.",
        "Why is the bridge closed?": "Forty feet, they say.",
        "Whose coat is this?": "They sleep in the attic.",
    }
    rows = [{"query": query, "positive": text} for query, text in asked.items()]
    found = luthier.train(
        model="minilm-l6",
        rows={"train": rows},
        tune="lora",
        objective="embed",
        train={"epochs": 15, "batch_rows": 8, "learning_rate": 3e-3, "precision": "fp32"},
        evaluate={"same": {"rows": rows, "metric": "recall_at_1"}},
        out=str(tmp_path),
    )
    assert found.metrics["same"]["before"] < 0.5 and found.metrics["same"]["after"] == 1.0
    tune, tokenizer = luthier.open_run(found.folder)
    texts = [*asked, *asked.values()]
    encoded = encode_all(list(read([{"text": text} for text in texts])), tokenizer, purpose="read").rows
    assert [list(row.token_ids) for row in encoded] == [tokenizer(text)["input_ids"] for text in texts]
    base = load_model("minilm-l6")
    found.export(tmp_path / "out")
    library = pytest.importorskip("sentence_transformers", reason="it comes with the extra `test`")
    theirs = library.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    torch.testing.assert_close(torch.tensor(theirs), readings(tune, encoded), atol=1e-5, rtol=0.0)
    assert torch.dist(pooled(base, [row.token_ids for row in encoded]), torch.tensor(theirs)) > 0.1
