"""Configurations of other tools as recipes: what each means, that it is read back, and that nothing of a file is dropped in silence."""

from __future__ import annotations

import copy
import importlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from luthier.cli import app
from luthier.convert import TOOLS, Converted, convert
from luthier.convert.config import Config
from luthier.convert.draft import WIDTH
from luthier.convert.lora import module_types
from luthier.errors import LuthierError
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe, read_recipe
from luthier.recipe.parts import choose_parts
from tests.unit.convert_inputs import CASES, SHELF


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder of its own, with LLaMA-Factory's description of data sets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "dataset_info.json").write_text(json.dumps(SHELF))


def converted(text: str, *options: Any, name: str = "theirs.yaml", **more: Any) -> Converted:
    Path(name).write_text(textwrap.dedent(text))
    return convert(name, *options, **more)


@pytest.mark.parametrize("name", CASES)
def test_a_file_means_this_recipe(name: str) -> None:
    case = CASES[name]
    made = converted(case.file)
    assert made.tool == case.tool, "recognized by its keys"
    assert made.recipe == case.recipe
    assert {one.key for one in made.left} == case.left
    assert set(made.needless) == case.needless
    assert {key for key, remark in made.remarks.items() if remark} == case.remarks


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_is_accepted_and_its_text_says_the_same(name: str) -> None:
    made = converted(CASES[name].file)
    assert yaml.safe_load(made.text) == made.recipe
    choose_parts(make_recipe(made.recipe))
    comments = " ".join(line.partition("# ")[2] for line in made.text.splitlines())
    assert all(" ".join(remark.split()) in comments for remark in made.remarks.values())
    for key, value, why in made.left:
        assert f"#   {key}: {value}" in made.text.splitlines() and why
    for line in made.text.splitlines():
        assert len(line) <= WIDTH or "#" not in line or line.startswith("#   "), line


def test_a_converted_recipe_runs_on_rows(tmp_path: Path) -> None:
    """From the file to a plan: the batch, the limits and what trains are those of the configuration."""
    Path("rows.jsonl").write_text("".join(json.dumps({"instruction": f"Say {n}.", "output": "Yes!"}) + "\n" for n in range(6)))
    made = converted(
        """
        base_model: tiny:llama
        datasets: [{path: rows.jsonl, ds_type: json, type: alpaca}]
        adapter: lora
        lora_r: 2
        lora_alpha: 4
        lora_target_modules: [q_proj, v_proj]
        sequence_len: 64
        excess_length_strategy: raise
        micro_batch_size: 1
        gradient_accumulation_steps: 3
        num_epochs: 2
        learning_rate: 1e-3
        """
    )
    plan = make_plan(make_recipe({**made.recipe, "out": str(tmp_path)}))
    # Six rows, three a step, twice.
    assert plan.clock.steps == 4
    assert plan.trained_parameters == sum(2 * (rows + columns) for rows, columns in shapes(plan))


def shapes(plan: Any) -> list[tuple[int, int]]:
    """The sizes of the matrices that LoRA should stand beside."""
    places = plan.parts.select(["attention_query", "attention_value"])
    return [tuple(plan.parts.view(plan.model, place).shape) for place in places]


OTHER: Mapping[type, Any] = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 3 + 0.01, str: lambda v: f"{v}x"}


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, list):
        return [other(value[0]), *value[1:]]
    if isinstance(value, dict):
        return {key: other(one) if place == len(value) - 1 else one for place, (key, one) in enumerate(value.items())}
    return OTHER[type(value)](value)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_dropped_in_silence(name: str) -> None:
    """Each key of each file that is changed changes what comes out, or stands among those that nothing is lost without."""
    data = yaml.safe_load(CASES[name].file)
    made = said(data, CASES[name].tool)
    unseen = set()
    for key in [key for key, value in data.items() if value not in (None, "")]:
        shown = said({**data, key: other(data[key])}, CASES[name].tool)
        if shown == made and key not in {one.partition(".")[0] for one in made.needless}:
            unseen.add(key)
    assert unseen == UNSEEN.get(name, set())


