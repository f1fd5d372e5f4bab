"""From a row's text to token ids, and which of them are labels.

One path serves every shape, training and inference, so a model is trained on the ids it will be shown. Whether a token
is a label follows from its place in the text, never from its id: a tokenizer whose padding token is its
end-of-sequence token loses no label.

Text a chat template wrote is tokenized as it is, since the template writes its own first token. Any other text begins
with the tokenizer's beginning-of-sequence token if the tokenizer adds one by itself; documents and completions end with
its end-of-sequence token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.kinds import Annotation, Written
from luthier.kinds.parts import Reads
from luthier.rows.annotate import token_columns
from luthier.rows.borders import Border, tokenized_at
from luthier.rows.chat import Form, LossOn, Rendered, form_of, render_pair, render_prompt, render_training
from luthier.rows.groups import GROUPS, PAIR, TEXTS, cut_alike, joined, refuse_other_prompts, run_tokens, without
from luthier.rows.ids import digest_of_tokens
from luthier.rows.labels import labels_of
from luthier.rows.limits import ANYTHING, Limits, TooLong, check_choice, check_ids
from luthier.rows.messages import Message
from luthier.rows.shapes import BadRow, Row, Scalar, bad_rows_error

Purpose = Literal["train", "prompt", "read"]
T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """A row as token ids.

    Args:
        id: the row's id.
        token_ids: the ids, not padded.
        supervised: True where the token is a label, to be predicted from those before it; the first never is.
        where: the place the row was read from.
        columns: the row's free columns.
        truncated: how many tokens were cut off.
        text_shape: the row's shape.
        notes: what about this row deserves a warning.
        token_columns: numbers for each token, by name, which token weights asked for; or K numbers each, [T, K].
        mates: the other rows of its group, in order, without mates of their own: a group stands in one micro-batch. Of a pair the row
            itself is the chosen answer, and its mate the rejected one.
    """

    id: str
    token_ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    where: str
    columns: Mapping[str, Scalar]
    truncated: int
    text_shape: str
    notes: tuple[str, ...] = ()
    token_columns: Mapping[str, Sequence[float] | NDArray[Any]] = field(default_factory=dict)
    mates: tuple[Encoded, ...] = ()

    @property
    def place(self) -> str:
        """Where errors say that the row stands."""
        return f"{self.where} (row {self.id})"

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def group(self) -> tuple[Encoded, ...]:
        """The row and its mates, each by itself."""
        return (replace(self, mates=()), *self.mates) if self.mates else (self,)

    @property
    def digest(self) -> int:
        """Identifies the row and its mates as models read them: token ids and labels, in 8 bytes."""
        return digest_of_tokens((one.token_ids, one.supervised) for one in (self, *self.mates))


def renamed(row: Encoded, id: str) -> Encoded:
    """A row under another id, and its mates with it."""
    mates = tuple(replace(one, id=id + one.id.removeprefix(row.id)) for one in row.mates)
    return replace(row, id=id, mates=mates)


def two_tokens(id: str, where: str, columns: Mapping[str, Scalar], text_shape: str, targets: int, mates: int = 0) -> Encoded:
    """What a row is apart from its text: two tokens, of which the second is a label if the row has any; and as many mates."""
    row = Encoded(id, (0, 0), (False, targets > 0), where, columns, 0, text_shape)
    return replace(row, mates=(row,) * mates) if mates else row


class Sizes(NamedTuple):
    """How large each row is, its mates with it: all that steps are planned from."""

    tokens: Sequence[int]
    targets: Sequence[int]
    longest: Sequence[int] = ()
    """Tokens of the longest of the row and its mates; empty where no row has mates."""
    members: Sequence[int] = ()
    """How many rows stand in a micro-batch for it; empty where each stands alone."""
    run: Sequence[int] = ()
    """Tokens of the row and its mates where what they begin with is run once; empty where no row has mates."""

    @classmethod
    def of(cls, rows: Iterable[Encoded]) -> Sizes:
        """The sizes of encoded rows."""
        groups = [row.group for row in rows]
        tokens = [sum(map(len, group)) for group in groups]
        targets = [sum(sum(one.supervised) for one in group) for group in groups]
        if all(len(group) == 1 for group in groups):
            return cls(tokens, targets)
        longest, members = [max(map(len, group)) for group in groups], [len(group) for group in groups]
        return cls(tokens, targets, longest, members, [run_tokens(group) for group in groups])

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of the longest of each row and its mates."""
        return self.longest or self.tokens

    def take(self, places: Sequence[int]) -> Sizes:
        """Those of some rows."""
        return Sizes(*([column[place] for place in places] if column else () for column in self))


