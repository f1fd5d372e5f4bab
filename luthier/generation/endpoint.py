"""The one client for OpenAI-compatible endpoints: chat completions, several at once, kept on the disk, counted, and within a budget.

Nothing is sent unless a recipe or a command names the endpoint; no address is read from the environment. The key comes from an environment
variable alone. It is read when a request is sent, and stands in no file and in no message.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier import disk
from luthier.errors import LuthierError, Say, silent
from luthier.generation.endpoint_address import address, key_in, key_variable
from luthier.generation.endpoint_replies import Answer, Failure, cut, read
from luthier.models.wheel import cache_folder

if TYPE_CHECKING:
    import httpx2

LONGEST_WAIT = 300.0
"""Seconds: an endpoint that asks for more time than this is not waited for."""
_FORMAT = 1
"""Counts up when what is kept of an answer changes."""
_OWN_KEYS = ("model", "messages", "stream", "n")
"""Of a request, what `extra_body` cannot set: the client would ask for one thing and read another."""


class Price(NamedTuple):
    """What a million tokens cost, in the currency of `max_price`."""

    prompt: float
    completion: float


@dataclass(frozen=True)
class Usage:
    """What was asked and what it cost."""

    requests: int = 0
    """Answers that the endpoint gave."""
    cached: int = 0
    """Answers that were there already: on the disk, or to the same words in the same call."""
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Answers that came without a count of their tokens."""

    @property
    def tokens(self) -> int:
        """Of prompts and completions."""
        return self.prompt_tokens + self.completion_tokens

    def price(self, price: Price | None) -> float | None:
        """What the tokens cost; None where no price is known."""
        if price is None:
            return None
        return (self.prompt_tokens * price.prompt + self.completion_tokens * price.completion) / 1e6

    def since(self, earlier: Usage) -> Usage:
        """What came on top of an earlier state."""
        return Usage(**{name: value - getattr(earlier, name) for name, value in asdict(self).items()})


class UnansweredError(LuthierError):
    """Not everything was answered: the endpoint failed, or the budget was used up.

    Args:
        what, where, fix: as in `LuthierError`.
        answers: what was answered before, by the conversation's place; it was paid for.
    """

    def __init__(self, what: str, *, where: str, fix: str, answers: Mapping[int, Answer]) -> None:
        super().__init__(what, where=where, fix=fix)
        self.answers = answers


