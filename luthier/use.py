"""Using what a run made: measure it, talk to it, export it, look inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from transformers import PreTrainedModel

from luthier import draws, machine, registry
from luthier.delta import Delta
from luthier.delta.sources import in_words
from luthier.errors import LuthierError
from luthier.evaluate.generate import generate
from luthier.evaluate.harness import Scores, harness
from luthier.evaluate.likelihood import row_likelihoods
from luthier.evaluate.planned import evaluation_sets
from luthier.evaluate.sets import SetResult, measure
from luthier.export import export_gguf, export_model, export_peft
from luthier.export.peft import load_peft
from luthier.export.peft_adapter import CONFIG
from luthier.kinds import Finding, Now, RowLikelihood
from luthier.models.fingerprint import fingerprint
from luthier.models.load import load_model, load_tokenizer, resolve
from luthier.models.parts import map_parts
from luthier.models.quantized import expand
from luthier.opened import BESIDE, is_run, load_base, open_base, open_model, open_run, recipe_of, silent
from luthier.plan import Say
from luthier.probing import Weights, of_delta, of_models
from luthier.recipe import Recipe
from luthier.rows.chat import LossOn
from luthier.rows.encode import encode_prompt
from luthier.rows.look import Look, look
from luthier.rows.shapes import Row
from luthier.run import Run, read_run
from luthier.training.precision import TYPES, pick
from luthier.training.services import RunServices
from luthier.tune import Tune


def evaluate(model: str, recipe: Recipe, *, say: Say = silent, weights_only: bool = False) -> dict[str, SetResult]:
    """Measure a model or a run on the evaluation sets of a recipe."""
    sets = evaluation_sets(recipe)
    if not sets:
        raise LuthierError("the recipe has no evaluation sets", where="evaluate", mend="add `evaluate: {name: {rows: FILE}}`")
    tune, tokenizer = open_model(model, out=recipe.out, say=say, precision=recipe.train.precision, weights_only=weights_only)
    return measure(tune, tokenizer, sets, say=say)


class Chat:
    """A conversation with a model or a run.

    Args:
        model: a model's name or a run's folder.
        max_new_tokens: longest answer.
        temperature: 0 for the most likely token, always.
        seed: of the draws when the temperature is above 0.
        weights_only: of a run, without the prompts, prefixes and edits beside its weights.
    """

    def __init__(
        self,
        model: str,
        *,
        say: Say = silent,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        weights_only: bool = False,
    ) -> None:
        self.tune, self.tokenizer = open_model(model, say=say, weights_only=weights_only)
        self.name, self.max_new_tokens, self.temperature, self.seed = model, max_new_tokens, temperature, seed
        self.turns: list[dict[str, str]] = []
        self._base: Tune | None = None

    def _answer(self, tune: Tune, messages: Sequence[Mapping[str, str]]) -> str:
        if any("\ud800" <= letter <= "\udfff" for letter in messages[-1]["content"]):
            raise LuthierError("the question is not valid UTF-8", where="the question", mend="type or paste it as UTF-8 text")
        row = Row("chat", "messages", {"messages": list(messages)}, "chat", {})
        prompt = encode_prompt(row, self.tokenizer)
        seed = draws.seed_of(self.seed, "chat", len(messages))
        (answer,) = generate(
            tune, self.tokenizer, [prompt], max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=seed
        )
        return answer

    def ask(self, prompt: str) -> str:
        """One question without a past."""
        return self._answer(self.tune, [{"role": "user", "content": prompt}])

    def ask_base(self, prompt: str) -> str:
        """The same question to the base of a run."""
        if self._base is None:
            run = read_run(self.name)
            self._base, _ = open_model(run.fact("recipe", "model"))
        return self._answer(self._base, [{"role": "user", "content": prompt}])

    def say_turn(self, text: str) -> str:
        """The next turn of the conversation."""
        self.turns.append({"role": "user", "content": text})
        answer = self._answer(self.tune, self.turns)
        self.turns.append({"role": "assistant", "content": answer})
        return answer


def evaluate_harness(
    name: str, tasks: Sequence[str], folder: Path, *, out: str = "runs", limit: int | None = None, say: Say = silent
) -> dict[str, Scores]:
    """Measure a model or a run on tasks of the language model evaluation harness.

    Args:
        name: a model's name, or a run's folder or name.
        tasks: names of tasks.
        folder: holds the tasks' YAML files.
        out: the folder that holds the run folders.
        limit: most rows of each task; None for all.

    Returns:
        `after`: what it scores now; for a run also `before`: what its base scores.

    Raises:
        LuthierError: as `harness`; or there is no such model or run.
    """
    if not is_run(name, out):
        tune, tokenizer = open_model(name, out=out, say=say)
        return {"after": harness(tune, tokenizer, tasks, folder, limit=limit)}
    run = read_run(name, out)
    tune, tokenizer = open_run(run, say=say, merged=False)
    say("measuring the tuned model")
    after = harness(tune, tokenizer, tasks, folder, limit=limit)
    # A run's changes in place cannot be taken back: the base is loaded anew, and only now, so that one model is held.
    del tune
    machine.free_what_is_gone()
    base, tokenizer = open_base(run, say=say)
    say("measuring the base")
    return {"before": harness(base, tokenizer, tasks, folder, limit=limit), "after": after}


def export(
    name: str,
    target: Path,
    *,
    form: str = "model",
    weights: str = "auto",
    out: str = "runs",
    say: Say = silent,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Write a run's result for other tools.

    Args:
        name: the run.
        target: what to write; it must not exist.
        form: `model`, a plain Hugging Face folder with everything merged, `gguf`, one file of the same, or `peft`, a
            folder with an adapter.
        weights: the type of a GGUF file's matrices: f32, f16, bf16, q8_0 or auto, which keeps the model's.
        weights_only: leave out prompts, prefixes and edits, which weights cannot hold.

    Raises:
        LuthierError: the target exists, or the result cannot be held in this form.
    """
    if target.exists():
        raise LuthierError("this exists already", where=str(target), mend="name another, or remove it")
    if form != "gguf" and weights != "auto":
        raise LuthierError(f"weights `{weights}` are for GGUF files", where="--weights", mend="leave it out, or use --as gguf")
    run = read_run(name, out)
    if form == "model":
        tune, tokenizer = open_run(run, say=say, merged=False, weights_only=weights_only)
        return {"folder": str(target), "as": form, **export_model(tune, tokenizer, target)}
    if form == "gguf":
        tune, tokenizer = open_run(run, say=say, merged=False, weights_only=weights_only)
        return {"file": str(target), "as": form, **export_gguf(tune, tokenizer, target, weights=weights)}
    if form == "peft":
        tune, _ = open_run(run, say=say, merged=False, weights_only=weights_only)
        return {
            "folder": str(target),
            "as": form,
            **export_peft(tune, target, run.fact("model", "name"), fingerprint=run.fact("model", "fingerprint")),
        }
    raise LuthierError(f"`{form}` is no form of export", where="--as", mend="use model, gguf or peft")


