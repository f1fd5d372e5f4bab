"""A model card, README.md beside what is exported: what was trained, what it learned and kept, how to load it, and what nobody knows."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from luthier.errors import LuthierError
from luthier.report.facts import Facts, SetFacts, sets_of, short_name
from luthier.report.story import headline, warnings_of
from luthier.report.words import clean, count, duration, measured, number, percent, plural, short, size, spaced

FILE = "README.md"
_ROWS = ("rows", "train", "validate")
"""Keys of a recipe that may hold rows themselves, which no card gives away."""
_SIGNS = re.compile(r"([\\`*_{}\[\]#|])")


class Use(NamedTuple):
    """How a folder is loaded."""

    library: str
    """Its name on the hub: transformers, peft, sentence-transformers, gguf."""
    task: str
    """The hub's name of what the model does; empty where it has none."""
    code: str
    """What loads it from `FOLDER`, and, of an adapter, from `BASE`."""
    language: str = "python"
    """What the code is written in, as Markdown names it."""


class Published(NamedTuple):
    """What whoever publishes a result says of it."""

    license: str = ""
    """As the hub names it, such as apache-2.0; empty where nothing is said."""
    languages: tuple[str, ...] = ()
    """Codes of ISO 639, such as en."""

    def check(self) -> None:
        """Refuse what the hub would not read.

        Raises:
            LuthierError: the license or a language is no such name.
        """
        if self.license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            fix = "write it as the hub does: apache-2.0, mit, cc-by-4.0, llama3.2, other"
            raise LuthierError(f"`{self.license}` names no license", where="--license", fix=fix)
        for one in self.languages:
            if not re.fullmatch(r"[a-z]{2,3}", one):
                raise LuthierError(f"`{one}` names no language", where="--language", fix="write its code, such as en or de")


def model_card(run: Facts, use: Use, *, base: str | None, folder: str, note: str = "", published: Published | None = None) -> str:
    """The card of a run's result, as Markdown. It names no path of the machine it is made on.

    Args:
        run: the facts.
        use: how what is written beside it is loaded.
        base: the base's name on the hub; None where it has none.
        folder: what the folder is called.
        note: what a reader should know of the base.
        published: what is said of it beside what the run knows.
    """
    model, said = run.get("model") or {}, published or Published()
    datasets = _datasets(run.get("recipe") or {})
    head = {
        **({"license": said.license} if said.license else {}),
        **({"language": list(said.languages)} if said.languages else {}),
        **({"datasets": datasets} if datasets else {}),
        **({"base_model": base} if base else {}),
        "library_name": use.library,
        **({"pipeline_tag": use.task} if use.task else {}),
        "tags": ["luthier", *(part.strip() for part in str(run.get("tune") or "").split(",") if part.strip())],
    }
    code = use.code.replace("FOLDER", folder).replace("BASE", base or "the folder of the base")
    sets = sets_of(run)
    pieces = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {plain(short_name(run))}",
        plain(headline(run)),
        "## Load it",
        f"```{use.language}\n{code}\n```",
        *([plain(note)] if note else []),
        "## What it learned, and what it kept",
        _table(("set", "role", "metric", "items", "before", "after", "verdict"), map(_row, sets))
        if sets
        else "Nothing was measured.",
        *(["Measured by luthier before and after training; 95 % intervals in brackets."] if sets else []),
        "## How it was trained",
        _table(("", ""), _training(run, model)),
        "The recipe, with the names of files alone:",
        f"```yaml\n{_recipe(run.get('recipe') or {})}```",
        "## What to know before using it",
        "\n".join(f"- {plain(one)}" for one in _limits(run, sets, said)),
    ]
    return "\n\n".join(pieces) + "\n"


