"""Looking at data before training on it: how much there is, what is wrong with it, and what exactly will be learned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from luthier.kinds.parts import Reads
from luthier.recipe import BlocksRecipe
from luthier.rows.blocks import splitter_of
from luthier.rows.chat import LossOn, form_of
from luthier.rows.columns import Columns
from luthier.rows.encode import Encoded, EncodedRows, encode_each, told
from luthier.rows.files import LeftOut
from luthier.rows.groups import sides
from luthier.rows.limits import ANYTHING, TooLong
from luthier.rows.read import Rows, read
from luthier.rows.shapes import BadRow, ignored

_QUANTILES = {"shortest": 0.0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}
_SHOWN_CHARACTERS = 1200
_SHOWN_REASONS = 5
_OPEN, _CLOSE = "[[", "]]"
# A terminal obeys control characters, so those of the data are shown, not sent; line breaks and tabs do no harm.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_STYLES = {
    (True, False): "bold green",
    (True, True): "bold green reverse",
    (False, False): "dim",
    (False, True): "magenta",
}


@dataclass(frozen=True)
class Piece:
    """Text of neighboring tokens that are alike: labels or not, special tokens or not."""

    text: str
    target: bool
    special: bool


@dataclass(frozen=True)
class Sample:
    """One row as the model will read it."""

    id: str
    where: str
    tokens: int
    labels: int
    truncated: int
    pieces: tuple[Piece, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """What a set of rows holds.

    Args:
        name: the set.
        rows: usable rows; a preference counts once.
        blocks: how documents were split, in words; empty where they were not.
        shape_counts: how many rows have each shape.
        tokens: all tokens, after truncation.
        supervised_tokens: the labels among them.
        lengths: tokens of the shortest, median, 90 %, 99 % and longest row, before truncation.
        too_long: rows over the limit.
        skipped: records that could not be read or encoded.
        dropped: rows left without a target.
        ignored_files: files of a folder that are in no known format.
        left_out: files beside those read that could be read, and why they were not.
        notes: warnings, and how many rows each concerns.
        first_noted: the first row that each concerns, by its place and id.
        ignored_columns: columns that the model does not read, and how many rows have each.
        samples: the first rows, rendered.
    """

    name: str
    rows: int
    blocks: str
    shape_counts: Mapping[str, int]
    tokens: int
    supervised_tokens: int
    lengths: Mapping[str, int]
    too_long: int
    skipped: tuple[BadRow, ...]
    dropped: tuple[BadRow, ...]
    ignored_files: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    notes: Mapping[str, int]
    first_noted: Mapping[str, str]
    ignored_columns: Mapping[str, int]
    samples: tuple[Sample, ...]

    def as_json(self) -> dict[str, Any]:
        """The same facts as plain values."""
        listed = {
            "skipped": [bad._asdict() for bad in self.skipped],
            "dropped": [bad._asdict() for bad in self.dropped],
            "left_out": [one._asdict() for one in self.left_out],
        }
        return {**asdict(replace(self, skipped=(), dropped=(), left_out=())), **listed}


def look(
    source: str | Path | Rows | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    n: int = 5,
    *,
    shape: str | None = None,
    columns: Columns | None = None,
    blocks: BlocksRecipe | None = None,
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
    too_long: TooLong = "refuse",
    template_options: Mapping[str, Any] | None = None,
    reads: Reads = ANYTHING,
) -> Look:
    """Read and encode rows as a run would, without stopping at bad ones.

    A preference is shown as two samples, the chosen and the rejected answer; a prompt without an answer has no labels.

    Args:
        source: anything `read` takes.
        tokenizer: the model's tokenizer.
        n: how many samples to render.
        shape, columns: as for `read`.
        blocks: how documents are split; None: they are left whole.
        loss_on: as for `encode`.
        max_length: as for `encode`.
        too_long: as for `encode`; a refused row counts as skipped here.
        template_options: as for `encode`.
        reads: what the model can read, as for `encode_all`.

    Raises:
        LuthierError: the source cannot be opened, or no row in it can be read.
    """
    rows = source if isinstance(source, Rows) else read(source, shape=shape, on_bad_row="skip", columns=columns)
    # Their lengths are of interest whether or not the model reads so much.
    longest = min((one for one in (max_length, reads.context) if one is not None), default=None)
    splitter = splitter_of(blocks, tokenizer, form_of(tokenizer, template_options).first_ids, longest)
    rows = rows if splitter is None else replace(rows, rows=tuple(splitter.rows(rows)))
    answered = [part for row in rows if row.shape != "prompt" for part in sides(row)]
    questions = [row for row in rows if row.shape == "prompt"]
    whole, bad = encode_each(
        answered, tokenizer, loss_on=loss_on, template_options=template_options, reads=Reads(vocabulary=reads.vocabulary)
    )
    long = {row.id for row in whole.rows if longest is not None and len(row) > longest}
    cut, refused = encode_each(
        [row for row in answered if row.id in long],
        tokenizer,
        loss_on=loss_on,
        max_length=max_length,
        too_long=too_long,
        template_options=template_options,
        reads=reads,
    )
    asked, unasked = encode_each(questions, tokenizer, purpose="prompt", template_options=template_options, reads=reads)
    kept = EncodedRows.of((*(row for row in whole.rows if row.id not in long), *cut.rows, *asked.rows))
    order = {part.id: place for place, part in enumerate([*answered, *questions])}
    shown = sorted(kept.rows, key=lambda row: order[row.id])[:n]
    return Look(
        name=rows.name,
        rows=len(rows),
        blocks="" if splitter is None else splitter.told(rows),
        shape_counts=rows.shape_counts,
        tokens=kept.tokens,
        supervised_tokens=kept.supervised_tokens,
        lengths=_quantiles([len(row) for row in (*whole.rows, *asked.rows)]),
        too_long=len(long),
        skipped=(*rows.skipped, *bad, *refused, *unasked),
        dropped=(*whole.dropped, *cut.dropped),
        ignored_files=rows.ignored_files,
        left_out=rows.left_out,
        notes=dict(Counter(whole.notes) + Counter(asked.notes)),
        first_noted={**asked.first_noted, **whole.first_noted},
        ignored_columns=dict(Counter(key for row in rows for key in ignored(row)).most_common()),
        samples=tuple(sample_of(row, tokenizer) for row in shown),
    )


def render(looked: Look, *, marked: bool = False) -> RenderableType:
    """What a terminal shows: the facts, the problems, and the samples with their labels in bold green.

    Special tokens are set off by color, line breaks are marked, and control characters of the data are spelled out.

    Args:
        looked: what was found.
        marked: put labels in brackets, for who sees no colors.
    """
    share = looked.supervised_tokens / looked.tokens if looked.tokens else 0.0
    facts = {
        "rows": ", ".join(f"{count} {shape}" for shape, count in looked.shape_counts.items()),
        "blocks": looked.blocks,
        "tokens": f"{looked.tokens}, of which {looked.supervised_tokens} are labels ({share:.0%})",
        "lengths": ", ".join(f"{name} {tokens}" for name, tokens in looked.lengths.items()),
        "too long": str(looked.too_long),
        "skipped": _reasons(looked.skipped),
        "dropped": _reasons(looked.dropped),
        "not read": ", ".join(f"`{name}` of {count} rows" for name, count in looked.ignored_columns.items()),
        "ignored files": "\n".join(looked.ignored_files),
        "left out": "\n".join(f"{one.file}: {one.why}" for one in looked.left_out),
        "notes": "\n".join(told(looked.notes, looked.first_noted)),
        "learned": (f"what stands between {_OPEN} and {_CLOSE}" if marked else "what is bold green") if looked.samples else "",
    }
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        if fact:
            table.add_row(Text(name, style="bold"), Text(_visible(fact)))
    return Group(
        Text(_visible(looked.name), style="bold underline"),
        table,
        *(_rendered(sample, looked, marked) for sample in looked.samples),
    )


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    last = len(ordered) - 1
    return {name: ordered[math.ceil(share * last)] for name, share in _QUANTILES.items()} if ordered else {}


def sample_of(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """A row in text again, cut where what is learned and what is read change."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    kinds = [(target, token in special) for token, target in zip(row.token_ids, row.supervised, strict=True)]
    pieces: list[Piece] = []
    end, text = 0, ""
    for kind, run in groupby(kinds):
        end += len(list(run))
        # Some tokenizers write the first token they are given without its space: only the whole text has it.
        longer = str(tokenizer.decode(list(row.token_ids[:end]), clean_up_tokenization_spaces=False))
        pieces.append(Piece(longer[len(text) :], *kind))
        text = longer
    return Sample(row.id, row.where, len(row), sum(row.supervised), row.truncated, tuple(pieces), row.notes)


