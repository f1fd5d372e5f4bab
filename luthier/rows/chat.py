"""From a row to the text a model reads, and the parts of that text which it must learn to write.

Conversations are written by the tokenizer's own chat template. Which characters are an assistant's is found by
rendering the conversation up to each assistant turn and comparing: the turn begins where the generation prompt ends, so
a model is trained on exactly what it sees at inference, and it ends behind the template's own end-of-turn token, so a
model learns to stop. Templates need no `{% generation %}` marks for this; where they have them, the marks narrow the
labels down.

A template may render an earlier turn differently once later turns follow. What would then be trained is not what inference shows,
so such a turn is context only, and a note says so. A message that says `learn: false` is context only, too. Where a template deletes
words of a turn to learn, as Qwen3's does with reasoning of earlier turns, the row is refused (`luthier.rows.thinking`).

What a row holds and its text does not is noted (`luthier.rows.unwritten`), and refused where nothing else would be learned.

Without a chat template rows take a plain form: the prompt, then the completion, then the end-of-sequence token. Where
the prompt and the completion are texts, nothing stands between them; messages, instructions, inputs and labelled texts
are each followed by an empty line, and roles are not written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

from jinja2.exceptions import UndefinedError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from luthier.errors import LuthierError
from luthier.rows.beside import asked, disliked
from luthier.rows.blocks import BLOCK, Block
from luthier.rows.messages import Message, arguments_of, with_written_arguments, without_mark
from luthier.rows.shapes import Row, unread
from luthier.rows.template import CLOCK, DATE, Choice, asks_clock, choice_of, templates_of, text_of, told
from luthier.rows.thinking import altered, arranged, check_thoughts, reads_fields
from luthier.rows.unwritten import CALLS, Dialogue, has_special, unwritten

LossOn = Literal["assistant", "last", "all"]
Span = tuple[int, int]
"""First character, and the one behind the last."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "LuthierProbe"
_EMPTY_LINE = "\n\n"
_UNANSWERED = {
    "prompt": "add a `completion`",
    "prompt+answers+scores": "make pairs of its answers with rows.map: ranked_pairs",
    "text+tags": "use an objective that reads labels of words, such as classify_tokens",
}
"""What to do about rows that have no one answer."""
# In these shapes the completion goes on where the prompt stops: spaces between the two are the file's to write.
_CONTINUED = ("prompt+completion", "prompt+chosen+rejected", "prompt+answer", "prompt+choices+answer", "prompt")

REWRITES = "the chat template writes earlier turns otherwise than at inference: those assistant turns are context only"
BEGINS = (
    "the chat template's generation prompt begins an answer with {words!r}, and answers that begin otherwise are context only: begin them "
    "so, or choose another template or template_options under rows"
)
OPENS = "the chat template cannot be asked for an assistant turn that opens a conversation: such turns are context only"
UNREACHABLE = "the chat template cannot be rendered up to an assistant turn: that turn is context only"
UNMARKED = "the chat template marks nothing of an assistant turn as generated: that turn is context only"
UNLEARNED = "every assistant turn that would be learned says `learn: false`"
ALTERS = "the chat template alters or removes text of an assistant turn"
ENDLESS = "neither the chat template nor the tokenizer ends an assistant turn with a token: no end is learned"
SPECIAL = "rows hold special tokens as text, which are read as tokens: perhaps a template was already applied"
UNPARSED = "the arguments of a tool call are text that is no JSON object"
DISLIKED = "`{key}` is false: an answer that is marked as a bad one is learned like any other"
PLAIN = "the tokenizer has no chat template: rows take the plain form"


@dataclass(frozen=True)
class Form:
    """How one tokenizer writes conversations.

    Args:
        tokenizer: the tokenizer.
        options: extra variables for its chat template, such as `{"enable_thinking": False}`.
        templated: whether it has a chat template.
        end_of_turn: the token text that ends an assistant turn; empty where there is none.
        turn_ends_itself: whether the template writes `end_of_turn`; where it does not, it is added after the last turn.
        marked: whether the template marks assistant text with `{% generation %}`.
        first_ids: the ids the tokenizer puts before text no template wrote: its beginning-of-sequence token, or
            nothing.
        special: finds the tokenizer's special tokens in a text; None where it has none.
        choice: which of the tokenizer's templates it is, and what its clock says.
        undated: whether the template asks what day it is, and nobody has set that.
        arguments_as_text: whether the template expects the arguments of calls as JSON text, not as objects.
        reads_thoughts: whether the template reads reasoning that stands in a key of a message.
    """

    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any]
    templated: bool
    end_of_turn: str
    turn_ends_itself: bool
    marked: bool
    first_ids: tuple[int, ...]
    special: re.Pattern[str] | None
    choice: Choice
    undated: bool = False
    arguments_as_text: bool = False
    reads_thoughts: bool = False


