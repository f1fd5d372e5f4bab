"""Where rows come from: data sets of the hub, files, and which of their keys is which of luthier's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from luthier.convert.draft import Draft
from luthier.rows.files import FORMATS

SUFFIXES = (*FORMATS, ".gz")
LOADERS = ("json", "csv", "parquet", "arrow", "text")
"""What stands for a type of files where a data set's name would."""
BLOCKS = "`at: paragraph` would keep paragraphs whole; no block holds two documents"
REMOTE = ("s3://", "gs://", "gcs://", "az://", "abfs://", "adl://", "oci://", "https://", "http://")


def source(draft: Draft, key: str, entry: Mapping[str, Any], taken: Sequence[str]) -> list[str]:
    """The sources that one entry of a list of data sets stands for.

    Args:
        draft: hears what of the entry is not carried over.
        key: what the entry is called in the other tool's file.
        entry: with `path`, and maybe `name`, `split` and `data_files`.
        taken: further keys of the entry that are dealt with elsewhere.
    """
    path, split = str(entry.get("path") or ""), str(entry.get("split") or "train")
    if not path:
        draft.leave(key, dict(entry), "it names no rows")
        return []
    files = entry.get("data_files")
    named = [str(one) for one in (files if isinstance(files, list) else [files])] if files else []
    config = str(entry.get("name") or "")
    for name, value in entry.items():
        if name not in ("path", "split", "name", "data_files", "ds_type", *taken) and value not in (None, "", [], {}, False):
            draft.leave(f"{key}.{name}", value)
    if path in LOADERS and named:
        return named
    if path.startswith(REMOTE):
        draft.leave(f"{key}.path", path, "luthier reads files of this machine and data sets of the hub; download it")
        return [path]
    if is_file(path):
        if split != "train":
            draft.leave(f"{key}.split", split, "a file has no splits: name the file itself")
        return [f"{path.rstrip('/')}/{one}" for one in named] or [path]
    if named:
        draft.leave(f"{key}.data_files", files, "a data set of the hub is read whole; download the file and name it")
    if config and path.count("/") != 1:
        draft.leave(f"{key}.name", config, "write `hub:OWNER/NAME/CONFIG`, which needs the owner of the data set")
        config = ""
    return [hub(path, config, split)]


def hub(name: str, config: str = "", split: str = "train") -> str:
    """A data set of the hub as a recipe names it."""
    return f"hub:{name}{f'/{config}' if config else ''}{'' if split == 'train' else f':{split}'}"


def is_file(path: str) -> bool:
    """Whether a path is one of this machine rather than a name on the hub."""
    return path.startswith(("./", "../", "/", "~")) or path.endswith(SUFFIXES) or _is_there(path)


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        # No file can have such a name.
        return False


class Source(NamedTuple):
    """Rows as a recipe names them."""

    rows: str
    weight: float | None = None
    columns: Mapping[str, str] = {}
    """Luthier's key to the column that holds it."""


def put(draft: Draft, found: Sequence[Source]) -> None:
    """Set `rows.train`, and `rows.columns` where all sources have the same."""
    renamed = [{ours: theirs for ours, theirs in one.columns.items() if ours != theirs} for one in found]
    shared = renamed[0] if renamed and all(one == renamed[0] for one in renamed) else {}
    listed: list[Any] = []
    for one, own in zip(found, renamed, strict=True):
        more: dict[str, Any] = {"weight": one.weight} if one.weight is not None else {}
        more |= {"columns": own} if own and not shared else {}
        listed.append({"rows": one.rows, **more} if more else one.rows)
    draft.put("rows.train", listed[0] if len(listed) == 1 and isinstance(listed[0], str) else listed or "ROWS")
    if not listed:
        draft.note("rows.train", "the file names no rows: name a file, or hub:OWNER/NAME")
    if shared:
        draft.put("rows.columns", shared, "luthier's key: the column that holds it")


def validation(draft: Draft, key: str, amount: float | None, files: Sequence[str] = ()) -> None:
    """Set `rows.validate`: a share or a number that is held out, or rows of their own."""
    if files:
        if amount:
            draft.leave(key, amount, "rows to validate on are named as well")
        draft.put("rows.validate", files[0] if len(files) == 1 else list(files))
    elif amount is not None and amount > 0 and (amount < 1 or float(amount).is_integer()):
        draft.put("rows.validate", amount if amount < 1 else int(amount))
    elif amount:
        draft.leave(key, amount, "`rows.validate` is a share, a number of rows, or rows of their own")
