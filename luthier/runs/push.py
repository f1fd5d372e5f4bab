"""Sending a run's result to the Hugging Face hub: the folder that `luthier export` writes, checked as it is, and its card."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from luthier.errors import LuthierError, Say, silent
from luthier.models.hub import offline
from luthier.models.quiet import quiet
from luthier.report.card import Published
from luthier.results.folder import read_run
from luthier.results.written import Asked, write_result

TOKEN = "HF_TOKEN"
"""The environment variable that holds the hub's token; a token is read from nowhere else."""
FORMS = ("model", "peft")
_MADE_BY_THE_HUB = frozenset({".gitattributes", "README.md"})
"""What a repository that was made by hand holds before anything is sent."""


class Destination(NamedTuple):
    """Where a result goes, and how."""

    repository: str
    """OWNER/NAME."""
    private: bool = False
    """Seen by the owner alone."""
    replace: bool = False
    """Put it in the place of what the repository holds; its history keeps that."""
    dry_run: bool = False
    """Write the folder, and send nothing."""
    folder: Path | None = None
    """Where the folder is written and kept; none: a temporary one, or NAME in a dry run."""

    def check(self) -> None:
        """Refuse what can be refused before anything is read.

        Raises:
            LuthierError: the name is none, the token is missing, or the hub is switched off.
        """
        try:
            validate_repo_id(self.repository)
            named = "/" in self.repository
        except HFValidationError:
            named = False
        if not named:
            fix = "write OWNER/NAME, of letters, digits, `-`, `_` and `.`"
            raise LuthierError(f"`{self.repository}` names no repository", where="luthier push", fix=fix)
        if self.dry_run:
            return
        if offline():
            raise LuthierError("the hub is switched off by HF_HUB_OFFLINE", where="luthier push", fix="unset it, or add --dry-run")
        if not os.environ.get(TOKEN, "").strip():
            fix = f"make one that may write at huggingface.co/settings/tokens, and export {TOKEN}=TOKEN"
            raise LuthierError("the hub's token is not set", where=f"environment variable {TOKEN}", fix=fix)


def push(
    name: str,
    to: Destination,
    *,
    form: str = "model",
    dtype: str = "auto",
    published: Published | None = None,
    out: str = "runs",
    say: Say = silent,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Write a run's result, check it, and send it to the hub.

    Args:
        name: the run.
        to: the repository. One that is not there is made; one that holds files is left alone unless `replace` is asked for.
        form, dtype, weights_only: as for `export`: `model` or `peft`.
        published: what the card says of it beside what the run knows.

    Returns:
        What `export` gives, and `files`, the bytes of each by name; and where they were sent, `url` and `commit`.

    Raises:
        LuthierError: the result cannot be held in this form or differs when it is read back, and nothing is sent; or the hub refuses.
    """
    to.check()
    if form not in FORMS:
        fix = f"use {' or '.join(FORMS)}; export other forms, and send them with `hf upload`"
        raise LuthierError(f"`{form}` is no form that is sent", where="--as", fix=fix)
    run = read_run(name, out)
    api = None if to.dry_run else huggingface_hub.HfApi(token=os.environ[TOKEN].strip(), library_name="luthier")
    with _place(to) as folder:
        asked = Asked(folder, form, dtype, called=to.repository, published=published or Published())
        asked.check()
        # Asked first: writing a model takes a while.
        held = None if api is None else _held(api, to)
        facts = write_result(run, asked, say=say, weights_only=weights_only)
        files = {str(one.relative_to(folder)): one.stat().st_size for one in sorted(folder.rglob("*")) if one.is_file()}
        facts = {**facts, "repository": to.repository, "private": to.private, "files": files}
        if to.folder is None and not to.dry_run:
            del facts["folder"]
        if api is None:
            return facts
        say(f"sending {len(files)} files to {to.repository}")
        with _told(to), quiet():
            if held is None:
                api.create_repo(to.repository, private=to.private or None, repo_type="model")
            sent = api.upload_folder(
                repo_id=to.repository,
                folder_path=folder,
                repo_type="model",
                commit_message=f"{run.folder.name}, by luthier",
                delete_patterns="*" if held else None,
            )
    return {**facts, "url": str(sent.repo_url), "commit": str(sent.oid)}


def _held(api: huggingface_hub.HfApi, to: Destination) -> Sequence[str] | None:
    """The files of a repository that may be written to; None where there is none.

    Raises:
        LuthierError: it holds files and is not to be replaced, or can be seen by all and must not.
    """
    with _told(to):
        # A token that is none shall not cost an export.
        api.whoami()
        try:
            info: Any = api.repo_info(to.repository, repo_type="model")
        except RepositoryNotFoundError:
            return None
        files = api.list_repo_files(to.repository, repo_type="model")
    if to.private and not info.private:
        raise LuthierError(
            f"{to.repository} can be seen by all", where="--private", fix="make it private on the hub first, or name another"
        )
    if not to.replace and set(files) - _MADE_BY_THE_HUB:
        raise LuthierError(
            f"{to.repository} holds {len(files)} files already",
            where="the hub",
            fix="add --replace, which takes them out of the newest version, or name another",
        )
    return files


@contextmanager
def _place(to: Destination) -> Iterator[Path]:
    name = to.repository.rpartition("/")[2]
    if to.folder is not None or to.dry_run:
        yield to.folder or Path(name)
        return
    with TemporaryDirectory(prefix="luthier-") as folder:
        yield Path(folder) / name


@contextmanager
def _told(to: Destination) -> Iterator[None]:
    """Turn what the hub refuses into an error that says what to do."""
    try:
        yield
    except LuthierError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = str(error.server_message or error).strip().partition("\n")[0]
        fix = "try again later"
        if status in (401, 403):
            fix = f"give {TOKEN} a token that may write to {to.repository.partition('/')[0]}"
        raise LuthierError(f"the hub refuses ({status}): {reason}", where=to.repository, fix=fix) from error
    # The client lets errors of its transport library through, and that library has changed more than once.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        what = f"the hub could not be reached ({type(error).__name__}: {reason})"
        raise LuthierError(what, where=to.repository, fix="try again; `--dry-run` writes the folder alone") from error
