"""The command line: a thin face over the library. `--json` prints one JSON document on standard output and nothing else there."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from luthier.errors import LuthierError

INTERRUPTED = 130
"""The exit code of a run that was stopped on request and can be resumed: what shells report of Ctrl-C."""

out = Console(emoji=False)
err = Console(stderr=True, emoji=False)

app = typer.Typer(
    name="luthier",
    help="Fine-tune language models, and see what each fine-tune changed.\n\n"
    "Start with a recipe: `luthier plan recipe.yaml` shows what would happen, `luthier train recipe.yaml` does it, and the run's "
    "folder holds report.html. Any key can be set on the command line: `luthier train recipe.yaml tune=lora train.epochs=2`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
rows_app = typer.Typer(help="Look at training rows before using them.", no_args_is_help=True)
app.add_typer(rows_app, name="rows")

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Keys of the recipe to set, e.g. `tune=lora train.epochs=2`.", metavar="KEY=VALUE"),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Out = Annotated[str, typer.Option(help="The folder that holds the run folders.")]


def is_first() -> bool:
    """Whether this process speaks: of those that a launcher started, one."""
    return os.environ.get("RANK", "0") == "0"


class Face:
    """How a command speaks: to people, or to scripts."""

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet or not is_first()

    def say(self, text: str) -> None:
        """What is being done, on standard error."""
        if not self.quiet:
            err.print(f"[dim]{escape(text)}[/dim]", highlight=False)

    def show(self, facts: Any, render: Callable[[], Any]) -> None:
        """The result: JSON for scripts, else what `render` makes."""
        if not is_first():
            return
        if self.as_json:
            sys.stdout.write(document(facts))
        else:
            out.print(render())


def document(facts: Any) -> str:
    """Facts as one line of JSON."""
    text = json.dumps(facts, ensure_ascii=False, default=str)
    # Half a character, which UTF-8 cannot hold, is escaped the same way in JSON and in Python.
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


@contextmanager
def face(as_json: bool, quiet: bool = False) -> Iterator[Face]:
    """A command's face; mistakes of the user end as one clear message and exit code 2."""
    speaker = Face(as_json, quiet or as_json)
    try:
        yield speaker
    except LuthierError as error:
        if not is_first():
            sys.stderr.write(f"process {os.environ['RANK']}: {error.what}\n")
        elif as_json:
            sys.stdout.write(document(error.as_json()))
        else:
            text = escape(error.what)
            text += f"\n[dim]where[/dim]  {escape(error.where)}" if error.where else ""
            text += f"\n[dim]mend[/dim]   {escape(error.mend)}" if error.mend else ""
            err.print(Panel(text, title="error", title_align="left", border_style="red"))
        raise typer.Exit(2) from None


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run's folder; ends in the same weights.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model, measure it before and after, and write a report.

    Interrupt once (Ctrl-C) to finish the step, save and stop (exit code 130); `luthier train --resume RUN` goes on. A second
    interrupt stops at once.
    """
    with face(as_json, quiet) as speak:
        from luthier.cli_progress import Bar
        from luthier.flow import train as run_training
        from luthier.recipe import read_recipe
        from luthier.report.terminal import summary

        if recipe is None:
            if resume is None:
                raise LuthierError("a recipe is missing", where="luthier train", mend="give a recipe, or --resume RUN")
            recipe = resume / "recipe.yaml"
            if not recipe.is_file():
                raise LuthierError("this is no run's folder", where=str(resume), mend="name a folder that `luthier runs` lists")
        read = read_recipe(recipe, overrides or [])
        with Bar(err, quiet=speak.quiet) as bar:
            run = run_training(read, resume=resume, say=bar.say, tell=bar.step, command=_command(recipe, overrides))
        speak.show(run.as_json(), lambda: summary(run.facts))
        if run.facts["status"] == "stopped":
            raise typer.Exit(INTERRUPTED)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take two steps, thrown away, and tell their memory and time.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a run in order, with what trains, steps, memory and time. Trains nothing that is kept."""
    with face(as_json, quiet) as speak:
        from luthier.plan import make_plan, measure_plan
        from luthier.recipe import read_recipe

        made = make_plan(read_recipe(recipe, overrides or []), speak.say)
        facts, lines = made.as_json(), made.lines()
        if measure:
            measured = measure_plan(made)
            facts["measured"] = measured.as_json()
            lines.append(f"measured   {measured.described()}")

        def render() -> Table:
            table = Table.grid(padding=(0, 2))
            for line in lines:
                key, text = line[:10].rstrip(), line[10:].strip()
                table.add_row(f"[bold]{escape(key)}[/bold]", escape(text))
            return table

        speak.show(facts, render)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model's name or folder, or a run's folder.")],
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")] = None,
    overrides: Overrides = None,
    tasks: Annotated[str, typer.Option("--harness", help="Instead of a recipe: tasks of lm-eval, with commas between.")] = "",
    tasks_folder: Annotated[Path, typer.Option(help="The folder with the tasks' YAML files.")] = Path("tasks"),
    limit: Annotated[int | None, typer.Option(help="Most rows of each task of lm-eval.", min=1)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model or a run on the evaluation sets of a recipe, or on tasks of the evaluation harness."""
    with face(as_json, quiet) as speak:
        from luthier.evaluate.harness import plain_scores
        from luthier.recipe import read_recipe
        from luthier.report.terminal import measured, scored
        from luthier.use import evaluate as run_evaluation
        from luthier.use import evaluate_harness

        if tasks and recipe is not None:
            raise LuthierError("a recipe and --harness", where="luthier eval", mend="give one of them")
        if tasks:
            found = evaluate_harness(model, [one.strip() for one in tasks.split(",")], tasks_folder, limit=limit, say=speak.say)
            speak.show({"model": model, **plain_scores(found)}, lambda: scored(found))
            return
        if recipe is None:
            raise LuthierError("a recipe is missing", where="luthier eval", mend="give a recipe, or --harness TASKS")
        results = run_evaluation(model, read_recipe(recipe, overrides or []), say=speak.say)
        speak.show(
            {"model": model, "metrics": {name: one.as_json() for name, one in results.items()}},
            lambda: measured(results),
        )


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A model's name or folder, or a run's folder.")],
    prompt: Annotated[str | None, typer.Option(help="Ask one question and stop.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    base: Annotated[bool, typer.Option("--base", help="Show the base's answer beside it (for a run).")] = False,
    as_json: Json = False,
) -> None:
    """Talk to a model or a run."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.use import Chat

        talk = Chat(model, say=speak.say, max_new_tokens=max_new_tokens, temperature=temperature)
        if prompt is not None or as_json:
            if prompt is None:
                raise LuthierError("a question is missing", where="luthier chat --json", mend="give --prompt")
            answer = talk.ask(prompt)
            facts: dict[str, Any] = {"model": model, "prompt": prompt, "answer": answer}
            if base:
                facts["base"] = talk.ask_base(prompt)
            speak.show(facts, lambda: escape(answer) + (f"\n[dim]base: {escape(facts['base'])}[/dim]" if base else ""))
            return
        out.print("[dim]An empty line ends the conversation.[/dim]")
        while True:
            try:
                asked = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if not asked:
                break
            if base:
                out.print(f"[dim]base: {escape(talk.ask_base(asked))}[/dim]")
            out.print(escape(talk.say_turn(asked)))


@app.command()
def techniques(
    kind: Annotated[str | None, typer.Option(help="Only this kind.")] = None,
    name: Annotated[str | None, typer.Argument(help="Show one technique whole, with its options.")] = None,
    as_json: Json = False,
) -> None:
    """List every technique with its card, or show one."""
    with face(as_json) as speak:
        from luthier.catalogue import as_rows, one_technique, table

        if name is not None:
            facts, text = one_technique(name)
            speak.show(facts, lambda: text)
            return
        rows = as_rows(kind)
        speak.show(rows, lambda: table(rows))


@app.command()
def papers(
    area: Annotated[str | None, typer.Option(help="Only areas that contain this word.")] = None,
    done: Annotated[bool, typer.Option("--done", help="Only papers that have a technique.")] = False,
    as_json: Json = False,
) -> None:
    """List the 270 papers and what stands for each."""
    with face(as_json) as speak:
        from luthier.catalogue import paper_rows, paper_table

        rows = paper_rows(area, done)
        speak.show(rows, lambda: paper_table(rows))


@app.command()
def runs(
    name: Annotated[str | None, typer.Argument(help="Show one run's summary.")] = None,
    folder: Out = "runs",
    as_json: Json = False,
) -> None:
    """List the runs, or show one."""
    with face(as_json) as speak:
        from luthier.report.terminal import run_table, summary
        from luthier.run import list_runs, read_run

        if name is not None:
            run = read_run(name, folder)
            speak.show(run.as_json(), lambda: summary(run.facts))
            return
        found = list_runs(folder)
        speak.show([run.as_json() for run in found], lambda: run_table([run.facts for run in found]))


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A run's name or folder.")],
    others: Annotated[list[str], typer.Argument(help="More runs.")],
    page: Annotated[Path | None, typer.Option(help="Also write the comparison as an HTML page.")] = None,
    folder: Out = "runs",
    as_json: Json = False,
) -> None:
    """Put runs side by side: what differs in their recipes, and what came of it."""
    with face(as_json) as speak:
        from luthier.report.compare import compare_runs, compared, write_comparison
        from luthier.run import read_run

        facts = [read_run(one, folder).facts for one in [first, *others]]
        if page is not None:
            write_comparison(facts, page)
            speak.say(f"page: {page}")
        speak.show(compared(facts), lambda: compare_runs(facts))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    target: Annotated[Path, typer.Argument(help="The folder, or the GGUF file, to write; it must not exist.")],
    form: Annotated[
        str, typer.Option("--as", help="`model`: a plain Hugging Face folder; `gguf`: one file; `peft`: a LoRA adapter.")
    ] = "model",
    weights: Annotated[str, typer.Option(help="Of a GGUF file: f32, f16, bf16, q8_0, or auto for the model's.")] = "auto",
    folder: Out = "runs",
    as_json: Json = False,
) -> None:
    """Write a run's result for other tools, and check that it reads back the same."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.use import export as run_export

        facts = run_export(run, target, form=form, weights=weights, out=folder, say=speak.say)
        speak.show(facts, lambda: "\n".join(f"{key:<24}{escape(str(value))}" for key, value in facts.items()))


@rows_app.command(name="look")
def rows_look(
    source: Annotated[str, typer.Argument(help="A file of rows, a folder, or `hub:name`.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template to use.")] = "smollm2-135m-instruct",
    shape: Annotated[str | None, typer.Option(help="The rows' shape, where it cannot be recognized.")] = None,
    loss_on: Annotated[str, typer.Option(help="assistant, last or all.")] = "assistant",
    rows: Annotated[int, typer.Option("--rows", "-n", help="Rows shown.")] = 5,
    as_json: Json = False,
) -> None:
    """Show shape, counts, lengths, and some rows as the model sees them, with what is learnt in color."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.rows.look import render
        from luthier.use import look_at_rows

        looked = look_at_rows(source, model, shape=shape, loss_on=loss_on, rows=rows, say=speak.say)
        speak.show(looked.as_json(), lambda: render(looked))


def _command(recipe: Path, overrides: list[str] | None) -> str:
    return shlex.join(["luthier", "train", str(recipe), *(overrides or [])])


def main() -> None:
    """Entry point of the command `luthier`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
