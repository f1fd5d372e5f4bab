"""Data sets that `save_to_disk` of Hugging Face's `datasets` wrote: the splits of a saved `DatasetDict`, each named `FOLDER:SPLIT`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from luthier.errors import LuthierError, nearest

DICT = "dataset_dict.json"
TRAIN = "train"
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
"""Names that lead nowhere else."""


class Split(NamedTuple):
    """One split of a saved `DatasetDict`."""

    folder: Path
    """Where the `DatasetDict` lies."""
    name: str
    others: tuple[str, ...]
    """The names of its other splits."""

    @property
    def path(self) -> Path:
        """Where the split's own files lie."""
        return self.folder / self.name


def splits_of(folder: Path) -> tuple[str, ...]:
    """The splits of the `DatasetDict` that was saved to a folder, in its order; none where the folder holds none."""
    try:
        listed = json.loads((folder / DICT).read_bytes())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    names = [name for name in listed if isinstance(name, str) and _NAME.fullmatch(name)] if isinstance(listed, list) else []
    return tuple(name for name in names if (folder / name).is_dir())


def split_of(source: str | Path, training: bool = True) -> Split | None:
    """The split that a source means; None where it is no saved `DatasetDict`, named with a split or without.

    Args:
        source: `FOLDER:SPLIT`, or a path.
        training: whether rows to train on are asked for: without a name these are those of the split `train`.

    Raises:
        LuthierError: the folder has no such split, or the source does not say which.
    """
    path = Path(source).expanduser()
    if path.exists():
        splits = splits_of(path) if path.is_dir() else ()
        if not splits:
            return None
        wanted = TRAIN if training else splits[0]
        if wanted in splits and (training or len(splits) == 1):
            return _split(path, wanted, splits)
        raise LuthierError(
            f"the data set was saved with the splits {_listed(splits)}, and none is named",
            where=str(source),
            fix=f"name one, such as {source}:{splits[-1]}",
        )
    before, colon, name = str(source).rpartition(":")
    folder = Path(before).expanduser()
    if not colon or not folder.is_dir():
        return None
    splits = splits_of(folder)
    if name in splits:
        return _split(folder, name, splits)
    if not splits:
        raise LuthierError(
            f"`{folder}` holds no saved DatasetDict, so it has no split `{name}`",
            where=str(source),
            fix="name the folder itself, or a file in it",
        )
    raise LuthierError(
        f"the data set has no split `{name}`, but {_listed(splits)}", where=str(source), fix=nearest(name, splits) or "name one"
    )


def place_of(source: str | Path) -> Path:
    """The file or folder of a source; of `FOLDER:SPLIT` the split's own folder."""
    path = Path(source).expanduser()
    before, colon, name = str(source).rpartition(":")
    folder = Path(before).expanduser()
    return folder / name if colon and not path.exists() and name in splits_of(folder) else path


def _split(folder: Path, name: str, splits: tuple[str, ...]) -> Split:
    return Split(folder, name, tuple(one for one in splits if one != name))


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
