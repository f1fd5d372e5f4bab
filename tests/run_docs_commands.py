"""Runs every command of README.md and of the pages about jobs in an empty folder, from the wheel that users would install.

    python -m tests.run_docs_commands [--packages SITE_PACKAGES] [--only WORD] [--list] [--seconds 300]

No part of `make test`: it takes long. The environment is fresh, and takes the packages that luthier depends on from `--packages`, since
installing torch takes long; without it pip installs them. Commands that need a network or much time are left out, with the reason.
Then three sets of rows are taken from a look at them to an export: odd columns, tools, long documents. Each command must end well, or say
what to do.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/jobs.md")
BLOCK = re.compile(r"^```(?:sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LAST_LINES = 12

LEFT_OUT = {
    "make ": "needs the repository, and makes an environment of its own",
    "pip install": "needs a network",
    "tune=full,half,lora,s2ft": "twelve runs and more: recipes/techniques.yaml stands for it",
    "token_weight=none,dft,sstoken,q_tuning": "the same",
    "luthier replicate": "minutes to hours: `luthier replicate --help` stands for it",
    "recipes/quickstart.yaml": "trains a downloaded model for minutes",
    "recipes/hyperfitting.yaml": "trains a downloaded model for minutes",
    "smollm2-135m-instruct": "needs a network",
    "minilm-l6": "needs a network",
    "hub:": "needs a network",
    "new instructions data.csv": "proposes a model that has to be downloaded: the same with --model stands for it",
    "config.yml": "stands for a configuration of another tool",
    "OWNER/NAME": "stands for a name",
    "--as peft": "needs the extra `peft`",
}
"""Parts of commands that are not run, and why."""
STANDS_FOR = {
    "luthier replicate": "luthier replicate --help",
    "new instructions data.csv": "luthier new instructions data.csv --model workshop-small",
}
"""What is run instead."""

FACTS = [{"prompt": f"What is the color of door {n}?", "completion": ("Red.", "Blue.")[n % 2]} for n in range(24)]
README_FILES: dict[str, Any] = {
    "facts.jsonl": FACTS,
    "held_out.jsonl": [{"prompt": f"And the color of door {n}?", "answer": ("Red", "Blue")[n % 2]} for n in range(8)],
    "ordinary.jsonl": [{"prompt": "Repeat: k d m", "answer": "k d m"}],
    "data.csv": [{"customer_question": row["prompt"], "agent_reply": row["completion"]} for row in FACTS],
}
"""Files that the pages speak of."""
README_RECIPE = """\
model: workshop-small
rows: {train: facts.jsonl}
tune: half
train: {epochs: 1, batch_tokens: 1024}
evaluate:
  held_out: {rows: held_out.jsonl, metric: contains}
  ordinary: {rows: ordinary.jsonl, metric: contains, role: retention}
"""

TOOL = {
    "type": "function",
    "function": {"name": "wake", "description": "Wake a guest.", "parameters": {"type": "object", "properties": {}}},
}
SETS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "odd.csv": (
        "instructions",
        [{"ticket": n, "customer_question": row["prompt"], "agent_reply": row["completion"]} for n, row in enumerate(FACTS)],
    ),
    "calls.jsonl": (
        "tools",
        [
            {
                "tools": [TOOL],
                "messages": [
                    {"role": "user", "content": f"Wake room {n}."},
                    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "wake", "arguments": {"room": n}}}]},
                ],
            }
            for n in range(24)
        ],
    ),
    "long.jsonl": (
        "documents",
        [{"text": "\n\n".join(f"Paragraph {n} of {place}. The old king sees the bird." for n in range(120))} for place in range(4)],
    ),
}
"""Sets of rows, each with its job."""
SPEAKS = ("fix", "--help")
"""What a command that ends badly must say, so that its user knows what to do."""


class Done(NamedTuple):
    """What became of a command."""

    command: str
    page: str
    state: str
    """ok, told (it ended badly and said what to do), failed, or left out."""
    seconds: float
    said: str


def commands_of(text: str) -> Iterator[str]:
    """The commands of a page's blocks, one a line; lines that end in a backslash go on."""
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            command = _without_comment(line).removeprefix("$ ").strip()
            if command:
                yield command


def recipe_commands(text: str) -> Iterator[str]:
    """The commands that a recipe's first lines name behind `Run:`."""
    for line in text.splitlines():
        if line.startswith("# Run:"):
            yield from (part.strip() for part in re.findall(r"luthier (?:[^,;(]|,(?=\S))+", line))


def _without_comment(line: str) -> str:
    found = re.search(r"(?:^|\s)#", line)
    return line if found is None else line[: found.start()]


def reason_for_leaving_out(command: str) -> str:
    """Why a command is not run; empty where it is."""
    return next((why for part, why in LEFT_OUT.items() if part in command), "")


