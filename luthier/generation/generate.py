"""Answers: batched decoding with a cache, greedy unless a temperature is given.

The loop is luthier's own, because it takes virtual ids of trained prompts, drops rows from the batch and from the cache
as soon as they end, and draws by row, so that an answer does not depend on which rows share its batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from luthier import draws, machine
from luthier.errors import LuthierError
from luthier.models import context
from luthier.models.head import head_of
from luthier.models.modes import evaluating
from luthier.rows.encode import end_of_turn_ids
from luthier.rows.limits import check_ids
from luthier.tune import Tune

BATCH_TOKENS = 8192
"""Most tokens of one batch. 60 short prompts in one batch take a processor 15 % less than in two."""

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""Logits [B, V], the rows' numbers [B] and the step, to tokens [B]."""
Hear = Callable[[int, Sequence[int]], bool]
"""A prompt's place and the ids of its answer so far, to whether the answer goes on."""


def generate(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    until: Sequence[str] = (),
    ends: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    hear: Hear | None = None,
) -> list[str]:
    """Answer prompts, in their order, as texts without special tokens.

    Args:
        tune: the model, with what is attached to it; trained prompts stand before each row.
        tokenizer: the model's tokenizer.
        prompts: token ids, as `encode_prompt` gives them.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 takes the most likely token always; else logits are divided by it and tokens are drawn.
        top_p: draw only among the most likely tokens that together have this probability (Holtzman et al., 2020).
        seed: of the draws; a prompt's draws depend on it, on the prompt's number and on nothing else.
        numbers: one for each prompt, such as `luthier.draws.seed_of` makes of names; None: its place in `prompts`.
        until: texts that end an answer, which is cut before the first of them.
        ends: ids that end an answer; None: `stop_ids`.
        batch_tokens: the most tokens of one batch, with padding and answers.
        hear: told of each answer after each of its tokens; it may end the answer there.

    Raises:
        LuthierError: a prompt is empty, an option is out of range, or a prompt and its answer exceed the context; or
            the model gives numbers that are not finite.
    """
    _check(tune, tokenizer, prompts, max_new_tokens, temperature, top_p)
    choose = _greedy if temperature == 0 else _nucleus(temperature, top_p, seed)
    ends_E = torch.tensor(stop_ids(tune, tokenizer) if ends is None else list(ends), dtype=torch.int64)
    stops = _stops(tokenizer, [text for text in until if text])
    number_P = torch.arange(len(prompts)) if numbers is None else torch.tensor(numbers, dtype=torch.int64)
    answers: dict[int, list[int]] = {}
    with evaluating(tune.model):
        for chosen in _batches([len(prompt) for prompt in prompts], max_new_tokens, batch_tokens):
            asked = [prompts[index] for index in chosen]
            heard = _heard(hear, stops, chosen)
            decoded = _decode(tune, asked, number_P[chosen], ends_E, max_new_tokens, choose, heard)
            answers.update(zip(chosen, decoded, strict=True))
    return [_cut(text_of(tokenizer, answers[index]), until) for index in range(len(prompts))]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """An answer's ids as text without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _cut(text: str, until: Sequence[str]) -> str:
    """What stands before the first of some texts."""
    for one in until:
        text = text.split(one)[0] if one else text
    return text


def _stops(tokenizer: PreTrainedTokenizerBase, until: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Whether the newest tokens of an answer end it; None where no text does."""
    if not until:
        return None
    # A character takes four tokens at most, those of its bytes; the last token may go beyond the text.
    window = 4 * max(map(len, until)) + 1

    def stops(ids: Sequence[int]) -> bool:
        newest = tokenizer.decode(list(ids[-window:]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(text in newest for text in until)

    return stops


def _heard(hear: Hear | None, stops: Callable[[Sequence[int]], bool] | None, chosen: Sequence[int]) -> Hear | None:
    """What is asked after each token of a batch's answers, whose prompts have these numbers: whether the answer goes on."""
    if hear is None and stops is None:
        return None

    def heard(row: int, ids: Sequence[int]) -> bool:
        goes_on = hear is None or hear(chosen[row], ids)
        return goes_on and (stops is None or not stops(ids))

    return heard


def stop_ids(tune: Tune, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end an answer: the chat template's end of turn, the tokenizer's end of sequence, and those of the
    model's own generation settings."""
    configured = getattr(getattr(tune.model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys([*end_of_turn_ids(tokenizer), *(one for one in listed if one is not None)]))


def context_of(tune: Tune) -> int | None:
    """The most tokens the model reads beside its trained prompt; None where it states no limit."""
    limit = context.context_of(cast(PreTrainedModel, tune.model).config)
    return None if limit is None else limit - _prompt_length(tune)


def _prompt_length(tune: Tune) -> int:
    return 0 if tune.is_off else tune.prompt_length


def _check(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    for name, value, right in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not right:
            fix = "give max_new_tokens from 1, temperature from 0, top_p above 0 and up to 1"
            raise LuthierError(f"{name} is {value}", fix=fix)
    limit = context_of(tune)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise LuthierError("the prompt has no token", where=f"prompt {index}", fix="give at least one token")
        check_ids(prompt, tokenizer, tune.parts.vocabulary, f"prompt {index}")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise LuthierError(
                f"{len(prompt)} tokens and an answer of up to {max_new_tokens} exceed the model's context of {limit}",
                where=f"prompt {index}",
                fix="shorten the prompt" + (", or lower max_new_tokens" if len(prompt) < limit else ""),
            )


def _batches(lengths: Sequence[int], new: int, batch_tokens: int) -> list[list[int]]:
    """Indices of prompts, sorted by length, in batches of about equal size."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    batches: list[list[int]] = []
    while order:
        # From the longest on, so that its length bounds the batch.
        room = max(1, batch_tokens // (lengths[order[-1]] + new))
        size = -(-len(order) // -(-len(order) // room))
        batches.append(order[-size:])
        order = order[:-size]
    return batches


def _decode(
    tune: Tune,
    prompts: Sequence[Sequence[int]],
    number_B: Tensor,
    ends: Tensor,
    new: int,
    choose: Choose,
    hear: Hear | None,
) -> list[list[int]]:
    """The new ids of each prompt, up to where it ends."""
    device = next(tune.model.parameters()).device
    ids_BT, attend_BT = _padded(prompts, _prompt_length(tune))
    ids_BT, attend_BT, ends, number_B = (one.to(device) for one in (ids_BT, attend_BT, ends, number_B))
    model, head = cast(PreTrainedModel, tune.model), head_of(tune.model, tune.parts)
    backbone: Any = tune.model.get_submodule(tune.parts.backbone)
    cache = DynamicCache(config=model.config) if _keeps_states(model, backbone) else None
    answers: list[list[int]] = [[] for _ in prompts]
    alive_B = torch.arange(len(prompts), device=device)
    position_BT = (attend_BT.cumsum(-1) - 1).clamp(min=0)
    for step in range(new):
        output = backbone(
            input_ids=ids_BT,
            attention_mask=attend_BT.long(),
            position_ids=position_BT,
            **({"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}),
        )
        logits_BV = head(output.last_hidden_state[:, -1])
        if not logits_BV.amax(-1).isfinite().all():
            raise LuthierError("the model gives numbers that are not finite", fix="lower the learning rate, or use precision fp32")
        token_B = choose(logits_BV, number_B[alive_B], step)
        goes_on = (~torch.isin(token_B, ends)).tolist()
        for place, (row, token) in enumerate(zip(alive_B.tolist(), token_B.tolist(), strict=True)):
            if goes_on[place]:
                answers[row].append(token)
                goes_on[place] = hear is None or hear(row, answers[row])
        if not all(goes_on):
            kept = torch.tensor([place for place, one in enumerate(goes_on) if one], dtype=torch.int64, device=device)
            if not len(kept):
                break
            if cache is not None:
                # Recurrent states know no other way to leave rows out.
                cache.reorder_cache(kept)  # type: ignore[arg-type]
            alive_B, token_B, ids_BT = alive_B[kept], token_B[kept], ids_BT[kept]
            attend_BT, position_BT = attend_BT[kept], position_BT[kept]
        next_B1, place_B1 = token_B[:, None], position_BT[:, -1:] + 1
        ids_BT = next_B1 if cache is not None else torch.cat([ids_BT, next_B1], dim=1)
        position_BT = place_B1 if cache is not None else torch.cat([position_BT, place_B1], dim=1)
        attend_BT = torch.cat([attend_BT, attend_BT.new_ones(len(attend_BT), 1)], dim=1)
    return answers


def _keeps_states(model: Any, backbone: Any) -> bool:
    """Whether a model goes on from what it kept of the tokens before, in the usual form; else it reads all of them for each new one.

    One that keeps states of its own kind (Mamba 2) takes the usual form without a word, and forgets all before the last token.
    """
    usual = "past_key_values" in inspect.signature(backbone.forward).parameters
    return usual and bool(model._supports_default_dynamic_cache())


def _padded(prompts: Sequence[Sequence[int]], virtual: int) -> tuple[Tensor, Tensor]:
    """Ids and attention [B, T], padded on the left, with virtual ids -1 to -`virtual` before each row."""
    rows = [[*range(-1, -1 - virtual, -1), *prompt] for prompt in prompts]
    time = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (time - len(row)) + row for row in rows])
    attend_BT = torch.tensor([[0] * (time - len(row)) + [1] * len(row) for row in rows], dtype=torch.bool)
    return ids_BT, attend_BT


def _greedy(logits_BV: Tensor, number_B: Tensor, step: int) -> Tensor:
    # Four times as fast as argmax in bf16 on processors; both give the first of equals.
    return logits_BV.max(-1).indices


def _nucleus(temperature: float, top_p: float, seed: int) -> Choose:
    """Draw by inverting the cumulative distribution at one uniform number a row and step."""

    def choose(logits_BV: Tensor, number_B: Tensor, step: int) -> Tensor:
        probability_BV, token_BV = (machine.widened(logits_BV) / temperature).softmax(-1).sort(descending=True, stable=True)
        before_BV = probability_BV.cumsum(-1) - probability_BV
        # The most likely token always stays: nothing comes before it.
        probability_BV = probability_BV.masked_fill(before_BV >= top_p, 0.0)
        reached_BV = probability_BV.cumsum(-1)
        drawn_B = machine.widened(draws.uniform(draws.keys(seed, step, number_B, torch.zeros_like(number_B)))) * reached_BV[:, -1]
        place_B1 = torch.searchsorted(reached_BV, drawn_B[:, None], right=True).clamp(max=logits_BV.shape[1] - 1)
        return token_BV.gather(-1, place_B1)[:, 0].to(logits_BV.device)

    return choose