UNSEEN: Mapping[str, set[str]] = {
    # Another way of offloading; an adapter that is in 4 bits by its name; a pattern that means all linear maps as well.
    "axolotl-qlora": {"gradient_checkpointing", "load_in_4bit", "lora_target_linear"},
    # Transformers' `constant` does not warm up, and the recipe says so.
    "axolotl-kto": {"warmup_steps"},
}
"""Keys whose other value means the same."""


def said(data: Mapping[str, Any], tool: str) -> Any:
    """What a configuration becomes: a draft, or the text of its refusal."""
    try:
        return TOOLS[tool].convert(Config(copy.deepcopy(data), "theirs.yaml"), 1)
    except LuthierError as error:
        return str(error)


JUNK: tuple[Any, ...] = (
    None,
    "",
    "x",
    "no",
    -1,
    0,
    1.5,
    True,
    False,
    [],
    ["x"],
    [1],
    {},
    {"a": 1},
    [{"a": None}],
    [{"path": 3}],
    float("nan"),
)


@pytest.mark.parametrize("name", CASES)
def test_junk_is_refused_by_its_key_or_said(name: str) -> None:
    """Whatever stands behind a key, there is a recipe that YAML reads back, or one clear error that names the key."""
    data = yaml.safe_load(CASES[name].file)
    for key in data:
        for junk in JUNK:
            try:
                draft = TOOLS[CASES[name].tool].convert(Config({**data, key: junk}, "theirs.yaml"), 1)
            except LuthierError as error:
                assert error.where.startswith("theirs.yaml: ") and error.fix, error
                continue
            assert draft.recipe()["model"]
            if junk is JUNK[-3] or junk is JUNK[2]:
                assert str(yaml.safe_load(draft.text("A title."))) == str(draft.recipe())


