"""Which files a path, a folder or a pattern means, and which of their neighbors hold no rows to train on."""

from __future__ import annotations

import glob
import gzip
import json
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

from luthier.errors import LuthierError
from luthier.rows.saved import DICT, split_of

Purpose = Literal["train", "evaluate"]

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet", ".arrow")
"""By the endings of names; all but the last two also gzipped."""
TEXTS = (".txt", ".md")
"""Of these a file is one document."""
_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_GZIP = b"\x1f\x8b"
_PACKED = {b"\x28\xb5\x2f\xfd": "Zstandard", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}
_POINTER = b"version https://git-lfs"
_HELD_OUT = frozenset(
    {
        "test",
        "tests",
        "testing",
        "testset",
        "validation",
        "valid",
        "validset",
        "val",
        "valset",
        "dev",
        "devset",
        "eval",
        "evaluation",
        "heldout",
        "holdout",
    }
)
_TRAINING = frozenset({"train", "training", "trainset"})
_ABOUT_ROWS = frozenset(
    {"license", "licence", "readme", "copying", "notice", "changelog", "authors", "contributing", "citation", "requirements"}
)
STORED = ".stored"
"""How folders end that hold what models said of rows, in Parquet files of their own."""
_STATE = "state.json"
_DESCRIBE = frozenset({"dataset_info.json", "dataset_infos.json", DICT, _STATE})
"""What `save_to_disk` and data sets of the hub keep beside their rows."""


class LeftOut(NamedTuple):
    """A file that could be read and was not."""

    file: str
    why: str


class Found(NamedTuple):
    """The files of a source."""

    files: tuple[Path, ...]
    """In the order in which they are read."""
    name: str
    ignored: tuple[str, ...] = ()
    """Files of a folder whose format is none of those that can be read."""
    left_out: tuple[LeftOut, ...] = ()


def find(source: str | Path, purpose: Purpose = "train") -> Found:
    """The files that a path, a folder or a pattern means.

    Of a saved `DatasetDict` these are the files of one split: see `luthier.rows.saved`. Of any other folder, or of what a pattern finds,
    files whose names say that they are for testing are left out, unless the given path says so itself; so are texts beside rows, and what
    only describes a data set.

    Args:
        source: the path.
        purpose: what the rows are for; a folder to evaluate on must not mix rows for testing with others.

    Raises:
        LuthierError: there is no such file or split, the folder holds nothing to read, or not what `state.json` promises.
    """
    try:
        path = Path(source).expanduser()
        split = split_of(source, training=purpose == "train")
    # Too long for a file's name, or the home of a user that is not there.
    except (OSError, RuntimeError) as problem:
        raise LuthierError(f"this is no path: {problem}", where=str(source), fix="check the path") from None
    if split is not None:
        found = find(split.path, purpose)
        others = [LeftOut(str(split.folder / name), f"it is another split, {split.folder}:{name}") for name in split.others]
        left_out = (LeftOut(str(split.folder / DICT), _no_rows(split.folder / DICT, ())), *found.left_out, *others)
        return found._replace(name=path.name, left_out=left_out)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
        usable = [file for file in files if format_of(file) is not None]
        if not usable:
            raise LuthierError("the folder holds no file that can be read", where=str(path), fix=formats_known())
        ignored = tuple(str(file) for file in files if format_of(file) is None)
        taken, left_out = _with_rows(usable, path, frozenset(), purpose, str(path))
        return Found(taken, path.name, ignored, left_out)
    if not path.exists() and glob.has_magic(str(path)):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
        fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
        files = [file for file in files if not any(part.endswith(STORED) for part in file.parts[len(fixed) :])]
        if not files:
            raise LuthierError("no file fits this pattern", where=str(source), fix="check the pattern")
        said = _words("/".join(path.parts[len(fixed) :]))
        taken, left_out = _with_rows(files, Path(*fixed), said, purpose, str(source))
        return Found(taken, str(source), (), left_out)
    if not path.exists():
        named = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)) and path.suffix not in FORMATS
        hub = f"; a data set of the Hugging Face hub is written `hub:{source}`" if named else ""
        raise LuthierError("there is no such file or folder", where=str(source), fix=f"check the path{hub}")
    if _describes(path):
        raise LuthierError(
            "the file describes a data set and holds no rows", where=str(path), fix=f"name the folder it lies in: {path.parent}"
        )
    return Found((path,), Path(path.name.removesuffix(".gz")).stem)


