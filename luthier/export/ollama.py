"""A tuned model as a folder for Ollama: one GGUF file and the Modelfile that says how conversations are written and where answers end.

Ollama writes conversations by a template of its own, in Go's language. Where the Modelfile has none it takes one from a list, by
likeness to the file's chat template, and else has the file's own rendered (from version 0.30 on; earlier ones send the bare question). So a
template is made here from what the chat template writes around each turn, and given only where it writes trial conversations alike,
character by character.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.export.folder import new_folder
from luthier.export.gguf import export_gguf
from luthier.export.model import write_texts
from luthier.generation.generate import stop_ids
from luthier.rows.chat import Form, form_of, render_prompt
from luthier.rows.shapes import Row
from luthier.rows.template import templates_of
from luthier.tune import Tune

FILE, MODELFILE = "model.gguf", "Modelfile"
OWN = "the file's own, which Ollama renders from version 0.30 on: "
NO_SYSTEM = "the chat template has no system turn"
_WORDS = ("Questionone", "Answerone", "Questiontwo", "Answertwo", "Questionthree")
_TEXTS = (
    'Say "yes" or {{ no }},\n\nplease: \\n 1 < 2 & é 東',
    "<b>Well</b>\n```\n{% if %}\n```",
    "And then?",
    "Nothing.",
    "Go on…",
)
_ROLES = ("user", "assistant")
_SYSTEM = "Systemtext"
_DEFAULT_TOP_K = 50
"""What transformers draws from where a configuration that draws says nothing."""


class Turns(NamedTuple):
    """What a chat template writes around the turns of a conversation."""

    opening: str
    """What stands first where there is no system turn; many templates put one of their own there."""
    system: tuple[str, str] | None
    """Around a system turn, which stands first; None where none is written."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    """What an answer follows."""
    refuses_system: bool = False
    """Whether a conversation with a system turn is refused."""

    def write(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation up to its answer, as Ollama writes it."""
        text = self.opening
        for message in messages:
            around = getattr(self, message["role"])
            if message["role"] == "system":
                text = self.opening if around is None else around[0] + message["content"] + around[1]
            else:
                text += around[0] + message["content"] + around[1]
        return text + self.answer

    def go(self) -> str:
        """The same as a template in Go's language, its texts in quotes, where no space is lost."""
        opening = _go(self.opening)
        if self.system is not None:
            begins = f"{{{{- if .System }}}}{_go(self.system[0])}{{{{ .System }}}}{_go(self.system[1])}"
            begins += f"{{{{ else }}}}{opening}{{{{ end }}}}" if opening else "{{ end }}"
        elif self.refuses_system:
            # There is no such template, which is what Ollama then says.
            begins = f'{{{{- if .System }}}}{{{{ template "{NO_SYSTEM}" . }}}}{{{{ end }}}}{opening}'
        else:
            begins = opening
        user, assistant = (f"{_go(before)}{{{{ .Content }}}}{_go(behind)}" for before, behind in (self.user, self.assistant))
        lines = [
            begins,
            "{{- range .Messages }}",
            f'{{{{- if eq .Role "user" }}}}{user}',
            f'{{{{- else if eq .Role "assistant" }}}}{assistant}',
            "{{- end }}",
            f"{{{{- end }}}}{_go(self.answer)}",
        ]
        return "\n".join(line for line in lines if line)


class _ElseError(Exception):
    """A chat template writes conversations in a way that no such template can; the message says how."""


