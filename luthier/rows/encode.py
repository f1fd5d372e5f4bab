"""From a row's text to token ids, and which of them are targets.

One path serves every shape, training and inference, so a model is trained on the ids it will be shown. Whether a token
is a target follows from its place in the text, never from its id: a tokenizer whose padding token is its
end-of-sequence token loses no target.

Text a chat template wrote is tokenized as it is, since the template writes its own first token. Any other text begins
with the tokenizer's beginning-of-sequence token if the tokenizer adds one by itself; documents and completions end with
its end-of-sequence token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.kinds import Annotation, Written
from luthier.kinds.parts import Reads
from luthier.rows.annotate import token_columns
from luthier.rows.chat import Form, LossOn, Rendered, form_of, render_pair, render_prompt, render_training
from luthier.rows.limits import ANYTHING, Limits, TooLong, check_choice, check_ids
from luthier.rows.messages import Message
from luthier.rows.shapes import BadRow, Row, Scalar, bad_rows_error

Purpose = Literal["train", "prompt"]
T = TypeVar("T")
_Tokenize = Callable[[str], list[int]]


class _Border(NamedTuple):
    """A place in a text where targets begin or end."""

    place: int
    begins: bool


@dataclass(frozen=True)
class Encoded:
    """A row as token ids.

    Args:
        id: the row's id.
        token_ids: the ids, not padded.
        supervised: True where the token is a target, to be predicted from those before it; the first never is.
        where: the place the row was read from.
        columns: the row's free columns.
        truncated: how many tokens were cut off.
        text_shape: the row's shape.
        notes: what about this row deserves a warning.
        token_columns: numbers for each token, by name, which token weights asked for.
    """

    id: str
    token_ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    where: str
    columns: Mapping[str, Scalar]
    truncated: int
    text_shape: str
    notes: tuple[str, ...] = ()
    token_columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)


def two_tokens(id: str, where: str, columns: Mapping[str, Scalar], text_shape: str, targets: int) -> Encoded:
    """What a row is apart from its text: two tokens, of which the second is a target if the row has any."""
    return Encoded(id, (0, 0), (False, targets > 0), where, columns, 0, text_shape)


class Sizes(NamedTuple):
    """How large each row is: all that steps are planned from."""

    tokens: Sequence[int]
    targets: Sequence[int]


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
        """Targets."""
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
        sizes = Sizes([len(row) for row in kept], [sum(row.supervised) for row in kept])
        return cls(kept, sizes, sum(row.truncated > 0 for row in kept), tuple(dropped), notes, first)


def counted(rows: Iterable[Encoded]) -> tuple[dict[str, int], dict[str, str]]:
    """The notes of rows: how many rows each concerns, and the first of them by its place and id."""
    notes: Counter[str] = Counter()
    first: dict[str, str] = {}
    for row in rows:
        notes.update(row.notes)
        for note in row.notes:
            first.setdefault(note, _place(row))
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
    max_tokens: int | None = None,
    too_long: TooLong = "refuse",
    template_options: Mapping[str, Any] | None = None,
    form: Form | None = None,
) -> Encoded:
    """Turn one row into token ids.

    Args:
        row: a checked row.
        tokenizer: the model's tokenizer.
        purpose: `"train"`: the whole row with its targets; `"prompt"`: up to where the model answers, without targets.
        loss_on: `"assistant"`: all assistant turns, or the completion where the row has one; `"last"`: the last of
            them; `"all"`: every token. A document is always learned whole.
        max_tokens: the most tokens a row may have; None for no limit.
        too_long: what happens to a longer row: `"refuse"` raises; `"right"` cuts its end off; `"left"` cuts its
            beginning off, which keeps the answer, and keeps a beginning-of-sequence token in its place.
        template_options: variables for the chat template, such as `{"enable_thinking": False}`.
        form: what `form_of` gave for the tokenizer and these, where it is known already: it takes longer than a short row.

    Returns:
        The encoded row. Truncation, or a template that writes earlier turns otherwise, can leave it without any target:
        `encode_all` drops such rows and says so.

    Raises:
        LuthierError: the row is too long, has nothing to learn, or the chat template refuses it.
    """
    form = form or form_of(tokenizer, template_options)
    return _encode(row, form, purpose, loss_on, Limits(max_tokens, too_long))


def encode_prompt(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    too_long: TooLong = "refuse",
    template_options: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """The ids a model is given to answer a row: its prompt, with the generation prompt of the chat template."""
    return _encode(row, form_of(tokenizer, template_options), "prompt", "last", Limits(max_tokens, too_long)).token_ids


def encode_pair(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    completion: str | Sequence[Message],
    *,
    id: str | None = None,
    max_tokens: int | None = None,
    too_long: TooLong = "refuse",
    template_options: Mapping[str, Any] | None = None,
    form: Form | None = None,
) -> Encoded:
    """A row's prompt and a given completion, whose tokens are the targets: a choice to score, or one side of a
    preference.

    Args:
        row: any row with a prompt.
        tokenizer: the model's tokenizer.
        completion: the completion, as text or as messages; for instance `row.fields["chosen"]`.
        id: the id of the result; the row's own when not given.
        max_tokens: as for `encode`.
        too_long: as for `encode`.
        template_options: as for `encode`.
        form: as for `encode`.

    Raises:
        LuthierError: the result is too long, the row has no prompt, or the chat template refuses it.
    """
    form = form or form_of(tokenizer, template_options)
    encoded = _limited(row, render_pair(row, form, completion), form, Limits(max_tokens, too_long))
    return encoded if id is None else replace(encoded, id=id)


def encode_all(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    purpose: Purpose = "train",
    loss_on: LossOn = "assistant",
    max_tokens: int | None = None,
    too_long: TooLong = "refuse",
    on_bad_row: Literal["stop", "skip"] = "stop",
    template_options: Mapping[str, Any] | None = None,
    annotations: Sequence[Annotation] = (),
    reads: Reads = ANYTHING,
) -> EncodedRows:
    """Encode many rows, and account for each of them. The arguments are those of `encode`.

    Args:
        on_bad_row: what happens when a row cannot be encoded: `"stop"` raises one error that names up to five of them,
            `"skip"` puts them into `dropped`. A row that is left without a target is dropped in both cases.
        annotations: what gives the rows' tokens numbers, where they are rows to train on.
        reads: what the model can read; rows that are longer, or have tokens that it does not know, cannot be encoded.

    Raises:
        LuthierError: a row cannot be encoded and `on_bad_row` is `"stop"`, or no target is left in any row.
    """
    found, bad = encode_each(
        rows,
        tokenizer,
        purpose=purpose,
        loss_on=loss_on,
        max_tokens=max_tokens,
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
    max_tokens: int | None = None,
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
    form, limits = form or form_of(tokenizer, template_options), Limits(max_tokens, too_long, reads)
    encoded: list[Encoded] = []
    dropped: list[BadRow] = []
    bad: list[BadRow] = []
    written: list[Encoded] = []
    for row in rows:
        try:
            one = _encode(row, form, purpose, loss_on, limits, annotations)
        except LuthierError as problem:
            bad.append(BadRow(_place(row), problem.what, problem.mend))
            continue
        written.append(one)
        if purpose == "train" and not any(one.supervised):
            dropped.append(BadRow(_place(row), _why_nothing_to_learn(one)))
        else:
            encoded.append(one)
    return EncodedRows.of(encoded, dropped, written), bad


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, form: Form | None = None) -> tuple[int, ...]:
    """The ids at which generation stops: the chat template's own end-of-turn token and the end-of-sequence token."""
    end_of_turn = (form or form_of(tokenizer)).end_of_turn
    ids = [tokenizer.convert_tokens_to_ids(end_of_turn)] if end_of_turn else []
    return tuple(dict.fromkeys([*ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]))


