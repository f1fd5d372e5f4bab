"""Answers: the same as those of transformers, whatever is attached and however rows are batched."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.errors import LuthierError
from luthier.generation.generate import context_of, generate, stop_ids
from luthier.kinds import Now, Prefix, Prompt
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.registry import kinds_under
from luthier.rows.batches import collate
from luthier.rows.encode import Encoded
from luthier.training.services import RunServices
from luthier.tune import Tune
from luthier.tune.forward import hidden

TOKENIZER: Any = tiny_tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("Who?", "What is the color of the gate?", "a", "Name the mill.", "b")]
# transformers computes Gemma 2's attention in a form that has no fp64 where rows are padded on the left.
FP32, FP64 = torch.float32, torch.float64
CAUSAL = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "mixtral")


def tune_of(architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = FP64) -> Tune:
    model = tiny(architecture, seed=seed, dtype=dtype)
    return Tune(model, map_parts(model))


def add(tune: Tune, *values: Any) -> Tune:
    for value in values:
        tune.add("toy", value, RunServices(tune, "toy", Now()), {})
    return tune


def prompt_of(length: int) -> Prompt:
    """A prompt of random embeddings."""

    def start(table_VD: Tensor, services: Any) -> dict[str, Tensor]:
        return {"prompt": torch.randn(length, table_VD.shape[1], generator=services.rng("prompt")).to(table_VD)}

    def apply(tensors: dict[str, Tensor], token_ids_BT: Tensor, embeds_BTD: Tensor) -> Tensor:
        chosen = tensors["prompt"][(-1 - token_ids_BT).clamp(min=0)]
        return torch.where((token_ids_BT < 0)[..., None], chosen, embeds_BTD)

    return Prompt(start, apply, length)


def prefix_of(length: int) -> Prefix:
    """A prefix of random keys and values."""

    def start(parts: Any, services: Any) -> dict[str, Tensor]:
        shape = (parts.blocks, parts.key_value_heads, length, parts.head_width)
        return {name: torch.randn(shape, generator=services.rng(name)) for name in ("key", "value")}

    return Prefix(start, lambda tensors, block: (tensors["key"][block], tensors["value"][block]))


def greedy_without_cache(tune: Tune, prompt: list[int], new: int) -> list[int]:
    """One token at a time through the training path, which knows neither cache nor left padding."""
    ids, answer = list(prompt), []
    ends = stop_ids(tune, TOKENIZER)
    for _ in range(new):
        row = Encoded("row", tuple(ids), (False,) * len(ids), "", {}, 0, "prompt")
        with torch.no_grad():
            last_D = hidden(tune, collate([row])).values[0, -1]
            token = int(tune.model.get_submodule(tune.parts.head)(last_D).argmax())
        if token in ends:
            break
        ids.append(token)
        answer.append(token)
    return answer


def decoded(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("architecture", CAUSAL)
def test_answers_are_those_of_transformers(architecture: str) -> None:
    tune = tune_of(architecture, dtype=FP32 if architecture == "gemma2" else FP64)
    model: Any = tune.model
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        eos = list(stop_ids(tune, TOKENIZER))
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=eos)
        expected.append(decoded(out[0, len(prompt) :].tolist()))
    assert generate(tune, TOKENIZER, PROMPTS, max_new_tokens=12) == expected
    assert len(set(expected)) > 1


def test_a_window_that_slides_over_the_prompt_is_no_hindrance() -> None:
    """The tiny Gemma 2 looks back 64 tokens in every other block."""
    tune = tune_of("gemma2", seed=3, dtype=FP32)
    prompts = [list(range(5, 100)), list(range(40, 110)), [7, 8, 9]]
    expected = [decoded(greedy_without_cache(tune, prompt, 20)) for prompt in prompts]
    assert generate(tune, TOKENIZER, prompts, max_new_tokens=20) == expected


@pytest.mark.parametrize("attached", ["lora", "prompt", "prefix", "prompt and prefix"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_what_is_attached_takes_part(attached: str, architecture: str) -> None:
    tune = tune_of(architecture)
    plain = generate(tune, TOKENIZER, PROMPTS, max_new_tokens=8)
    if attached == "lora":
        add(tune, *registry.make({"lora": {"rank": 2}}, kinds_under("tune")).values)
        generator = torch.Generator().manual_seed(0)
        tune.set({name: torch.randn(one.master.shape, generator=generator) for name, one in tune.trained.items()})
    add(tune, *([prompt_of(3)] if "prompt" in attached else []), *([prefix_of(2)] if "prefix" in attached else []))
    expected = [decoded(greedy_without_cache(tune, prompt, 8)) for prompt in PROMPTS]
    assert generate(tune, TOKENIZER, PROMPTS, max_new_tokens=8) == expected != plain
    with tune.at("base"):
        assert generate(tune, TOKENIZER, PROMPTS, max_new_tokens=8) == plain


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 4}])
def test_batches_change_nothing(options: dict[str, Any]) -> None:
    """Fault 14: prompts of unequal length are padded on the left, so an answer does not depend on its neighbors."""
    tune = tune_of(seed=2)
    prompts = [prompt[:size] for prompt in PROMPTS for size in (1, 3, 9)]
    together = generate(tune, TOKENIZER, prompts, max_new_tokens=10, **options)
    for batch_tokens in (1, 40, 90):
        assert generate(tune, TOKENIZER, prompts, max_new_tokens=10, batch_tokens=batch_tokens, **options) == together


def forced(tune: Tune, tokens: dict[int, int]) -> Tune:
    """A model whose next token depends on the last alone."""

    def say(module: Any, arguments: Any, logits: Tensor) -> Tensor:
        forced_logits = torch.zeros_like(logits)
        for row, token in enumerate(seen["ids"]):
            forced_logits[row, tokens.get(token, token)] = 1.0
        return forced_logits

    seen: dict[str, list[int]] = {}

    def look(module: Any, arguments: Any) -> None:
        seen["ids"] = arguments[0][:, -1].tolist()

    tune.model.get_submodule(tune.parts.embedding).register_forward_pre_hook(look)
    tune.model.get_submodule(tune.parts.head).register_forward_hook(say)
    return tune


def test_rows_stop_at_their_own_end() -> None:
    """Of three rows one ends at once, one in the middle, and one is cut; none gets another's tokens."""
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    a, b, c, d = (TOKENIZER(letter)["input_ids"][0] for letter in "abcd")
    tune = forced(tune_of(), {a: b, b: c, c: end, d: d})
    prompts = [[d], [d, d, b], [a], [d, c]]
    assert generate(tune, TOKENIZER, prompts, max_new_tokens=5) == ["ddddd", "c", "bc", ""]


