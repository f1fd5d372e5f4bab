"""The page of the first run: what the quickstart learned and kept over seeds, and what other work on the machine costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from generated.tables import cell, table

BENCH = Path(__file__).parents[2] / "bench"


def quickstart_seeds() -> str:
    """What `python -m bench.first_run` measured, as it was committed: a line for each number type and length."""
    results = json.loads((BENCH / "first_run.json").read_text(encoding="utf-8"))
    groups: dict[tuple[str, bool, float], list[dict[str, Any]]] = {}
    for one in results:
        groups.setdefault((one["precision"], one["plain"], one["share"]), []).append(one)
    rows = []
    for (precision, plain, share), found in sorted(groups.items(), key=lambda group: (group[0][1], -group[0][2])):
        by_seed = sorted(found, key=lambda one: int(one["seed"]))
        timed = [one for one in by_seed if "seconds" in one]
        rows.append(
            (
                f"{precision}, {'AVX2' if plain else 'bf16 units'}",
                f"{by_seed[0]['tokens']:,}" + ("" if share == 1 else f" ({share:.0%})"),
                ", ".join(f"{round(one['learned'] * one['questions'])}" for one in by_seed),
                _range([100 * one["retained"] for one in by_seed], "{:.1f}") + " %",
                f"{by_seed[0]['prose'][0]:.1f} to " + _range([one["prose"][1] for one in by_seed], "{:.0f}", between=" or "),
                _range([one["seconds"] / 60 for one in timed], "{:.1f}") + " min" if timed else "",
                _range([one["total_seconds"] / 60 for one in timed], "{:.1f}") + " min" if timed else "",
            )
        )
    header = (
        "numbers",
        "tokens trained",
        f"learned of {results[0]['questions']}, seeds 0, 1, 2 ...",
        "retained",
        "perplexity of prose",
        "training",
        "in all",
    )
    processors = ", ".join(dict.fromkeys(str(one["processor"]) for one in results))
    said = (
        f"{processors}, two cores. AVX2: the same processor, with its libraries told to use nothing newer. Times are of runs with nothing "
        "beside them."
    )
    return f"{table(header, rows)}\n\n{cell(said)}"


def busy_machine() -> str:
    """What `python -m bench.busy` measured, as it was committed."""
    facts = json.loads((BENCH / "busy.json").read_text(encoding="utf-8"))
    rows = [
        (cell(one["setting"]), *(f"{one[load]:.1f} s (longest {one[f'{load}, longest']:.1f})" for load in ("quiet", "busy")))
        for one in facts["results"]
    ]
    said = (
        f"Means over {facts['steps'] - 1} steps of the quickstart in fp32 on {facts['cores']} cores"
        f"{', with AVX2' if facts['plain'] else ''}, torch {facts['versions']['torch']}."
    )
    return f"{table(('threads wait', 'a step, quiet', 'beside four processes that compute'), rows)}\n\n{cell(said)}"


def _range(values: Sequence[float], form: str, between: str = " to ") -> str:
    texts = list(dict.fromkeys(form.format(one) for one in (min(values), max(values))))
    return between.join(texts)