def probe(
    name: str, base: str, tuned: str = "", *, out: str = "runs", precision: str = "fp32", say: Say = silent, **options: Any
) -> Finding:
    """Look at what tuning changed inside a model.

    Args:
        name: the probe's, e.g. `intruder_dimensions`.
        base: a model's name, or a run's folder or name. Where it stands alone, a run, which is compared with its own base.
        tuned: a run's folder or name, a model's name, or the folder of a LoRA adapter of PEFT.
        out: the folder that holds the run folders.
        precision: of models: fp32 holds every number of their files. A run brings its own.
        say: hears what is being done.
        options: of the probe.

    Raises:
        LuthierError: there is no such probe, option, model or run, or the two are of different architectures or shapes.
    """
    return look_inside({name: options}, base, tuned, out=out, precision=precision, say=say)


def look_inside(
    spec: Mapping[str, Mapping[str, Any]],
    base: str,
    tuned: str = "",
    *,
    out: str = "runs",
    precision: str = "fp32",
    say: Say = silent,
) -> Finding:
    """`probe`, with the probe as a recipe would spell it: `{name: {option: value}}`."""
    named = {name.replace("-", "_"): options for name, options in spec.items()}
    part = registry.make(named, ("probe",), where="luthier probe")
    weights = compare_weights(base, tuned, out=out, precision=precision, say=say)
    say(f"{part.name}: looking at {len(weights.changed)} changed places")
    finding: Finding = part.values[0].look(weights)
    return finding._replace(notes=[*finding.notes, *_beside_notes(tuned or base, out)])