def test_every_end_ends() -> None:
    """The template's end of turn, the tokenizer's end of sequence and the model's own settings."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tune = tune_of()
    model: Any = tune.model
    model.generation_config.eos_token_id = [77, 78]
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids(tune, tokenizer) == (end_of_turn, tokenizer.eos_token_id, 77, 78)
    model.generation_config.eos_token_id = 77
    assert stop_ids(tune, tokenizer) == (end_of_turn, tokenizer.eos_token_id, 77)


def test_the_answer_stops_at_an_end_from_the_settings() -> None:
    a, b, c = (TOKENIZER(letter)["input_ids"][0] for letter in "abc")
    tune = forced(tune_of(), {a: b, b: c, c: a})
    model: Any = tune.model
    model.generation_config.eos_token_id = [c]
    assert generate(tune, TOKENIZER, [[a]], max_new_tokens=9) == ["b"]


def test_special_tokens_are_left_out_and_spaces_stay() -> None:
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    a, space, point = (TOKENIZER(letter)["input_ids"][0] for letter in "a .")
    tune = forced(tune_of(), {a: start, start: space, space: point, point: a})
    assert generate(tune, TOKENIZER, [[a]], max_new_tokens=4) == [" .a"]


def test_draws_follow_the_distribution_and_the_nucleus() -> None:
    """Fault 28: draws repeat with the seed. Three tokens with probabilities 1/2, 1/3 and 1/6."""
    tune = tune_of()
    chances = {70: 3.0, 71: 2.0, 72: 1.0}

    def say(module: Any, arguments: Any, logits: Tensor) -> Tensor:
        fixed = torch.full_like(logits, -1e9)
        for token, chance in chances.items():
            fixed[:, token] = torch.tensor(chance).log()
        return fixed

    tune.model.get_submodule(tune.parts.head).register_forward_hook(say)

    def shares(**options: Any) -> list[float]:
        answers = generate(tune, TOKENIZER, [[5]] * 600, max_new_tokens=4, batch_tokens=10**6, **options)
        drawn = [TOKENIZER(answer)["input_ids"] for answer in answers]
        assert {len(answer) for answer in drawn} == {4}
        return [sum(answer.count(token) for answer in drawn) / 2400 for token in chances]

    assert shares(temperature=1.0) == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.03)
    # Half the temperature squares the odds: 9, 4 and 1 of 14.
    assert shares(temperature=0.5) == pytest.approx([9 / 14, 4 / 14, 1 / 14], abs=0.03)
    # The first two reach 0.6; they keep their odds of 3 to 2.
    assert shares(temperature=1.0, top_p=0.6) == pytest.approx([0.6, 0.4, 0.0], abs=0.03)
    assert shares(temperature=1.0, top_p=0.5) == [1.0, 0.0, 0.0]
    assert shares(temperature=1.0, seed=1) == shares(temperature=1.0, seed=1) != shares(temperature=1.0, seed=2)


def test_the_model_is_left_as_it_was_and_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    tune = tune_of()
    tune.model.train()
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(tune, TOKENIZER, PROMPTS, max_new_tokens=4, temperature=1.0)
    assert tune.model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_numbers_that_are_not_finite_are_no_answer() -> None:
    tune = tune_of()
    tune.model.get_parameter(f"{tune.parts.head}.weight").data[3] = float("nan")
    with pytest.raises(LuthierError, match="not finite"):
        generate(tune, TOKENIZER, PROMPTS)


def test_nothing_asked_nothing_answered() -> None:
    assert generate(tune_of(), TOKENIZER, []) == []


@pytest.mark.parametrize(
    ("options", "word"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p")],
)
def test_options_out_of_range_are_refused(options: Any, word: str) -> None:
    with pytest.raises(LuthierError, match=word):
        generate(tune_of(), TOKENIZER, PROMPTS, **options)


def test_what_does_not_fit_is_refused() -> None:
    tune = add(tune_of(), prompt_of(12))
    assert context_of(tune) == 500
    with tune.at("base"):
        assert context_of(tune) == 512
    with pytest.raises(LuthierError, match="exceed the model's context of 500") as problem:
        generate(tune, TOKENIZER, [[5], [5] * 480], max_new_tokens=21)
    assert problem.value.where == "prompt 1"
    with pytest.raises(LuthierError, match="no token"):
        generate(tune, TOKENIZER, [[]])


def test_texts_end_answers_which_are_cut_before_them() -> None:
    tune = tune_of()
    whole = generate(tune, TOKENIZER, PROMPTS, max_new_tokens=24)
    # Something of two bytes or more in the midst of an answer, where a window of one token would miss it.
    text = max(whole, key=len)
    stop = text[5:8]
    assert len(text) > 10 and len(stop) == 3
    steps: list[int] = []
    head = tune.model.get_submodule(tune.parts.head)
    hook = head.register_forward_hook(lambda *given: steps.append(1))
    found = generate(tune, TOKENIZER, PROMPTS, max_new_tokens=24, until=["", stop])
    assert found == [one.split(stop)[0] for one in whole] and stop not in "".join(found)
    (one,) = generate(tune, TOKENIZER, [PROMPTS[whole.index(text)]], max_new_tokens=24, until=[stop])
    used = len(steps)
    hook.remove()
    assert one == text[: text.index(stop)] and used < 48
    (first,) = {TOKENIZER(letter)["input_ids"][0] for letter in text[0]}
    assert generate(tune, TOKENIZER, [PROMPTS[whole.index(text)]], max_new_tokens=24, ends=[first]) == [""]
