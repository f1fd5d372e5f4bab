"""Talking to a model, or to what a run made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from luthier import draws
from luthier.errors import LuthierError, Say, silent
from luthier.generation.generate import Hear, generate
from luthier.results.folder import read_run
from luthier.results.opened import open_base, open_model
from luthier.results.start import is_run
from luthier.rows.encode import encode_prompt
from luthier.rows.shapes import Row
from luthier.tune import Tune

MOSTLY, MOSTLY_NOT = 0.9, 0.1
"""Shares of rows with a system turn from which on asking otherwise is warned of."""


class Sampling(NamedTuple):
    """How an answer is written; the defaults are those of `luthier chat`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 for the most likely token, always."""
    top_p: float = 1.0
    seed: int = 0
    """Of the draws when the temperature is above 0."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The ids of a conversation, up to where the model answers.

    Raises:
        LuthierError: a text is not valid UTF-8, or the chat template refuses the conversation.
    """
    if any("\ud800" <= letter <= "\udfff" for message in messages for letter in str(message["content"])):
        raise LuthierError("the question is not valid UTF-8", where="the question", fix="type or paste it as UTF-8 text")
    return encode_prompt(Row("chat", "messages", {"messages": list(messages)}, "chat", {}), tokenizer)


def answer(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    how: Sampling,
    hear: Hear | None = None,
) -> str:
    """The answer to a conversation; draws depend on the seed and on how many turns there are.

    Raises:
        LuthierError: the conversation cannot be read, or an option is out of range.
    """
    (text,) = generate(
        tune,
        tokenizer,
        [prompt_ids(tokenizer, messages)],
        max_new_tokens=how.max_new_tokens,
        temperature=how.temperature,
        top_p=how.top_p,
        seed=draws.seed_of(how.seed, "chat", len(messages)),
        hear=hear,
    )
    return text


class Chat:
    """A conversation with a model or a run.

    Args:
        model: a model's name or a run's folder.
        max_new_tokens: longest answer.
        temperature: 0 for the most likely token, always.
        top_p: draw only among the most likely tokens that together have this probability.
        seed: of the draws when the temperature is above 0.
        weights_only: of a run, without the prompts, prefixes and edits beside its weights.
        system: the text of a system turn before every question; empty for none.
    """

    def __init__(
        self,
        model: str,
        *,
        say: Say = silent,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        weights_only: bool = False,
        system: str = "",
    ) -> None:
        self.tune, self.tokenizer = open_model(model, say=say, weights_only=weights_only)
        self.name, self.system = model, system
        self.how = Sampling(max_new_tokens, temperature, top_p, seed)
        self.turns: list[dict[str, str]] = []
        self._base: Tune | None = None

    def _answer(self, tune: Tune, messages: Sequence[Mapping[str, str]]) -> str:
        said = [{"role": "system", "content": self.system}] if self.system else []
        return answer(tune, self.tokenizer, [*said, *messages], self.how)

    def ask(self, prompt: str) -> str:
        """One question without a past."""
        return self._answer(self.tune, [{"role": "user", "content": prompt}])

    def ask_base(self, prompt: str) -> str:
        """The same question to the base of a run."""
        if self._base is None:
            self._base, _ = open_base(read_run(self.name))
        return self._answer(self._base, [{"role": "user", "content": prompt}])

    def say_turn(self, text: str) -> str:
        """The next turn of the conversation."""
        self.turns.append({"role": "user", "content": text})
        answer = self._answer(self.tune, self.turns)
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def reset(self) -> None:
        """Begin a new conversation; the system turn stays."""
        self.turns.clear()

    def warning(self) -> str:
        """Says that a run learned with a system turn and is asked without one, or the reverse; empty where neither is so."""
        share = read_run(self.name).facts.get("rows", {}).get("system_turns") if is_run(self.name, "runs") else None
        return system_warning(share, bool(self.system))


def system_warning(share: float | None, given: bool) -> str:
    """What is said of a system turn that a run learned with, or did not.

    Args:
        share: of the run's rows, how many began with one; None where it is not known, or rows asked nothing.
        given: whether the model is asked with one.
    """
    if share is None or MOSTLY_NOT < share < MOSTLY:
        return ""
    if share >= MOSTLY and not given:
        return (
            f"{share:.0%} of the rows of this run had a system turn, and it is asked without one: give it as in the rows (--system)"
        )
    if share <= MOSTLY_NOT and given:
        return (
            f"{share:.0%} of the rows of this run had a system turn, and it is asked with one: leave it out to ask as in the rows"
        )
    return ""
