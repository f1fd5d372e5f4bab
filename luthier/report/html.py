"""Reports as one self-contained HTML page: no script, no network, and a content security policy that allows neither."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from luthier.errors import LuthierError
from luthier.report import words
from luthier.report.curves import training_figure
from luthier.report.facts import Facts, samples_of, sets_of
from luthier.report.figures import interval_figure
from luthier.report.heat import change_figure, changes_by_role, total_change
from luthier.report.radar import benchmark_figure
from luthier.report.story import cards, headline, warnings_of

FORMS: dict[str, Callable[[float], str]] = {
    "count": words.count,
    "short": words.short,
    "number": words.number,
    "percent": words.percent,
    "duration": words.duration,
    "size": words.size,
}
"""Number filters of the templates; each shows an absent number as not measured."""


def write_report(run: Facts, path: Path) -> Path:
    """Write a run's page.

    Args:
        run: what `run.json` holds. Whatever is absent reads `not measured`.
        path: the file to write; one that exists is replaced.

    Returns:
        The path.
    """
    return write_page(path, report_page(run))


def report_page(run: Facts) -> str:
    """A run's page as HTML."""
    sets = sets_of(run)
    delta = run.get("delta") or {}
    return render_page(
        "report.html.j2",
        run=run,
        **{key: run.get(key) or {} for key in ("model", "rows", "machine", "versions")},
        headline=headline(run),
        cards=cards(run),
        warnings=warnings_of(run),
        sets=sets,
        benchmark=benchmark_figure(sets),
        lost=samples_of(sets, "lost"),
        learned=samples_of(sets, "learned"),
        wrong=samples_of(sets, "wrong"),
        right=samples_of(sets, "right"),
        training=training_figure(run, sets),
        heat=change_figure(delta),
        roles=changes_by_role(delta),
        moved=total_change(delta.get("by_place") or ()),
    )


def render_page(template: str, **facts: Any) -> str:
    """A template as a whole page, with the style sheet and the policy in it."""
    css = _source("style.css")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return _environment().get_template(template).render(css=Markup(css), policy=policy, **facts)


def write_page(path: Path, page: str) -> Path:
    """Write beside and rename, so that a reader never sees half a page."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(page, encoding="utf-8", newline="\n")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise LuthierError(f"the page cannot be written: {error}", where=str(path), fix="name a file to write to") from error
    return path


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("luthier.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: partial(words.shown, form=form) for name, form in FORMS.items()})
    environment.filters.update(spaced=words.spaced, plural=words.plural, moment=words.moment, clip=clip)
    environment.filters.update(interval_figure=interval_figure)
    return environment


def clip(text: str, most: int = 2000, *, end: bool = False) -> str:
    """The start of a long text, or its end, with how much is left out. A prompt asks at its end."""
    if len(text) <= most:
        return text
    left_out = f"({words.count(len(text) - most)} more characters in run.json)"
    return f"{left_out} \u2026 {text[-most:]}" if end else f"{text[:most]} \u2026 {left_out}"


def _shown(value: Any) -> Any:
    """How templates show a value: nothing as not measured, text without controls. Escaping comes after."""
    if value is None:
        return words.NOT_MEASURED
    return words.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _source(name: str) -> str:
    environment = _environment()
    loader = environment.loader
    assert loader is not None
    return loader.get_source(environment, name)[0]