def export_ollama(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    weights: str = "auto",
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the merged model as `export_gguf` does, and a Modelfile beside it.

    Args:
        tune: the tuned model; afterwards it is as it was.
        tokenizer: a byte-level BPE; what its chat template writes goes into the Modelfile.
        folder: must not exist; it appears when everything has been checked.
        weights: as for `export_gguf`.
        texts: files of text that belong beside them, by name.

    Returns:
        What `export_gguf` gives, `template`, where Ollama has its template from, and `create`, the command that takes the folder in.

    Raises:
        LuthierError: the folder exists, the file would not be the model (see `export_gguf`), or neither Ollama's template nor the file's
            own writes conversations as they were trained.
    """
    folder = Path(folder)
    turns, why = _template(form_of(tokenizer))
    with new_folder(folder) as beside:
        found = export_gguf(tune, tokenizer, beside / FILE, weights=weights)
        (beside / MODELFILE).write_text(modelfile(tune, tokenizer, turns, why), encoding="utf-8", newline="\n")
        write_texts(beside, texts)
    note = {"note": f"{NO_SYSTEM}, and Ollama refuses conversations with one"} if turns and turns.refuses_system else {}
    create = f"ollama create {folder.name} -f {folder / MODELFILE}"
    return {**found, "template": OWN + why if turns is None else "in the Modelfile", **note, "create": create}


def modelfile(tune: Tune, tokenizer: PreTrainedTokenizerBase, turns: Turns | None, why: str = "") -> str:
    """What Ollama is told: the file, the template, where answers end, and how tokens are drawn.

    Args:
        tune: whose generation settings say how tokens are drawn.
        tokenizer: whose tokens end an answer.
        turns: what is written around turns; None leaves it to the template in the file.
        why: the reason for that.
    """
    lines = [f"FROM ./{FILE}", ""]
    if turns is None:
        lines += [f"# The chat template is {OWN}{why}.", ""]
    else:
        lines += [f'TEMPLATE """{turns.go()}"""', ""]
    special = tokenizer.added_tokens_decoder
    ends = [str(special[number]) for number in stop_ids(tune, tokenizer) if number in special]
    lines += [f'PARAMETER stop "{text}"' for text in dict.fromkeys(ends)]
    lines += [f"PARAMETER {name} {value:g}" for name, value in _drawing(getattr(tune.model, "generation_config", None))]
    return "\n".join(lines) + "\n"


def _drawing(config: Any) -> list[tuple[str, float]]:
    """Ollama's names of generation settings; what a configuration leaves open is what transformers takes, not what Ollama would."""

    def of(name: str, default: float) -> float:
        value = getattr(config, name, None)
        return default if value is None else value

    drawn = [("temperature", 0.0)]
    if getattr(config, "do_sample", None):
        drawn = [("temperature", of("temperature", 1.0)), ("top_k", of("top_k", _DEFAULT_TOP_K)), ("top_p", of("top_p", 1.0))]
        drawn += [("min_p", of("min_p", 0.0))]
    drawn += [("repeat_penalty", of("repetition_penalty", 1.0))]
    longest = getattr(config, "max_new_tokens", None)
    return [*drawn, *([("num_predict", longest)] if longest else [])]


def _template(form: Form) -> tuple[Turns | None, str]:
    """What is written around turns; where Ollama's template cannot write it, nothing and the reason.

    Raises:
        LuthierError: the template in the file would not write it either.
    """
    try:
        return turns_of(form), ""
    except _ElseError as error:
        choice, held = form.choice, templates_of(form.tokenizer)
        if choice.options or (choice.name not in (None, "default") and "default" in held):
            raise LuthierError(
                f"Ollama cannot write conversations as they were trained: {error}, and the file's template is not told of "
                "rows.chat_template or rows.chat_template_options",
                where="--as ollama",
                fix="use --as gguf with a program that takes options of chat templates, such as llama-server, or --as model",
            ) from error
        return None, str(error)


def turns_of(form: Form) -> Turns:
    """What a tokenizer writes around turns, found by writing trial conversations and tried on others.

    Raises:
        _ElseError: no such pieces write what the tokenizer does.
    """
    if form.undated:
        raise _ElseError("it writes what day it is")

    def write(messages: Sequence[Mapping[str, str]]) -> str:
        return _bare(form, [dict(message) for message in messages])

    first, tail = _apart(write(_talk(1)), _WORDS[:1])
    _, between, behind, _ = _apart(write(_talk(2)), _WORDS[:3])
    try:
        text = write([{"role": "system", "content": _SYSTEM}, *_talk(1)])
        refuses = False
    except LuthierError:
        text, refuses = "", True
    system = None
    if _SYSTEM in text:
        before, after, _ = _apart(text, (_SYSTEM, _WORDS[0]))
        system = (before, after)
    found = _pieces(form.end_of_turn, first, system, between, behind, tail)._replace(refuses_system=refuses)
    _try(found, write)
    return found


def _pieces(end: str, first: str, system: tuple[str, str] | None, between: str, behind: str, tail: str) -> Turns:
    """Cut what stands between turns into the end of one and the beginning of the next, where a reader would.

    Args:
        end: the text that ends a turn; empty where there is none.
        first: what stands before the first question.
        system: around a system turn, up to the first question.
        between: from a question to its answer.
        behind: from an answer to the next question.
        tail: from the last question to where its answer begins.
    """
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(between, tail, strict=False)))
    cut = _behind_end(between, end)
    cut = cut if cut is not None and cut <= common else common
    begins = behind[_behind_end(behind, end) or 0 :]
    heads = [first] if system is None else [first, system[1]]
    if not all(head.endswith(begins) for head in heads):
        # The first question stands elsewhere than later ones, such as behind the system's text.
        begins = ""
    ends = behind.removesuffix(begins)
    if system is not None:
        system = (system[0], system[1].removesuffix(begins))
    return Turns(first.removesuffix(begins), system, (begins, between[:cut]), (between[cut:], ends), tail[cut:])