def compare_weights(base: str, tuned: str = "", *, out: str = "runs", precision: str = "fp32", say: Say = silent) -> Weights:
    """What a probe gets. Runs and adapters need the base and their change; only other models are loaded twice.

    Args and errors are those of `probe`.
    """
    # On other devices singular values are computed on the processor anyway.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not tuned:
        if not is_run(base, out):
            raise LuthierError(f"`{base}` is no run, so its base is not known", where="luthier probe", mend="give BASE and TUNED")
        base, tuned = "", base
    if is_run(tuned, out):
        found = _beside_base(read_run(tuned, out), base, out, say)
        if found is not None:
            model, delta = found
            return Weights(model, map_parts(model), of_delta(delta), device=device)
    model = _whole_model(base, out, precision, say)
    parts = map_parts(model)
    if (Path(tuned) / CONFIG).is_file():
        tune = Tune(model, parts)
        tune.add("adapter", load_peft(tuned, tune), RunServices(tune, "adapter", Now()), {})
        return Weights(model, parts, of_delta(Delta.of(tune)), device=device)
    other = _whole_model(tuned, out, precision, say)
    return Weights(model, parts, of_models(model, parts, other, map_parts(other)), device=device)


def _beside_base(run: Run, base: str, out: str, say: Say) -> tuple[PreTrainedModel, Delta] | None:
    """A run's base and its delta; None where `base` names another model than the run trained."""
    recipe = recipe_of(run)
    if base and is_run(base, out):
        return None
    if base:
        source = resolve(base, say=say)
    else:
        source = resolve(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, say=say)
    delta = Delta.load(run.folder / "delta.safetensors")
    dtype = next((one for one in TYPES.values() if in_words([one]) == delta.base.dtype), torch.float32)
    model = load_model(source, dtype=dtype, quantize=recipe.quantize)
    if fingerprint(model) == delta.base.fingerprint:
        expand(model, dtype)
        return model, delta
    if base:
        return None
    raise LuthierError(
        "the base of this run is no longer the model that it trained",
        where=recipe.model,
        mend="name the base itself: luthier probe NAME BASE RUN",
    )


def _whole_model(name: str, out: str, precision: str, say: Say) -> PreTrainedModel:
    """A model, or a run's model with its delta in the weights."""
    if is_run(name, out):
        run = read_run(name, out)
        recipe = recipe_of(run)
        if recipe.quantize == "none":
            return cast(PreTrainedModel, open_run(run, say=say)[0].model)
        _, model, _ = load_base(recipe, say)
        # Quantized weights take no change, dense ones of the same numbers do.
        expand(model, model.dtype)
        Delta.load(run.folder / "delta.safetensors").apply(model, force=True)
        return model
    return load_model(resolve(name, say=say), dtype=pick(precision, torch.device("cpu"))[0])


def _beside_notes(tuned: str, out: str) -> list[str]:
    if is_run(tuned, out) and (read_run(tuned, out).folder / BESIDE).is_file():
        return ["prompts, prefixes or edits of hidden states stand beside the weights and were not compared"]
    return []


def look_at_rows(
    source: str, model: str, *, shape: str | None = None, loss_on: str = "assistant", rows: int = 5, say: Say = silent
) -> Look:
    """Rows as a model would see them."""
    turns = _turns(loss_on)
    tokenizer = load_tokenizer(resolve(model, say=say))
    return look(source, tokenizer, n=rows, shape=shape, loss_on=turns)


def likelihood_of_rows(
    model: str, rows: Sequence[Row], *, loss_on: str = "assistant", out: str = "runs", precision: str = "auto", say: Say = silent
) -> list[RowLikelihood]:
    """How likely a model or a run finds what each row teaches; what `luthier.rows.select.score_rows` runs models with.

    Args:
        model: a model's name, or a run's folder or name.
        rows: checked rows.
        loss_on: which turns are targets, as under `rows` in a recipe.
        out: the folder that holds the run folders.
        precision: of a model's weights, as in a recipe; a run brings its own.
        say: hears what is being done.

    Raises:
        LuthierError: there is no such model or run, or `luthier.evaluate.likelihood.row_likelihoods` refuses a row.
    """
    turns = _turns(loss_on)
    tune, tokenizer = open_model(model, out=out, say=say, precision=precision)
    say(f"{model}: how likely it finds {len(rows)} rows")
    return row_likelihoods(tune, tokenizer, rows, loss_on=turns)


def _turns(loss_on: str) -> LossOn:
    if loss_on not in get_args(LossOn):
        raise LuthierError(f"loss on `{loss_on}`", where="--loss-on", mend="use assistant, last or all")
    return cast(LossOn, loss_on)
