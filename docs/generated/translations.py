"""Configurations of other tools beside the recipes that `luthier convert` makes of them."""

from __future__ import annotations

import html
from pathlib import Path

from luthier.convert import TOOLS, convert

FILES = {
    "Supervised fine-tuning with LoRA": "trl_sft.yaml",
    "QLoRA on chats": "axolotl_qlora.yml",
    "Preferences": "llamafactory_dpo.yaml",
}


def page() -> str:
    """One table for each file: theirs on the left, the recipe on the right."""
    pieces = []
    for heading, name in FILES.items():
        path = Path(__file__).parent / "theirs" / name
        made = convert(path)
        cells = "".join(f"<td><pre><code>{shown(text)}</code></pre></td>" for text in (path.read_text("utf-8"), made.text))
        head = f"<th>{TOOLS[made.tool].title}</th><th>luthier</th>"
        pieces += [f"### {heading}", f'<table><tr>{head}</tr><tr style="vertical-align: top">{cells}</tr></table>']
    return "\n\n".join(pieces)


def shown(text: str) -> str:
    """A file's text within HTML. An empty line would end the HTML in Markdown on GitHub, so line breaks before one are entities."""
    return html.escape(text).replace("\n\n", "\n&#10;")