def _place(row: Row | Encoded) -> str:
    return f"{row.where} (row {row.id})"


def _encode(
    row: Row, form: Form, purpose: Purpose, loss_on: LossOn, limits: Limits, annotations: Sequence[Annotation] = ()
) -> Encoded:
    check_choice("purpose", purpose, get_args(Purpose))
    check_choice("loss_on", loss_on, get_args(LossOn))
    if purpose == "train":
        rendered = render_training(row, form, loss_on)

        def write(other: Row) -> str:
            return render_training(other, form, loss_on).text

        def replaced(start: int, stop: int, text: str) -> list[int]:
            return _tokenized(_replaced(rendered, start, stop, text), form)[0]

        def columns_of(ids: Sequence[int]) -> dict[str, tuple[float, ...]]:
            return token_columns(annotations, Written(row, rendered.text, rendered.targets, ids, write, replaced))

        return _limited(row, rendered, form, limits, columns_of)
    if limits.too_long == "right":
        raise LuthierError("a prompt cannot be cut on the right, where the answer begins", where=row.where, mend='too_long="left"')
    return _limited(row, render_prompt(row, form), form, limits)


def _limited(
    row: Row,
    rendered: Rendered,
    form: Form,
    limits: Limits,
    columns_of: Callable[[Sequence[int]], dict[str, tuple[float, ...]]] = lambda ids: {},
) -> Encoded:
    ids, supervised = _tokenized(rendered, form)
    surplus = max(0, len(ids) - limits.longest) if limits.longest is not None else 0
    if surplus and limits.too_long == "refuse":
        raise limits.refusal(row, len(ids))
    first = 1 if ids[:1] == [form.tokenizer.bos_token_id] else 0
    start = len(ids) - surplus if limits.too_long == "right" else first

    def cut(values: Sequence[T]) -> tuple[T, ...]:
        return (*values[:start], *values[start + surplus :])

    kept = cut(ids)
    check_ids(kept, form.tokenizer, limits.reads.vocabulary, row.where)
    return Encoded(
        id=row.id,
        token_ids=kept,
        supervised=tuple(one and place > 0 for place, one in enumerate(cut(supervised))),
        where=row.where,
        columns=row.columns,
        truncated=surplus,
        text_shape=row.shape,
        notes=rendered.notes,
        token_columns={name: cut(numbers) for name, numbers in columns_of(ids).items()},
    )


