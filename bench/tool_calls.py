"""`python -m bench.tool_calls`: what a small fine-tune on dialogues with calls does to calls that no dialogue has.

Trained on the calls of Glaive's dialogues, measured before and after on rows of the Berkeley Function-Calling Leaderboard (one call,
functions of Python), with the interval and the paired test of every run. The functions stand in the system turn as text, since many chat
templates have no place for tools. Results go to `bench/tool_calls.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.rows.function_calls import calls_of
from luthier.rows.read import read
from luthier.rows.shapes import Row
from luthier.runs.train import train

HERE = Path(__file__).parent
TRAINED, MEASURED = "toolcall_glaive/train.jsonl", "bfcl/simple_python.jsonl"
TOLD = (
    "You may call these functions:\n{functions}\n"
    'Answer with the call alone, as JSON: {{"name": "...", "arguments": {{...}}}}; with several calls, one a line.'
)
KEPT = ("role", "content")


def told(tools: list[Any]) -> dict[str, str]:
    """A system turn that names functions."""
    functions = "\n".join(json.dumps(one.get("function", one), ensure_ascii=False) for one in tools)
    return {"role": "system", "content": TOLD.format(functions=functions)}


def taught(rows: list[Row]) -> list[dict[str, Any]]:
    """Of each dialogue its first call, with all that led to it."""
    found = []
    for row in rows:
        messages, tools = row.fields["messages"], row.fields.get("tools") or []
        place = next((at for at, one in enumerate(messages) if one.get("tool_calls")), None)
        if not tools or place is None:
            continue
        calls = [one.get("function", one) for one in messages[place]["tool_calls"]]
        written = "\n".join(json.dumps({key: one[key] for key in ("name", "arguments")}, ensure_ascii=False) for one in calls)
        before = [{key: one[key] for key in KEPT} for one in messages[:place] if one["role"] != "system"]
        if calls_of(written):
            found.append({"id": row.id, "prompt": [told(tools), *before], "completion": written})
    return found


def asked(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows of the leaderboard, with their functions in the system turn."""
    return [
        {
            "id": row.id,
            "prompt": [told(row.fields["tools"]), *({key: one[key] for key in KEPT} for one in row.fields["prompt"])],
            "answer": row.fields["answer"],
        }
        for row in rows
    ]


def measured(data: Path, *, model: str, rows: int, epochs: float, learning_rate: float, out: Path) -> dict[str, Any]:
    """Train, measure before and after, and say what came of it.

    Args:
        data: holds `toolcall_glaive/train.jsonl` and `bfcl/simple_python.jsonl`.
        model: as in a recipe.
        rows: how many of the leaderboard's are measured, from the start.
        epochs: passes over the dialogues' calls.
        learning_rate: of the LoRA.
        out: holds the run.
    """
    lessons, questions = taught(list(read(data / TRAINED))), asked(list(read(data / MEASURED))[:rows])
    run = train(
        {
            "name": "tool-calls",
            "model": model,
            "rows": {"train": lessons, "on_bad_row": "skip"},
            "tune": {"lora": {"rank": 16}},
            "train": {"epochs": epochs, "learning_rate": learning_rate, "batch_rows": 8},
            "evaluate": {"bfcl": {"rows": questions, "metric": "tool_calls", "max_new_tokens": 96}},
            "out": str(out),
        },
        say=print,
    )
    entry: Mapping[str, Any] = run.facts["metrics"]["bfcl"]
    keys = (
        "metric",
        "n",
        "before",
        "before_interval",
        "after",
        "after_interval",
        "difference",
        "difference_interval",
        "p_value",
        "verdict",
    )
    return {
        "model": model,
        "trained": f"{run.facts['rows']['rows']} calls of {TRAINED}, {epochs:g} epochs, LoRA of rank 16 at {learning_rate:g}",
        "measured": f"{len(questions)} rows of {MEASURED}",
        "seconds": run.facts["seconds"],
        **{key: entry[key] for key in keys},
        "run": str(run.folder),
    }


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"holds {TRAINED} and {MEASURED}")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=HERE / "tool_calls.json")
    given = vars(parser.parse_args(words))
    results = given.pop("results")
    found = measured(given.pop("data"), **given)
    results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