def format_of(path: Path) -> str | None:
    """The ending in `FORMATS` that a file's name has, or should have by its first bytes; None for other names."""
    name = path.name.lower()
    ending = Path(name.removesuffix(".gz")).suffix
    if ending not in FORMATS:
        return None
    return next((kind for magic, kind in _MAGIC.items() if path.is_file() and _begins(path, magic)), ending)


def formats_known() -> str:
    """The formats, for errors."""
    return f"formats that can be read: {', '.join(FORMATS[:-2])} (each also with .gz), {', '.join(FORMATS[-2:])}"


def opened(path: Path) -> BinaryIO:
    """A file's bytes, unpacked where they are gzipped, whatever its name says.

    Raises:
        LuthierError: the file is packed in another way, or only says where its content is.
    """
    if path.suffix.lower() == ".gz" or _begins(path, _GZIP):
        return cast("BinaryIO", gzip.open(path))
    if _begins(path, _POINTER):
        raise LuthierError(
            "the file is a pointer of Git LFS: the rows themselves were not cloned",
            where=str(path),
            fix="run `git lfs pull` there",
        )
    packed = next((name for magic, name in _PACKED.items() if _begins(path, magic)), None)
    if packed is not None:
        raise LuthierError(f"the file is packed with {packed}", where=str(path), fix="unpack it, or pack it with gzip")
    return path.open("rb")


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part.endswith(STORED) for part in path.parts)


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall("[a-z]+", name.lower()))


def _with_rows(
    files: Sequence[Path], folder: Path, said: frozenset[str], purpose: Purpose, where: str
) -> tuple[tuple[Path, ...], tuple[LeftOut, ...]]:
    """The files that hold the rows asked for, and the others; `said` are the words with which somebody asked for them."""
    reasons = {file: _no_rows(file, files) for file in files}
    with_rows = [file for file in files if not reasons[file]]
    held_out = [file for file in with_rows if _is_held_out(file, folder, said)]
    if purpose == "evaluate" and held_out and len(held_out) < len(with_rows):
        raise LuthierError(
            "some files here are for testing and others are not: " + ", ".join(file.name for file in with_rows[:5]),
            where=where,
            fix=f"name the files to evaluate on, such as {held_out[0]}",
        )
    if purpose == "train":
        reasons |= dict.fromkeys(held_out, "its name says that it is for testing")
    taken = tuple(file for file in files if not reasons[file])
    left_out = tuple(LeftOut(str(file), reasons[file]) for file in files if reasons[file])
    if not taken:
        raise LuthierError(
            "no file here holds rows to train on: " + ", ".join(f"{Path(one.file).name} ({one.why})" for one in left_out[:5]),
            where=where,
            fix=f"name a file itself to use it all the same, such as {left_out[0].file}",
        )
    return taken, left_out


def _is_held_out(file: Path, folder: Path, said: frozenset[str]) -> bool:
    inside = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
    words = _words(str(inside.with_name(inside.name.split(".")[0]))) - said
    return bool(words & _HELD_OUT) and not _words(inside.name) & _TRAINING


def _no_rows(file: Path, files: Iterable[Path]) -> str:
    """Why a file beside others holds no rows; empty where it may."""
    if _describes(file):
        return "it describes a data set"
    if format_of(file) == ".arrow" and not _is_listed(file):
        return f"{_STATE} does not name it"
    if format_of(file) in TEXTS:
        if _words(file.name.split(".")[0]) & _ABOUT_ROWS:
            return "it is about the rows"
        if any(other.parent == file.parent and format_of(other) not in TEXTS and not _describes(other) for other in files):
            return "it is a text beside rows"
    return ""


def _describes(file: Path) -> bool:
    """Whether a file is what others write about a data set; one of the same name may hold rows all the same."""
    if file.name not in _DESCRIBE:
        return False
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and not isinstance(content.get("data"), list)


def _is_listed(file: Path) -> bool:
    """Whether a data set that was saved to a folder has this file; others there are what was computed with it."""
    state = file.with_name(_STATE)
    if not state.is_file() or not _describes(state):
        return True
    listed = [str(one.get("filename")) for one in json.loads(state.read_bytes()).get("_data_files") or []]
    missing = [name for name in listed if not file.with_name(name).is_file()]
    if missing:
        raise LuthierError(
            f"`{missing[0]}` is missing, which belongs to the data set", where=str(state), fix="save or copy it again"
        )
    return not listed or file.name in listed
