"""A model in memory as the language model evaluation harness (lm-eval) asks one, with whatever is attached to it and nothing merged.

Texts become ids as in the harness's own class for Hugging Face models, and are cut from the left where they exceed the context, so scores
are the same. This module imports the harness, and is imported where that is known to be there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.evaluate.likelihood import continuations
from luthier.generation.generate import generate, stop_ids
from luthier.tune import Tune

MAX_NEW_TOKENS = 256
"""The longest answer of a task that does not say; the harness's own default."""
_OF_DRAWS = ("top_k", "typical_p", "min_p")
"""Options of generation that change nothing where the most likely token is always taken."""


class Decoding(NamedTuple):
    """How a request is answered, of `generation_kwargs`."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float


def decoding_of(options: Mapping[str, Any], where: str) -> Decoding:
    """How the options of a task's generation are read.

    Raises:
        LuthierError: one is not known, or asks for what is not done here, such as beams.
    """
    given = normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS)
    until = given.pop("until", None) or []
    draws = bool(given.pop("do_sample", False))
    longest, temperature, top_p = int(given.pop("max_gen_toks")), float(given.pop("temperature", 0.0)), given.pop("top_p", 1.0)
    for key, value in given.items():
        if value is not None and (key, value) != ("num_beams", 1) and (draws or key not in _OF_DRAWS):
            raise LuthierError(
                f"`{key}: {value}` is no option of generation here",
                where=f"{where}, gen_kwargs",
                fix="known are until, max_gen_toks, do_sample, temperature and top_p",
            )
    if draws and not temperature:
        temperature = 1.0
    until = [until] if isinstance(until, str) else until
    return Decoding(tuple(map(str, until)), longest, temperature if draws else 0.0, float(top_p or 1.0) if draws else 1.0)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness calls.

    Args:
        tune: the model; inside `tune.at("base")` it is the base.
        tokenizer: its tokenizer, whose chat template is used.
        batch_tokens: the most tokens of one batch.
        chat: whether prompts are written with the chat template: an answer then also ends where a turn does.
    """

    def __init__(self, tune: Tune, tokenizer: PreTrainedTokenizerBase, *, batch_tokens: int, chat: bool) -> None:
        super().__init__()
        self.tune, self.tokenizer, self._batch_tokens, self._chat = tune, tokenizer, batch_tokens, chat
        self.notes: Counter[str] = Counter()
        """What was cut or left out, and how often."""

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return int(self._special("eos_token_id"))

    @property
    def prefix_token_id(self) -> int:
        """The id that is read before a text that nothing stands before."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(self._special("bos_token_id"))

    def _special(self, name: str) -> Any:
        found = getattr(self.tokenizer, name)
        if found is None:
            raise LuthierError(
                f"the tokenizer has no `{name}`", where="harness", fix="use a tokenizer with a token that ends texts"
            )
        return found

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads beside its trained prompt."""
        prompt = 0 if self.tune.is_off else self.tune.prompt_length
        return int(resolve_max_length(self.tune.model.config, self.tokenizer)) - prompt

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer, by name."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """A text's ids, with the tokenizer's special ones unless it begins with the first of them already."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for asked, before, follows in requests:
            if not follows:
                raise LuthierError("a text to be told the likelihood of has no tokens", where=str(asked), fix="change the task")
            if len(follows) > self.max_length:
                what = f"{len(follows)} tokens to be told the likelihood of exceed the model's context of {self.max_length}"
                raise LuthierError(what, where=str(asked)[:80], fix="use a model with a longer context")
            room = self.max_length + 1 - len(follows)
            self._note_cut(len(before) - room)
            pairs.append((before[-room:], follows))
        found = continuations(self.tune, pairs, batch_tokens=self._batch_tokens)
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context's length that share no label."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            mine = [(text, *make_disjoint_window(window)) for window in rolled]
            windows += mine
            counts.append(len(mine))
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to where it ends by the task's own rule."""
        answers: dict[int, str] = {}
        by_decoding: dict[Decoding, list[int]] = {}
        for number, request in enumerate(requests):
            by_decoding.setdefault(decoding_of(request.args[1], str(request.task_name)), []).append(number)
        for decoding, numbers in by_decoding.items():
            room = self.max_length - decoding.max_new_tokens
            if room <= 0:
                what = (
                    f"answers of up to {decoding.max_new_tokens} tokens leave no room in the model's context of {self.max_length}"
                )
                raise LuthierError(what, where=str(requests[numbers[0]].task_name), fix="set gen_kwargs: {max_gen_toks: NUMBER}")
            prompts = [self._prompt(requests[number].args[0], room) for number in numbers]
            texts = generate(
                self.tune,
                self.tokenizer,
                prompts,
                max_new_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                numbers=numbers,
                until=(*decoding.until, str(self.tokenizer.decode(self.eot_token_id))),
                ends=self._ends(),
                batch_tokens=self._batch_tokens,
            )
            answers.update(zip(numbers, texts, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _ends(self) -> tuple[int, ...]:
        """The ids that end an answer. Without a chat template there are no turns, and the harness heeds none."""
        if self._chat:
            return stop_ids(self.tune, self.tokenizer)
        configured = getattr(getattr(self.tune.model, "generation_config", None), "eos_token_id", None)
        listed = configured if isinstance(configured, list) else [configured]
        return tuple(dict.fromkeys([self.eot_token_id, *(int(one) for one in listed if one is not None)]))

    def _prompt(self, text: str, room: int) -> list[int]:
        begun = has_bos_prefix(text, self.tokenizer.bos_token)
        ids = list(self.tokenizer(text, **({"add_special_tokens": False} if begun else {}))["input_ids"])
        self._note_cut(len(ids) - room)
        return ids[-room:]

    def _note_cut(self, over: int) -> None:
        if over > 0:
            self.notes["prompts exceed the model's context, and were cut from the left, as the harness does"] += 1

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model reads it."""
        try:
            return self._written(chat_history, add_generation_prompt)
        except jinja2.exceptions.TemplateError:
            self.notes["conversations lost their system turn, which the chat template does not take"] += 1
            return self._written([one for one in chat_history if one["role"] != "system"], add_generation_prompt)

    def _written(self, history: Iterable[dict[str, str]], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(history),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )
