"""Which chat template writes conversations, with which variables, and what day it is told.

What is chosen travels with the tokenizer, as its templates do, so that rows, evaluation sets, answers and exports are written alike. The
templates themselves stay as they are: whoever saves the tokenizer saves all of them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from luthier.errors import LuthierError, nearest
from luthier.recipe.paths import TEMPLATES
from luthier.recipe.schema import RowsRecipe
from luthier.rows.thinking import Thinking

DATE = "date"
"""The option that sets a template's clock."""
CLOCK = (
    "the chat template writes today's date: on another day these rows are others, unless rows.chat_template_options says "
    "{date: YYYY-MM-DD}"
)

KEPT = "chat_template.jinja"
"""Where a run keeps the file that its recipe names."""
CHATML_NAME = "chatml"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML: each message between two tokens, behind the name of its role."""

_CHOICE = "_luthier_template"
_ASKS = "strftime_now"
_TAKEN = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages", "raise_exception", _ASKS} - {
    "kwargs"
}


@dataclass(frozen=True)
class Choice:
    """How conversations are written.

    Args:
        name: of one of the tokenizer's templates; None: its default, or `tool_use`, if it has one, where there are tools.
        options: variables for the template, such as `{"enable_thinking": False}`; `date` is also what its clock says.
        today: what the clock says otherwise.
        thinking: what becomes of reasoning in assistant turns.
    """

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    today: date = field(default_factory=date.today)
    thinking: Thinking = "keep"

    @property
    def clock(self) -> datetime:
        """What a template is told that asks what time it is: midnight, where only the day is known."""
        return datetime.fromisoformat(self.options[DATE]) if DATE in self.options else datetime.combine(self.today, time())


def choose(
    tokenizer: PreTrainedTokenizerBase,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    today: date | None = None,
    thinking: Thinking = "keep",
) -> None:
    """Decide how a tokenizer writes conversations from here on.

    Args:
        tokenizer: a model's.
        name: of one of its templates; none: its default. A file FILE.jinja, or `chatml` where it has none of this name, becomes its only
            template, and is saved with it.
        options: variables for the template; `date` sets its clock.
        today: what the clock says otherwise; none: the day it is.
        thinking: what becomes of reasoning in assistant turns.

    Raises:
        LuthierError: there is no such template, none is the default, it cannot be read, its tokens are missing, or an option that it
            does not read.
    """
    given = given_template(name, templates_of(tokenizer))
    if given is not None:
        set_template(tokenizer, given)
        name = None
    choice = Choice(name, dict(options or {}), today or date.today(), thinking)
    text = text_of(tokenizer, name) if templates_of(tokenizer) or name is not None else ""
    for key in choice.options:
        _check_option(key, text)
    give(tokenizer, choice)


def choose_for(tokenizer: PreTrainedTokenizerBase, rows: RowsRecipe, today: date | None = None) -> None:
    """Let a tokenizer write conversations as a recipe says under `rows`. Errors are those of `choose`."""
    choose(tokenizer, rows.chat_template, rows.chat_template_options, today, rows.thinking)


def is_file(name: str | None) -> bool:
    """Whether a recipe's `chat_template` is a file and no name."""
    return name is not None and name.endswith(TEMPLATES)


def given_template(name: str | None, held: Mapping[str, str] = {}) -> str | None:
    """The text of a template that no tokenizer holds: of a file, or of `chatml`; None for a name that is looked up.

    Raises:
        LuthierError: there is no such file, or it holds no template.
    """
    if name == CHATML_NAME and name not in held:
        return CHATML
    if name is None or not is_file(name) or name in held:
        return None
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        fix = f"name a file {TEMPLATES[0]} that is there; a run keeps its own as {KEPT} in its folder"
        raise LuthierError(f"the chat template cannot be read: {problem}", where=f"rows.chat_template: {name}", fix=fix) from None
    try:
        # In the sandbox in which transformers lets every template run.
        _compile_jinja_template(text)
    except TemplateError as problem:
        place = f", line {problem.lineno}" if isinstance(problem, TemplateSyntaxError) else ""
        raise LuthierError(
            f"this is no chat template: {problem}", where=f"rows.chat_template: {name}{place}", fix="correct the file"
        ) from None
    if not text.strip():
        raise LuthierError("the chat template is empty", where=f"rows.chat_template: {name}", fix="write a template into the file")
    return text