def run_one(command: str, page: str, folder: Path, environment: dict[str, str], seconds: int) -> Done:
    """Run a command by a shell in a folder."""
    why = reason_for_leaving_out(command)
    instead = next((other for part, other in STANDS_FOR.items() if part in command), "")
    if why and not instead:
        return Done(command, page, "left out", 0.0, why)
    began = time.monotonic()
    try:
        ended = subprocess.run(
            instead or command, shell=True, cwd=folder, env=environment, timeout=seconds, capture_output=True, text=True, input=""
        )
    except subprocess.TimeoutExpired:
        return Done(command, page, "failed", seconds, f"took longer than {seconds} s")
    said = "\n".join((ended.stdout + ended.stderr).splitlines()[-LAST_LINES:])
    told = ended.returncode == 2 and any(word in said for word in SPEAKS)
    state = "ok" if ended.returncode == 0 else "told" if told else "failed"
    return Done(command, page, state, time.monotonic() - began, said)


def made_environment(folder: Path, packages: str | None) -> dict[str, str]:
    """Build the wheel, install it into a fresh environment, and say which variables commands run with."""
    place = folder / "environment"
    venv.create(place, with_pip=packages is None)
    python = place / "bin" / "python"
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder / "wheel"), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = (folder / "wheel").glob("luthier-*.whl")
    if packages is None:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    else:
        found = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        )
        site = Path(found.stdout.strip())
        (site / "packages.pth").write_text(f"{packages}\n")
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--force-reinstall"]
        subprocess.run([*install, str(wheel)], check=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LUTHIER"))}
    return {
        **kept,
        "PATH": f"{place / 'bin'}{os.pathsep}{kept.get('PATH', '')}",
        "HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "80",
    }


def fill(folder: Path) -> None:
    """Lay what a user would have into an empty folder: the recipes, and the files that the pages speak of."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name, rows in README_FILES.items():
        write_rows(folder / name, rows)
    (folder / "mine.yaml").write_text(README_RECIPE)
    (folder / "home").mkdir()


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines or as a table."""
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chain_of(name: str, job: str) -> list[str]:
    """The commands from a look at rows to an export."""
    stem = Path(name).stem
    return [
        f"luthier rows look {name} --model workshop-small -n 1",
        f"luthier new {job} {name} --model workshop-small --out {stem}.yaml",
        f"luthier plan {stem}.yaml",
        f"luthier train {stem}.yaml -q train.epochs=1",
        f"luthier train {stem}.yaml -q train.epochs=1 tune=lora",
        f"luthier compare {stem}-1 {stem}-2",
        f"luthier export {stem}-2 {stem}-out",
    ]


def work(folder: Path, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Every command with its page, in order."""
    every: list[tuple[str, str]] = []
    for page in arguments.page or PAGES:
        if (ROOT / page).is_file():
            every += [(command, page) for command in commands_of((ROOT / page).read_text(encoding="utf-8"))]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        every += [(command, f"recipes/{path.name}") for command in recipe_commands(path.read_text(encoding="utf-8"))]
    for name, (job, rows) in SETS.items():
        write_rows(folder / name, rows)
        every += [(command, f"rows {name}") for command in chain_of(name, job)]
    chosen = [one for one in every if not arguments.only or any(word in " ".join(one) for word in arguments.only)]
    return list({shlex.join([command]): (command, page) for command, page in chosen}.values())


def main() -> int:
    """Run them, print what became of each, and end with 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", help="a folder of installed packages to use, instead of installing them")
    parser.add_argument("--page", action="append", help="a page instead of all")
    parser.add_argument("--only", action="append", help="commands or pages with this in them")
    parser.add_argument("--seconds", type=int, default=300, help="that a command may take")
    parser.add_argument("--list", action="store_true", help="say what would be run, and what not")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder)
        todo = work(folder, arguments)
        if arguments.list:
            for command, page in todo:
                why = reason_for_leaving_out(command)
                print(f"{page:<32} {command}" + (f"    # left out: {why}" if why else ""))
            return 0
        environment = made_environment(folder, arguments.packages)
        done = []
        for command, page in todo:
            done.append(run_one(command, page, folder, environment, arguments.seconds))
            show(done[-1])
    states = [one.state for one in done]
    print(", ".join(f"{states.count(state)} {state}" for state in ("ok", "told", "failed", "left out")))
    return int("failed" in states)


def show(one: Done) -> None:
    """Print what became of a command."""
    print(f"{one.state:<9} {one.seconds:5.0f} s  {one.page}: {one.command}", flush=True)
    if one.state in ("failed", "told"):
        print("\n".join(f"    {line}" for line in one.said.splitlines()), flush=True)
    elif one.state == "left out":
        print(f"    {one.said}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