@dataclass(frozen=True)
class Rendered:
    """A row's text.

    Args:
        text: what the model reads.
        labels: the characters it learns to write, in order, apart from each other.
        plain: whether the text was written without a chat template, so that the tokenizer may add its own first token.
        notes: what about this row deserves a warning.
        block: of a part of a document, its tokens, which the whole was cut into.
    """

    text: str
    targets: tuple[Span, ...]
    plain: bool
    notes: tuple[str, ...] = ()
    block: Block | None = None


def form_of(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> Form:
    """Learn how a tokenizer writes conversations, and its real end-of-turn token, from a trial conversation."""
    choice = choice_of(tokenizer)
    choice = replace(choice, options={**choice.options, **(options or {})})
    eos = str(tokenizer.eos_token) if tokenizer.eos_token is not None else ""
    special = sorted((str(token) for token in tokenizer.added_tokens_decoder.values() if token.special), key=len)
    plain = Form(
        tokenizer=tokenizer,
        options=choice.options,
        templated=False,
        end_of_turn=eos,
        turn_ends_itself=False,
        marked=False,
        first_ids=_first_ids(tokenizer),
        special=re.compile("|".join(map(re.escape, reversed(special)))) if special else None,
        choice=choice,
    )
    if not templates_of(tokenizer):
        return plain
    written = text_of(tokenizer, choice.name)
    marked = _GENERATION_MARK.search(written) is not None
    undated = asks_clock(tokenizer, choice.name) and DATE not in choice.options
    templated = replace(plain, templated=True, marked=marked, undated=undated, reads_thoughts=reads_fields(written))
    templated = replace(templated, arguments_as_text=_wants_text(templated))
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    dialogue = Dialogue(probe, given=0, tools=None, joint="", where="the chat template, with a trial conversation")
    tail = _apply(dialogue, templated, len(probe), generate=False).rpartition(_PROBE)[2]
    found = [(tail.find(token), -len(token), token) for token in _token_texts(tokenizer) if token in tail]
    return replace(templated, end_of_turn=min(found)[2], turn_ends_itself=True) if found else templated


def _wants_text(form: Form) -> bool:
    """Whether a template joins arguments to text as they are: objects fail there, or are written as Python writes them."""
    arguments = {_PROBE: True}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", CALLS: [call]}]
    written: list[str | None] = []
    for messages in (turns, list(map(with_written_arguments, turns))):
        try:
            written.append(_apply(Dialogue(messages, 0, None, "", ""), form, len(messages), generate=False))
        except LuthierError:
            written.append(None)
    as_object, as_text = written
    return as_text is not None and (as_object is None or str(arguments) in as_object)


def _first_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    added, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and added[:1] == [bos] != bare[:1] else ()


def render_training(row: Row, form: Form, loss_on: LossOn = "assistant") -> Rendered:
    """A row's whole text with its labels.

    Args:
        row: any row that has something to learn.
        form: what `form_of` gave for the tokenizer.
        loss_on: `"assistant"`: every assistant turn, or the completion where a row has one; `"last"`: the last of them;
            `"all"`: all text. A document is always learned whole.

    Raises:
        LuthierError: the row has nothing to learn, or the chat template refuses the conversation.
    """
    if row.shape == "text":
        return _document(row, form)
    answer = _answer(row)
    if not answer and row.shape != "messages":
        others = ", ".join(f"`{key}`" for key in (*row.columns, *row.fields))
        fix = _UNANSWERED.get(row.shape, "encode each of its two answers as a pair")
        raise LuthierError(
            f"a row of the shape `{row.shape}` has no one answer to learn; it has {others}", where=row.where, fix=fix
        )
    prompt = prompt_of(row)
    dialogue = _dialogue(row, form, [*prompt, *answer], given=0 if row.shape == "messages" else len(prompt))
    key = disliked(row.shape, row.columns)
    noted = (*dialogue.notes, DISLIKED.format(key=key)) if key is not None else dialogue.notes
    return _render(replace(dialogue, notes=noted), form, loss_on)


def render_pair(row: Row, form: Form, completion: str | Sequence[Message]) -> Rendered:
    """A row's prompt followed by a given completion, which alone is the target."""
    if row.shape == "text":
        raise LuthierError("a document has no prompt to complete", where=row.where)
    prompt = prompt_of(row)
    return _render(_dialogue(row, form, [*prompt, *_said("assistant", completion)], given=len(prompt)), form, "assistant")


def render_prompt(row: Row, form: Form) -> Rendered:
    """A row's text up to where a model answers: the prompt, or a conversation without its last assistant turn."""
    if row.shape == "text":
        return Rendered(row.fields["text"], (), plain=True, notes=_document_notes(row, form))
    prompt = prompt_of(row)
    if not prompt:
        raise LuthierError("nothing stands before the assistant turn", where=row.where, fix="give a user message")
    dialogue = _dialogue(row, form, prompt, given=len(prompt))
    text = _up_to(dialogue, form, len(prompt), generate=True)
    notes = _notes(dialogue, form, text, (), lambda one: _up_to(one, form, len(one.messages), generate=True))
    return Rendered(text, (), plain=not form.templated, notes=notes)


def prompt_of(row: Row) -> list[Message]:
    """What stands before a row's answer, as messages: of a conversation, all but an assistant turn at its end."""
    fields = row.fields
    if row.shape == "messages":
        messages = list(fields["messages"])
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if row.shape == "instruction":
        return _said("user", asked(fields))
    return _said("user", fields["text"] if row.shape == "text+label" else fields["prompt"])


def _answer(row: Row) -> list[Message]:
    fields = row.fields
    if row.shape == "messages":
        return [message for message in fields["messages"][-1:] if message["role"] == "assistant"]
    if row.shape == "prompt+choices+answer":
        return _said("assistant", fields["choices"][fields["answer"]])
    if row.shape == "prompt+answer":
        return _said("assistant", fields["answer"][0])
    key = {"prompt+completion": "completion", "instruction": "output", "text+label": "label"}.get(row.shape)
    if key is None:
        return []
    return _said("assistant", str(fields[key]) if key == "label" else fields[key])


def _said(role: str, content: str | Sequence[Message]) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def _dialogue(row: Row, form: Form, messages: Sequence[Message], given: int) -> Dialogue:
    continued = row.shape in _CONTINUED and isinstance(row.fields["prompt"], str)
    documents = {key: row.fields[key] for key in ("documents",) if key in row.fields}
    thinking = form.choice.thinking
    messages = arranged(messages, thinking, reads=form.reads_thoughts, where=row.where)
    spoken = map(without_mark, messages)
    return Dialogue(
        list(map(with_written_arguments, spoken) if form.arguments_as_text else spoken),
        given,
        row.fields.get("tools"),
        "" if continued else _EMPTY_LINE,
        row.where,
        frozenset(index for index, message in enumerate(messages) if message.get("learn") is False),
        {**documents, **row.fields.get("chat_template_kwargs", {})},
        _unread(row),
    )


def _document(row: Row, form: Form) -> Rendered:
    eos = str(form.tokenizer.eos_token or "")
    text = row.fields["text"]
    if BLOCK in row.fields:
        return Rendered(text, ((0, len(text)),), plain=True, notes=_document_notes(row, form), block=row.fields[BLOCK])
    text += "" if eos and text.endswith(eos) else eos
    notes = (*([] if eos else [ENDLESS]), *_document_notes(row, form))
    return Rendered(text, ((0, len(text)),), plain=True, notes=notes)


def _document_notes(row: Row, form: Form) -> tuple[str, ...]:
    # Its own beginning and end may be written out.
    first = str(form.tokenizer.bos_token) if form.first_ids else ""
    within = row.fields["text"].removeprefix(first).removesuffix(str(form.tokenizer.eos_token or ""))
    return (*([SPECIAL] if has_special(within, form.special) else []), *_unread(row))


def _unread(row: Row) -> tuple[str, ...]:
    return tuple(f"the row's `{key}` is no part of its text" for key in unread(row))


def _render(dialogue: Dialogue, form: Form, loss_on: LossOn) -> Rendered:
    turns = [index for index, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
    turns = [index for index in turns if index >= dialogue.given]
    if not turns and loss_on != "all":
        raise LuthierError(
            "the conversation has no assistant turn to learn",
            where=dialogue.where,
            fix="add the assistant's answer, or learn every turn with loss_on: all",
        )
    if loss_on == "last":
        turns = turns[-1:]
    learned = [index for index in turns if index not in dialogue.context]
    text, marks = _written(dialogue, form)
    check_thoughts(dialogue, text, lambda one: _written(one, form)[0], learned)
    notes = list(_notes(dialogue, form, text, learned, lambda one: _written(one, form)[0]))
    if not form.end_of_turn:
        notes.append(ENDLESS)
    if loss_on == "all":
        return Rendered(text, _around_context(dialogue, form, text), plain=not form.templated, notes=tuple(notes))
    if not learned:
        notes.append(UNLEARNED)
    targets: list[Span] = []
    for index in learned:
        turn = _turn(dialogue, form, index, text)
        if isinstance(turn, str):
            notes.append(turn)
            continue
        if altered(dialogue, index, turn, text, form.end_of_turn):
            notes.append(ALTERS)
        narrowed = _narrowed(turn, marks) if form.marked else [turn]
        notes += [] if narrowed else [UNMARKED]
        targets += narrowed
    return Rendered(text, tuple(targets), plain=not form.templated, notes=tuple(dict.fromkeys(notes)))


def _notes(dialogue: Dialogue, form: Form, text: str, learned: Sequence[int], write: Callable[[Dialogue], str]) -> tuple[str, ...]:
    who = "the chat template" if form.templated else "the plain form"
    notes = [*([] if form.templated else [PLAIN]), *([CLOCK] if form.undated else []), *dialogue.notes]
    if has_special([dialogue.messages, dialogue.tools, dialogue.options], form.special):
        notes.append(SPECIAL)
    if not form.arguments_as_text and any(isinstance(one, str) for turn in dialogue.messages for one in arguments_of(turn)):
        notes.append(UNPARSED)
    return (*notes, *unwritten(dialogue, text, write, learned, who))


def _written(dialogue: Dialogue, form: Form) -> tuple[str, Sequence[Span]]:
    """The whole text, and what a chat template marks in it as generated."""
    text, marks = _marked(dialogue, form) if form.marked else (_up_to(dialogue, form, len(dialogue.messages)), [])
    if form.templated and not form.turn_ends_itself and dialogue.messages[-1]["role"] == "assistant":
        text += form.end_of_turn
    return text, marks


def _turn(dialogue: Dialogue, form: Form, index: int, text: str) -> Span | str:
    """The characters of the assistant turn `index`, or a note where inference would show them otherwise."""
    try:
        prefix = _up_to(dialogue, form, index, generate=True)
    except LuthierError:
        prefix = None
    through = text if index == len(dialogue.messages) - 1 else _up_to(dialogue, form, index + 1)
    if index == 0 and (prefix is None or not through.startswith(prefix)):
        prefix = _opening(dialogue, form, through)
    if prefix is None:
        return UNREACHABLE if index else OPENS
    end = len(prefix) + _turn_length(through[len(prefix) :], form)
    if not through.startswith(prefix) or not text.startswith(through[:end]):
        return _begun(dialogue, form, index, prefix, through) or REWRITES
    return len(prefix), end


def _begun(dialogue: Dialogue, form: Form, index: int, prefix: str, through: str) -> str | None:
    """What to say where the generation prompt begins the last answer with words that it lacks."""
    before = _up_to(dialogue, form, index) if index else ""
    common = "".join(one for one, _ in takewhile(lambda both: both[0] == both[1], zip(prefix, through, strict=False)))
    if index < len(dialogue.messages) - 1 or len(common) < len(before) or not through.startswith(before):
        return None
    return BEGINS.format(words=prefix[len(common) :])


def _opening(dialogue: Dialogue, form: Form, through: str) -> str | None:
    """What stands before an assistant turn that opens a conversation: up to the generation prompt, as others have it."""
    asked_first = replace(dialogue, messages=[{"role": "user", "content": _PROBE}])
    try:
        before, asking = (_up_to(asked_first, form, 1, generate=generate) for generate in (False, True))
    except LuthierError:
        return None
    prompt = asking[len(before) :] if asking.startswith(before) else ""
    begin = through.find(prompt) + len(prompt)
    words = str(dialogue.messages[0]["content"]).strip()
    return through[:begin] if prompt and prompt in through and words and through.find(words) >= begin else None


def _around_context(dialogue: Dialogue, form: Form, text: str) -> tuple[Span, ...]:
    """The whole text but for the messages that are context only, each from its beginning to that of the next."""
    places = [0]
    for index in sorted(dialogue.context):
        before = _up_to(dialogue, form, index) if index else ""
        through = text if index == len(dialogue.messages) - 1 else _up_to(dialogue, form, index + 1)
        if not through.startswith(before) or not text.startswith(through):
            raise LuthierError(
                "the chat template does not write the conversation message by message, so none of them can be left out of the loss",
                where=dialogue.where,
                fix="remove `learn: false`, or use loss_on: assistant",
            )
        places += [len(before), len(through)]
    return tuple((start, end) for start, end in zip(places[::2], [*places[1::2], len(text)], strict=True) if start < end)


def _narrowed(turn: Span, marks: Sequence[Span]) -> list[Span]:
    start, end = turn
    parts = [(max(start, first), behind) for first, behind in marks if first < end and behind > start]
    # Authors often mark the words only; without the token that ends the turn a model would not learn to stop.
    return [*parts[:-1], (parts[-1][0], end)] if parts else []


def _turn_length(turn: str, form: Form) -> int:
    if form.end_of_turn and form.end_of_turn in turn:
        return turn.rindex(form.end_of_turn) + len(form.end_of_turn)
    # A turn that calls a tool may end with a token of its own, such as Llama 3's `<|eom_id|>`.
    words = turn.rstrip()
    return len(words) if any(words.endswith(token) for token in _token_texts(form.tokenizer)) else len(turn)


def _token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # Some tokenizers add runs of spaces as tokens of their own; those end nothing.
    return [str(token) for token in tokenizer.get_added_vocab() if token.strip()]


def _up_to(dialogue: Dialogue, form: Form, count: int, *, generate: bool = False) -> str:
    """The first `count` messages as they are written, with the generation prompt or without."""
    return (_apply if form.templated else _plain)(dialogue, form, count, generate=generate)


def _plain(dialogue: Dialogue, form: Form, count: int, *, generate: bool) -> str:
    """Without a template there is no generation prompt: a prompt looks the same whether or not an answer follows."""
    text = ""
    for message in dialogue.messages[:count]:
        if dialogue.tools or message.get("tool_calls") or message["role"] == "tool":
            raise LuthierError(
                "the row uses tools, which only a chat template can write, and the tokenizer has none",
                where=dialogue.where,
                fix="use the tokenizer of a model trained for conversations, or set its `chat_template`",
            )
        text += message["content"] + (form.end_of_turn if message["role"] == "assistant" else dialogue.joint)
    return text


def _apply(dialogue: Dialogue, form: Form, count: int, *, generate: bool) -> str:
    template = text_of(form.tokenizer, form.choice.name, dialogue.tools)
    try:
        with told(form.choice.clock, template):
            # As a batch of one: by itself, an empty conversation fails before the template sees it.
            rendered = form.tokenizer.apply_chat_template(
                [list(dialogue.messages[:count])],
                tools=dialogue.tools,
                chat_template=template,
                add_generation_prompt=generate,
                tokenize=False,
                **{**form.options, **dialogue.options},
            )
    except Exception as problem:
        raise _refused(problem, dialogue.where) from problem
    return str(rendered[0])


def _marked(dialogue: Dialogue, form: Form) -> tuple[str, Sequence[Span]]:
    template = text_of(form.tokenizer, form.choice.name, dialogue.tools)
    try:
        with told(form.choice.clock, template):
            rendered: Any = render_jinja_template(
                conversations=[list(dialogue.messages)],
                tools=dialogue.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**form.tokenizer.special_tokens_map, **form.options, **dialogue.options},
            )
    except Exception as problem:
        raise _refused(problem, dialogue.where) from problem
    (text,), (marks,) = rendered
    return text, marks


def _refused(problem: Exception, where: str) -> LuthierError:
    # A template is a program of the model's author: it can fail in any way, and its message is what the user needs.
    if isinstance(problem, TypeError | UndefinedError):
        fix = "give the messages all that this template reads of them, or choose another template under rows"
    else:
        fix = "bring the turns into the order this model expects, for some: no system turn, user and assistant in turn"
    return LuthierError(f"the chat template refuses the conversation: {problem}", where=where, fix=fix)
