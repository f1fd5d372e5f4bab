"""Commands for models and finished runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from luthier.cli.complete import run_names
from luthier.cli.face import (
    Dtype,
    Items,
    Json,
    Out,
    Overrides,
    Quiet,
    Skills,
    WeightsOnly,
    err,
    face,
    listed,
    out,
)
from luthier.cli.talk import converse
from luthier.errors import LuthierError


def evaluate(
    model: Annotated[str, typer.Argument(help="A model's name or folder, or a run's folder.", autocompletion=run_names)],
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")] = None,
    overrides: Overrides = None,
    tasks: Annotated[
        str, typer.Option(help="Instead of a recipe: tasks of the LM Evaluation Harness, with commas between.", metavar="TASK,...")
    ] = "",
    num_fewshot: Annotated[int | None, typer.Option(help="With --tasks: examples before each question.", min=0)] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="With --tasks: write prompts with the chat template.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="With --tasks: most rows of each.", min=1)] = None,
    include_path: Annotated[Path | None, typer.Option(help="With --tasks: a folder with YAML files of more of them.")] = None,
    model_name: Annotated[str, typer.Option(help="Of endpoint:URL: which of its models answers.")] = "",
    api_key_env: Annotated[
        str | None, typer.Option(help="Of endpoint:URL: the environment variable with the key; `none`: no key.")
    ] = None,
    harness: Annotated[str, typer.Option(hidden=True)] = "",
    tasks_folder: Annotated[str, typer.Option(hidden=True)] = "",
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Instead of a recipe: the skills of the synthetic benchmark.")
    ] = False,
    skills: Skills = "",
    count: Items = None,
    page: Annotated[Path | None, typer.Option(help="With --benchmark: also write an HTML page with a radar chart.")] = None,
    weights_only: WeightsOnly = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model, a run or an endpoint on a recipe's evaluation sets, on tasks of the LM Evaluation Harness, or skill by skill."""
    with face(as_json, quiet) as speak:
        from luthier.evaluate.served import ENDPOINT
        from luthier.recipe import EvaluationSet, read_recipe
        from luthier.report.terminal import compared_sets, measured
        from luthier.runs.measure import evaluate as run_evaluation
        from luthier.runs.measure import evaluate_endpoint, evaluate_tasks

        for old, new, given in (("--harness", "--tasks", harness), ("--tasks-folder", "--include-path", tasks_folder)):
            if given:
                raise LuthierError(f"there is no option {old}", where="luthier eval", fix=f"write {new} {given}")
        if (tasks != "") + (recipe is not None) + benchmark > 1:
            raise LuthierError("more than one of a recipe, --tasks and --benchmark", where="luthier eval", fix="give one of them")
        if not tasks and (num_fewshot is not None or apply_chat_template or limit is not None or include_path is not None):
            raise LuthierError(
                "--num-fewshot, --apply-chat-template, --limit and --include-path are of tasks",
                where="luthier eval",
                fix="add --tasks, or write these keys into the recipe's set",
            )
        if not model.startswith(ENDPOINT) and (model_name or api_key_env is not None):
            raise LuthierError("--model-name and --api-key-env are of an endpoint", where="luthier eval", fix="write endpoint:URL")
        if model.startswith(ENDPOINT) and recipe is None:
            raise LuthierError(
                "an endpoint answers the evaluation sets of a recipe",
                where="luthier eval",
                fix="give a recipe: luthier eval endpoint:URL RECIPE",
            )
        if benchmark:
            from luthier.lab.benchmark_sets import named
            from luthier.lab.profile import COUNT, profile
            from luthier.lab.profile_page import profile_table, write_profile

            profiled = profile(model, skills=named(skills), count=count or COUNT, say=speak.say, weights_only=weights_only)
            if page is not None:
                speak.say(f"page: {write_profile(profiled, page)}")
            speak.show(profiled, lambda: profile_table(profiled))
            return
        if skills or count is not None or page is not None:
            raise LuthierError(
                "--skills, --count and --page are of the synthetic benchmark", where="luthier eval", fix="add --benchmark"
            )
        if tasks:
            options = {"num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template or None, "limit": limit}
            path = None if include_path is None else str(include_path)
            names = [one.strip() for one in tasks.split(",") if one.strip()]
            asked = {name: EvaluationSet(tasks=(name,), include_path=path, **options) for name in names}
            results, compared = evaluate_tasks(model, asked, say=speak.say, weights_only=weights_only)
            found = compared or {name: one.as_json() for name, one in results.items()}
            speak.show({"model": model, "metrics": found}, lambda: compared_sets(compared) if compared else measured(results))
            return
        if recipe is None:
            raise LuthierError("a recipe is missing", where="luthier eval", fix="give a recipe, --tasks TASKS or --benchmark")
        read = read_recipe(recipe, overrides or [])
        if model.startswith(ENDPOINT):
            results = evaluate_endpoint(model, model_name, read, api_key_env=api_key_env, say=speak.say)
        else:
            results = run_evaluation(model, read, say=speak.say, weights_only=weights_only)
        speak.show(
            {"model": model, "metrics": {name: one.as_json() for name, one in results.items()}},
            lambda: measured(results),
        )


def chat(
    model: Annotated[str, typer.Argument(help="A model's name or folder, or a run's folder.", autocompletion=run_names)],
    prompt: Annotated[str | None, typer.Option(help="Ask one question and stop.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    system: Annotated[str, typer.Option(help="The text of a system turn before the conversation.", metavar="TEXT")] = "",
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the most likely tokens of together this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws, with a temperature above 0.")] = 0,
    base: Annotated[bool, typer.Option("--base", help="Show the base's answer beside it (for a run).")] = False,
    weights_only: WeightsOnly = False,
    as_json: Json = False,
) -> None:
    """Talk to a model or a run. In a conversation, /reset, /system TEXT and /quit are commands."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.runs.chat import Chat

        talk = Chat(
            model,
            say=speak.say,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            weights_only=weights_only,
            system=system,
        )
        warning = talk.warning()
        if prompt is not None or as_json:
            if prompt is None:
                raise LuthierError("a question is missing", where="luthier chat --json", fix="give --prompt")
            answer = talk.ask(prompt)
            facts: dict[str, Any] = {"model": model, "prompt": prompt, "answer": answer}
            facts |= {"warning": warning} if warning else {}
            if warning and not as_json:
                err.print(f"[yellow]warning: {escape(warning)}[/yellow]", highlight=False)
            if base:
                facts["base"] = talk.ask_base(prompt)
            speak.show(facts, lambda: escape(answer) + (f"\n[dim]base: {escape(facts['base'])}[/dim]" if base else ""))
            return
        converse(talk, input, out.print, base=base)


def runs(
    name: Annotated[str | None, typer.Argument(help="Show one run's summary.", autocompletion=run_names)] = None,
    folder: Out = "runs",
    as_json: Json = False,
) -> None:
    """List the runs, or show one."""
    with face(as_json) as speak:
        from luthier.report.terminal import run_table, summary
        from luthier.results.folder import list_runs, read_run

        if name is not None:
            run = read_run(name, folder)
            speak.show(run.as_json(), lambda: summary(run.facts))
            return
        found = list_runs(folder)
        speak.show([run.as_json() for run in found], lambda: run_table([run.facts for run in found]))


def compare(
    first: Annotated[str, typer.Argument(help="A run's name or folder.", autocompletion=run_names)],
    others: Annotated[list[str], typer.Argument(help="More runs.", autocompletion=run_names)],
    page: Annotated[Path | None, typer.Option(help="Also write the comparison as an HTML page.")] = None,
    folder: Out = "runs",
    as_json: Json = False,
) -> None:
    """Put runs side by side: what differs in their recipes, and what came of it."""
    with face(as_json) as speak:
        from luthier.report.compare import compare_summary, compared, write_comparison
        from luthier.results.folder import read_run

        found = [read_run(one, folder) for one in [first, *others]]
        facts = [one.facts for one in found]
        if page is not None:
            write_comparison(facts, page, [one.folder for one in found])
            speak.say(f"page: {page}")
        speak.show(compared(facts), lambda: compare_summary(facts))


def probe(
    name: Annotated[str, typer.Argument(help="A probe: `luthier techniques --kind probe` lists them.", metavar="PROBE")],
    words: Annotated[
        list[str],
        typer.Argument(
            help="A base, then a run, a model or a PEFT adapter's folder (a run alone stands beside its own base), then options.",
            metavar="[BASE] TUNED [KEY=VALUE]...",
        ),
    ],
    figure: Annotated[Path | None, typer.Option(help="Also write the figure as an SVG file.")] = None,
    precision: Annotated[str, typer.Option(help="What models are loaded in; a run brings its own.")] = "fp32",
    folder: Out = "runs",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """See what tuning changed inside a model: a table, a figure, one sentence."""
    with face(as_json, quiet) as speak:
        from luthier.recipe import apply_overrides
        from luthier.report.probe import found, write_figure
        from luthier.runs.probe import look_inside

        options = [word for word in words if "=" in word and not os.path.exists(word)]
        models = [word for word in words if word not in options]
        if len(models) not in (1, 2):
            fix = "give a base and what was tuned, or a run alone"
            raise LuthierError(f"{len(models)} models", where="luthier probe", fix=fix)
        spec = {name: apply_overrides({}, options)}
        finding = look_inside(spec, *models, out=folder, precision=precision, say=speak.say)
        if figure is not None:
            write_figure(finding, figure)
            speak.say(f"figure: {figure}")
        speak.show(finding.as_json(), lambda: found(finding))


def export(
    run: Annotated[str, typer.Argument(help="A run's name or folder.", autocompletion=run_names)],
    target: Annotated[Path, typer.Argument(help="The folder, or the GGUF file, to write; it must not exist.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="`model`: a plain Hugging Face folder; `gguf`: one file; `ollama`: that file and a Modelfile; `peft`: an adapter.",
        ),
    ] = "model",
    dtype: Dtype = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Of a GGUF file, its matrices in fewer bits: q8_0, or q2_k to q6_k by llama-cpp-python (q4_k_m is usual)."
        ),
    ] = None,
    folder: Out = "runs",
    weights_only: WeightsOnly = False,
    as_json: Json = False,
) -> None:
    """Write a run's result for other tools, and check that it reads back the same."""
    with face(as_json, quiet=as_json) as speak:
        from luthier.runs.export import export as run_export

        facts = run_export(
            run, target, form=form, dtype=dtype, quantize=quantize, out=folder, say=speak.say, weights_only=weights_only
        )
        speak.show(facts, lambda: listed(facts))