def _replaced(rendered: Rendered, start: int, stop: int, text: str) -> Rendered:
    """The same with another text from start to stop; targets that begin or end within it do so at most where it ends."""
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
    ids, counts = _tokenized_at(tokenize, text, [_Border(place, place in begins) for place in places[1:-1]])
    first_token = dict(zip(places, [0, *counts, len(ids)], strict=True))
    supervised = [False] * len(ids)
    for start, end in rendered.targets:
        supervised[first_token[start] : first_token[end]] = [True] * (first_token[end] - first_token[start])
    # A text may begin with the token itself, written out; a second one would be a beginning no model has seen.
    first_ids = list(form.first_ids) if rendered.plain and ids[:1] != list(form.first_ids) else []
    return first_ids + ids, [False] * len(first_ids) + supervised


def _tokenized_at(tokenize: _Tokenize, text: str, borders: Sequence[_Border]) -> tuple[list[int], list[int]]:
    """The ids of a text, and how many of them stand before each border.

    Offsets are of no use here: many tokenizers trim spaces from them, and a character cut into bytes gives each of them
    the same. Instead the text before a border is tokenized by itself, as inference does it. Where its tokens are not
    the first tokens of the whole (a line break before the border that merges with one behind it), or where a special
    token before the border swallows spaces the model has to write, the text is cut at the border.
    """
    whole = tokenize(text)
    if not borders:
        return whole, []
    places = [0, *(border.place for border in borders), len(text)]
    parts = [tokenize(text[start:end]) for start, end in pairwise(places)]
    if [token for part in parts for token in part] == whole:
        return whole, list(accumulate(map(len, parts[:-1])))
    counts = []
    for number, (place, begins) in enumerate(borders):
        before = tokenize(text[:place])
        if whole[: len(before)] != before or (begins and _swallows(tokenize, text, place, whole)):
            head, head_counts = _tokenized_at(tokenize, text[:place], borders[:number])
            later = [border._replace(place=border.place - place) for border in borders[number + 1 :]]
            tail, tail_counts = _tokenized_at(_going_on(tokenize), text[place:], later)
            return head + tail, [*head_counts, len(head), *(len(head) + count for count in tail_counts)]
        counts.append(len(before))
    return whole, counts


def _swallows(tokenize: _Tokenize, text: str, place: int, whole: Sequence[int]) -> bool:
    behind = text[place:]
    return behind[:1].isspace() and tokenize(text[:place] + behind.lstrip()) == whole


def _going_on(tokenize: _Tokenize) -> _Tokenize:
    """Tokenize text that stands behind other text: some tokenizers put a space before the beginning of a text."""

    def behind(text: str) -> list[int]:
        line_break, both = tokenize("\n"), tokenize("\n" + text)
        return both[len(line_break) :] if both[: len(line_break)] == line_break else tokenize(text)

    return behind