def plain(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return _SIGNS.sub(r"\\\1", html.escape(" ".join(clean(text).split()), quote=False))


def _row(one: SetFacts) -> tuple[str, ...]:
    values = (
        one.value(estimate.value) + (f" ({interval})" if (interval := estimate.interval(one.form)) else "")
        for estimate in (one.before, one.after)
    )
    return (one.name, one.role, spaced(one.metric), "" if one.n is None else count(one.n), *values, one.verdict)


def _training(run: Facts, model: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    rows, batch = run.get("rows") or {}, run.get("batch") or {}
    trained, total = run.get("trained_parameters"), run.get("total_parameters")
    files = ", ".join(dict.fromkeys(_name(str(one)) for one in rows.get("files") or () if one != "list"))
    yield (
        "base",
        f"{_name(str(model.get('name')))}, {model.get('origin') if not _is_path(str(model.get('origin'))) else 'a folder'}",
    )
    yield "fingerprint of the base", str(model.get("fingerprint"))
    for ancestor in model.get("ancestors") or ():
        yield "trained on from", _name(str(ancestor.get("run")))
    yield "technique", str(run.get("tune"))
    if measured(trained) and measured(total) and total:
        yield "parameters trained", f"{short(trained)} of {short(total)} ({percent(trained / total)})"
    yield "rows", ", ".join(part for part in (f"{count(rows['rows'])} rows" if measured(rows.get("rows")) else "", files) if part)
    if measured(run.get("steps")) and measured(batch.get("rows")):
        yield "steps", f"{count(run['steps'])} of {number(batch['rows'])} rows and {count(batch['tokens'])} tokens"
    if measured(run.get("learning_rate")):
        yield "highest learning rate", number(run["learning_rate"])
    if measured(run.get("seconds")):
        peak = f", {size(run['peak_memory_bytes'])} at most" if measured(run.get("peak_memory_bytes")) else ""
        yield "cost", f"{duration(run['seconds'])}{peak}"
    machine = run.get("machine") or {}
    yield "machine", f"{machine.get('gpu') or machine.get('processor')}, {machine.get('precision')}"
    yield "versions", ", ".join(f"{name} {number}" for name, number in (run.get("versions") or {}).items())


def _limits(run: Facts, sets: list[SetFacts], said: Published) -> Iterable[str]:
    named = ", ".join(one.name for one in sets) or "nothing"
    yield f"What it does was measured on {named}; of everything else nothing is known, safety and bias among it."
    bound = "Licenses of the base and of the rows bind this model too"
    yield f"It is published under {said.license}. {bound}." if said.license else f"{bound}; this card does not know them."
    yield from warnings_of(run)


def _datasets(recipe: Mapping[str, Any]) -> list[str]:
    """The data sets of the hub that a recipe trains on, each once."""
    rows = recipe.get("rows")
    train = rows.get("train") if isinstance(rows, Mapping) else None
    listed = train if isinstance(train, (list, tuple)) else [train]
    named = [one.get("rows") if isinstance(one, Mapping) else one for one in listed]
    hub = [one.removeprefix("hub:").partition(":")[0] for one in named if isinstance(one, str) and one.startswith("hub:")]
    # A configuration stands behind owner and name.
    return list(dict.fromkeys("/".join(one.split("/")[:2]) for one in hub))


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *(tuple(map(plain, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _recipe(value: Mapping[str, Any]) -> str:
    """As YAML, without paths of this machine; fenced code must not end within it."""
    return yaml.safe_dump(_named(value), sort_keys=False, allow_unicode=True).replace("```", "'''")


def _named(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {str(name): _named(one, str(name)) for name, one in value.items() if one is not None and name != "out"}
    if isinstance(value, (list, tuple)):
        if key in _ROWS and value and all(isinstance(one, Mapping) and "rows" not in one for one in value):
            return f"{plural(len(value), 'row')} given in Python"
        return [_named(one, key) for one in value]
    return _name(value) if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:[\\/]", text) is not None


def _name(text: str) -> str:
    return PurePath(text.replace("\\", "/")).name if _is_path(text) else text
