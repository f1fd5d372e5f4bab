"""Likelihoods against the model's own logits, and choices by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.evaluate.likelihood import Likelihood, encode_choices, likelihoods, most_likely
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.rows.encode import encode
from luthier.rows.read import read
from luthier.tune import Tune

TOKENIZER: Any = tiny_tokenizer()
ROWS = read(
    [
        {"prompt": "What is the color of the door?", "completion": "Red."},
        {"text": "A short text."},
        {"text": "A text that is quite a bit longer than the short one, so that it is padded less."},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]},
    ]
)
CHOICES = read([{"prompt": "The door is", "choices": ["red", "blue or green", "r"], "answer": "blue or green"}])


def tune_of(architecture: str = "llama") -> Tune:
    model = tiny(architecture, dtype=torch.float64)
    return Tune(model, map_parts(model))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 150, 4096])
def test_nats_are_those_of_the_whole_logits(architecture: str, batch_tokens: int) -> None:
    tune = tune_of(architecture)
    encoded = [encode(row, TOKENIZER) for row in ROWS]
    found = likelihoods(tune, encoded, batch_tokens=batch_tokens)
    model: Any = tune.model
    for row, one in zip(encoded, found, strict=True):
        with torch.no_grad():
            log_TV = model(torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
        targets = [place for place, is_target in enumerate(row.supervised) if is_target]
        expected = -sum(float(log_TV[place - 1, row.token_ids[place]]) for place in targets)
        # Gemma 2's softmax is in fp32 whatever the weights are.
        assert one.nats == pytest.approx(expected, rel=1e-7 if architecture == "gemma2" else 1e-12)
        assert one.targets == len(targets) > 0


def test_no_rows_no_likelihoods() -> None:
    assert likelihoods(tune_of(), []) == []


def test_training_mode_comes_back() -> None:
    tune = tune_of()
    tune.model.train()
    likelihoods(tune, [encode(ROWS[0], TOKENIZER)])
    assert tune.model.training


def test_numbers_that_are_not_finite_are_named() -> None:
    tune = tune_of()
    tune.model.get_parameter(f"{tune.parts.head}.weight").data[3] = float("nan")
    with pytest.raises(LuthierError, match="not finite for 2 of 2 rows") as problem:
        likelihoods(tune, [encode(row, TOKENIZER) for row in ROWS[:2]])
    assert ROWS[0].id in problem.value.where


def test_a_choice_is_scored_without_the_end_of_the_turn() -> None:
    for number, encoded in enumerate(encode_choices(CHOICES[0], TOKENIZER)):
        targets = [token for token, is_target in zip(encoded.token_ids, encoded.supervised, strict=True) if is_target]
        assert TOKENIZER.decode(targets) == CHOICES[0].fields["choices"][number]
        assert encoded.id == f"{CHOICES[0].id}#{number}"
    prompts = {encoded.token_ids[: encoded.supervised.index(True)] for encoded in encode_choices(CHOICES[0], TOKENIZER)}
    assert len(prompts) == 1


def test_the_sum_favors_short_choices_and_the_mean_per_byte_does_not() -> None:
    """2 nats for 1 byte, 3 nats for 3 bytes, 4 nats for 2 letters of 2 bytes each."""
    choices = ["a", "abc", "\u00e9\u00e9"]
    found = [Likelihood(2.0, 1), Likelihood(3.0, 2), Likelihood(4.4, 2)]
    assert most_likely(choices, found, per_byte=False) == 0
    assert most_likely(choices, found, per_byte=True) == 1
    # Per letter the last would be the worst of these two, per byte it is the better.
    assert most_likely(["ab", "\u00e9\u00e9"], [Likelihood(2.4, 1), Likelihood(4.4, 2)], per_byte=True) == 1
    assert most_likely(["a", "b"], [Likelihood(1.0, 1), Likelihood(1.0, 1)], per_byte=False) == 0
