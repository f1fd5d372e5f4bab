"""Build the models that come with luthier, from nothing: rows of the synthetic benchmark, a tokenizer, random weights, and a recipe.

python -m luthier.lab.workshop [--size main|small|large] [--into FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier import disk, draws
from luthier.errors import LuthierError
from luthier.evaluate.sets import SetResult, measure
from luthier.lab import benchmark
from luthier.lab.benchmark_sets import sets_of
from luthier.models.load import load_model, load_tokenizer
from luthier.models.packaged import PACKAGED, folder_of
from luthier.models.parts import map_parts
from luthier.recipe import read_recipe
from luthier.results.folder import Run
from luthier.runs.export import export
from luthier.runs.train import train
from luthier.tune import Tune

RECIPE = Path(__file__).with_name("workshop.yaml")
SEED = 1
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 2048
CONTEXT = 512
HEAD = 32
"""Width of an attention head."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Size(NamedTuple):
    """How large a model is, and how fast it may learn."""

    name: str
    width: int
    layers: int
    key_value_heads: int
    inner: int
    learning_rate: float


SIZES: Mapping[str, Size] = {
    "main": Size("workshop", width=192, layers=6, key_value_heads=3, inner=512, learning_rate=2e-3),
    "small": Size("workshop-small", width=96, layers=4, key_value_heads=3, inner=256, learning_rate=3e-3),
    "large": Size("workshop-large", width=256, layers=7, key_value_heads=4, inner=704, learning_rate=1.5e-3),
}
COUNTS: Mapping[str, int] = {
    "facts": 40_000,
    "two_hop": 8_000,
    "arithmetic": 12_000,
    "boxes": 16_000,
    "copy": 8_000,
    "reverse": 10_000,
    "count": 8_000,
    "case": 6_000,
    "sentiment": 5_000,
    "topic": 4_000,
    "pairs": 8_000,
    "refusals": 6_000,
    "translate": 12_000,
    "in_context": 14_000,
    "stories": 6_000,
}
"""Training rows of each skill the models are taught."""
ITEMS = 100
"""Held-back items of each skill that a model card tells of."""


def build(size: str, into: Path, work: Path, overrides: Sequence[str] = ()) -> Path:
    """Build one model and write it, with its model card, to a folder that must not exist.

    Args:
        size: one of `SIZES`.
        into: where the model goes.
        work: for rows, the start and the run.
        overrides: keys of the recipe to set, as on the command line.
    """
    if into.exists():
        raise LuthierError("this is there already", where=str(into), fix="name another folder with --into, or remove it")
    chosen = SIZES[size]
    _write_rows(work / "rows")
    start = write_start(chosen, work / chosen.name)
    chosen_keys = {
        "name": chosen.name,
        "model": start,
        "rows.train": work / "rows",
        "out": work / "runs",
        "seed": SEED,
        "train.learning_rate": chosen.learning_rate,
    }
    recipe = read_recipe(RECIPE, [*(f"{key}={value}" for key, value in chosen_keys.items()), *overrides])
    run = train(recipe, say=print)
    _publish(run, chosen, into, work / f"{chosen.name}-trained")
    return into


def _publish(run: Run, size: Size, into: Path, merged: Path) -> None:
    """Write a trained model in bf16, with its scores."""
    shutil.rmtree(merged, ignore_errors=True)
    export(str(run.folder), merged, say=print)
    model = load_model(str(merged), dtype=torch.bfloat16)
    tokenizer = load_tokenizer(str(merged))
    into.mkdir(parents=True)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    (into / "README.md").write_text(_card(size, model.num_parameters(), run.facts, score(into)), encoding="utf-8")


def score(model: str | Path, skills: Sequence[str] | None = None) -> dict[str, SetResult]:
    """A model's result on held-out items of skills; without names, of every skill."""
    loaded = load_model(str(model))
    return measure(Tune(loaded, map_parts(loaded)), load_tokenizer(str(model)), sets_of(skills, count=ITEMS))