def set_template(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Make a template a tokenizer's only one, which is saved with it.

    Raises:
        LuthierError: it is `chatml`, whose tokens the tokenizer does not have.
    """
    if text == CHATML:
        known = tokenizer.get_vocab()
        missing = [one for one in CHATML_TOKENS if one not in known]
        if missing:
            raise LuthierError(
                f"`{CHATML_NAME}` is written with {' and '.join(f'`{one}`' for one in missing)}, which are no tokens of this model",
                where="rows.chat_template",
                fix=f"add them: model: {{name: MODEL, add_tokens: [{', '.join(repr(one) for one in missing)}]}}",
            )
    tokenizer.chat_template = text


def give(tokenizer: PreTrainedTokenizerBase, choice: Choice) -> None:
    """Let a tokenizer write as another one does."""
    vars(tokenizer)[_CHOICE] = choice


def choice_of(tokenizer: PreTrainedTokenizerBase) -> Choice:
    """What was chosen for a tokenizer; its default, today, where nothing was."""
    found: Choice | None = vars(tokenizer).get(_CHOICE)
    return found or Choice()


def templates_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """All chat templates of a tokenizer by name; one alone is called `default`."""
    held: Any = getattr(tokenizer, "chat_template", None)
    return dict(held) if isinstance(held, Mapping) else {"default": str(held)} if held else {}


def text_of(tokenizer: PreTrainedTokenizerBase, name: str | None, tools: Any = None) -> str:
    """The template that writes a conversation.

    Args:
        tokenizer: holds it.
        name: its name; None: the default one.
        tools: those of the conversation; some tokenizers have a template of its own for them.

    Raises:
        LuthierError: there is no such template, or none is the default.
    """
    held = templates_of(tokenizer)
    listed = ", ".join(held)
    if name is None:
        name = "tool_use" if tools is not None and "tool_use" in held else "default"
        if name not in held:
            raise LuthierError(
                f"the tokenizer has several chat templates, and none is the default: {listed}",
                where="rows.chat_template",
                fix=f"name one: `template: {next(iter(held), 'NAME')}` under `rows`",
            )
    if name not in held:
        what = f"it has {listed}" if held else "it has none"
        raise LuthierError(
            f"the tokenizer has no chat template `{name}`: {what}", where="rows.chat_template", fix=nearest(name, held)
        )
    return held[name]


def asks_clock(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> bool:
    """Whether a template that may write conversations asks what day it is."""
    held = templates_of(tokenizer)
    written = held.values() if name is None else [held.get(name, "")]
    return any(_ASKS in text for text in written)


def date_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The day, as YYYY-MM-DD, or the moment that a tokenizer's template is told; None where it does not ask."""
    choice = choice_of(tokenizer)
    if not asks_clock(tokenizer, choice.name):
        return None
    return str(choice.options[DATE]) if DATE in choice.options else choice.today.isoformat()


@contextmanager
def told(moment: datetime, text: str) -> Iterator[None]:
    """Let a template's clock stand still while it writes."""
    if _ASKS not in text:
        yield
        return
    # Variables of a template can hold no function, so its environment has to: transformers keeps one for each text.
    known: dict[str, Callable[[str], str]] = _compile_jinja_template(text).environment.globals
    before = known[_ASKS]
    known[_ASKS] = lambda pattern: moment.strftime(pattern)
    try:
        yield
    finally:
        known[_ASKS] = before


def _check_option(key: str, text: str) -> None:
    where = f"rows.chat_template_options.{key}"
    if key in _TAKEN:
        raise LuthierError(f"`{key}` is what luthier itself gives to a chat template", where=where, fix="leave it out")
    if not text:
        raise LuthierError("the tokenizer has no chat template to read options", where=where, fix="leave it out")
    if key == DATE and _ASKS in text:
        return
    if not re.search(rf"\b{re.escape(key)}\b", text):
        what = "asks for no date" if key == DATE else f"reads no `{key}`"
        raise LuthierError(f"the chat template {what}", where=where, fix="leave it out, or look for its name in the template")
