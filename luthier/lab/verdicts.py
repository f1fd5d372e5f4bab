"""What came of the replications, in words that say how large an effect is; and the list of it that comes with luthier.

python -m luthier.lab.verdicts docs/replications writes that list anew from the committed results, and beside them the figure of all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape

from luthier.errors import LuthierError
from luthier.lab.overview import draw_effects
from luthier.lab.verdict import CANNOT_TELL, HOLDS, HOLDS_NOT, TWO_LOOKS, Design
from luthier.registry.listing import VERDICTS

FILE = VERDICTS
NOT_AGAIN = "not run again under the rule"
"""Said of a result from before the rule: it had other seeds, and one verdict of several expectations."""
COLORS = {HOLDS: "green", HOLDS_NOT: "red", CANNOT_TELL: "yellow", NOT_AGAIN: "dim"}
CALIBRATION, EFFECTS = "calibration", "effects"
"""The names of the result that is about the lab itself, and of the figure of all replications."""
_BEFORE = {"supported": HOLDS, "refuted": HOLDS_NOT, "inconclusive": CANNOT_TELL}
"""Verdicts as results from before the rule write them."""
Result = dict[str, Any]


def rule_facts(design: Design) -> dict[str, Any]:
    """How the lab looked, as plain data."""
    return {"looks": list(design.looks), "level": design.level, "lab": design.lab}


def under_rule(result: Mapping[str, Any]) -> bool:
    """Whether a result came about under the present rule: two looks, or one where the replication's runs are too dear for two."""
    rule = result.get("rule") or {"lab": False}
    return bool(rule["lab"]) and rule["lab"] and (len(rule["looks"]) == 1 or rule == rule_facts(TWO_LOOKS))


def readable(result: Result) -> Result:
    """A result as results are now; one from before the rule keeps its numbers and has no `rule`."""
    if "rule" in result:
        return result
    found = [{**one, "verdict": _BEFORE[one["verdict"]]} for one in result["expectations"]]
    verdict = _BEFORE[result["verdict"]]
    return {**result, "rule": None, "question": "", "unit": "", "verdict": verdict, "expectations": found}


def number(value: float | None) -> str:
    """A number of a table."""
    return "none" if value is None else f"{value:.3g}"


def difference(one: Mapping[str, Any]) -> str:
    """An expectation's mean difference with its interval."""
    text = number(one["mean"])
    return text + (f" ({number(one['interval'][0])} to {number(one['interval'][1])})" if one["interval"] else "")


def in_words(result: Mapping[str, Any]) -> str:
    """A replication's verdict with the size of its main effect: `holds at this scale: gained 0.31 nats (0.1 to 0.5), half minus full`."""
    (main, *_) = result["expectations"]
    mean, _, interval = difference(main).partition(" ")
    amount = " ".join(one for one in (main["measure"], mean, result["unit"], interval) if one)
    return f"{result['verdict']} at this scale: {amount}, {main['variant']} minus {main['versus']}, {len(result['seeds'])} seeds"


def entry(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the list keeps of a result: a result from before the rule tells its first expectation and no verdict."""
    (main, *_) = result["expectations"]
    ruled = under_rule(result)
    return {
        "verdict": result["verdict"] if ruled else NOT_AGAIN,
        "words": in_words(result) if ruled else NOT_AGAIN,
        "effect": main["mean"],
        "interval": main["interval"],
        "measure": main["measure"],
        "unit": result["unit"],
        "variant": main["variant"],
        "versus": main["versus"],
        "seeds": len(result["seeds"]),
        "under_rule": ruled,
    }


def load(folder: Path, stem: str) -> Result | None:
    """A result from its folder; None where there is none.

    Raises:
        LuthierError: the file is damaged.
    """
    path = folder / f"{stem}.json"
    if not path.is_file():
        return None
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LuthierError(f"this result cannot be read: {error}", where=str(path), fix=f"luthier replicate {stem}") from None
    return readable(result)


def results_in(folder: Path) -> dict[str, Result]:
    """The results of replications in a folder, by the names of their files."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.stem != CALIBRATION]
    return {path.stem: readable(json.loads(path.read_text(encoding="utf-8"))) for path in paths}


def list_of(folder: Path) -> str:
    """The list as its file has it."""
    return json.dumps({stem: entry(result) for stem, result in results_in(folder).items()}, indent=1) + "\n"


def colored(verdict: str) -> str:
    """A verdict for the terminal."""
    return f"[{COLORS[verdict]}]{verdict}[/{COLORS[verdict]}]"


def worded(told: Mapping[str, str]) -> str:
    """A verdict in its color, and the rest of what is said of it."""
    return colored(told["verdict"]) + escape(told["words"].removeprefix(told["verdict"]))


def main(folder: Path) -> None:
    """Write the list, and the figure where there is something to draw."""
    FILE.write_text(list_of(folder), encoding="utf-8")
    ruled = [result for result in results_in(folder).values() if under_rule(result)]
    picture = folder / f"{EFFECTS}.svg"
    if ruled:
        picture.write_text(draw_effects(ruled), encoding="utf-8")
    else:
        picture.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
