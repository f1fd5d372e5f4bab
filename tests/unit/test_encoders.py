"""Encoders: heads read their texts both ways, train through the whole way, and come out as `transformers` has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

import luthier
from luthier.errors import LuthierError
from luthier.evaluate.readings import readings
from luthier.kinds import Now
from luthier.methods.head import _layer
from luthier.models.context import context_of
from luthier.models.load import load_model
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.rows.encode import encode_all
from luthier.rows.read import read
from luthier.training.services import RunServices
from luthier.tune import Tune

ROWS = [
    {"text": f"It was {word}.", "label": label}
    for word, label in (("warm", "good"), ("cold and grey", "bad"), ("fine", "good"), ("dull", "bad"), ("a very long day", "bad"))
]
QUESTIONS = [{"query": f"{word}?", "positive": f"It is {word} again."} for word in ("warm", "cold and grey", "fine", "dull")]
PAIRS = [{"prompt": "a?", "chosen": "b", "rejected": "c"}]
CLASSES = {"classify": {"labels": ["bad", "good"]}}
SETTINGS: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "modernbert": {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 6, "classifier_pooling": "mean"},
    "mpnet": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1},
}
"""Of families without a tiny model of their own."""
FAMILIES = ("bert", "roberta", "distilbert", *SETTINGS)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a random encoder, whose tokenizer puts a token at either end of a text."""
    known: dict[str, str] = {}

    def make(architecture: str) -> str:
        if architecture not in known:
            folder = tmp_path_factory.mktemp(architecture)
            _model(architecture).save_pretrained(folder)
            tokenizer = tiny_tokenizer()
            ends = [("<|im_start|>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
                single="<|im_start|> $A <|im_end|>", special_tokens=ends
            )
            tokenizer.save_pretrained(folder)
            known[architecture] = str(folder)
        return known[architecture]

    return make


def _model(architecture: str) -> Any:
    if architecture not in SETTINGS:
        return tiny(architecture)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 259}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.AutoConfig.for_model(architecture, **{**sizes, **ends, **SETTINGS[architecture]})
    model = transformers.AutoModel.from_config(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in model.parameters():
            values.add_(torch.randn(values.shape, generator=rng) * (32**-0.5 if values.dim() > 1 else 0.05))
    return model


def run(folder: str, out: Path, *, rows: Any = ROWS, **keys: Any) -> Any:
    train = {"steps": 3, "batch_rows": 5, "learning_rate": 1e-2, "precision": "fp32", **keys.pop("train", {})}
    return luthier.train(model=folder, rows={"train": rows}, train=train, out=str(out), **keys)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_classes_of_an_encoder_come_out_as_transformers_has_them(architecture: str, folder_of: Any, tmp_path: Path) -> None:
    """Trained, measured before and after, opened and exported; several rows beside each other, padded, give the same numbers there."""
    tune = {"bert": "full", "roberta": "half", "mpnet": ["lora", "ssf"]}.get(architecture, "lora")
    found = run(folder_of(architecture), tmp_path, tune=tune, objective=CLASSES, evaluate={"same": {"rows": ROWS}})
    assert found.metrics["same"]["before"] == pytest.approx(0.6)
    opened, tokenizer = luthier.open_run(found.folder)
    rows = encode_all(list(read(ROWS)), tokenizer, purpose="read").rows
    assert all(row.token_ids[0] == tokenizer.bos_token_id and row.token_ids[-1] == tokenizer.eos_token_id for row in rows)
    said_BK = readings(opened, rows)
    assert said_BK.std(0).min() > 1e-3, "the rows are told apart"
    assert found.metrics["same"]["after"] == float((said_BK.argmax(-1) == torch.tensor([1, 0, 1, 0, 0])).double().mean())
    found.export(tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    given = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")([row["text"] for row in ROWS], padding=True)
    with torch.no_grad():
        logits_BK = theirs(torch.tensor(given["input_ids"]), attention_mask=torch.tensor(given["attention_mask"])).logits
    torch.testing.assert_close(logits_BK, said_BK, atol=1e-5, rtol=1e-5)


def test_a_mean_is_exported_where_the_family_has_one(folder_of: Any, tmp_path: Path) -> None:
    """ModernBERT reads a mean by its configuration; BERT does not, and nothing is written instead."""
    mean = {"classify": {"labels": ["bad", "good"], "pool": "mean"}}
    modern = run(folder_of("modernbert"), tmp_path, tune="lora", objective=mean)
    modern.export(tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").classifier_pooling == "mean"
    bert = run(folder_of("bert"), tmp_path, tune="lora", objective=mean)
    with pytest.raises(LuthierError, match="no head that reads rows as this one does"):
        bert.export(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_number_of_an_encoder_has_a_mean(folder_of: Any, tmp_path: Path) -> None:
    rows = [{**row, "label": 3.0 + number} for number, row in enumerate(ROWS)]
    found = run(folder_of("bert"), tmp_path, rows=rows, tune="lora", objective="regress", evaluate={"same": {"rows": rows}})
    assert found.metrics["same"]["before"] == 5.0
    tune, _ = luthier.open_run(found.folder)
    assert tune.head is not None and {"weight", "bias", "tanh_weight", "tanh_bias"} == set(tune.head[0].masters())
    found.export(tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.problem_type == "regression"
    assert torch.equal(theirs.classifier.bias.data, tune.head[0].masters()["bias"])


def test_the_layer_before_the_classes_begins_as_the_models_own_pooler() -> None:
    """BERT brings one; of RoBERTa's pooler, which its checkpoints lack, a new layer takes the place only where there is none."""
    model = tiny("bert")
    parts = map_parts(model)
    own = _layer.start(3, RunServices(Tune(model, parts), "classify", Now()))
    assert torch.equal(own["tanh_weight"], model.pooler.dense.weight) and torch.equal(own["tanh_bias"], model.pooler.dense.bias)
    assert own["weight"].shape == (3, 32) and not own["weight"].any() and not own["bias"].any()
    hidden_BD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    own["weight"], own["bias"] = torch.randn(3, 32), torch.randn(3)
    wanted_BK = torch.tanh(hidden_BD @ model.pooler.dense.weight.T + model.pooler.dense.bias) @ own["weight"].T + own["bias"]
    torch.testing.assert_close(_layer.read(own, hidden_BD), wanted_BK)
    model.pooler = None
    for deviation, wanted in ((0.02, 0.02), (0.3, 0.3), (None, 0.02)):
        parts = replace(map_parts(model), initial_deviation=deviation)
        drawn = _layer.start(3, RunServices(Tune(model, parts), "classify", Now()))
        assert drawn["tanh_weight"].std().item() == pytest.approx(wanted, rel=0.1) and not drawn["tanh_bias"].any()


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_a_text_is_read_the_same_whatever_stands_beside_it(architecture: str, folder_of: Any, tmp_path: Path) -> None:
    """Padding is not attended to, and every token sees those behind it."""
    found = run(folder_of(architecture), tmp_path, rows=QUESTIONS, tune="lora", objective="embed")
    tune, tokenizer = luthier.open_run(found.folder)
    rows = encode_all(list(read(ROWS)), tokenizer, purpose="read").rows
    alone_BD = torch.cat([readings(tune, [row]) for row in rows])
    torch.testing.assert_close(readings(tune, rows), alone_BD, atol=1e-5, rtol=1e-5)
    assert torch.allclose(alone_BD.norm(dim=-1), torch.ones(len(rows)))
    first = {"embed": {"pool": "first"}}
    other = run(folder_of(architecture), tmp_path, rows=QUESTIONS, tune="lora", objective=first, train={"steps": 1})
    tune, tokenizer = luthier.open_run(other.folder)
    ends = [{"text": f"It was {word}."} for word in ("warm", "worn")]
    vectors_BD = readings(tune, encode_all(list(read(ends)), tokenizer, purpose="read").rows)
    assert not torch.allclose(vectors_BD[0], vectors_BD[1], atol=1e-4), "the first token has seen the last word"


def test_an_encoder_goes_on_as_if_it_had_not_stopped(folder_of: Any, tmp_path: Path) -> None:
    """Stopped behind its second step and resumed: the same numbers, head and all."""
    keys: dict[str, Any] = {"tune": "lora", "objective": CLASSES, "train": {"steps": 4, "save_every": 2}}
    whole = run(folder_of("bert"), tmp_path / "whole", **keys)

    def stop(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder_of("bert"), tmp_path / "cut", tell=stop, **keys)
    (folder,) = [path.parent for path in (tmp_path / "cut").glob("*/run.json")]
    resumed = run(folder_of("bert"), tmp_path / "cut", resume=folder, **keys)
    for name in ("delta.safetensors", "adapters.safetensors"):
        mine, other = (load_file(one.folder / name) for one in (whole, resumed))
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"objective": "cross_entropy", "rows": [{"text": "abc"}]}, "`cross_entropy` learns from the tokens that a language model"),
        ({"objective": "dpo", "rows": PAIRS}, "`dpo` learns from the tokens"),
        ({"objective": "kto", "rows": PAIRS}, "`kto` learns from the tokens"),
        (
            {"objective": "reward_model", "rows": PAIRS},
            "`reward_model` reads answers within their conversation, and bert is an encoder",
        ),
        ({"objective": [CLASSES, "kl"]}, "`kl` learns from the tokens"),
        ({"objective": CLASSES, "token_weight": "dft"}, "`dft` learns from the tokens"),
        (
            {"objective": CLASSES, "rows": [{"prompt": "a", "completion": "b", "label": 1}]},
            "an encoder, which reads texts, and this row",
        ),
        ({"objective": CLASSES, "evaluate": {"same": {"rows": [{"text": "a"}], "metric": "loss"}}}, "does not predict next tokens"),
        ({"objective": CLASSES, "train": {"packing": True}}, "rows cannot be packed: this model is no causal one"),
    ],
    ids=str,
)
def test_what_needs_predicted_tokens_refuses_an_encoder_by_name(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=words):
        run("tiny:bert", tmp_path, **{"tune": "lora", **keys})


def test_positions_that_begin_behind_padding_leave_room_for_fewer_tokens(tmp_path: Path) -> None:
    """RoBERTa's table of 512 positions is read from 1 on where padding is 0: the longest row has 511 tokens, and one more is refused
    before training, where the model would fail within it."""
    model = load_model("tiny:roberta")
    assert context_of(model.config) == 511 and context_of(load_model("tiny:bert").config) == 512
    assert context_of(transformers.RobertaConfig(max_position_embeddings=514)) == 512
    rows = [{"text": "a" * 511, "label": "bad"}, {"text": "b", "label": "good"}]
    run("tiny:roberta", tmp_path, rows=rows, tune="lora", objective=CLASSES, train={"steps": 1})
    with pytest.raises(LuthierError, match="512 tokens, and at most 511 are allowed"):
        run("tiny:roberta", tmp_path, rows=[{**rows[0], "text": "a" * 512}, rows[1]], tune="lora", objective=CLASSES)


@pytest.mark.parametrize("tune", ["prefix_tuning", "prompt_tuning"])
def test_what_stands_before_a_text_leaves_it_read_both_ways(tune: str, folder_of: Any, tmp_path: Path) -> None:
    """Rows without padding have no mask, which for a model of another kind would mean a causal one."""
    found = run(folder_of("bert"), tmp_path, rows=QUESTIONS, tune=tune, objective="embed")
    opened, tokenizer = luthier.open_run(found.folder)
    rows = encode_all(list(read(ROWS)), tokenizer, purpose="read").rows
    alone_BD = torch.cat([readings(opened, [row]) for row in rows])
    torch.testing.assert_close(readings(opened, rows), alone_BD, atol=1e-5, rtol=1e-5)
