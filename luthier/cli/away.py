"""Commands that take a result to where it is used: a hub, other programs."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Annotated

import typer
from rich.markup import escape

from luthier.cli.complete import run_names
from luthier.cli.face import Json, Quiet, WeightsOnly, face


def serve(
    model: Annotated[str, typer.Argument(help="A model's name or folder, or a run's folder.", autocompletion=run_names)],
    port: Annotated[int, typer.Option(help="The port to listen on; 0 for one that is free.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen on; others than this one let other machines in.")] = "127.0.0.1",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer where a request names none.", min=1)] = 512,
    system: Annotated[str, typer.Option(help="The text of a system turn for conversations without one.", metavar="TEXT")] = "",
    weights_only: WeightsOnly = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer chats by OpenAI's interface, for trying a run in other programs; Ctrl-C ends it."""
    with face(as_json, quiet=quiet) as speak:
        from luthier.runs.chat import Chat
        from luthier.runs.completions import Completions
        from luthier.runs.serve import KEY, serve

        chat = Chat(model, say=speak.say, weights_only=weights_only, system=system)
        completions = Completions(chat, max_new_tokens=max_new_tokens)
        with serve(completions, host=host, port=port, say=speak.say) as server:
            asked = {"model": completions.name, "messages": [{"role": "user", "content": "Hello!"}]}
            url, body = f"{server.url}/chat/completions", shlex.quote(json.dumps(asked, ensure_ascii=False))
            line = f"curl {url} \\\n  -H 'Content-Type: application/json' \\\n  -d {body}"
            facts = {"url": server.url, "model": completions.name, "curl": line}
            warnings = [chat.warning()] if chat.warning() else []
            if server.open_to_others and not server.key:
                warnings.append(f"whoever reaches {host} can use this model: set {KEY}, or leave --host out")
            facts |= {"warning": "; ".join(warnings)} if warnings else {}
            shown = [f"[yellow]warning: {escape(one)}[/yellow]" for one in warnings]
            speak.show(facts, lambda: "\n".join([*shown, f"serving {escape(completions.name)} at {server.url}", escape(line)]))
            sys.stdout.flush()
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                speak.say("ended")