def _behind_end(text: str, end: str) -> int | None:
    """Where what follows the end of a turn begins, white space left with the turn; None where none ends."""
    if not end or end not in text:
        return None
    place = text.index(end) + len(end)
    return place + len(text[place:]) - len(text[place:].lstrip())


def _try(turns: Turns, write: Callable[[Sequence[Mapping[str, str]]], str]) -> None:
    """Write other conversations both ways.

    Raises:
        _ElseError: one differs.
    """
    systems: list[list[dict[str, str]]] = [[]]
    if not turns.refuses_system:
        systems.append([{"role": "system", "content": "Be brief.\n\nBe {{ kind }}."}])
    for system in systems:
        for count in (1, 2, 3):
            talk = [*system, *_talk(count, _TEXTS)]
            if turns.write(talk) != write(talk):
                raise _ElseError("it writes turns otherwise by their place or their text")


def _talk(questions: int, texts: Sequence[str] = _WORDS) -> list[dict[str, str]]:
    """A conversation with so many questions, all but the last answered."""
    return [{"role": _ROLES[place % 2], "content": texts[place]} for place in range(2 * questions - 1)]


def _bare(form: Form, messages: list[dict[str, str]]) -> str:
    """A conversation up to its answer, without the token that Ollama puts before every text.

    Raises:
        LuthierError: the chat template refuses it.
        _ElseError: the chat template does not write that token.
    """
    rendered = render_prompt(Row("trial", "messages", {"messages": messages}, "a trial conversation", {}), form)
    if rendered.plain or not form.first_ids:
        return rendered.text
    token = str(form.tokenizer.bos_token)
    if not rendered.text.startswith(token):
        raise _ElseError(f"it does not begin with {token}, which readers of the file put first")
    return rendered.text.removeprefix(token)


def _apart(text: str, words: Sequence[str]) -> list[str]:
    """What stands before, between and behind words.

    Raises:
        _ElseError: one of them is not there exactly once, in this order.
    """
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            raise _ElseError("it leaves out or repeats turns")
        pieces.append(before)
    return [*pieces, text]


def _go(text: str) -> str:
    """A text as an action of Go's templates; signs that a Modelfile loses are escaped."""
    if not text:
        return ""
    quoted = json.dumps(text, ensure_ascii=False)
    return f"{{{{ {''.join(one if one.isprintable() else _escaped(one) for one in quoted)} }}}}"


def _escaped(sign: str) -> str:
    return f"\\u{ord(sign):04x}" if ord(sign) < 1 << 16 else f"\\U{ord(sign):08x}"