@dataclass(frozen=True)
class EncodedRows:
    """Encoded rows, and what became of the others.

    Args:
        rows: the rows that can be used, in order.
        sizes: their sizes.
        truncated: rows that lost tokens.
        dropped: the rows that cannot, with the reason.
        notes: warnings, and how many rows each concerns.
        first_noted: the first row that each concerns, by its place and id.
    """

    rows: Sequence[Encoded]
    sizes: Sizes
    truncated: int = 0
    dropped: tuple[BadRow, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    first_noted: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(self.sizes.tokens)

    @property
    def supervised_tokens(self) -> int:
        """Labels."""
        return sum(self.sizes.targets)

    @classmethod
    def of(cls, rows: Iterable[Encoded], dropped: Iterable[BadRow] = (), noted: Iterable[Encoded] = ()) -> EncodedRows:
        """Rows that are all in memory, measured.

        Args:
            rows: the rows that can be used.
            dropped: the rows that cannot, with the reason.
            noted: rows whose notes are counted, usable or not.
        """
        kept, (notes, first) = tuple(rows), counted(noted)
        return cls(kept, Sizes.of(kept), sum(row.truncated > 0 for row in kept), tuple(dropped), notes, first)


def counted(rows: Iterable[Encoded]) -> tuple[dict[str, int], dict[str, str]]:
    """The notes of rows: how many rows each concerns, and the first of them by its place and id."""
    notes: Counter[str] = Counter()
    first: dict[str, str] = {}
    for row in rows:
        notes.update(row.notes)
        for note in row.notes:
            first.setdefault(note, row.place)
    return dict(notes), first


def told(notes: Mapping[str, int], first: Mapping[str, str]) -> list[str]:
    """Notes as text, with the numbers of their rows and the first row of each."""
    return [f"{note} ({count} rows" + (f", the first: {first[note]})" if note in first else ")") for note, count in notes.items()]


def encode(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    purpose: Purpose = "train",
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
    too_long: TooLong = "refuse",
    template_options: Mapping[str, Any] | None = None,
    form: Form | None = None,
) -> Encoded:
    """Turn one row into token ids.

    Args:
        row: a checked row.
        tokenizer: the model's tokenizer.
        purpose: `"train"`: the whole row with its labels; `"prompt"`: up to where the model answers, without labels; `"read"`: as a
            head reads it, texts with the special tokens that the tokenizer puts around them, all else whole.
        loss_on: `"assistant"`: all assistant turns, or the completion where the row has one; `"last"`: the last of
            them; `"all"`: every token. A document is always learned whole.
        max_length: the most tokens a row may have; None for no limit.
        too_long: what happens to a longer row: `"refuse"` raises; `"right"` cuts its end off; `"left"` cuts its
            beginning off, which keeps the answer, and keeps a beginning-of-sequence token in its place.
        template_options: variables for the chat template, such as `{"enable_thinking": False}`.
        form: what `form_of` gave for the tokenizer and these, where it is known already: it takes longer than a short row.

    Returns:
        The encoded row. Truncation, or a template that writes earlier turns otherwise, can leave it without any label:
        `encode_all` drops such rows and says so.

    Raises:
        LuthierError: the row is too long, has nothing to learn, or the chat template refuses it.
    """
    form = form or form_of(tokenizer, template_options)
    return _encode(row, form, purpose, loss_on, Limits(max_length, too_long))


def encode_prompt(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    too_long: TooLong = "refuse",
    template_options: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """The ids a model is given to answer a row: its prompt, with the generation prompt of the chat template."""
    return _encode(row, form_of(tokenizer, template_options), "prompt", "last", Limits(max_length, too_long)).token_ids


def encode_pair(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    completion: str | Sequence[Message],
    *,
    id: str | None = None,
    max_length: int | None = None,
    too_long: TooLong = "refuse",
    template_options: Mapping[str, Any] | None = None,
    form: Form | None = None,
) -> Encoded:
    """A row's prompt and a given completion, whose tokens are the labels: a choice to score, or one side of a
    preference.

    Args:
        row: any row with a prompt.
        tokenizer: the model's tokenizer.
        completion: the completion, as text or as messages; for instance `row.fields["chosen"]`.
        id: the id of the result; the row's own when not given.
        max_length: as for `encode`.
        too_long: as for `encode`.
        template_options: as for `encode`.
        form: as for `encode`.

    Raises:
        LuthierError: the result is too long, the row has no prompt, or the chat template refuses it.
    """
    form = form or form_of(tokenizer, template_options)
    encoded = _limited(row, render_pair(row, form, completion), form, Limits(max_length, too_long))
    return encoded if id is None else replace(encoded, id=id)


def encode_all(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    purpose: Purpose = "train",
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
    too_long: TooLong = "refuse",
    on_bad_row: Literal["stop", "skip"] = "stop",
    template_options: Mapping[str, Any] | None = None,
    annotations: Sequence[Annotation] = (),
    reads: Reads = ANYTHING,
) -> EncodedRows:
    """Encode many rows, and account for each of them. The arguments are those of `encode`.

    Args:
        on_bad_row: what happens when a row cannot be encoded: `"stop"` raises one error that names up to five of them,
            `"skip"` puts them into `dropped`. A row that is left without a label is dropped in both cases.
        annotations: what gives the rows' tokens numbers, where they are rows to train on.
        reads: what the model can read; rows that are longer, or have tokens that it does not know, cannot be encoded.

    Raises:
        LuthierError: a row cannot be encoded and `on_bad_row` is `"stop"`, or no label is left in any row.
    """
    found, bad = encode_each(
        rows,
        tokenizer,
        purpose=purpose,
        loss_on=loss_on,
        max_length=max_length,
        too_long=too_long,
        template_options=template_options,
        annotations=annotations,
        reads=reads,
    )
    total = len(found.rows) + len(found.dropped) + len(bad)
    if not total:
        raise LuthierError("there are no rows to encode")
    if bad and (on_bad_row == "stop" or not found.rows):
        raise bad_rows_error(bad, total)
    if not found.rows:
        raise bad_rows_error(found.dropped, total)
    return replace(found, dropped=(*bad, *found.dropped))


def encode_each(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    purpose: Purpose = "train",
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
    too_long: TooLong = "refuse",
    template_options: Mapping[str, Any] | None = None,
    form: Form | None = None,
    annotations: Sequence[Annotation] = (),
    reads: Reads = ANYTHING,
) -> tuple[EncodedRows, list[BadRow]]:
    """`encode_all` without its verdict: what can be encoded, and the rows that cannot.

    Args:
        form: what `form_of` gave for the tokenizer, where it is known already.
    """
    form, limits = form or form_of(tokenizer, template_options), Limits(max_length, too_long, reads)
    encoded: list[Encoded] = []
    dropped: list[BadRow] = []
    bad: list[BadRow] = []
    written: list[Encoded] = []
    for row in rows:
        try:
            one = _encode(row, form, purpose, loss_on, limits, annotations)
        except LuthierError as problem:
            bad.append(BadRow(row.place, problem.what, problem.fix))
            continue
        written.append(one)
        if purpose == "train" and not all(any(member.supervised) for member in one.group):
            dropped.append(BadRow(row.place, _why_nothing_to_learn(one)))
        else:
            encoded.append(one)
    return EncodedRows.of(encoded, dropped, written), bad


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, form: Form | None = None) -> tuple[int, ...]:
    """The ids at which generation stops: the chat template's own end-of-turn token and the end-of-sequence token."""
    end_of_turn = (form or form_of(tokenizer)).end_of_turn
    ids = [tokenizer.convert_tokens_to_ids(end_of_turn)] if end_of_turn else []
    return tuple(dict.fromkeys([*ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]))


def _encode(
    row: Row, form: Form, purpose: Purpose, loss_on: LossOn, limits: Limits, annotations: Sequence[Annotation] = ()
) -> Encoded:
    check_choice("purpose", purpose, get_args(Purpose))
    check_choice("loss_on", loss_on, get_args(LossOn))
    if purpose != "prompt" and row.shape in GROUPS:
        return _together(row, form, purpose, loss_on, limits, annotations)
    if purpose == "read" and row.shape in TEXTS:
        return _text(row, form, limits)
    if not limits.reads.conversations:
        raise LuthierError(
            f"the model is an encoder, which reads texts, and this row is `{row.shape}`",
            where=row.where,
            fix="give rows with a `text`, or `query` and `positive`, or use a causal language model",
        )
    if purpose != "prompt":
        rendered = render_training(row, form, loss_on)

        def write(other: Row) -> str:
            return render_training(other, form, loss_on).text

        def replaced(start: int, stop: int, text: str) -> list[int]:
            return _tokenized(_replaced(rendered, start, stop, text), form)[0]

        def columns_of(ids: Sequence[int]) -> dict[str, tuple[float, ...]]:
            return token_columns(annotations, Written(row, rendered.text, rendered.targets, ids, write, replaced))

        return _limited(row, rendered, form, limits, columns_of)
    if limits.too_long == "right":
        raise LuthierError("a prompt cannot be cut on the right, where the answer begins", where=row.where, fix='too_long="left"')
    return _limited(row, render_prompt(row, form), form, limits)


def _limited(
    row: Row,
    rendered: Rendered,
    form: Form,
    limits: Limits,
    columns_of: Callable[[Sequence[int]], dict[str, tuple[float, ...]]] = lambda ids: {},
) -> Encoded:
    ids, supervised = rendered.block.encoded(form.first_ids) if rendered.block else _tokenized(rendered, form)
    surplus = max(0, len(ids) - limits.longest) if limits.longest is not None else 0
    if surplus and limits.too_long == "refuse":
        raise limits.refusal(row, len(ids))
    whole = Encoded(
        id=row.id,
        token_ids=tuple(ids),
        supervised=tuple(supervised),
        where=row.where,
        columns=row.columns,
        truncated=0,
        text_shape=row.shape,
        notes=rendered.notes,
        token_columns={name: tuple(numbers) for name, numbers in columns_of(ids).items()},
    )
    start = len(ids) - surplus if limits.too_long == "right" else _first_kept(whole, form)
    kept = without(whole, start, surplus)
    check_ids(kept.token_ids, form.tokenizer, limits.reads.vocabulary, row.where)
    return kept


def _text(row: Row, form: Form, limits: Limits) -> Encoded:
    """A text as a head reads it, with its label or those of its words among the columns."""
    given = form.tokenizer(row.fields["text"], verbose=False, return_offsets_mapping=form.tokenizer.is_fast)
    ids = list(given["input_ids"])
    surplus = max(0, len(ids) - limits.longest) if limits.longest is not None else 0
    if surplus and limits.too_long == "refuse":
        raise limits.refusal(row, len(ids))
    found = labels_of(row.fields, given.get("offset_mapping"), row.where)
    columns = {**row.columns, **found.columns}
    whole = Encoded(row.id, tuple(ids), (False,) * len(ids), row.where, columns, 0, row.shape, found.notes, found.of_tokens)
    # The tokens that a tokenizer puts around a text stay; of one that ends with none the text's own end does.
    kept = without(whole, len(ids) - surplus - 1 if limits.too_long == "right" else 1, surplus)
    check_ids(kept.token_ids, form.tokenizer, limits.reads.vocabulary, row.where)
    return kept


def _first_kept(row: Encoded, form: Form) -> int:
    """How many tokens at the beginning stay where others are cut off behind them."""
    return 1 if row.token_ids[:1] == (form.tokenizer.bos_token_id,) else 0


def _together(
    row: Row, form: Form, purpose: Purpose, loss_on: LossOn, limits: Limits, annotations: Sequence[Annotation]
) -> Encoded:
    """Rows that belong together."""
    members = GROUPS[row.shape](row)
    if row.shape != PAIR:
        return joined(row, [_encode(one, form, purpose, loss_on, limits, annotations) for one in members])
    if loss_on == "all":
        raise LuthierError(
            "of two answers to one prompt the answers are compared, and loss_on asks for all text",
            where=row.where,
            fix="leave rows.loss_on out",
        )
    whole = Limits(None, limits.too_long, limits.reads._replace(context=None))
    pair = [_encode(one, form, "train", loss_on, whole, annotations) for one in members]
    refuse_other_prompts(pair, lambda ids: form.tokenizer.decode(list(ids)))
    surplus = max(map(len, pair)) - (max(map(len, pair)) if limits.longest is None else limits.longest)
    if surplus > 0 and limits.too_long == "refuse":
        raise limits.refusal(row, max(map(len, pair)))
    if surplus > 0:
        pair = cut_alike(pair, surplus, _first_kept(pair[0], form))
    return joined(row, pair)


def _replaced(rendered: Rendered, start: int, stop: int, text: str) -> Rendered:
    """The same with another text from start to stop; labels that begin or end within it do so at most where it ends."""
    longer = len(text) - (stop - start)

    def moved(place: int) -> int:
        return place + longer if place >= stop else min(place, start + len(text))

    targets = [(moved(first), moved(behind)) for first, behind in rendered.targets]
    whole = rendered.text[:start] + text + rendered.text[stop:]
    return replace(rendered, text=whole, targets=tuple(target for target in targets if target[0] < target[1]))


def _why_nothing_to_learn(row: Encoded) -> str:
    causes = [f"{row.truncated} tokens were cut off"] if row.truncated else []
    return "no token is left to learn: " + "; ".join([*causes, *row.notes] or ["the row is a single token"])


def _tokenized(rendered: Rendered, form: Form) -> tuple[list[int], list[bool]]:
    def tokenize(text: str) -> list[int]:
        return list(form.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    text = rendered.text
    begins = {start for start, _ in rendered.targets}
    places = sorted(begins | {end for _, end in rendered.targets} | {0, len(text)})
    ids, counts = tokenized_at(tokenize, text, [Border(place, place in begins) for place in places[1:-1]])
    first_token = dict(zip(places, [0, *counts, len(ids)], strict=True))
    supervised = [False] * len(ids)
    for start, end in rendered.targets:
        supervised[first_token[start] : first_token[end]] = [True] * (first_token[end] - first_token[start])
    # A text may begin with the token itself, written out; a second one would be a beginning no model has seen.
    first_ids = list(form.first_ids) if rendered.plain and ids[:1] != list(form.first_ids) else []
    return first_ids + ids, [False] * len(first_ids) + supervised