def refusal(text: str, *options: Any) -> LuthierError:
    with pytest.raises(LuthierError) as caught:
        converted(text, *options)
    return caught.value


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("{base_model: x, rl: grpo}", "grpo trains on answers that it samples", "luthier rows answers"),
        ("{model_name_or_path: x, stage: ppo}", "ppo trains on answers that it samples", "luthier rows answers"),
        ("{base_model: x, rl: unheard}", "`rl: unheard` has no counterpart", ""),
        ("{model_name_or_path: x, stage: sftt}", "`stage: sftt` is not known", "pt, sft, rm, dpo, kto"),
        ("{base_model: x, process_reward_model: true, datasets: []}", "no objective judges the steps", "reward_model"),
        ("{model_name_or_path: x, stage: dpo, pref_loss: kto_pair}", "the loss `kto_pair` has no counterpart", "pair_loss"),
        ("{base_model: x, rl: dpo, dpo_loss_type: [ipo, hinge], dpo_loss_weights: [1]}", "2 losses have the weights [1]", "one weight"),
        ("{stage: sft, dataset: 'a, b', interleave_probs: '1'}", "2 data sets have 1 probabilities", "one for each"),
        ("{stage: sft, dataset: 'a, b', interleave_probs: 'x, y'}", "`interleave_probs` are ['x', 'y']", "number for each"),
        ("{base_model: x, micro_batch_size: two}", "`micro_batch_size` is 'two', where a number belongs", "correct the file"),
        ("{base_model: x, micro_batch_size: 1.5}", "`micro_batch_size` is 1.5, where a whole number belongs", "correct the file"),
        ("{base_model: x, num_epochs: true}", "`num_epochs` is True, where a number belongs", "correct the file"),
        ("{base_model: 3, num_epochs: 1}", "`base_model` is 3, where text belongs", "correct the file"),
        ("{base_model: x, sample_packing: 'yes please'}", "`sample_packing` is 'yes please', where true or false belongs", ""),
        ("{base_model: x, datasets: one}", "`datasets` is 'one', where a list of mappings belongs", ""),
        ("{base_model: x, adapter: lora, lora_target_modules: [1]}", "`lora_target_modules` is [1], where names belongs", ""),
        ("{colour: red}", "the tool cannot be told: none of its keys", "axolotl, llama-factory, trl"),
        ("{output_dir: x, learning_rate: 1}", "the tool cannot be told: none of its keys", "--from TOOL"),
        ("{base_model: x, stage: sft}", "its keys are those of axolotl and llama-factory", "--from TOOL"),
        ("{model: x, rows: {train: y}, tune: lora}", "this is a recipe of luthier already", "luthier plan"),
        ("[1, 2]", "a configuration is a mapping of keys", "YAML file"),
        ("base_model: [", "this cannot be read as YAML", "indentation"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_by_name(text: str, what: str, fix: str) -> None:
    error = refusal(text)
    assert what in error.what and fix in error.fix and error.where.startswith("theirs.yaml"), error


def test_the_tool_can_be_said() -> None:
    assert refusal("{base_model: x}", "axolot").fix == "did you mean `axolotl`?"
    assert converted("{model_name_or_path: x}", "llama-factory").recipe["tune"] == {"lora": {"rank": 8, "alpha": 16}}
    rates = {
        script: converted("{model_name_or_path: x}", f"trl-{script}").recipe["train"]["learning_rate"]
        for script in ("sft", "dpo", "kto", "reward")
    }
    assert rates == {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "reward": 1e-4}
    assert "--from" not in converted("{model_name_or_path: x}", "trl-dpo").text
    assert "for `trl sft`, as its keys suggest" in converted("{model_name_or_path: x, use_peft: false}").remarks["objective"]


def test_a_step_has_the_rows_of_all_devices() -> None:
    text = "{base_model: x, micro_batch_size: 2, gradient_accumulation_steps: 4, sequence_len: 128, sample_packing: %s}"
    assert converted(text % "false", devices=3).recipe["train"]["batch_rows"] == 24
    packed = converted(text % "true", devices=3).recipe["train"]
    assert packed["batch_tokens"] == 24 * 128 and "batch_rows" not in packed and packed["micro_batch_tokens"] == 256
    # TRL's file may say how many; the word of the command line is nearer.
    for devices, rows in ((1, 32), (2, 16)):
        made = converted("{model_name_or_path: x, num_processes: 4, use_peft: true}", devices=devices)
        assert made.recipe["train"]["batch_rows"] == rows and f"{rows // 8} devices" in made.remarks["train.batch_rows"]


def test_names_of_modules_are_types_of_modules() -> None:
    """Each name that `luthier.models.roles` knows means its own type, fused ones their parts as well, and all of a group the group."""
    for names, types in (
        ("q_proj", ["attention_query"]),
        ("self_attn.k_proj query", ["attention_key", "attention_query"]),
        ("gate_proj up_proj down_proj", ["mlp"]),
        ("gate_proj up_proj", ["mlp_gate", "mlp_up"]),
        ("q_proj k_proj v_proj o_proj", ["attention"]),
        ("qkv_proj o_proj", ["attention"]),
        ("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", ["linear"]),
        ("qkv_proj o_proj gate_up_proj down_proj lm_head", ["linear", "head"]),
        ("c_attn", ["attention_query", "attention_key", "attention_value", "attention_query_key_value"]),
        ("all-linear", ["linear"]),
        ("embed_tokens wte", ["embedding"]),
    ):
        assert module_types(names.split()) == (types, []), names
    assert module_types(["w1", "q_proj", "dense"]) == (["attention_query"], ["w1", "dense"])


def test_what_has_no_type_keeps_the_name_that_the_model_gives_it() -> None:
    made = converted("{base_model: x, adapter: lora, lora_r: 2, lora_target_modules: [w1, q_proj], lora_modules_to_save: [gate]}")
    lora, full = made.recipe["tune"]
    assert lora["lora"]["target_modules"] == ["attention_query", "w1"] and full == {"full": {"target_modules": ["gate"]}}
    assert not made.left and "the model's own names: w1, gate" in made.remarks["tune"]


@pytest.mark.parametrize(
    ("pattern", "types"),
    [
        (r"model.layers.[\d]+.(self_attn|mlp).(q|k|v|o|gate|up|down)_proj", None),
        (r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj", ["attention_query", "attention_value"]),
        (r".*mlp.*", ["mlp"]),
        # Of some blocks alone, of none, no pattern at all, and one that could search for ever.
        (r"model.layers.[0-9].mlp.down_proj", "left"),
        (r"visual.*", "left"),
        (r"model.layers.([0-9", "left"),
        (r"(.*)*x", "left"),
    ],
)
def test_patterns_of_names_are_tried(pattern: str, types: Any) -> None:
    made = converted(yaml.safe_dump({"base_model": "x", "adapter": "lora", "lora_r": 2, "lora_target_modules": pattern}))
    assert made.recipe["tune"]["lora"].get("target_modules") == (None if types == "left" else types)
    assert bool(made.left) == (types == "left") and made.remarks["tune"]


@pytest.mark.parametrize(
    ("text", "train"),
    [
        ("lr_scheduler: cosine", {"schedule": "cosine"}),
        ("warmup_steps: 0", {"schedule": "cosine", "warmup": 0}),
        ("{warmup_steps: 0, warmup_ratio: 0.2}", {"schedule": "cosine", "warmup": 0.2}),
        ("{warmup_steps: 9, warmup_ratio: 0.2}", {"schedule": "cosine", "warmup": 9}),
        ("warmup_ratio: 1", {"schedule": "cosine"}),
        ("{lr_scheduler: constant, warmup_ratio: 0.1}", {"schedule": "constant", "warmup": 0}),
        ("{lr_scheduler: constant_with_warmup, warmup_ratio: 0.1}", {"schedule": "constant", "warmup": 0.1}),
        ("bf16: auto", {"schedule": "cosine"}),
        ("bf16: full", {"schedule": "cosine", "precision": "bf16"}),
        ("bf16: false", {"schedule": "cosine", "precision": "fp32"}),
        ("{bf16: false, fp16: true}", {"schedule": "cosine"}),
        ("bfloat16: true", {"schedule": "cosine", "precision": "bf16", "master_weights": "none"}),
        ("save_steps: 0.1", {"schedule": "cosine"}),
        ("{save_steps: 40, save_strategy: no}", {"schedule": "cosine"}),
        ("{save_steps: 40, save_strategy: steps}", {"schedule": "cosine", "save_every": 40}),
        ("save_total_limit: -1", {"schedule": "cosine"}),
        ("deepspeed: deepspeed_configs/zero3_bf16.json", {"schedule": "cosine", "sharding": "full"}),
        ("deepspeed: {zero_optimization: {stage: 3}}", {"schedule": "cosine", "sharding": "full"}),
        ("deepspeed: {zero_optimization: {stage: 2}}", {"schedule": "cosine"}),
        ("deepspeed: deepspeed_configs/zero1.json", {"schedule": "cosine"}),
        (
            "fsdp_config: {activation_checkpointing: true}",
            {"schedule": "cosine", "gradient_checkpointing": True, "sharding": "full"},
        ),
    ],
)
def test_how_a_run_steps(text: str, train: Mapping[str, Any]) -> None:
    made = converted(yaml.safe_dump({"base_model": "x", "micro_batch_size": 1, **yaml.safe_load(text)}))
    usual = {"epochs": 1.0, "batch_rows": 1, "micro_batch_tokens": 512}
    assert made.recipe["train"] == {**usual, **train}


def test_an_optimizer_is_written_where_it_is_another() -> None:
    def optimizer(text: str) -> Any:
        return converted(yaml.safe_dump({"base_model": "x", "num_epochs": 1, **yaml.safe_load(text)})).recipe.get("optimizer")

    usual = (
        "{optimizer: adamw_torch, weight_decay: 0.0, adam_beta1: 0.9, adam_beta2: 0.999, adam_epsilon: 1e-8, max_grad_norm: 1.0}"
    )
    assert optimizer(usual) is None
    assert optimizer("{weight_decay: 0.01, adam_eps: 1e-6}") == ["clip", {"adamw": {"weight_decay": 0.01, "epsilon": 1e-6}}]
    assert optimizer("max_grad_norm: 0.0") == [{"clip": {"norm": 0.0}}, "adamw"]
    assert optimizer("{optimizer: adamw_bnb_8bit, weight_decay: 0.1}") == ["clip", {"adamw": {"weight_decay": 0.1}}]


def test_losses_by_their_names_in_trl() -> None:
    def objective(text: str, tool: str) -> Any:
        return converted(text, tool).recipe["objective"]

    base = "base_model: x, rl: "
    assert objective(f"{{{base}simpo, rl_beta: 2, simpo_gamma: 1, cpo_alpha: 0}}", "axolotl") == {"simpo": {"beta": 2, "margin": 1}}
    # TRL adds a supervised part unless told otherwise, LLaMA-Factory none.
    assert objective(f"{{{base}simpo}}", "axolotl") == [{"simpo": {"beta": 0.1, "margin": 0.5}}, {"cross_entropy": {"weight": 1.0}}]
    assert objective("{stage: dpo, pref_loss: simpo}", "llama-factory") == {"simpo": {"beta": 0.1, "margin": 0.5}}
    assert objective("{stage: dpo, pref_loss: orpo, pref_beta: 0.2}", "llama-factory") == {"orpo": {"weight": 0.2}}
    assert objective(f"{{{base}orpo, rl_beta: 0.4, orpo_alpha: 0.3}}", "axolotl") == {"orpo": {"weight": 0.4}}
    assert objective(f"{{{base}ipo, dpo_label_smoothing: 0.1}}", "axolotl") == {"ipo": {"beta": 0.1}}
    assert objective("{base_model: x, reward_model: true, num_labels: 1, center_rewards_coefficient: 0.01}", "axolotl") == {
        "reward_model": {"center_rewards_coefficient": 0.01}
    }
    assert objective("{stage: sft, use_asft_loss: true, asft_alpha: 0.05}", "llama-factory") == {"asft": {"anchor": 0.05}}
    assert objective("{loss_type: [robust], label_smoothing: 0.2}", "trl-dpo") == {"robust": {"beta": 0.1, "wrong": 0.2}}
    assert objective("{loss_type: robust}", "trl-dpo") == {"robust": {"beta": 0.1, "wrong": 0.0}}
    assert objective("{use_weighting: true}", "trl-dpo") == {"wpo": {"beta": 0.1}}
    assert objective("{f_divergence_type: js_divergence}", "trl-dpo") == {"f_dpo": {"beta": 0.1, "divergence": "jensen_shannon"}}
    # Theirs is one minus luthier's.
    alpha = objective("{f_divergence_type: alpha_divergence, f_alpha_divergence_coef: 0.2}", "trl-dpo")
    assert alpha == {"f_dpo": {"beta": 0.1, "divergence": "alpha", "alpha": 0.8}}
    assert objective("{loss_type: sigmoid_norm}", "trl-dpo") == {"dpo": {"beta": 0.1, "length_normalized": True}}
    assert objective("{loss_type: discopop, discopop_tau: 0.1}", "trl-dpo") == {"discopop": {"beta": 0.1, "temperature": 0.1}}
    made = converted("{loss_type: [ipo], use_weighting: true, f_divergence_type: forward_kl, label_smoothing: 0.1}", "trl-dpo")
    assert {one.key for one in made.left} == {"use_weighting", "f_divergence_type", "label_smoothing"}


def test_every_loss_of_trl_is_a_technique() -> None:
    from luthier.convert.preferences import PAIRS

    for name in PAIRS:
        made = converted(f"{{model_name_or_path: x, dataset_name: a/b, loss_type: [{name}], beta: 0.3}}", "trl-dpo")
        choose_parts(make_recipe(made.recipe))


def test_what_a_comment_holds_stays_in_it() -> None:
    """A value of a stranger's file is one line of a comment, whatever stands in it."""
    evil = "x\n\rtune: full\u2028tune: half\x1b[31m"
    made = converted(
        yaml.safe_dump(
            {"base_model": "x", "num_epochs": 1, "chat_template": evil, f"a{evil}": 1, "output_dir": evil, "optimizer": evil}
        )
    )
    assert yaml.safe_load(made.text) == made.recipe
    assert (
        made.text.isascii() and "\x1b" not in made.text and not any(line.startswith("tune: h") for line in made.text.splitlines())
    )
    assert made.recipe["tune"] == "full" and make_recipe(made.recipe).name
    # A value of the recipe itself keeps all that it is, in one line.
    paths = {"base_model": evil, "datasets": [{"path": f"./{evil}"}, {"path": "./plain"}]}
    made = converted(yaml.safe_dump({"num_epochs": 1, **paths}))
    plain = converted(yaml.safe_dump({"num_epochs": 1, "base_model": "x", "datasets": [{"path": "./x"}, {"path": "./plain"}]}))
    assert yaml.safe_load(made.text) == made.recipe and made.recipe["model"] == evil
    assert len(made.text.splitlines()) == len(plain.text.splitlines()) and "    - ./plain" in made.text.splitlines()
    made = converted(yaml.safe_dump({"base_model": "two\n\nlines", "num_epochs": 1}))
    assert yaml.safe_load(made.text) == made.recipe and 'model: "two\\n\\nlines"' in made.text


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def test_the_command_prints_a_recipe_and_says_the_rest_beside_it(tmp_path: Path) -> None:
    Path("theirs.yaml").write_text(textwrap.dedent(CASES["axolotl-lora"].file))
    made = convert("theirs.yaml")
    shown = call("theirs.yaml")
    assert shown.exit_code == 0 and shown.stdout == made.text
    assert "taken as a file of axolotl" in shown.stderr and "not carried over: unheard_of: {a: 1}" in shown.stderr
    assert call("theirs.yaml", "--quiet").stderr == ""
    facts = json.loads(call("theirs.yaml", "--json", "--devices", 2).stdout)
    assert facts["recipe"]["train"]["batch_rows"] == 16 and facts["tool"] == "axolotl"
    assert facts["left"] == [{"key": "unheard_of", "value": "{a: 1}", "why": "luthier has nothing like it"}]
    refused = json.loads(call("theirs.yaml", "--from", "trl-ppo", "--json").stdout)
    assert "no tool that is known" in refused["error"]


def test_a_file_is_written_once(tmp_path: Path) -> None:
    """And what stands there is never written over."""
    Path("theirs.yaml").write_text(
        "{model_name_or_path: tiny:llama, dataset_name: rows.jsonl, max_length: null, gradient_checkpointing: false}"
    )
    out = tmp_path / "mine.yaml"
    done = call("theirs.yaml", "--from", "trl", "--out", out)
    assert done.exit_code == 0 and done.stdout == "" and "luthier plan" in " ".join(done.stderr.split())
    recipe = read_recipe(out)
    assert recipe.name == "mine" and recipe.rows.train == "rows.jsonl" and recipe.train.batch_rows == 8 and recipe.train.warmup == 0
    before = out.read_text()
    for target, what in ((out, "this file exists already"), (tmp_path / "nowhere" / "x.yaml", "the file cannot be written")):
        refused = call("theirs.yaml", "--from", "trl", "--out", target, "--json")
        assert refused.exit_code == 2 and what in json.loads(refused.stdout)["error"]
    assert out.read_text() == before


def test_a_description_that_is_no_json_is_named() -> None:
    Path("shelf/dataset_info.json").write_text("{")
    error = refusal("{stage: sft, dataset: a, dataset_dir: shelf}")
    assert "this is no JSON" in error.what and error.where == "shelf/dataset_info.json"
    Path("shelf/dataset_info.json").write_text("[1]")
    assert "dataset" in {one.key for one in converted("{stage: sft, dataset: a, dataset_dir: shelf}").left}


def test_descriptions_are_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "there" / "data").mkdir(parents=True)
    (tmp_path / "there" / "data" / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.json"}}))
    Path("there/x.yaml").write_text("{stage: sft, dataset: a}")
    assert convert("there/x.yaml").recipe["rows"]["train"] == "there/data/a.json"


def test_the_page_shows_what_the_command_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs and ours, escaped, as they stand."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    page = importlib.import_module("generated.translations").page()
    assert page.count("<pre>") == 6 and page.count("### ") == 3
    assert "plan`,\n" in page and page.count("\n\n") == 5, "an empty line within a table ends it on GitHub"
    for line in ("batch_rows: 16", "batch_tokens: 16384", "objective: {dpo: {beta: 0.1}}", "columns: {messages: turns}"):
        assert line in page
    assert "(see --devices)" in page and "hub:acme/compared" in page


@pytest.mark.parametrize(
    ("amount", "held"),
    [("0.1", 0.1), ("0", None), ("0.0", None), ("1", 1), ("200", 200), ("200.0", 200), ("1.5", None), ("-1", None)],
)
def test_a_share_or_a_number_of_rows_is_held_out(amount: str, held: float | None) -> None:
    made = converted(f"{{base_model: x, num_epochs: 1, val_set_size: {amount}}}")
    found = made.recipe["rows"].get("validate")
    assert found == held and type(found) is type(held)
    assert [one.key for one in made.left] == (["val_set_size"] if amount in ("1.5", "-1") else [])


def test_trl_evaluates_where_a_strategy_says_so() -> None:
    text = "{model_name_or_path: x, dataset_name: a/b, eval_strategy: %s}"
    assert converted(text % "epoch").recipe["rows"]["validate"] == "hub:a/b:test"
    for strategy in ("no", "'no'", "null"):
        assert "validate" not in converted(text % strategy).recipe["rows"], strategy


def test_columns_that_a_description_leaves_out() -> None:
    """Without any it has LLaMA-Factory's own; with some it has these alone."""
    pairs = {"plain": {"file_name": "a.json"}, "named": {"file_name": "b.json", "columns": {"chosen": "good", "rejected": "bad"}}}
    Path("shelf/dataset_info.json").write_text(json.dumps(pairs))
    made = converted("{stage: dpo, dataset: 'plain, named', dataset_dir: shelf}")
    assert made.recipe["rows"]["train"] == [
        {"rows": "shelf/a.json", "columns": {"prompt": "instruction"}},
        {"rows": "shelf/b.json", "columns": {"chosen": "good", "rejected": "bad"}},
    ]


def test_new_tokens_and_templates_of_ones_own_are_carried_over() -> None:
    base = "base_model: x, num_epochs: 1, datasets: [{path: ./x}]"
    made = converted(f'{{{base}, tokens: ["<think>", "</think>"], chat_template: chatml}}', "axolotl")
    assert make_recipe(made.recipe).add_tokens == ("<think>", "</think>") and made.recipe["rows"]["chat_template"] == "chatml"
    assert "tokens" not in {one.key for one in made.left}
    made = converted(f"{{{base}, chat_template: jinja, chat_template_jinja: ./my.jinja}}", "axolotl")
    assert made.recipe["rows"]["chat_template"] == "./my.jinja" and "chat_template" not in " ".join(one.key for one in made.left)
    made = converted(f'{{{base}, chat_template: jinja, chat_template_jinja: "{{{{ messages }}}}"}}', "axolotl")
    assert "chat_template" not in made.recipe["rows"] and "FILE.jinja" in " ".join(one.why for one in made.left)
    theirs = "stage: sft, model_name_or_path: x, dataset: chats, cutoff_len: 64, template: default, resize_vocab: true"
    made = converted(f'{{{theirs}, add_special_tokens: "<|a|>,<|b|>", new_special_tokens: "<|b|>,<|c|>"}}', "llama-factory")
    assert make_recipe(made.recipe).add_tokens == ("<|a|>", "<|b|>", "<|c|>")
