"""A run in the terminal: the headline, the four cards and the sets, within 80 columns and 24 lines, and as much more as warnings need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from luthier.report.facts import Estimate, Facts, SetFacts, are_shares, sets_of, short_name
from luthier.report.story import Card, cards, headline, last_step, warnings_of
from luthier.report.words import NOT_MEASURED, clean, count, duration, moment, number, percent, shown, spaced

if TYPE_CHECKING:
    from luthier.evaluate.best_of import BestOf
    from luthier.evaluate.sets import SetResult

MOST_SETS = 4
MOST_WARNINGS = 2
LONGEST_SENTENCE = 300
"""Characters of the headline and of each warning: four lines, and no warning that luthier writes by itself is longer."""
ONE_WORD = ("status", "steps", "loss", "target", "retention", "time", "started", "items", "value", "before", "after")
"""Columns that hold words and numbers short enough never to be cut."""
NOTHING = "-"
"""Stands in a narrow column for what was not measured."""
STYLES = {"better": "green", "worse": "red", NOT_MEASURED: "dim"}


def summary(run: Facts) -> Group:
    """A run's headline, cards, sets and warnings. Text from data is shown as it is, never read as markup."""
    sets = sets_of(run)
    warnings = warnings_of(run)
    parts: list[RenderableType] = [plain(_clipped(headline(run)), "bold"), _cards(cards(run))]
    if sets:
        parts.append(_set_table(sets[:MOST_SETS]))
    if len(sets) > MOST_SETS:
        parts.append(plain(f"and {len(sets) - MOST_SETS} more sets in report.html", "dim"))
    parts += [plain(_clipped(f"warning: {warning}"), "yellow") for warning in warnings[:MOST_WARNINGS]]
    if len(warnings) > MOST_WARNINGS:
        parts.append(plain(f"and {len(warnings) - MOST_WARNINGS} more warnings in report.html", "yellow"))
    return Group(*parts)


def run_table(runs: Iterable[Facts]) -> Table:
    """Runs, one a line. Each stands for itself: sets of different runs need not be the same, so nothing is ranked."""
    table = _table("run", "status", "steps", "loss", "target", "retention", "time", "started")
    for run in runs:
        learned = next((one for one in sets_of(run) if one.role != "retention"), None)
        table.add_row(
            plain(short_name(run), "bold"),
            plain(str(run.get("status") or "unknown"), "" if run.get("status") == "finished" else "yellow"),
            plain(_steps(run)),
            plain(_brief(_last_loss(run), number)),
            plain(_brief(learned.after.value if learned else None, learned.value if learned else number)),
            plain(_brief(run.get("retained"), percent)),
            plain(_brief(run.get("seconds"), duration)),
            plain(moment(str(run.get("started") or ""))[:10]),
        )
    return table


def _steps(run: Facts) -> str:
    """Steps taken, and of how many where that is not all of them."""
    step, of = last_step(run) or run.get("steps"), run.get("planned_steps")
    if step is None:
        return NOTHING
    return count(step) if run.get("status") == "finished" or not of else f"{count(step)}/{count(of)}"


def _last_loss(run: Facts) -> float | None:
    """The loss of the last step that was recorded."""
    history = run.get("history") or ()
    loss = history[-1].get("loss") if history else run.get("final_loss")
    return None if loss is None else float(loss)


def _brief(value: Any, form: Callable[[float], str]) -> str:
    said = shown(value, form)
    return NOTHING if said == NOT_MEASURED else said


def measured(results: Mapping[str, SetResult]) -> Table:
    """Sets measured on one model, with 95 % intervals."""
    table = _table("set", "metric", "items", "value", "95 % interval")
    for name, one in results.items():
        form = percent if are_shares([one.value], one.higher_is_better) else number
        value = Estimate(one.value, *(one.interval or ()))
        table.add_row(
            plain(name, "bold"),
            plain(spaced(one.metric)),
            str(one.n),
            shown(value.value, form),
            value.interval(form) or NOT_MEASURED,
        )
    return table


def compared_sets(metrics: Mapping[str, Any]) -> Group:
    """Sets measured before and after, as a run's facts hold them, and all values of those that are tasks of the evaluation harness."""
    sets = sets_of({"metrics": metrics})
    values = [(task, *value) for one in sets for task in one.tasks for value in task.values]
    table = _table("task", "all metrics", "before", "after")
    for task, name, before, after in values:
        table.add_row(plain(task.name, "bold"), plain(name), _brief(before, number), _brief(after, number))
    rest: list[RenderableType] = [plain(""), table] if values else []
    return Group(_set_table(sets), *rest)


def best_of(found: BestOf) -> Group:
    """What the best of n answers comes to, n by n, with 95 % intervals, and where it is best."""
    table = _table("best of", "KL at most", "reward", "gold", "disagreement")
    for one in found.picked:
        estimates = [Estimate(one.reward, *(one.reward_interval or ()))]
        estimates += [] if one.gold is None else [Estimate(one.gold, *(one.gold_interval or ()))]
        cells = [f"{shown(each.value, number)} ({each.interval(number)})".removesuffix(" ()") for each in estimates]
        cells += [NOT_MEASURED] * (2 - len(cells))
        table.add_row(plain(str(one.n), "bold"), plain(number(one.kl)), *map(plain, cells), plain(shown(one.disagreement, number)))
    said = f"{count(found.rows)} rows, {count(found.answers)} answers each or more; {count(found.members)} members, {found.combine}"
    if found.peak is not None:
        said += f"; gold is highest at {found.peak}"
    return Group(table, plain(said, "dim"))


def plain(text: str, style: str = "") -> Text:
    """Text that is neither markup nor able to steer the terminal."""
    return Text(clean(text).replace("\n", " "), style=style)


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST_SENTENCE else f"{text[: LONGEST_SENTENCE - 1]}\u2026"


def _cards(four: Iterable[Card]) -> Table:
    grid = Table.grid(expand=True, padding=0)
    panels = []
    for card in four:
        grid.add_column(ratio=1)
        lines = [
            plain(card.value, f"bold {STYLES.get(card.verdict, '')}".strip()),
            *(plain(note, "dim") for note in card.notes),
        ]
        panels.append(Panel(Group(*lines), title=card.title, title_align="left", box=box.ROUNDED, border_style="dim", height=9))
    grid.add_row(*panels)
    return grid


def _set_table(sets: Iterable[SetFacts]) -> Table:
    table = _table("set", "metric", "before", "after", "difference", "verdict")
    for one in sets:
        table.add_row(
            _one_line(one.name, "bold"),
            _one_line(spaced(one.metric), ""),
            plain(one.value(one.before.value)),
            plain(one.value(one.after.value)),
            plain(one.difference_words()),
            _one_line(one.verdict, STYLES.get(one.verdict, "")),
        )
    return table


def _one_line(text: str, style: str) -> Text:
    line = plain(text, style)
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold", max_width=28)
    for name in others:
        right = name in ("items", "value", "before", "after", "difference")
        # Where room is short, names and sentences take more lines, and what is one word stays one.
        table.add_column(name, overflow="fold", justify="right" if right else "left", no_wrap=name in ONE_WORD)
    return table