def _rendered(sample: Sample, looked: Look, marked: bool) -> Text:
    cut = f", {sample.truncated} cut off" if sample.truncated else ""
    heading = f"\n{sample.where}, row {sample.id}: {sample.tokens} tokens, {sample.labels} labels{cut}\n"
    text = Text(_visible(heading), style="bold")
    # What is so in every row is said once, above.
    for note in (note for note in sample.notes if looked.notes.get(note, 0) < looked.rows):
        text.append(f"note: {_visible(note)}\n", style="yellow")
    for is_label, pieces in groupby(sample.pieces, lambda piece: piece.target):
        text.append(_OPEN if marked and is_label else "")
        for piece in pieces:
            text.append(shortened(_visible(piece.text)).replace("\n", "↵\n"), style=_STYLES[piece.target, piece.special])
        text.append(_CLOSE if marked and is_label else "")
    return text


def _visible(text: str) -> str:
    return text.translate(_VISIBLE)


def shortened(text: str) -> str:
    """Both ends of a long text, with how much is left out between."""
    surplus = len(text) - _SHOWN_CHARACTERS
    if surplus <= 0:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {surplus} more characters … {text[-half:]}"


def _reasons(bad: Sequence[BadRow]) -> str:
    if not bad:
        return ""
    shown = [f"{row.where}: {row.reason}" for row in bad[:_SHOWN_REASONS]]
    return "\n".join([str(len(bad)), *shown, *(["…"] if len(bad) > len(shown) else [])])
