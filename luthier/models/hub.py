"""Models on the Hugging Face hub: the copy on this machine first, then the network, briefly."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from luthier.models.folder import has_code, has_tokenizer, has_weights
from luthier.models.quiet import quiet

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
# Subfolders hold other formats of the same weights, and named chat templates; `consolidated` is a second copy in another naming.
_UNWANTED = [*(f"*/*.{ending}" for ending in ("json", "safetensors", "txt", "model", "py")), "consolidated*"]
_TIMEOUT_SECONDS = 3.0


class HubUnavailableError(Exception):
    """The hub gave no model; the message says why."""


def offline() -> bool:
    """Whether the user has switched the hub off by `HF_HUB_OFFLINE`."""
    asked = os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")
    return asked or huggingface_hub.is_offline_mode()


def cached_snapshot(name: str, *, revision: str | None = None, remote_code: bool = False) -> Path | None:
    """The folder of a model that is wholly in the hub client's cache, None otherwise. Touches no network.

    A cached model is not looked up again, so that a name keeps its weights until another revision is asked for.
    """
    try:
        folder = _download(name, revision, remote_code, local_files_only=True)
    except (OSError, ValueError):
        return None
    complete = (folder / "config.json").is_file() and has_weights(folder) and has_tokenizer(folder)
    if not complete or (remote_code and not has_code(folder)):
        return None
    return folder


def fetch_snapshot(name: str, *, revision: str | None = None, remote_code: bool = False) -> Path:
    """Download a model into the hub client's cache.

    Raises:
        HubUnavailableError: the hub is switched off, can not be reached, or does not have or give the model.
    """
    if offline():
        raise HubUnavailableError("the hub is switched off by HF_HUB_OFFLINE")
    try:
        # `snapshot_download` asks the same first, but would wait for ever on a hub that accepts and does not answer.
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_SECONDS)
        with quiet():
            return _download(name, revision, remote_code, local_files_only=False)
    except RevisionNotFoundError as error:
        raise HubUnavailableError(f"`{name}` has no revision `{revision}`") from error
    except GatedRepoError as error:
        raise HubUnavailableError(f"`{name}` is gated: accept its terms on the hub and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise HubUnavailableError(f"there is no model `{name}` on the hub, or it is private") from error
    # The client lets errors of its transport library through, and that library has changed more than once.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise HubUnavailableError(f"the hub could not be reached ({type(error).__name__}: {reason})") from error


def _download(name: str, revision: str | None, remote_code: bool, *, local_files_only: bool) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*_WANTED, "*.py"] if remote_code else _WANTED,
            ignore_patterns=_UNWANTED,
            etag_timeout=_TIMEOUT_SECONDS,
            local_files_only=local_files_only,
        )
    )
