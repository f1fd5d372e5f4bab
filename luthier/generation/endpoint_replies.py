"""What an endpoint replied: an answer, or why there is none and whether to ask again."""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.errors import printable

if TYPE_CHECKING:
    import httpx2

_SAID = 300
"""Characters of what a server said that an error shows."""
_OVER_FOR_GOOD = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of 429 that no waiting mends."""


class Answer(NamedTuple):
    """What an endpoint said to one conversation."""

    text: str
    """Empty where the model said nothing, such as one that thought until its tokens were used up."""
    finish_reason: str = ""
    model: str = ""
    """The name by which the endpoint calls what answered, often with a date."""
    prompt_tokens: int | None = None
    """None where the endpoint does not count."""
    completion_tokens: int | None = None
    cached: bool = False
    """Whether it was answered before and nothing was sent."""


class Failure(NamedTuple):
    """A try that gave no answer."""

    what: str
    fix: str
    again: bool = False
    after: float | None = None
    """Seconds that the endpoint asks to be left alone."""


def read(response: httpx2.Response, key: str | None, key_variable: str | None) -> Answer | Failure:
    """What a reply says.

    Args:
        response: the reply.
        key: that was sent; no text that is returned holds it.
        key_variable: where it stands.
    """
    if response.status_code != 200:
        return _refused(response, key, key_variable)
    try:
        told = json.loads(response.content)
        choice = told["choices"][0]
        text = choice["message"].get("content")
        if not isinstance(text, str | None):
            raise TypeError("the content is no text")
        usage = told.get("usage") or {}
        return Answer(
            text or "",
            str(choice.get("finish_reason") or ""),
            str(told.get("model") or ""),
            _whole(usage.get("prompt_tokens")),
            _whole(usage.get("completion_tokens")),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        what = f"this is no chat completion: {cut(response.text, key)}"
        return Failure(what, "check the address, which often ends in /v1; the endpoint must speak OpenAI's chat completions")


def _refused(response: httpx2.Response, key: str | None, key_variable: str | None) -> Failure:
    status = response.status_code
    said, code = _said(response)
    what = f"the endpoint answers {status}" + (f": {cut(said, key)}" if said else "")
    after = _retry_after(response.headers.get("retry-after"))
    if status in (401, 403):
        named = f"check the key in {key_variable}"
        if key_variable is None:
            named = "no key was sent: name the environment variable that holds one, api_key_env: NAME"
        return Failure(what, named)
    if status == 429:
        fix = "wait, lower `num_concurrent`, raise `max_retries`, or look at what your account may use"
        return Failure(what, fix, again=code not in _OVER_FOR_GOOD, after=after)
    if status == 408 or status >= 500:
        return Failure(what, "try again later", again=True, after=after)
    if 300 <= status < 400:
        return Failure(f"{what}: it has moved", "name the address that it moved to")
    if status == 404:
        return Failure(what, "check the address, which often ends in /v1, and the name of the model")
    return Failure(what, "check the request: `extra_body: {key: value}` sets a key of it, and null leaves one out")


def _said(response: httpx2.Response) -> tuple[str, str]:
    """What a server said about a refusal, and its code for it."""
    try:
        told = json.loads(response.content)
    except (ValueError, RecursionError):
        return response.text, ""
    error = told.get("error", told) if isinstance(told, dict) else told
    if isinstance(error, dict):
        return str(error.get("message") or error.get("detail") or error), str(error.get("code") or error.get("type") or "")
    return str(error), ""


def cut(text: str, key: str | None) -> str:
    """A text of a server as an error shows it: one line, cut, and without the key, which some servers repeat."""
    text = text.replace(key, "(the key)") if key else text
    text = " ".join(printable(text).split())
    return text if len(text) <= _SAID else f"{text[:_SAID]}\u2026"


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a number of them or from a date."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
