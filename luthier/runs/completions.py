"""Chat completions in the form of OpenAI's interface, answered by a model or a run with all that stands beside its weights."""

from __future__ import annotations

import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from luthier.errors import LuthierError, cut_short, printable
from luthier.generation.generate import context_of, text_of
from luthier.rows.messages import checked_messages
from luthier.runs.chat import Chat, Sampling, answer, prompt_ids

MAX_NEW_TOKENS = 512
"""Longest answer where a request names none, as far as the context allows."""
WAITING = 32
"""Most requests that wait for the one that is being answered."""
_STOPS = 4
"""Most texts that end an answer, as with OpenAI."""
_HALF = "\ufffd"
"""What the first bytes of a character decode to."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Keys that would change answers in ways that are not offered, and what may stand there because it changes nothing."""
_NO_MATTER = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""Keys that change no answer."""
_KEYS = (
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
)


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        message: what was wrong and what to do about it.
        status: of HTTP.
        param: the key it is about.
        code: for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Request(NamedTuple):
    """A checked request."""

    messages: Sequence[Mapping[str, Any]]
    how: Sampling
    prompt: int
    """Tokens that the model reads."""
    stop: tuple[str, ...] = ()
    stream: bool = False
    counts: bool = False
    """Whether a stream ends in the numbers of tokens."""


class Answered(NamedTuple):
    """A finished answer."""

    text: str
    finish: str
    """stop: where the model or a text of `stop` ended it; length: it was cut."""
    tokens: int


class Completions:
    """Answers requests, one at a time.

    Args:
        chat: the model, its tokenizer, and the system turn of conversations that have none.
        max_new_tokens: longest answer where a request names none.

    Raises:
        LuthierError: the model writes no answers.
    """

    def __init__(self, chat: Chat, *, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        tune = chat.tune
        if tune.head is not None or not tune.parts.causal:
            what = f"`{tune.head[0].slot}` is a head that reads rows" if tune.head is not None else "the model is an encoder"
            raise LuthierError(
                f"{what}, and writes no answers",
                where=chat.name,
                fix="export it, and serve it with what reads such models, or serve its weights alone with --weights-only",
            )
        self.chat, self.max_new_tokens = chat, max_new_tokens
        self.name = chat.name.replace("\\", "/").rstrip("/").rpartition("/")[2] or chat.name
        self.since = int(time.time())
        self._one = threading.Lock()
        self._room = threading.BoundedSemaphore(WAITING)

    def model(self) -> dict[str, Any]:
        """What is served, as an entry of `/v1/models`."""
        return {"id": self.name, "object": "model", "created": self.since, "owned_by": "luthier"}

    def check(self, body: Any) -> Request:
        """A request out of its JSON.

        Raises:
            RefusedError: it asks for what is not offered, or cannot be answered.
        """
        if not isinstance(body, dict):
            raise RefusedError("the body must be a JSON object")
        given = {key: value for key, value in body.items() if value is not None}
        _check_keys(given)
        # One model is served, so that a request need not name it.
        if given.get("model", self.name) != self.name:
            told = f"there is no model `{given['model']}` here, but `{self.name}`"
            raise RefusedError(told, status=404, param="model", code="model_not_found")
        messages = self._messages(given.get("messages"))
        try:
            prompt = len(prompt_ids(self.chat.tokenizer, messages))
        except LuthierError as error:
            raise RefusedError(str(error), param="messages") from error
        longest = _number(given, "max_completion_tokens", _number(given, "max_tokens", None, int, 1), int, 1)
        limit = context_of(self.chat.tune)
        room = math.inf if limit is None else limit - prompt
        if room < (longest or 1):
            raise RefusedError(
                f"{prompt} tokens and an answer of up to {longest or 1} exceed the model's context of {limit}",
                param="messages",
                code="context_length_exceeded",
            )
        how = Sampling(
            max_new_tokens=longest or int(min(self.max_new_tokens, room)),
            temperature=_number(given, "temperature", 0.0, float, 0, 2),
            top_p=_number(given, "top_p", 1.0, float, 0, 1),
            seed=_number(given, "seed", secrets.randbelow(1 << 31), int, -(1 << 63), (1 << 63) - 1),
        )
        if how.top_p == 0:
            raise RefusedError("`top_p` must be above 0", param="top_p")
        options = given.get("stream_options", {})
        if not isinstance(options, dict) or not isinstance(given.get("stream", False), bool):
            raise RefusedError("`stream` is true or false, and `stream_options` an object", param="stream")
        return Request(messages, how, prompt, _stops(given), given.get("stream", False), options.get("include_usage") is True)

    def _messages(self, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            raise RefusedError("`messages` must be a list of {role, content}", param="messages")
        try:
            messages = checked_messages(value, "messages")
        except LuthierError as error:
            raise RefusedError(f"{error.what}{'; ' if error.fix else ''}{error.fix}", param="messages") from error
        if messages[-1]["role"] == "assistant":
            raise RefusedError("the last message is an assistant's: answers are not continued", param="messages")
        if self.chat.system and not any(one["role"] in ("system", "developer") for one in messages):
            return [{"role": "system", "content": self.chat.system}, *messages]
        return messages

    def answer(self, request: Request, hear: Callable[[str], bool]) -> Answered:
        """Answer a request, when its turn has come.

        Args:
            request: what `check` gave.
            hear: told each new piece of the answer; it may end it.

        Raises:
            RefusedError: too many requests wait, or the model gives no answer.
        """
        if not self._room.acquire(blocking=False):
            raise RefusedError(f"{WAITING} requests wait already: try again", status=503, code="overloaded")
        try:
            with self._one:
                return self._answer(request, hear)
        except RefusedError:
            raise
        # Whatever fails in a model, such as for want of memory, is the answer to this request and not the end of the server.
        except Exception as error:
            told = str(error) if isinstance(error, LuthierError) else f"{type(error).__name__}: {cut_short(printable(str(error)))}"
            raise RefusedError(f"the model gives no answer: {told}", status=500) from error
        finally:
            self._room.release()

    def _answer(self, request: Request, hear: Callable[[str], bool]) -> Answered:
        told = _Told(request.stop, hear)

        def each(place: int, ids: Sequence[int]) -> bool:
            return told.so_far(text_of(self.chat.tokenizer, ids), len(ids))

        text = answer(self.chat.tune, self.chat.tokenizer, request.messages, request.how, each)
        told.last(text)
        cut = not told.ended and told.tokens == request.how.max_new_tokens
        return Answered(told.text, "length" if cut else "stop", told.tokens)


class _Told:
    """What has been told of an answer: never half a character, and nothing that may turn out to be what ends it."""

    def __init__(self, stop: tuple[str, ...], hear: Callable[[str], bool]) -> None:
        self.stop, self.hear = stop, hear
        self.text, self.tokens, self.ended = "", 0, False

    def so_far(self, text: str, tokens: int) -> bool:
        """Hear an answer up to here. Returns whether it goes on."""
        self.tokens = tokens
        if self._at_end(text):
            return False
        held = max((size for one in self.stop for size in range(1, len(one)) if text.endswith(one[:size])), default=0)
        safe = text[: len(text) - held]
        return safe.endswith(_HALF) or self._tell(safe)

    def last(self, text: str) -> None:
        """Hear the whole answer."""
        if not self.ended and not self._at_end(text):
            self._tell(text)

    def _at_end(self, text: str) -> bool:
        found = [place for one in self.stop if (place := text.find(one)) >= 0]
        if found:
            self._tell(text[: min(found)])
            self.ended = True
        return self.ended

    def _tell(self, text: str) -> bool:
        new = text[len(self.text) :]
        self.text = text if new else self.text
        if new and not self.hear(new):
            self.ended = True
        return not self.ended


def _check_keys(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise RefusedError(f"`{key}` is not offered here: leave it out", param=key, code="unsupported_parameter")
        if key not in _NEUTRAL and key not in _NO_MATTER and key not in _KEYS:
            raise RefusedError(f"`{key}` is not known here: leave it out", param=key, code="unknown_parameter")


def _number(given: Mapping[str, Any], key: str, default: Any, kind: type, least: float, most: float = math.inf) -> Any:
    value = given.get(key, default)
    if value is default:
        return value
    right = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not right or not least <= value <= most:
        bounds = f"from {least}" + ("" if most == math.inf else f" to {most}")
        raise RefusedError(f"`{key}` must be {'a whole' if kind is int else 'a'} number {bounds}", param=key)
    return kind(value)


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("stop", [])
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or len(listed) > _STOPS or not all(isinstance(one, str) and one for one in listed):
        raise RefusedError(f"`stop` is a text or a list of up to {_STOPS}", param="stop")
    return tuple(listed)


class Written:
    """The documents of one answer.

    Args:
        name: of the model.
        request: what is answered.
    """

    def __init__(self, name: str, request: Request) -> None:
        self.request = request
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}

    def whole(self, answered: Answered) -> dict[str, Any]:
        """An answer in one."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answered.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answered.finish,
        }
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage(answered)}

    def piece(self, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def end(self, answered: Answered) -> list[dict[str, Any]]:
        """The last pieces of a stream."""
        pieces = [self.piece({}, answered.finish)]
        if self.request.counts:
            pieces.append({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage(answered)})
        return pieces

    def _usage(self, answered: Answered) -> dict[str, int]:
        prompt = self.request.prompt
        return {"prompt_tokens": prompt, "completion_tokens": answered.tokens, "total_tokens": prompt + answered.tokens}


def event(document: Any) -> bytes:
    """A document as a server-sent event."""
    text = document if isinstance(document, str) else json.dumps(document)
    return f"data: {text}\n\n".encode()
