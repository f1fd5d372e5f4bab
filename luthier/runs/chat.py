"""Talking to a model, or to what a run made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from luthier import draws
from luthier.errors import LuthierError, Say, silent
from luthier.generation.generate import generate
from luthier.results.folder import read_run
from luthier.results.opened import open_base, open_model
from luthier.results.start import is_run
from luthier.rows.encode import encode_prompt
from luthier.rows.shapes import Row
from luthier.tune import Tune

MOSTLY, MOSTLY_NOT = 0.9, 0.1
"""Shares of rows with a system turn from which on asking otherwise is warned of."""


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
        self.name, self.max_new_tokens, self.temperature, self.seed = model, max_new_tokens, temperature, seed
        self.top_p, self.system = top_p, system
        self.turns: list[dict[str, str]] = []
        self._base: Tune | None = None

    def _answer(self, tune: Tune, messages: Sequence[Mapping[str, str]]) -> str:
        messages = [*([{"role": "system", "content": self.system}] if self.system else []), *messages]
        if any("\ud800" <= letter <= "\udfff" for message in messages for letter in message["content"]):
            raise LuthierError("the question is not valid UTF-8", where="the question", fix="type or paste it as UTF-8 text")
        row = Row("chat", "messages", {"messages": list(messages)}, "chat", {})
        prompt = encode_prompt(row, self.tokenizer)
        seed = draws.seed_of(self.seed, "chat", len(messages))
        (answer,) = generate(
            tune,
            self.tokenizer,
            [prompt],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )
        return answer

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
