"""What a model can do: the synthetic benchmark's skills, measured one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from luthier import __version__, machine
from luthier.errors import LuthierError, Say, silent
from luthier.evaluate.compare import compare
from luthier.evaluate.paired import NOT_MEASURED
from luthier.evaluate.sets import EvalSet, SetResult, measure
from luthier.lab import benchmark
from luthier.lab.benchmark_sets import sets_of
from luthier.results.folder import read_run
from luthier.results.opened import open_base, open_model
from luthier.results.start import is_run
from luthier.tune import Tune

COUNT = 100
"""Items of a skill."""


class _Found(NamedTuple):
    """What one model reaches, by skill, and why where it could not be measured."""

    results: Mapping[str, SetResult]
    reasons: Mapping[str, str]


def profile(
    model: str,
    *,
    skills: Sequence[str] | None = None,
    count: int = COUNT,
    seed: int = 0,
    out: str = "runs",
    say: Say = silent,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Measure a model, or a run and its base, on skills of the synthetic benchmark.

    Args:
        model: a model's name or folder, or a run's folder or name.
        skills: names of skills; None for all.
        count: held-out items of each skill; one that has fewer gives all.
        seed: of the items; the same one gives every model the same items.
        out: the folder that holds the run folders.
        say: hears what is being done.
        weights_only: of a run, without the prompts, prefixes and edits beside its weights.

    Returns:
        Plain facts: `model`, `luthier`, `count`, `seed`, `compares` (whether there is a base to compare with), and `skills` by name:
        `meaning`, `taught` (whether the built-in model learned it), and the entry that `metrics` in `run.json` would have. Of a
        model alone `before` is None, and `after` is what it reaches. A skill that could not be measured has the reason in `note`.

    Raises:
        LuthierError: there is no such model, run or skill, or no skill could be measured.
    """
    sets = sets_of(skills, count=count, seed=seed)
    tune, tokenizer = open_model(model, out=out, say=say, weights_only=weights_only)
    after, before = _measure_each(tune, tokenizer, sets, say), None
    if is_run(model, out):
        # Changes in place cannot be taken back: the base is loaded anew, and only now, so that one model is held.
        del tune
        machine.free_what_is_gone()
        say("measuring the base")
        before = _measure_each(*open_base(read_run(model, out), say=say), sets, say)
    return {
        "model": model,
        "luthier": __version__,
        "count": count,
        "seed": seed,
        "compares": before is not None,
        "skills": {one.name: _entry(one, before, after) for one in sets},
    }


def headline(facts: Mapping[str, Any]) -> str:
    """A profile in one sentence."""
    entries = facts["skills"].values()
    if facts["compares"]:
        verdicts = [entry["verdict"] for entry in entries]
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("better", "worse", "no change", "unclear"))
        return f"Of {len(verdicts)} skills: {counts.replace('no change', 'without a change')}."
    scored = [entry["after"] for entry in entries if entry["after"] is not None and entry["higher_is_better"]]
    half = sum(value >= 0.5 for value in scored)
    return f"At least half right in {half} of {len(scored)} skills with answers."


def _measure_each(tune: Tune, tokenizer: PreTrainedTokenizerBase, sets: Sequence[EvalSet], say: Say) -> _Found:
    """Measure skill by skill: one whose rows a model cannot read, being too long for it, says nothing about the others."""
    results: dict[str, SetResult] = {}
    problems: dict[str, LuthierError] = {}
    for one in sets:
        try:
            results |= measure(tune, tokenizer, [one], say=say)
        except LuthierError as problem:
            # A traceback would hold the model.
            problems[one.name] = problem.with_traceback(None)
    if not results:
        raise next(iter(problems.values()))
    return _Found(results, {name: problem.what for name, problem in problems.items()})


def _entry(one: EvalSet, before: _Found | None, after: _Found) -> dict[str, Any]:
    skill = benchmark.SKILLS[one.name]
    facts = {"meaning": skill.meaning, "taught": skill.pretrained}
    if one.name in after.reasons or (before is not None and one.name in before.reasons):
        reasons = {**(before.reasons if before is not None else {}), **after.reasons}
        return {**facts, **_ABSENT, "metric": one.chosen_metric, "role": one.role, "note": reasons[one.name]}
    now = after.results[one.name]
    if before is not None:
        return {**facts, **compare(before.results[one.name], now)}
    items = [
        {"id": item.id, "prompt": item.prompt, "expected": item.expected, "after": item.answer, "after_score": item.score}
        for item in now.items
    ]
    return {
        **facts,
        **_ABSENT,
        "metric": now.metric,
        "role": now.role,
        "higher_is_better": now.higher_is_better,
        "n": now.n,
        "after": now.value,
        "after_interval": now.interval,
        "items": items,
    }


_ABSENT: Mapping[str, Any] = {
    "higher_is_better": True,
    "n": None,
    "before": None,
    "before_interval": None,
    "after": None,
    "after_interval": None,
    "difference": None,
    "difference_interval": None,
    "verdict": NOT_MEASURED,
    "note": "",
    "retained": None,
    "items": (),
}
