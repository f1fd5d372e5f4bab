"""Where requests to an endpoint go, and whose key goes with them. Addresses never come from the environment, and keys from nowhere else."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import SplitResult, parse_qsl, urlsplit

from luthier.errors import LuthierError

DEFAULT_KEY = "OPENAI_API_KEY"
"""The environment variable that holds the key where none is named. It goes to OpenAI and to this machine alone: whoever writes a recipe
should not get a key that the recipe does not ask for."""
NO_KEY = "none"
_PATH = "/chat/completions"
_SECRET = re.compile(r"key|token|secret|sig|pass|auth|credential", re.IGNORECASE)


def address(url: str) -> tuple[str, str]:
    """Where requests go, and how that is shown.

    Raises:
        LuthierError: it is no address, or holds what should stand in the environment.
    """
    try:
        parts = urlsplit(url.strip())
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_one = False
    if not is_one:
        # Whatever it is, it may hold a key.
        fix = "write http:// or https://, a host and a path, e.g. https://api.openai.com/v1"
        raise LuthierError("the endpoint is no address on the web", where="endpoint", fix=fix)
    shown = _shown(parts)
    secret = next((name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(name)), None)
    if "@" in parts.netloc or secret is not None:
        raise LuthierError(
            "the address holds " + ("a name or a password" if secret is None else f"`{secret}`, which looks like a secret"),
            where=shown,
            fix="put the key into an environment variable, and name that: api_key_env: NAME",
        )
    path = parts.path.rstrip("/")
    path = path if path.endswith(_PATH) else path + _PATH
    return parts._replace(path=path, fragment="").geturl(), shown


def _shown(parts: SplitResult) -> str:
    """An address without what may be secret in it."""
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def key_variable(url: str, shown: str, named: str | None) -> str | None:
    """The environment variable whose key goes to an address.

    Raises:
        LuthierError: the key would be readable on its way, or what is named cannot be a variable.
    """
    if named == NO_KEY:
        return None
    if named is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", named):
        # It may be the key itself, so it is not shown.
        what, fix = "`api_key_env` is no name of an environment variable", "write the variable's name, and put the key into it"
        raise LuthierError(what, where=shown, fix=fix)
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    here = is_here(host)
    if named is None:
        trusted = here or (parts.scheme == "https" and (host == "openai.com" or host.endswith(".openai.com")))
        return DEFAULT_KEY if trusted and os.environ.get(DEFAULT_KEY) else None
    if parts.scheme == "http" and not here:
        raise LuthierError(
            "a key sent by http can be read on its way",
            where=shown,
            fix=f"use https, or api_key_env: {NO_KEY} where the endpoint needs no key",
        )
    return named


def is_here(host: str) -> bool:
    """Whether a host's name or number is that of this machine alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_in(variable: str) -> str:
    """The key in an environment variable.

    Raises:
        LuthierError: it is not set, or what it holds cannot be one.
    """
    key = os.environ.get(variable, "").strip()
    where = f"environment variable {variable}"
    if not key:
        raise LuthierError(
            "the key of the endpoint is not set", where=where, fix=f"export {variable}=KEY, or api_key_env: {NO_KEY} for none"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise LuthierError("what it holds has spaces or signs that no key has", where=where, fix="copy the key again")
    return key
