"""Commands that take a result to where it is used: a hub, other programs."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from luthier.cli.complete import run_names
from luthier.cli.face import Dtype, Json, Out, Quiet, WeightsOnly, face, listed


def push(
    run: Annotated[str, typer.Argument(help="A run's name or folder.", autocompletion=run_names)],
    repository: Annotated[str, typer.Argument(help="Where to: OWNER/NAME.", metavar="OWNER/NAME")],
    form: Annotated[str, typer.Option("--as", help="`model`: everything merged; `peft`: an adapter.")] = "model",
    dtype: Dtype = "auto",
    private: Annotated[bool, typer.Option("--private", help="To be seen by the owner alone.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of files that are there already.")] = False,
    license: Annotated[str, typer.Option(help="For the card, as the hub names it: apache-2.0, mit, ...")] = "",
    language: Annotated[list[str] | None, typer.Option(help="For the card: en, de, ...; may be given several times.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder, and send nothing.")] = False,
    keep: Annotated[Path | None, typer.Option(help="Where the folder is written and kept; in a dry run NAME by itself.")] = None,
    folder: Out = "runs",
    weights_only: WeightsOnly = False,
    as_json: Json = False,
) -> None:
    """Send a run's result and its card to the Hugging Face hub, once it reads back the same; the token is that in HF_TOKEN."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.report.card import Published
        from luthier.report.words import size
        from luthier.runs.push import Destination, push

        facts = push(
            run,
            Destination(repository, private, replace, dry_run, keep),
            form=form,
            dtype=dtype,
            published=Published(license, tuple(language or ())),
            out=folder,
            say=speak.say,
            weights_only=weights_only,
        )

        def shown() -> str:
            files = {f"  {name}": size(count) for name, count in facts["files"].items()}
            rest: dict[str, Any] = {key: value for key, value in facts.items() if key != "files"}
            end = f"nothing was sent: this would go to {repository}" if dry_run else "sent"
            return "\n".join([listed(rest), listed(files), escape(end)])

        speak.show(facts, shown)


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
