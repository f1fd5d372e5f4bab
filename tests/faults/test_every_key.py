"""Every key of a recipe changes what happens: one case a key, and a key without a case fails by its name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import luthier
from luthier.errors import LuthierError
from luthier.models.quantized import quantized
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.planning.plan import Plan, make_plan
from luthier.recipe import make_recipe, reference
from luthier.results.folder import Run
from luthier.rows.stored import StoredRows
from tests.toys.helpers import toys  # noqa: F401

ROWS = [
    {"id": thing, "prompt": f"What does the {thing} say?", "completion": f"{thing.title()}!"}
    for thing in ("door", "gate", "mill", "well")
]
LONG = [{"id": "long", "text": "This is as long as five short ones are."}]
SHORT = [{"id": f"short {number}", "text": "Short."} for number in range(5)]
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]
PROSE = [{"text": f"The {thing} is red and old."} for thing in ("lane", "ford", "hill", "barn", "roof", "wall")]
STORY: dict[str, Any] = {"rows__train": [{"text": "Ab. Cd.\n\nEf."}]}
ASKED = [{"prompt": row["prompt"], "answer": row["completion"]} for row in ROWS]
FILE = "rows.jsonl"
"""Holds ROWS."""
SETS = {"prose": {"rows": PROSE, "metric": "loss", "role": "retention"}}
ASKS = {"asked": {"rows": ASKED, "metric": "contains", "max_new_tokens": 2}}

ELSEWHERE = {
    "evaluate.NAME.combine": "tests/unit/test_best_of.py::test_members_are_combined_as_asked_when_pairs_are_scored",
    "evaluate.NAME.deviations": "tests/unit/test_best_of.py::test_members_are_combined_as_asked_when_pairs_are_scored",
    "evaluate.NAME.tasks": "tests/unit/test_evaluate_harness.py::test_a_run_measures_tasks_before_and_after_with_all_that_decides_them",
    **{
        f"evaluate.NAME.{key}": "tests/unit/test_evaluate_harness.py::test_scores_prompts_and_answers_are_those_of_the_harness_by_itself"
        for key in ("num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "gen_kwargs", "include_path")
    },
    "add_tokens": "tests/unit/test_new_tokens.py::test_rows_begin_at_the_mean_and_alone_move",
    "baseline_run": "tests/unit/test_control.py::test_a_run_is_compared_with_the_run_it_names",
    "models": "tests/unit/test_other_models.py::test_a_run_on_the_same_base_stands_beside_its_weights",
    "revision": "tests/faults/test_every_key.py::test_the_revision_chooses_the_weights",
    "rows.stored": "tests/unit/test_numbers.py::test_the_plan_and_the_run_tell_whose_numbers_they_are",
    "rows.chat_template": "tests/unit/test_rows_template.py::test_one_of_several_templates",
    "rows.chat_template_options": "tests/unit/test_rows_template.py::test_the_day_that_a_template_is_told_can_be_set",
    "rows.thinking": "tests/unit/test_thinking.py::test_the_plan_states_what_becomes_of_reasoning",
    "track": "tests/unit/test_trackers.py::test_a_run_in_tensorboard_reads_back",
    "trust_remote_code": "tests/faults/test_every_key.py::test_code_that_comes_with_a_model_runs_only_when_trusted",
}
"""Keys whose case needs more than a value, by the test that is theirs."""


class Case(NamedTuple):
    """What a key does, seen from outside."""

    values: tuple[Any, ...]
    see: Callable[[Any], Any]
    """Reads what a value led to: off the plan, or off the finished run. A refusal is seen as its text."""
    shows: tuple[Any, ...] | None = None
    """What is seen, value by value; None: it only has to differ."""
    among: Mapping[str, Any] = {}
    """Other keys."""
    trains: bool = True


def planned(values: tuple[Any, ...], see: Callable[[Plan], Any], shows: tuple[Any, ...] | None = None, **among: Any) -> Case:
    """A case that shows before anything trains."""
    return Case(values, see, shows, _dotted(among), trains=False)


def trained(values: tuple[Any, ...], see: Callable[[Run], Any], shows: tuple[Any, ...] | None = None, **among: Any) -> Case:
    """A case that shows in the finished run."""
    return Case(values, see, shows, _dotted(among))


def _dotted(among: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in among.items()}


def weights(run: Run) -> Any:
    return run.facts["weights_sha256"]


def targets(plan: Plan) -> list[str]:
    """What is learned, row by row."""
    return [
        plan.tokenizer.decode([token for token, wanted in zip(row.token_ids, row.supervised, strict=True) if wanted])
        for row in plan.rows.rows
    ]


def drawn(plan: Plan) -> list[str]:
    """The ids of all rows of the first epoch, as often as they come."""
    return sorted(plan.rows.rows[place].id for step in plan.feed.epoch(0) for group in step for place in group)


def rate_at(step: int) -> Callable[[Plan], float]:
    """The learning rate at a step."""
    return lambda plan: plan.clock.at(step, 0.0).learning_rate


def first_learning_rate(run: Run) -> float:
    return float(run.facts["history"][0]["learning_rate"])


def checkpoints(run: Run) -> list[str]:
    return sorted(path.name for path in (run.folder / "checkpoints").glob("*"))


def evaluated_at(run: Run) -> list[int]:
    return [one["step"] for one in run.facts["evaluations"]]


def asked(fact: str) -> Callable[[Run], Any]:
    """A fact of the set `asked`."""
    return lambda run: run.facts["metrics"]["asked"][fact]


def longest_answer(run: Run) -> int:
    """In characters: a token of the tiny tokenizer is at most one."""
    return max(len(item["before"]) for item in run.facts["metrics"]["asked"]["items"])


def prose_after_is_best(run: Run) -> bool:
    after, best = (f(one["metrics"]["prose"] for one in run.facts["evaluations"]) for f in (lambda v: list(v)[-1], min))
    assert after > best, "training does damage here, so the last weights are not the best"
    return bool(run.facts["metrics"]["prose"]["after"] == pytest.approx(best, rel=1e-5))


def architecture(plan: Plan) -> str:
    return plan.parts.architecture


def checkpointed(plan: Plan) -> int:
    """How many blocks recompute their activations."""
    blocks = [plan.model.get_submodule(name) for name in plan.parts.block_modules]
    return sum(bool(getattr(block, "gradient_checkpointing", False)) for block in blocks)


def steps(plan: Plan) -> int:
    return plan.clock.steps


TEN: dict[str, Any] = {"train__steps": 10, "train__learning_rate": 1.0}
ONE_EPOCH: dict[str, Any] = {"train__steps": None, "train__epochs": 1.0}
DAMAGE: dict[str, Any] = {
    "evaluate": SETS, "train__steps": 6, "train__evaluate_every": 1, "train__learning_rate": 0.05, "repeat_baseline": False,
}  # fmt: skip

CASES: dict[str, Case] = {
    "name": trained(("first", "second"), lambda run: run.folder.name, ("first-1", "second-1")),
    "model": planned(("tiny:llama", "tiny:gpt2"), architecture, ("llama", "gpt2")),
    "quantize": planned(("none", "int8", "nf4"), lambda plan: {one.scheme.bits for one in quantized(plan.model).values()},
                        (set(), {8}, {4}), tune="lora"),
    "seed": trained((0, 1), weights, tune="lora"),
    "rows.train": planned((ROWS, ROWS[:2], [{"rows": ROWS[:1], "weight": 3.0}, {"rows": ROWS[1:], "weight": 1.0}]),
                          lambda plan: drawn(plan)[:3], (["door", "gate", "mill"], ["door", "gate"], ["door"] * 3)),
    "rows.validate": planned((None, 0.5, 2, ROWS[:1]), lambda plan: (len(plan.rows.rows), [len(one.rows) for one in plan.sets]),
                             ((4, []), (1, [3]), (2, [2]), (4, [1]))),
    "rows.validate_by": planned((None, "half"), lambda plan: len(plan.rows.rows), (3, 2), rows__validate=1,
                                rows__train=[{**row, "id": row["id"], "half": n // 2} for n, row in enumerate(ROWS)]),
    "rows.temperature": planned((1.0, 1e9), lambda plan: drawn(plan).count("door"), (1, 2), rows__train=[ROWS[:1], ROWS[1:]]),
    "rows.mixture_unit": planned(("rows", "tokens"), lambda plan: drawn(plan).count("long"), (3, 1),
                          rows__train=[LONG, SHORT], rows__temperature=1e9),
    "rows.streaming": planned((False, True), lambda plan: isinstance(plan.rows.rows, StoredRows), (False, True), rows__train=FILE),
    "rows.workers": planned((2, 0), lambda plan: len(plan.rows.rows), ("2 processes", 4), rows__train=FILE, rows__streaming=True),
    "rows.columns": planned(({"completion": "reply"}, {"completion": "other"}), targets, (["B.<|im_end|>"], ["C.<|im_end|>"]),
                            rows__train=[{"prompt": "A?", "reply": "B.", "other": "C."}]),
    "rows.format": planned(("text", "prompt+completion"), targets, (["ll.<|im_end|>"], ["B.<|im_end|>"]),
                          rows__train=[{"text": "All.", "prompt": "A?", "completion": "B."}]),
    "rows.blocks": planned((None, {}), lambda plan: len(plan.rows.rows), ("the row has 13 tokens, and at most 12 are allowed", 2), **STORY,
                           rows__max_length=12),
    "rows.blocks.tokens": planned((None, 8), lambda plan: len(plan.rows.rows), (1, 3), **STORY),
    "rows.blocks.overlap": planned((0, 3), lambda plan: sum(map(len, plan.rows.rows)), (13, 19), **STORY, rows__blocks={"tokens": 8}),
    "rows.blocks.at": planned(("paragraph", "token"), lambda plan: [row.fields["text"] for row in plan.raw],
                              (["Ab. ", "Cd.\n\n", "Ef."], ["Ab. Cd.\n", "\nEf."]), **STORY, rows__blocks={"tokens": 8}),
    "rows.map": planned((None, "twice"), lambda plan: len(plan.rows.rows), (4, 8)),
    "rows.loss_on": planned(("assistant", "last", "all"), targets, rows__train=[{"messages": TURNS}]),
    "rows.max_length": planned((None, 12), lambda plan: max(map(len, plan.rows.rows)), rows__too_long="left"),
    "rows.too_long": planned(("left", "right", "refuse"), lambda plan: plan.rows.rows[0].token_ids, rows__max_length=40),
    "rows.on_bad_row": planned(("skip", "stop"), lambda plan: len(plan.skipped),
                               rows__train=[*ROWS, {"prompt": "Hm?", "completion": ""}]),
    "tune": planned(("full", "lora"), lambda plan: plan.trained_parameters),
    "objective": trained(("cross_entropy", {"cross_entropy": {"weight": 2.0}}),
                         lambda run: run.facts["history"][0]["loss"] / run.facts["history"][0]["nll"],
                         (pytest.approx(1.0), pytest.approx(2.0))),
    "token_weight": trained((None, "dft"), lambda run: run.facts["history"][0].get("mean_weight", 1.0)),
    "optimizer": trained(("sgd", "adamw"), weights),
    "gradient_estimator": trained(("backprop", "zeroth_order"), weights, optimizer="sgd"),
    "callbacks": trained((None, "average"), weights),
    "freeze": trained((None, "in_turns"), weights),
    "train.epochs": planned((1.0, 2.5), steps, (2, 5), train__steps=None),
    "train.steps": trained((1, 3), lambda run: len(run.facts["history"]), (1, 3)),
    "train.batch_tokens": planned((10, 10000), steps, (4, 1), **ONE_EPOCH, train__batch_rows=None),
    "train.batch_rows": planned((1, 4), steps, (4, 1), **ONE_EPOCH),
    "train.micro_batch_tokens": planned((1, 10000), lambda plan: len(plan.feed.at(0)[1]), (2, 1)),
    "train.learning_rate": trained((1e-3, 2e-3, None), first_learning_rate, (1e-3, 2e-3, 1e-4), tune="full"),
    "train.schedule": planned(("constant", "linear", "cosine", "warmup_stable_decay"), rate_at(9),
                              (1.0, pytest.approx(0.1), pytest.approx(0.5 + 0.5 * math.cos(0.9 * math.pi)), pytest.approx(0.5)), **TEN),
    "train.warmup": planned((0, 2, 0.4), rate_at(0), (1.0, 0.5, 0.25), **TEN),
    "train.precision": planned(("fp32", "bf16", "fp64"), lambda plan: next(plan.model.parameters()).dtype,
                               (torch.float32, torch.bfloat16, torch.float64)),
    "train.master_weights": planned(("fp32", "none"), lambda plan: {one.master.dtype for one in plan.engine.tune.trained.values()},
                             ({torch.float32}, {torch.bfloat16}), train__precision="bf16"),
    "train.device": planned(("cpu", "cuda:99"), lambda plan: next(plan.model.parameters()).device.type,
                            ("cpu", "there is no device `cuda:99` on this machine")),
    "train.threads": planned((1, 2), lambda plan: torch.get_num_threads(), (1, 2)),
    "train.sharding": planned(("none", "full"), lambda plan: plan.engine.tune.root,
                              (None, "there is one process, and a model is spread over several")),
    "train.packing": planned((True, False), lambda plan: plan.feed.padding() > 0, (False, True),
                              rows__train=LONG + SHORT, train__batch_rows=6),
    "train.gradient_checkpointing": planned((False, True), checkpointed, (0, 2)),
    "train.compile": planned((False, True),
                             lambda plan: sum(plan.model.get_submodule(name)._compiled_call_impl is not None
                                              for name in plan.parts.block_modules), (0, 2)),
    "train.save_every": trained((None, 1, 2), checkpoints, ([], ["step-1", "step-2", "step-3"], ["step-2", "step-3"]),
                                train__steps=3, train__keep_checkpoints=9),
    "train.keep_checkpoints": trained((1, 2), checkpoints, (["step-3"], ["step-2", "step-3"]), train__steps=3, train__save_every=1),
    "train.evaluate_every": trained(
        (None, 1, 2), evaluated_at, ([], [1, 2, 3], [2, 3]), train__steps=3, evaluate=SETS, repeat_baseline=False
    ),
    "train.best": trained((None, "prose"), prose_after_is_best, (False, True), **DAMAGE),
    "train.patience": trained((None, 2), lambda run: run.facts["steps"] < 6, (False, True), **DAMAGE, train__best="prose"),
    "evaluate": trained(({}, SETS), lambda run: list(run.facts["metrics"]), ([], ["prose"])),
    "evaluate.NAME.rows": trained((ASKED, ASKED[:3]), asked("n"), (4, 3), evaluate=ASKS),
    "evaluate.NAME.columns": trained(({}, {"answer": "prompt", "prompt": "answer"}), lambda run: asked("items")(run)[0]["expected"],
                                     ("Door!", "What does the door say?"), evaluate=ASKS),
    "evaluate.NAME.metric": trained(("contains", "f1"), asked("metric"), ("contains", "f1"), evaluate=ASKS),
    "evaluate.NAME.role": trained(("target", "retention"), asked("role"), ("target", "retention"), evaluate=ASKS),
    "evaluate.NAME.max_new_tokens": trained((1, 6), longest_answer, (1, 6), evaluate=ASKS),
    "evaluate.NAME.limit": trained((None, 2), asked("n"), (4, 2), evaluate=ASKS),
    "repeat_baseline": trained((True, False), lambda run: list(run.facts["repeat_baseline"]), (["prose"], []), evaluate=SETS),
    "out": trained(("here", "there"), lambda run: run.folder.parent.name, ("here", "there")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working folder of its own, with a file of rows and no other process; the number of threads stays as it was."""

    def refuse(count: int, *options: Any, **more: Any) -> None:
        raise LuthierError(f"{count} processes")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("luthier.rows.chunks.ProcessPoolExecutor", refuse)
    Path(FILE).write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; NAME is the set `asked`."""
    *path, last = key.replace("NAME", "asked").split(".")
    for step in path:
        data[step] = dict(data.get(step) or {})
        data = data[step]
    data[last] = value


def outcome(key: str, value: Any, case: Case) -> Any:
    """What one value of a key leads to."""
    train = {"steps": 2, "batch_rows": 2, "precision": "fp32", "learning_rate": 1e-3, "schedule": "constant", "warmup": 0}
    data: dict[str, Any] = {"model": "tiny:llama", "rows": {"train": ROWS}, "train": train}
    for name, other in {**case.among, key: value}.items():
        put(data, name, other)
    try:
        recipe = make_recipe(data)
        return case.see(luthier.train(recipe) if case.trains else make_plan(recipe))
    except LuthierError as error:
        return error.what


@pytest.mark.parametrize("key", CASES)
def test_every_key_changes_what_happens(key: str) -> None:
    """Fault 26: a key that is read and then ignored would show the same for both values."""
    case = CASES[key]
    seen = [outcome(key, value, case) for value in case.values]
    if case.shows is not None:
        assert tuple(seen) == case.shows
    assert all(one != other for i, one in enumerate(seen) for other in seen[i + 1 :]), f"{key} shows {seen}"


def test_no_key_is_forgotten() -> None:
    """Fault 26: a new key must come with its case."""
    keys = {key for key, _, _ in reference()}
    assert keys == CASES.keys() | ELSEWHERE.keys()
    for place in ELSEWHERE.values():
        file, _, test = place.partition("::")
        text = (Path(__file__).parents[2] / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"there is no test {place}"


def test_the_revision_chooses_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 26: two revisions of one name on the hub are two models."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--some--model"
    (place / "refs").mkdir(parents=True)
    for number, name in enumerate(("main", "older")):
        commit = f"{number}" * 40
        (place / "refs" / name).write_text(commit)
        tiny("llama", seed=number).save_pretrained(place / "snapshots" / commit)
        tiny_tokenizer().save_pretrained(place / "snapshots" / commit)
    case = planned((None, "older"), lambda plan: plan.model.get_parameter("lm_head.weight").tolist(), model="some/model")
    shown = tuple(tiny("llama", seed=number).get_parameter("lm_head.weight").tolist() for number in (0, 1))
    assert tuple(outcome("revision", value, case) for value in case.values) == shown


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 26: without trust the model is refused; with it the model's own class is loaded."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    case = planned((False, True), lambda plan: type(plan.model).__name__, model=str(folder))
    refused, loaded = (outcome("trust_remote_code", value, case) for value in case.values)
    assert refused == "the model `own` runs code that comes with it" and loaded == "OwnModel"
