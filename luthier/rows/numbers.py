"""Numbers that a model gave to rows, kept beside them: a folder of Parquet files, keyed by row id.

Each file says in its metadata what the numbers were made with. It holds some rows, is written beside its place and renamed, and is never
changed: a kill costs the file in progress alone, and a later file's numbers of a row stand for those of an earlier one. Only ids' digests
and scalars stay in memory; what each label has is read when a batch asks for it, a row group of about a MiB at a time.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from luthier import disk
from luthier.errors import LuthierError
from luthier.kinds import TEACHER
from luthier.rows.cache import tokenizer_fingerprint
from luthier.rows.files import STORED
from luthier.rows.ids import canonical, digest
from luthier.rows.saved import place_of
from luthier.rows.template import choice_of, date_of

LIKELIHOOD = "log_likelihood"
COLUMNS: Mapping[str, Mapping[str, pyarrow.DataType]] = {
    "likelihood": {LIKELIHOOD: pyarrow.list_(pyarrow.float64())},
    "teacher": dict(zip(TEACHER, map(pyarrow.list_, (pyarrow.float32(), pyarrow.int32(), pyarrow.float32())), strict=True)),
}
"""By kind: of each row and its mates in turn one likelihood, in nats; or of each of their labels in turn K log-probabilities, the ids of
their tokens, and the probability of all others."""
_KEYS = {"id": pyarrow.string(), "encoded": pyarrow.int64(), "targets": pyarrow.list_(pyarrow.int32())}
_FACTS = b"luthier"
_GROUP_BYTES = 2**20
"""Of a row group, the least that is read from the disk; one row may be more."""
_OPEN_FILES = 8
MADE_WITH = {
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "template_name": "rows.chat_template",
    "chat_template_options": "rows.chat_template_options",
    "thinking": "rows.thinking",
    "date": "the day that the chat template is told",
    "code": "the code that makes them",
}
"""Facts that must be the same where the numbers are read, and what errors call them."""
OPTIONS = (
    "columns",
    "blocks",
    "format",
    "chat_template",
    "chat_template_options",
    "thinking",
    "loss_on",
    "max_length",
    "too_long",
    "on_bad_row",
)
"""The keys under `rows` of a recipe that say how rows are read and written."""
MADE_BY = {"model": "the model", "fingerprint": "its numbers", "precision": "its precision", "top_k": "top_k"}
"""Facts that must be the same, too, where more rows are added."""


class Entry(NamedTuple):
    """What a store holds of one row."""

    id: str
    encoded: int
    """`Encoded.digest`."""
    targets: tuple[int, ...]
    """Of the row and of each of its mates."""
    values: Mapping[str, NDArray[Any]]
    """By column of `COLUMNS`, flat."""

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return sum(one.nbytes for one in self.values.values())


def written_by(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Facts about how a tokenizer writes rows."""
    choice = choice_of(tokenizer)
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": canonical(tokenizer.chat_template),
        "template_name": choice.name,
        "chat_template_options": dict(choice.options),
        **({"thinking": choice.thinking} if choice.thinking != "keep" else {}),
        "date": date_of(tokenizer),
    }


def beside(source: str | Path, kind: str) -> Path | None:
    """Where a store of some kind lies that belongs to rows; None where these are no file or folder."""
    path = place_of(source)
    return path.with_name(path.name + STORED) / kind if path.exists() and path.name else None


def command_of(
    kind: str,
    source: str,
    model: str,
    options: Mapping[str, Any],
    *,
    top_k: int | None = None,
    tokenizer: str = "",
    folder: Path | None = None,
    precision: str = "auto",
) -> str:
    """The command that writes a store.

    Args:
        kind: of its numbers.
        source: the rows.
        model: a model's name, or a run's folder or name.
        options: of `OPTIONS`.
        top_k: of `teacher`, how many probabilities.
        tokenizer: the model whose tokenizer writes the rows, where it is another.
        folder: where the store lies, where that is not beside the rows.
        precision: of the model's weights.
    """
    words = ["luthier", "rows", "store", kind, source, *_flat(options), "--model", model]
    words += ["--top-k", str(top_k)] if kind == "teacher" else []
    words += ["--tokenizer", tokenizer] if tokenizer else []
    words += ["--out", str(folder)] if folder is not None else []
    words += ["--precision", precision] if precision != "auto" else []
    return shlex.join(words)