class Endpoint:
    """An OpenAI-compatible endpoint for chat completions, with what was asked of it counted.

    Args:
        url: where it is, such as `https://api.openai.com/v1`; what stands before `/chat/completions`.
        model: which of its models answers.
        api_key_env: the environment variable with the key. None: `OPENAI_API_KEY`, if it is set, for OpenAI and endpoints on this machine,
            and no key for others; `none`: no key.
        timeout: seconds in which something must arrive, at each try.
        max_retries: tries after the first one where the endpoint is busy (429), fails (5xx) or gives nothing; the pauses double from one
            second to a minute, or are what `Retry-After` says.
        num_concurrent: requests that are under way at once.
        cache: keep answers in `endpoint/` of luthier's cache folder, or in this folder, so that nothing is paid for twice.
        price: of a million tokens, `{prompt: ..., completion: ...}`; None: tokens are counted, not money.
        max_tokens_total: of prompts and completions together; once they are used up nothing more is asked. Requests that are under way
            then still end, so up to `num_concurrent` of them may go beyond it.
        max_price: the same for money.
        extra_body: more keys of each request, such as `top_p`; null leaves out one that would be sent.

    Raises:
        LuthierError: the address is none, or holds a secret; the variable is not set; or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 5,
        num_concurrent: int = 8,
        cache: bool | str = True,
        price: Mapping[str, float] | None = None,
        max_tokens_total: int | None = None,
        max_price: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        self._url, self.shown = address(url)
        self.model, self.price = model, _price(price)
        self._timeout, self._max_retries, self._num_concurrent = timeout, max_retries, num_concurrent
        self._max_tokens, self._max_price, self._extra = max_tokens_total, max_price, dict(extra_body or {})
        self._check()
        self.key_variable = key_variable(self._url, self.shown, api_key_env)
        """The environment variable whose key is sent; None where none is."""
        if self.key_variable is not None:
            key_in(self.key_variable)
        folder = cache_folder() / "endpoint" if cache is True else Path(cache).expanduser() if cache else None
        self.folder: Path | None = folder
        """Where answers are kept."""
        self.used = Usage()
        self._lock = threading.Lock()

    def _check(self) -> None:
        """Refuse settings under which nothing could be asked, or a budget would not hold."""
        if not self.model.strip():
            raise LuthierError("no model is named", where=self.shown, fix="name one of the endpoint's: model: NAME")
        for name, value, least in (
            ("timeout", self._timeout, 0.001),
            ("max_retries", self._max_retries, 0),
            ("num_concurrent", self._num_concurrent, 1),
            ("max_tokens_total", self._max_tokens, 1),
            ("max_price", self._max_price, 0.0),
        ):
            if value is not None and not (math.isfinite(value) and value >= least):
                raise LuthierError(f"`{name}` is {value}", where=self.shown, fix=f"give at least {least}")
        if self._max_price is not None and self.price is None:
            fix = "add price: {prompt: ..., completion: ...}, what a million tokens of each cost"
            raise LuthierError("`max_price` bounds what is paid, and no price is given", where=self.shown, fix=fix)
        own = next((key for key in self._extra if key in _OWN_KEYS), None)
        if own is not None:
            raise LuthierError(f"`extra_body` sets `{own}`", where=self.shown, fix="leave it out: luthier sets it")
        try:
            json.dumps(self._extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            fix = "give text, finite numbers, true, false, lists and mappings"
            raise LuthierError(f"`extra_body` holds what no request can: {error}", where=self.shown, fix=fix) from error

    def described(self) -> str:
        """The model, where it is and whose key it is sent, in words."""
        key = "no key" if self.key_variable is None else f"with the key in {self.key_variable}"
        return f"{self.model} at {self.shown}, {key}"

    def ask(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        *,
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        seeds: int | Sequence[int] = 0,
        say: Say = silent,
    ) -> list[Answer]:
        """Have conversations answered, in their order. Equal requests are sent once.

        Args:
            conversations: messages of `role` and `content` each.
            temperature: 0: the most likely answer; None: the endpoint's default.
            max_tokens: the longest answer; None: the endpoint's default.
            seeds: of the draws, where the endpoint heeds it; one for all, or one each, which tells several answers to one question apart.
            say: hears how far it is, and of tries that failed.

        Raises:
            UnansweredError: the endpoint refused or failed, or the budget is used up. It holds the answers that there are.
        """
        each = [seeds] * len(conversations) if isinstance(seeds, int) else list(seeds)
        bodies = [self._body(messages, temperature, max_tokens, seed) for messages, seed in zip(conversations, each, strict=True)]
        keys = [self._digest(body) for body in bodies]
        found = {key: kept for key in dict.fromkeys(keys) if (kept := self._kept(key)) is not None}
        todo = {key: body for key, body in zip(keys, bodies, strict=True) if key not in found}
        self._count(cached=len(keys) - len(todo))
        problem = self._ask_all(todo, found, say) if todo else None
        if problem is not None:
            answers = {place: found[key] for place, key in enumerate(keys) if key in found}
            raise UnansweredError(
                f"{problem.what} ({len(answers)} of {len(keys)} are answered)",
                where=problem.where,
                fix=problem.fix + self._kept_words(len(answers)),
                answers=answers,
            ) from problem
        return [found[key] for key in keys]

    def _kept_words(self, answers: int) -> str:
        return f"; what is answered is kept in {self.folder} and not asked again" if self.folder is not None and answers else ""

    def _body(
        self, messages: Sequence[Mapping[str, Any]], temperature: float | None, max_tokens: int | None, seed: int
    ) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [dict(one) for one in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
            **self._extra,
        }
        return {key: value for key, value in body.items() if value is not None}

    def _digest(self, body: Mapping[str, Any]) -> str:
        """Names all that decides the answer; the key of a user does not."""
        return hashlib.sha256(json.dumps([_FORMAT, self._url, body], sort_keys=True).encode()).hexdigest()

    def _ask_all(self, todo: Mapping[str, Mapping[str, Any]], found: dict[str, Answer], say: Say) -> LuthierError | None:
        """Put answers into `found`, several at once. Returns what stopped it, if anything did."""
        import httpx2

        stop, problem = threading.Event(), None
        said = max(1, len(todo) // 10)
        try:
            client = httpx2.Client(timeout=self._timeout, limits=httpx2.Limits(max_connections=self._num_concurrent))
        except (ValueError, ImportError) as error:
            # Of proxies, which the environment names.
            return LuthierError(f"no connection can be made: {error}", where=self.shown, fix="check HTTPS_PROXY and ALL_PROXY")
        with client, ThreadPoolExecutor(self._num_concurrent) as pool:
            waiting = [pool.submit(self._answer, client, key, body, found, stop, say) for key, body in todo.items()]
            try:
                for number, future in enumerate(as_completed(waiting), start=1):
                    try:
                        future.result()
                    except LuthierError as error:
                        problem = problem or error
                    if number % said == 0 and problem is None:
                        say(f"{self.model}: {number} of {len(todo)} answered")
            except BaseException:
                stop.set()
                raise
        return problem

    def _answer(
        self,
        client: httpx2.Client,
        key: str,
        body: Mapping[str, Any],
        found: dict[str, Answer],
        stop: threading.Event,
        say: Say,
    ) -> None:
        """One answer, sent for, counted and kept, unless asking was stopped before."""
        if stop.is_set():
            return
        try:
            self._check_budget()
            answer = self._sent(client, body, stop, say)
        except LuthierError:
            # What is under way is paid for, and its answer kept; nothing new is begun.
            stop.set()
            raise
        if answer is None:
            return
        counts = (answer.prompt_tokens, answer.completion_tokens)
        self._count(
            requests=1,
            prompt_tokens=answer.prompt_tokens or 0,
            completion_tokens=answer.completion_tokens or 0,
            uncounted=int(None in counts),
        )
        found[key] = answer
        self._keep(key, answer)

    def _check_budget(self) -> None:
        used = self.used
        if used.uncounted and (self._max_tokens is not None or self._max_price is not None):
            raise LuthierError(
                "the endpoint does not say how many tokens an answer took, so no budget can be held",
                where=self.shown,
                fix="leave max_tokens_total and max_price out, or use an endpoint that sends `usage`",
            )
        price = used.price(self.price)
        tokens_over = self._max_tokens is not None and used.tokens >= self._max_tokens
        price_over = self._max_price is not None and price is not None and price >= self._max_price
        if tokens_over or price_over:
            paid = "" if price is None else f", which cost {price:.4g}"
            raise LuthierError(
                f"the budget is used up: {used.tokens:,} tokens in {used.requests:,} requests{paid}",
                where=self.shown,
                fix=f"raise `{'max_tokens_total' if tokens_over else 'max_price'}`, or ask for less",
            )

    def _sent(self, client: httpx2.Client, body: Mapping[str, Any], stop: threading.Event, say: Say) -> Answer | None:
        """The endpoint's answer, after as many tries as it takes and is allowed.

        Raises:
            LuthierError: it refused, or failed to the last.
        """
        jitter = random.Random(self._digest(body))
        for attempt in range(self._max_retries + 1):
            failure = self._try(client, body)
            if isinstance(failure, Answer):
                return failure
            # Many requests that failed together must not all come again together.
            pause = min(60.0, 2.0**attempt) * (0.75 + 0.5 * jitter.random()) if failure.after is None else failure.after
            if not failure.again or attempt == self._max_retries or pause > LONGEST_WAIT:
                tries = f", after {attempt + 1} tries" if attempt else ""
                raise LuthierError(f"{failure.what}{tries}", where=f"{self.model} at {self.shown}", fix=failure.fix)
            say(f"{self.shown}: {failure.what}; again in {pause:.0f} s ({attempt + 1} of {self._max_retries})")
            self._count(retries=1)
            if pause_for(stop, pause):
                return None
        raise AssertionError("the last try returns or raises")

    def _try(self, client: httpx2.Client, body: Mapping[str, Any]) -> Answer | Failure:
        import httpx2

        key = None if self.key_variable is None else key_in(self.key_variable)
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        try:
            # In ASCII, since half a character, which UTF-8 cannot hold, is text all the same.
            response = client.post(self._url, content=json.dumps(body).encode("ascii"), headers=headers)
        except httpx2.TimeoutException:
            what = f"nothing came within {self._timeout:g} s"
            return Failure(what, "raise `timeout`, or lower `num_concurrent`", again=True)
        except httpx2.TransportError as error:
            what = f"the endpoint cannot be reached: {cut(str(error) or type(error).__name__, key)}"
            return Failure(what, "check the address, and that the endpoint runs", again=True)
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
            return Failure(f"the endpoint cannot be asked: {cut(str(error), key)}", "check the address")
        return read(response, key, self.key_variable)

    def _count(self, **more: int) -> None:
        with self._lock:
            self.used = replace(self.used, **{name: getattr(self.used, name) + count for name, count in more.items()})

    def _file(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.json"

    def _kept(self, key: str) -> Answer | None:
        """The answer that is kept; None where there is none, or it is damaged and asked for again."""
        file = self._file(key)
        if file is None or not file.is_file():
            return None
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            answer = Answer(**told["answer"])
            whole = all(isinstance(one, str) for one in (answer.text, answer.finish_reason, answer.model))
            counted = all(isinstance(one, int | None) for one in (answer.prompt_tokens, answer.completion_tokens))
            return answer._replace(cached=True) if whole and counted else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _keep(self, key: str, answer: Answer) -> None:
        file = self._file(key)
        if file is not None:
            kept = {name: value for name, value in answer._asdict().items() if name != "cached"}
            with disk.written(file, fix="or set `cache: false`") as beside:
                text = json.dumps({"format": _FORMAT, "at": datetime.now(timezone.utc).isoformat(), "answer": kept})
                beside.write_text(text, encoding="utf-8")


def pause_for(stop: threading.Event, seconds: float) -> bool:
    """Wait, or until asking is stopped; whether it was."""
    return stop.wait(seconds)


def _price(price: Mapping[str, float] | None) -> Price | None:
    if price is None:
        return None
    known = {key: value for key, value in price.items() if key in Price._fields}
    if set(known) != set(price) or set(known) != set(Price._fields):
        fix = "write price: {prompt: 0.15, completion: 0.60}, what a million tokens of each cost"
        raise LuthierError(f"the price has {', '.join(price) or 'no keys'}", where="price", fix=fix)
    if any(isinstance(one, bool) or not math.isfinite(one) or one < 0 for one in known.values()):
        raise LuthierError("a price is no number from 0", where="price", fix="say what a million tokens cost")
    return Price(**known)