def _write_rows(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for skill, count in COUNTS.items():
        lines = (json.dumps(row) + "\n" for row in benchmark.rows(skill, "train", count, seed=SEED))
        (folder / f"{skill}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer made from rows of every skill, those too that pretraining leaves out. Digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _texts() -> list[str]:
    texts = []
    for skill in benchmark.SKILLS:
        for row in benchmark.rows(skill, "train", 3000, seed=SEED):
            if "text" in row:
                texts.append(row["text"])
                continue
            turns = [row["prompt"]] if isinstance(row["prompt"], str) else [turn["content"] for turn in row["prompt"]]
            texts += [f" {text}" for text in (*turns, row["completion"])]
    return texts


def write_start(size: Size, folder: Path) -> Path:
    """Random weights and the tokenizer, as a model folder."""
    shutil.rmtree(folder, ignore_errors=True)
    # Once in the package, a tokenizer stays, though rows be reworded: ids must not move.
    tokenizer = load_tokenizer("workshop") if folder_of("workshop").is_dir() else make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // HEAD,
        num_key_value_heads=size.key_value_heads,
        intermediate_size=size.inner,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.seed_of("workshop", size.name, SEED))
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _card(size: Size, parameters: int, cost: Mapping[str, Any], scores: Mapping[str, SetResult]) -> str:
    lines = [
        f"# {size.name}",
        "",
        f"A Llama-architecture language model of {parameters:,} parameters that knows a small made-up world and nothing else. It comes",
        "with luthier, for learning and for experiments; `make workshop` builds it again from nothing. Licence: that of luthier.",
        "",
        f"- {size.layers} blocks, width {size.width}, {size.width // HEAD} heads, {VOCABULARY} tokens, context {CONTEXT}, bfloat16",
        f"- trained for {cost['steps']:,} steps on {cost['tokens'] / 1e6:.1f} million tokens",
        "",
        "Held-back items, greedy answers:",
        "",
        "| skill | taught | measured by | result |",
        "|---|---|---|---|",
    ]
    for name, result in scores.items():
        skill = benchmark.SKILLS[name]
        value = f"{result.value:.3f}" if result.metric == "loss" else f"{100 * result.value:.0f} %"
        lines.append(f"| {name}: {skill.meaning} | {'yes' if skill.pretrained else 'no'} | {result.metric} | {value} |")
    return "\n".join(lines) + "\n"


def compared(folder: Path, name: str) -> str:
    """Whether a built model is the one in the package, in words."""
    packaged = folder_of(name)
    if name not in PACKAGED or not packaged.is_dir():
        return "there is none in the package to compare it with"
    files = ("model.safetensors", "tokenizer.json")
    same = all(disk.sha256(folder / one) == disk.sha256(packaged / one) for one in files)
    return "the same bytes as the one in the package" if same else "other bytes than the one in the package"


def main() -> None:
    """Build one model, or all that come with the package."""
    parser = argparse.ArgumentParser(prog="python -m luthier.lab.workshop", description="Build luthier's own models from nothing.")
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all", help="all: those in the package")
    parser.add_argument("--into", type=Path, help="folder for the models; otherwise build/, or luthier's cache for the large one")
    parser.add_argument("--work", type=Path, default=Path("build/workshop"), help="folder for rows, start and run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe to set, such as train.threads=1")
    chosen = parser.parse_args()
    try:
        for size in [one for one in SIZES if SIZES[one].name in PACKAGED] if chosen.size == "all" else [chosen.size]:
            name = SIZES[size].name
            into = chosen.into / name if chosen.into else Path("build") / name if name in PACKAGED else folder_of(name)
            folder = build(size, into, chosen.work, chosen.overrides)
            print(f"{name}: {folder}: {compared(folder, name)}")
    except LuthierError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