def _flat(options: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}={value if isinstance(value, str) else canonical(value)}"


def parts_of(folder: Path) -> list[Path]:
    """The files of a store, in the order in which they were written."""
    return sorted(folder.glob("part-*.parquet"))


def write_part(folder: Path, number: int, entries: Iterable[Entry], facts: Mapping[str, Any]) -> None:
    """Write one file of a store.

    Args:
        folder: the store.
        number: of the file; no other has it.
        entries: what it shall hold; they are let go as row groups fill up.
        facts: what the numbers were made with.

    Raises:
        LuthierError: the disk is full, or the place cannot be written to.
    """
    schema = pyarrow.schema({**_KEYS, **COLUMNS[facts["kind"]]}, metadata={_FACTS: canonical(facts).encode()})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    with (
        disk.written(folder / f"part-{number:06}.parquet") as place,
        pyarrow.parquet.ParquetWriter(place, schema, **options) as writer,
    ):
        for group in _grouped(entries):
            rows = [{"id": one.id, "encoded": one.encoded, "targets": one.targets} for one in group]
            keys = [pyarrow.array([row[name] for row in rows], kind) for name, kind in _KEYS.items()]
            values = [_listed([one.values[name] for one in group], schema.field(name).type) for name in COLUMNS[facts["kind"]]]
            writer.write_table(pyarrow.Table.from_arrays([*keys, *values], schema=schema), row_group_size=len(group))


