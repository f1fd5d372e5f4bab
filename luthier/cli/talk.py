"""A conversation in the terminal: what is typed goes to the model, but for a few commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.markup import escape

if TYPE_CHECKING:
    from luthier.runs.chat import Chat

COMMANDS = "/reset begins anew, /system TEXT gives a system turn (/system alone takes it away), /quit or an empty line ends."


def converse(chat: Chat, ask: Callable[[str], str], show: Callable[[str], object], *, base: bool = False) -> None:
    """Talk until an empty line, `/quit` or the end of the input.

    Args:
        chat: the model.
        ask: shows a prompt and returns the line that is typed.
        show: prints a line, with rich's markup.
        base: also show the base's answer to each question by itself.
    """
    show(f"[dim]{COMMANDS}[/dim]")
    warned = _warn(chat, show, "")
    while True:
        try:
            asked = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, rest = asked.partition(" ")
        if not asked or asked == "/quit":
            return
        if asked == "/reset":
            chat.reset()
            show("[dim]a new conversation[/dim]")
        elif command == "/system":
            chat.system = rest.strip()
            chat.reset()
            show(f"[dim]a new conversation, {'with this' if chat.system else 'without a'} system turn[/dim]")
            warned = _warn(chat, show, warned)
        elif command.startswith("/") and command[1:].isalpha():
            show(f"[dim]there is no command {escape(command)}: {COMMANDS}[/dim]")
        else:
            if base:
                show(f"[dim]base: {escape(chat.ask_base(asked))}[/dim]")
            show(escape(chat.say_turn(asked)))


def _warn(chat: Chat, show: Callable[[str], object], said: str) -> str:
    """Warn once of the same."""
    warning = chat.warning()
    if warning and warning != said:
        show(f"[yellow]warning: {escape(warning)}[/yellow]")
    return warning or said
