"""Tasks of the evaluation harness on a model in memory: its numbers are those of the harness by itself, item by item."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.evaluate.harness import _datasets
from luthier.evaluate.harness_items import Main, _score
from luthier.evaluate.harness_model import decoding_of
from luthier.evaluate.items import Item
from luthier.evaluate.paired import difference_of
from luthier.evaluate.planned import evaluation_sets
from luthier.evaluate.sets import SetResult, check, measure, result_of
from luthier.kinds import Now
from luthier.methods.prefix.prefix_tuning import prefix_tuning
from luthier.methods.prompt.prompt_tuning import prompt_tuning
from luthier.methods.representation_edit.ia3 import ia3
from luthier.methods.weight_delta.lora import lora
from luthier.models import map_parts, tiny, tiny_tokenizer
from luthier.recipe import EvaluationSet, TrainRecipe, make_recipe
from luthier.runs.train import train
from luthier.training.services import RunServices
from luthier.tune import Tune

WORDS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "last"]
ROWS = [
    {"question": f"The {word} one is", "choices": [" red", " tan", " sky blue"], "answer": number % 3, "note": f"It is {word}."}
    for number, word in enumerate(WORDS)
]
SHOTS = [
    {**row, "question": f"A {word} was"}
    for row, word in zip(ROWS, ["bat", "cat", "hat", "mat", "rat", "sat", "vat", "wat"], strict=True)
]
DATA = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/rows.jsonl\n    train: {folder}/shots.jsonl\n"
TASKS = {
    "colors": (
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\nmetadata:\n  version: 2.5\n"
    ),
    "spell": (
        "output_type: generate_until\ndoc_to_text: '{{question}}:'\ndoc_to_target: '{{choices[answer]}}'\ntag: words\n"
        "generation_kwargs:\n  until: ['e', '\\n']\n  max_gen_toks: 24\n  do_sample: false\n"
        "filter_list:\n  - name: start\n    filter:\n      - function: regex\n        regex_pattern: '(.)'\n      - function: take_first\n"
        "  - name: whole\n    filter:\n      - function: take_first\n"
        "metric_list:\n  - metric: exact_match\n    regexes_to_ignore: ['[^a-m]']\n    ignore_case: true\n"
    ),
    "notes": (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{note}}'\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    ),
    "next": (
        "output_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: ' {{note}}'\n"
        "metric_list:\n  - metric: perplexity\n  - metric: acc\n"
    ),
    "short": (
        "output_type: multiple_choice\ndoc_to_text: 'Q {{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\ntag: words\n"
        "num_fewshot: 0\nprocess_docs: !function code.three\nmetric_list:\n  - metric: mcc\n  - metric: acc\n"
    ),
}
GROUP = "group: both\ntask: [colors, short]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: {size}\n"


def task_folder(folder: Path, *, by_size: bool = True) -> str:
    for name, rows in (("rows", ROWS), ("shots", SHOTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        splits = "test_split: test\n" if name == "notes" else "test_split: test\ntraining_split: train\nfewshot_split: train\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{DATA.format(folder=folder)}{splits}{text}")
    (folder / "code.py").write_text("def three(docs):\n    return docs.select(range(min(3, len(docs))))\n")
    (folder / "both.yaml").write_text(GROUP.format(size=str(by_size).lower()))
    return str(folder)


@pytest.fixture(autouse=True)
def small(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and no tasks but those of the test, since reading thousands of files takes seconds."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    empty = tasks.TaskManager(include_defaults=False)
    monkeypatch.setattr("luthier.evaluate.harness._manager_of", lambda module: empty)


def tuned(*techniques: Any) -> Tune:
    tune = Tune(tiny(), map_parts(tiny()), keep_base=True)
    values = [one for each in techniques for one in (each if type(each) is tuple else (each,))]
    for number, technique in enumerate(values):
        tune.add(f"slot{number}", technique, RunServices(tune, f"slot{number}", Now(seed=0)), {})
    rng = torch.Generator().manual_seed(3)
    tune.set({key: 1.0 * torch.randn(one.master.shape, generator=rng) for key, one in tune.trained.items()})
    return tune


def reached(tune: Tune, folder: str, *tasks: str, **options: Any) -> dict[str, SetResult]:
    asked = EvaluationSet(tasks=tasks, include_path=folder, **options)
    sets = evaluation_sets({"set": asked}, TrainRecipe())
    check(tune, tiny_tokenizer(), sets)
    return measure(tune, tiny_tokenizer(), sets)


def alone(model: Any, folder: str, task: str, **options: Any) -> Mapping[str, Any]:
    """What the harness tells by itself, of its own class for such models."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    given = {"fewshot_as_multiturn": False, **options}
    found: Mapping[str, Any] = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tiny_tokenizer(), backend="causal", batch_size=1),
        tasks=[task],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **given,
    )
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks the system and the hub about itself, which takes seconds."""
    for name in ("add_env_info", "add_tokenizer_info"):
        monkeypatch.setattr(f"lm_eval.evaluator.{name}", lambda *given: None)
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.get_model_info", lambda model: {})


CASES: list[tuple[str, dict[str, Any]]] = [
    ("colors", {}),
    ("colors", {"num_fewshot": 2}),
    ("spell", {"num_fewshot": 3, "limit": 5}),
    ("spell", {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": True}),
    ("spell", {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": False, "gen_kwargs": {"max_gen_toks": 3}}),
    ("colors", {"num_fewshot": 1, "apply_chat_template": True}),
    ("notes", {}),
    ("next", {"num_fewshot": 1}),
]


@pytest.mark.parametrize(("task", "options"), CASES)
def test_scores_prompts_and_answers_are_those_of_the_harness_by_itself(task: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder, tune = task_folder(tmp_path), tuned(lora(rank=3))
    (found,) = reached(tune, folder, task, **options).values()
    chat = {"fewshot_as_multiturn": True} if options.get("apply_chat_template") else {}
    expected = alone(tune.model, folder, task, **{**chat, **options})
    told = found.told["benchmark"]
    assert told["values"][task] == {
        key: pytest.approx(value, rel=1e-5)
        for key, value in expected["results"][task].items()
        if "," in key and "stderr" not in key
    }
    first = next(iter(told["values"][task]))
    assert found.metric == first and found.value == pytest.approx(told["values"][task][first], rel=1e-6)
    key, by = first.split(",")
    samples = [one for one in expected["samples"][task] if one["filter"] == by]
    assert [item.prompt for item in found.items] == [one["arguments"][0][0] for one in samples]
    if task == "spell":
        assert [item.answer for item in found.items] == [one["resps"][0][0] for one in samples]
        assert any(item.answer for item in found.items) and all("e" not in item.answer for item in found.items)
    if key in ("acc", "exact_match"):
        assert [item.score for item in found.items] == [float(one[key]) for one in samples]
    assert told["tasks"][task]["num_fewshot"] == options.get("num_fewshot", 0)
    assert told["tasks"][task]["version"] == (2.5 if task == "colors" else expected["versions"][task])


def test_chosen_and_right_choices_are_told_by_name(tmp_path: Path) -> None:
    tune = tuned()
    (found,) = reached(tune, task_folder(tmp_path), "colors").values()
    tokenizer = tiny_tokenizer()
    for item, row in zip(found.items, ROWS, strict=True):
        scores = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            prompt, answer = tokenizer(row["question"])["input_ids"], tokenizer(choice)["input_ids"]
            with torch.no_grad():
                log_p = tune.model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[len(prompt) + place - 1, token]) for place, token in enumerate(answer)))
        best = row["choices"][scores.index(max(scores))]  # type: ignore[index]
        assert (item.answer, item.expected) == (best, row["choices"][row["answer"]])  # type: ignore[index]
        assert item.score == float(item.answer == item.expected)
    assert found.interval is not None and found.n == len(ROWS)


@pytest.mark.parametrize("technique", [prefix_tuning(length=2), ia3()])
def test_what_stands_beside_the_weights_is_in_effect_and_off_at_the_base(technique: Any, tmp_path: Path) -> None:
    folder, tune = task_folder(tmp_path), tuned(technique)
    for task in ("colors", "spell"):
        (found,) = reached(tune, folder, task, num_fewshot=1).values()
        expected = alone(tune.model, folder, task, num_fewshot=1)["results"][task]
        assert found.told["benchmark"]["values"][task] == {
            key: pytest.approx(expected[key]) for key in found.told["benchmark"]["values"][task]
        }
        with tune.at("base"):
            (base,) = reached(tune, folder, task, num_fewshot=1).values()
        (plain,) = reached(tuned(), folder, task, num_fewshot=1).values()
        assert [item.answer for item in base.items] == [item.answer for item in plain.items]
        assert [item.answer for item in base.items] != [item.answer for item in found.items]


def test_a_trained_prompt_stands_before_what_is_asked(tmp_path: Path) -> None:
    folder = task_folder(tmp_path)
    tune, tokenizer = tuned(prompt_tuning(length=2, init="text", token_ids=(5, 6))), tiny_tokenizer()
    (found,) = reached(tune, folder, "next").values()
    expected = []
    for row in ROWS:
        before, after = tokenizer(row["question"])["input_ids"], tokenizer(f" {row['note']}")["input_ids"]
        with torch.no_grad():
            log_p = tune.model(torch.tensor([[-1, -2, *before, *after]])).logits[0].log_softmax(-1)
        expected.append(sum(float(log_p[2 + len(before) + place - 1, token]) for place, token in enumerate(after)))
    assert [item.score for item in found.items] == [pytest.approx(-one, rel=1e-5) for one in expected]
    (plain,) = reached(tuned(), folder, "next").values()
    assert abs(plain.value - found.value) > 1


def test_prompts_beyond_the_context_are_cut_as_the_harness_cuts_them_and_told(tmp_path: Path) -> None:
    folder, tune = task_folder(tmp_path), tuned()
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROWS[0], "question": "long " * 120, "note": "word " * 12}) + "\n")
    for task in ("next", "spell", "colors"):
        (found,) = reached(tune, folder, task).values()
        expected, values = alone(tune.model, folder, task)["results"][task], found.told["benchmark"]["values"][task]
        # e to the power of hundreds of nats, which differ in the seventh digit.
        assert values == {key: pytest.approx(expected[key], rel=1e-3) for key in values}
        assert sum(found.told["benchmark"]["notes"].values()) > 0
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROWS[0], "note": "word " * 150}) + "\n")
    (found,) = reached(tune, folder, "notes").values()
    expected = alone(tune.model, folder, "notes")["results"]["notes"]
    assert found.value == pytest.approx(expected["word_perplexity,none"]) and not found.told["benchmark"]["notes"]
    with pytest.raises(LuthierError, match="751 tokens to be told the likelihood of exceed the model's context of 512"):
        reached(tune, folder, "next")


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_with_a_value_is_one_set_and_a_tag_one_for_each_task(by_size: bool, tmp_path: Path) -> None:
    folder, tune = task_folder(tmp_path, by_size=by_size), tuned()
    (found,) = reached(tune, folder, "both").values()
    expected = alone(tune.model, folder, "both")["results"]
    values = found.told["benchmark"]["values"]
    assert found.value == pytest.approx(expected["both"]["acc,none"]) and list(values) == ["both", "colors", "short"]
    assert all(values[name]["acc,none"] == pytest.approx(expected[name]["acc,none"]) for name in values)
    assert found.n == 11 and [item.id for item in found.items][7:9] == ["colors/7", "short/0"]
    # Three items of the small task count as much as eight of the large one, or as three.
    weights = [1.0] * 11 if by_size else [11 / 16] * 8 + [11 / 6] * 3
    assert [item.weight for item in found.items] == pytest.approx(weights)
    assert sorted(reached(tune, folder, "words")) == ["set/short", "set/spell"]
    assert list(reached(tune, folder, "colors", "short", limit=2)) == ["set/colors", "set/short"]


def test_a_group_whose_items_weigh_differently_has_an_interval_of_weighted_means(tmp_path: Path) -> None:
    folder = task_folder(tmp_path, by_size=False)
    (one,) = evaluation_sets({"set": EvaluationSet(tasks=("both",), include_path=folder)}, TrainRecipe())
    items = [
        Item(row.id, "", "", "", float(row.id.startswith("short")), 11 / 6 if row.id.startswith("short") else 11 / 16)
        for row in one.rows
    ]
    found = result_of(one, items, "")
    assert found.value == pytest.approx(0.5) and found.interval is not None and found.interval[0] < 0.5 < found.interval[1]
    # Wilson's interval is of plain shares, and would lie around 3 of 11.
    assert found.interval[1] > 0.62
    changed = [item._replace(score=1.0) for item in items]
    assert difference_of("acc,none", items, changed).value == pytest.approx(0.5)


def test_the_main_metric_is_the_first_mean_or_the_one_that_is_named(tmp_path: Path) -> None:
    folder, tune = task_folder(tmp_path), tuned()
    named = {"colors": "acc_norm", "spell": "exact_match,whole", "notes": "bits_per_byte", "next": "acc"}
    for task, metric in named.items():
        (found,) = reached(tune, folder, task, metric=metric).values()
        told = found.told["benchmark"]
        assert found.metric == (metric if "," in metric else f"{metric},none") and told["chosen"] == "named by the recipe"
        assert found.value == pytest.approx(told["values"][task][found.metric]) and len(told["values"][task]) == 2
        assert found.higher_is_better == (task != "notes")
    # That of Matthews is of a whole set, and no mean.
    (short,) = reached(tune, folder, "short").values()
    assert short.metric == "acc,none" and "mcc,none" in short.told["benchmark"]["values"]["short"]
    with pytest.raises(LuthierError, match=r"(?s)`mcc` is no mean over items.*evaluate\.set\.metric.*acc,none"):
        reached(tune, folder, "short", metric="mcc")
    with pytest.raises(LuthierError, match=r"(?s)no metric `rouge`.*acc,none, acc_norm,none"):
        reached(tune, folder, "colors", metric="rouge")


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("short", {"num_fewshot": 2}, r"`short` says that nothing stands before its questions.*evaluate\.set\.num_fewshot"),
        ("notes", {"num_fewshot": 2}, "`num_fewshot` is not for it"),
        ("notes", {"apply_chat_template": True}, "`apply_chat_template` is not for it"),
        ("colors", {"gen_kwargs": {"max_gen_toks": 3}}, "nothing is generated, and `gen_kwargs`"),
        ("spell", {"gen_kwargs": {"num_beams": 4}}, "`num_beams: 4` is no option of generation"),
        ("spell", {"gen_kwargs": {"repetition_penalty": 1.2}}, "`repetition_penalty: 1.2` is no option"),
        ("spell", {"gen_kwargs": {"max_gen_toks": 512}}, "leave no room in the model's context of 512"),
        ("colours", {}, r"no task `colours` in the harness nor in .*`colors`"),
    ],
)
def test_what_a_task_does_not_know_is_refused_by_name(task: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=f"(?s){said}"):
        reached(tuned(), task_folder(tmp_path), task, **options)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "either rows or tasks"),
        ({"rows": [], "tasks": ["a"]}, "either rows or tasks|rows are read"),
        ({"rows": "a.jsonl", "tasks": ["a"]}, "has both"),
        ({"rows": "a.jsonl", "num_fewshot": 2}, "`num_fewshot` is for tasks"),
        ({"tasks": ["a"], "max_new_tokens": 99}, r"(?s)`max_new_tokens` is for rows.*max_gen_toks"),
        ({"tasks": ["a"], "columns": {"prompt": "question"}}, "`columns` is for rows"),
        ({"tasks": ["a"], "fewshot_as_multiturn": True}, "turns of their own only"),
    ],
)
def test_a_set_is_of_rows_or_of_tasks(keys: dict[str, Any], said: str) -> None:
    recipe = {"model": "tiny:llama", "rows": {"train": [{"text": "a b"}]}, "evaluate": {"set": keys}}
    with pytest.raises(LuthierError, match=said):
        make_recipe(recipe)


def test_greedy_and_drawn_answers_by_hand() -> None:
    assert decoding_of({"until": "x", "do_sample": False, "temperature": 0.7, "top_k": 5}, "t") == (("x",), 256, 0.0, 1.0)
    assert decoding_of({"until": [], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 9}, "t") == (
        (),
        9,
        0.7,
        0.9,
    )
    with pytest.raises(LuthierError, match="`top_k: 5`"):
        decoding_of({"do_sample": True, "temperature": 0.7, "top_k": 5}, "t")


def test_scores_by_hand() -> None:
    def main(metric: str, how: str) -> Main:
        return Main(metric, "none", how, True, "")

    assert _score(main("acc", "mean"), np.float64(0.5), "") == (0.5, 1.0)
    assert _score(main("perplexity", "perplexity"), -2.0, "") == (2.0, 1.0)
    assert _score(main("word_perplexity", "weighted_perplexity"), (-6.0, 3), "") == (2.0, 3.0)
    assert _score(main("bits_per_byte", "bits_per_byte"), (-6.0, 3), "") == (pytest.approx(2 / np.log(2)), 3.0)
    with pytest.raises(LuthierError, match=r"\[True, False\], and no number"):
        _score(main("loose", "mean"), [True, False], "")


def test_generators_of_the_caller_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    folder = task_folder(tmp_path)
    draws = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    reached(tuned(), folder, "colors", num_fewshot=1)
    assert (random.getstate(), np.random.get_state()[2]) == draws[:2] and torch.equal(torch.get_rng_state(), draws[2])


def test_without_the_harness_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LuthierError, match=r'pip install "luthier\[lm-eval\]"'):
        reached(tuned(), str(tmp_path), "colors")


HUB = (
    "task: {name}\ndataset_path: {path}\ndataset_name: {subset}\ntest_split: test\noutput_type: generate_until\n"
    "doc_to_text: q\ndoc_to_target: a\n"
)


def test_data_that_is_not_there_is_named_before_anything_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def away(path: str, **given: Any) -> None:
        asked.append(path)
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", away)
    for name, path, subset in (("sums", "school/sums", "main"), ("facts", "school/facts", "null"), ("hard", "school/hard", "null")):
        (tmp_path / f"{name}.yaml").write_text(HUB.format(name=name, path=path, subset=subset))
    (tmp_path / "all.yaml").write_text("group: all\ntask: [facts, hard]\naggregate_metric_list:\n  - metric: exact_match\n")
    recipe = {
        "model": "tiny:llama",
        "rows": {"train": [{"text": "a b"}]},
        "evaluate": {"one": {"tasks": ["sums", "all"], "include_path": str(tmp_path)}},
        "out": str(tmp_path / "runs"),
    }
    with pytest.raises(
        LuthierError, match=r"(?s)data of sums, all is not on this machine.*school/sums \(main\), school/facts, school/hard"
    ):
        train(recipe)
    assert asked == ["school/sums", "school/facts"] and not (tmp_path / "runs").exists()


def test_data_sets_of_built_in_tasks_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(tags=set(), cfg={"task": "x", "dataset_path": "openai/gsm8k", "dataset_name": "main"})
    words = SimpleNamespace(tags={"b", "a"}, cfg=None)
    plain = SimpleNamespace(tags=set(), cfg={"task": "a", "dataset_path": "json", "dataset_kwargs": {"data_files": "here.jsonl"}})
    manager = SimpleNamespace(task_index={"x": entry, "words": words, "a": plain, "b": entry})
    assert _datasets(manager, "x") == ["openai/gsm8k (main)"] and _datasets(manager, "words") == [
        "json of here.jsonl",
        "openai/gsm8k (main)",
    ]


def test_tasks_that_run_what_a_model_writes_are_refused(tmp_path: Path) -> None:
    folder = task_folder(tmp_path)
    (tmp_path / "risky.yaml").write_text(
        (tmp_path / "spell.yaml").read_text().replace("task: spell", "task: risky\nunsafe_code: true")
    )
    with pytest.raises(LuthierError, match="`risky` runs code that the model writes"):
        reached(tuned(), folder, "risky")
    (tmp_path / "broken.yaml").write_text(
        (tmp_path / "spell.yaml").read_text().replace("spell", "broken").replace("{{question}}", "{{nothing.at.all}}")
    )
    with pytest.raises(LuthierError, match="cannot load the task `broken`"):
        reached(tuned(), folder, "broken")


def recipe_of(folder: str, out: Path, **more: Any) -> dict[str, Any]:
    rows = [{"text": row["question"] + row["choices"][row["answer"]]} for row in ROWS]  # type: ignore[index, operator]
    return {
        "model": "tiny:llama",
        "rows": {"train": rows},
        "tune": "full",
        "train": {"steps": 60, "batch_rows": 8, "device": "cpu", "learning_rate": 0.01, "precision": "fp32"},
        "evaluate": {
            "asked": {"tasks": ["both", "spell"], "include_path": folder, "limit": 6, "role": "retention"},
            "shown": {"tasks": ["colors"], "include_path": folder, "num_fewshot": 1},
        },
        "out": str(out),
        **more,
    }


def test_a_run_measures_tasks_before_and_after_with_all_that_decides_them(tmp_path: Path) -> None:
    folder = task_folder(tmp_path)
    run = train(recipe_of(folder, tmp_path / "runs"))
    metrics = run.facts["metrics"]
    assert list(metrics) == ["asked/both", "asked/spell", "shown"] and set(run.facts["repeat_baseline"].values()) == {0.0}
    both = metrics["asked/both"]
    assert both["n"] == 9 and both["role"] == "retention" and both["verdict"] in ("better", "unclear", "no change")
    assert both["after"] > both["before"] and both["difference_interval"] is not None
    assert both["difference"] == pytest.approx(both["after"] - both["before"])
    assert 0 < both["p_value"] <= 1 and both["matters"] == 0.05
    told = both["benchmark"]
    assert told["limit"] == 6 and told["metric"] == "acc,none" and told["harness"] and told["tasks"]["colors"]["version"] == 2.5
    assert told["after"]["both"]["acc,none"] == pytest.approx(both["after"]) and told["before"]["both"][
        "acc,none"
    ] == pytest.approx(both["before"])
    assert told["tasks"]["short"]["num_fewshot"] == 0 and metrics["shown"]["benchmark"]["num_fewshot"] == 1
    (first, *_) = metrics["shown"]["items"]
    assert first["prompt"].endswith("The first one is") and first["prompt"].startswith("A ") and first["expected"] == " red"
    assert first["after"] in (" red", " tan", " sky blue") and first["after_score"] in (0.0, 1.0)
    assert metrics["asked/spell"]["items"][0]["prompt"] == "The first one is:"
    assert all(item["before_note"].startswith("counted as") for item in metrics["asked/spell"]["items"] if item["before"])
    expected = alone(run.model, folder, "colors", num_fewshot=1)["results"]["colors"]
    assert metrics["shown"]["after"] == pytest.approx(expected["acc,none"])
    page = (run.folder / "report.html").read_text()
    for said in (
        "both, task by task: 3",
        "2.5",
        "exact_match,whole",
        "prompts without a chat template",
        "max_gen_toks: 24",
        "sky blue",
    ):
        assert said in page, said
    assert "benchmarks    both: 2 tasks, 9 items, acc,none, 0-shot" in "\n".join(run.facts["plan"])
    assert "evaluate.asked/both.metric: the code of acc,none" in run.facts["inputs"]


def test_a_resumed_run_keeps_what_the_base_reached_and_ends_the_same(tmp_path: Path) -> None:
    folder = task_folder(tmp_path)
    steps = {"steps": 6, "batch_rows": 8, "device": "cpu", "learning_rate": 0.01, "precision": "fp32", "save_every": 3}
    whole = train(recipe_of(folder, tmp_path / "runs", train=steps))

    class StopError(Exception):
        pass

    def stop(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == 4:
            raise StopError

    with pytest.raises(StopError):
        train(recipe_of(folder, tmp_path / "others", train=steps), tell=stop)
    (broken,) = (tmp_path / "others").iterdir()
    again = train(recipe_of(folder, tmp_path / "others", train=steps), resume=broken)
    assert again.facts["metrics"] == whole.facts["metrics"]
    (tmp_path / "spell.yaml").write_text((tmp_path / "spell.yaml").read_text().replace("24", "20"))
    with pytest.raises(StopError):
        train(recipe_of(folder, tmp_path / "third", train=steps), tell=stop)
    (tmp_path / "spell.yaml").write_text((tmp_path / "spell.yaml").read_text().replace("20", "24"))
    (broken,) = (tmp_path / "third").iterdir()
    with pytest.raises(LuthierError, match=r"evaluate\.asked/spell\.metric: the code of exact_match,start"):
        train(recipe_of(folder, tmp_path / "third", train=steps), resume=broken)


def test_the_command_line_measures_a_run_and_its_base_and_a_model_alone(tmp_path: Path) -> None:
    folder = task_folder(tmp_path)
    run = train(recipe_of(folder, tmp_path / "runs", evaluate={}))
    command = ["--tasks", "colors,spell", "--include-path", folder, "--limit", "7"]
    result = CliRunner().invoke(app, ["eval", str(run.folder), *command, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["metrics"]
    (base,) = reached(tuned(), folder, "colors", limit=7).values()
    assert (
        found["colors"]["before"] == pytest.approx(base.value)
        and found["colors"]["after"] == 1.0
        and len(found["colors"]["items"]) == 7
    )
    plain = CliRunner().invoke(app, ["eval", str(run.folder), *command])
    assert plain.exit_code == 0 and "acc_norm,none" in plain.output and "verdict" in plain.output
    alone = CliRunner().invoke(app, ["eval", "tiny:llama", *command, "--num-fewshot", "2", "--apply-chat-template", "--json"])
    assert alone.exit_code == 0, alone.output
    told = json.loads(alone.stdout)["metrics"]["spell"]["told"]["benchmark"]
    assert told["tasks"]["spell"]["num_fewshot"] == 2 and told["apply_chat_template"] and told["fewshot_as_multiturn"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--harness", "gsm8k"], "write --tasks gsm8k"),
        (["--tasks-folder", "mine"], "write --include-path mine"),
        (["--limit", "3"], "add --tasks"),
        (["--tasks", "a", "--benchmark"], "more than one"),
        (["--model-name", "a"], "endpoint:URL"),
    ],
)
def test_options_that_mean_nothing_here_are_refused(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["eval", "tiny:llama", *words])
    assert result.exit_code == 2 and said in " ".join(result.output.split())