def _grouped(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    size = 0
    for one in entries:
        if group and size + one.size > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(one)
        size += one.size
    if group:
        yield group


def _listed(values: Sequence[NDArray[Any]], kind: pyarrow.DataType) -> pyarrow.Array:
    ends = numpy.fromiter(accumulate(map(len, values), initial=0), dtype=numpy.int32)
    return pyarrow.ListArray.from_arrays(ends, pyarrow.array(numpy.concatenate(values), kind.value_type))


class Numbers:
    """A store, opened.

    Args:
        folder: where it lies.

    Raises:
        LuthierError: there is none, it is damaged, or its files were not made alike.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts = folder, parts_of(folder)
        if not self.parts:
            raise LuthierError("there are no numbers of rows here", where=str(folder), fix="luthier rows store --help")
        self._file: Callable[[int], Any] = lru_cache(_OPEN_FILES)(self._opened)
        self._group: Callable[[int], Any] = lru_cache(_OPEN_FILES)(self._read)
        # Of each row group its file and its number in it; of each row its group and its place in that.
        self._groups: list[tuple[int, int]] = []
        ids, encoded, groups, places, values, counts = [], [], [], [], [], []
        for number, path in enumerate(self.parts):
            with _whole(path):
                file = self._file(number)
                facts = json.loads((file.schema_arrow.metadata or {})[_FACTS])
                self.facts: dict[str, Any] = facts if not number else self.facts
                names = [*_KEYS, LIKELIHOOD] if facts["kind"] == "likelihood" else [*_KEYS]
                table = file.read(columns=names).combine_chunks()
                ids.append(numpy.array([digest(one) for one in table["id"].to_pylist()], dtype=numpy.int64))
                encoded.append(table["encoded"].to_numpy())
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    groups.append(numpy.full(rows, len(self._groups), dtype=numpy.int32))
                    places.append(numpy.arange(rows, dtype=numpy.int32))
                    self._groups.append((number, group))
                if facts["kind"] == "likelihood":
                    values.append(pyarrow.compute.list_flatten(table[LIKELIHOOD]).to_numpy())
                    counts.append(pyarrow.compute.list_value_length(table[LIKELIHOOD]).to_numpy())
            self._refuse_mixed(path, facts)
        self._place_R, self._group_R = numpy.concatenate(places), numpy.concatenate(groups)
        self.encoded_R: NDArray[Any] = numpy.concatenate(encoded)
        self._value = numpy.concatenate(values) if values else numpy.zeros(0)
        self._end_R = numpy.cumsum(numpy.concatenate(counts)) if counts else numpy.zeros(0, dtype=numpy.int64)
        # Of rows that were written twice the later entry counts: the first one of them read backwards.
        digests = numpy.concatenate(ids)
        self._digest_E, last_E = numpy.unique(digests[::-1], return_index=True)
        self._row_E = len(digests) - 1 - last_E

    def __len__(self) -> int:
        return len(self._row_E)

    @property
    def kind(self) -> str:
        """What the numbers are: a key of `COLUMNS`."""
        return str(self.facts["kind"])

    def _refuse_mixed(self, path: Path, facts: Mapping[str, Any]) -> None:
        changed = differences(self.facts, facts, {"kind": "what they are", **MADE_WITH, **MADE_BY})
        if changed:
            raise LuthierError(
                f"the files here were not made alike: {'; '.join(changed)}",
                where=str(path),
                fix=f"write them again: {self.command}",
            )

    @property
    def command(self) -> str:
        """What writes the numbers again."""
        return f"{self.facts['command']} --replace"

    def find(self, ids: Sequence[str]) -> NDArray[Any]:
        """Where the store holds rows, by their ids; -1 where it does not."""
        wanted = numpy.array([digest(one) for one in ids], dtype=numpy.int64)
        entry = numpy.searchsorted(self._digest_E, wanted).clip(max=len(self._digest_E) - 1)
        return numpy.where(self._digest_E[entry] == wanted, self._row_E[entry], -1)

    def likelihoods(self, place: int) -> NDArray[Any]:
        """The log-likelihoods of a row and its mates, by the row's place in the store."""
        return self._value[self._end_R[place - 1] if place else 0 : self._end_R[place]]

    def arrays(self, place: int) -> dict[str, NDArray[Any]]:
        """What each label of a row and its mates has, by column: [labels, K], or [labels].

        Raises:
            LuthierError: the file is damaged.
        """
        number = int(self._group_R[place])
        with _whole(self.parts[self._groups[number][0]]):
            table = self._group(number)
            flat = {name: table[name][int(self._place_R[place])].values.to_numpy() for name in COLUMNS[self.kind]}
        rest = TEACHER[-1]
        return {name: one if name == rest else one.reshape(len(flat[rest]), -1) for name, one in flat.items()}

    def _opened(self, part: int) -> Any:
        return pyarrow.parquet.ParquetFile(self.parts[part], memory_map=True, page_checksum_verification=True)

    def _read(self, number: int) -> Any:
        part, group = self._groups[number]
        return self._file(part).read_row_group(group, columns=list(COLUMNS[self.kind])).combine_chunks()

    def fingerprint(self) -> str:
        """Identifies what it holds but for the arrays, whose making the facts tell: a SHA-256, in hexadecimal digits."""
        found = hashlib.sha256(canonical(self.facts).encode())
        for one in (self._digest_E, self.encoded_R[self._row_E], self._value):
            found.update(one.tobytes())
        return found.hexdigest()


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Tell that a file of a store is damaged, or none.

    Raises:
        LuthierError: it is.
    """
    try:
        yield
    except (OSError, pyarrow.ArrowException, ValueError, KeyError, IndexError, TypeError) as problem:
        raise LuthierError(
            f"this is no whole file of numbers of rows: {str(problem).splitlines()[0] if str(problem) else type(problem).__name__}",
            where=str(path),
            fix="remove it and repeat the command that wrote it: what the other files hold is kept",
        ) from problem


def differences(stored: Mapping[str, Any], here: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """What differs between the facts of a store and those of its reader, in words."""
    changed = [(name, stored.get(name), here.get(name)) for name in names if stored.get(name) != here.get(name)]
    return [f"{names[name]}: {_shown(name, old)}, now {_shown(name, new)}" for name, old, new in changed]


def _shown(name: str, value: Any) -> str:
    if name == "template" and value is not None:
        return f"{digest(value) & (2**64 - 1):016x}"[:12]
    return str(value)[:12] if name in ("tokenizer", "fingerprint", "code") else canonical(value)
