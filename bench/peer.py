"""The other side: TRL's SFTTrainer, with PEFT for LoRA, as its documentation has it."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.turns import Turn
from luthier.models.load import load_model, load_tokenizer, resolve

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments_for(setting: dict[str, Any], folder: str) -> dict[str, Any]:
    """What every trainer of the other side is told, but the learning rate."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "per_device_train_batch_size": setting["rows_a_step"],
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "max_length": None,
        # bf16 is what these trainers would choose by themselves: autocast over weights in fp32, and in bf16 what LoRA leaves frozen.
        "bf16": setting["precision"] == "bf16",
        "gradient_checkpointing": False,
        "logging_steps": 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Taking(TrainerCallback):
    """Waits before every step and reports after it."""

    def __init__(self, turn: Turn) -> None:
        self.turn, self.tokens, self.supervised = turn, 0, 0

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        """Wait."""
        self.turn.wait()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        """Report."""
        self.turn.done(self.tokens, self.supervised)


class Counting(SFTTrainer):
    """Counts the real and the supervised tokens of each step."""

    taking: Taking

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """One step of SFTTrainer."""
        labels = inputs["labels"]
        real = inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(labels.numel())
        self.taking.tokens, self.taking.supervised = int(real), int((labels[:, 1:] != -100).sum())
        return super().training_step(model, inputs, *arguments, **options)


def main(setting: dict[str, Any]) -> None:
    """Train on the rows that luthier's side wrote, in the same order, as many a step."""
    taking = Taking(Turn())
    narrow, lora = setting["precision"] == "bf16", setting["tune"] == "lora"
    source = resolve(setting["model"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(**arguments_for(setting, folder), learning_rate=1e-3 if lora else 1e-4)
        Counting.taking = taking
        trainer = Counting(
            model=load_model(source, dtype=torch.bfloat16 if narrow and lora else torch.float32),
            args=arguments,
            train_dataset=Dataset.from_list(json.loads(Path(setting["encoded"]).read_text())),
            processing_class=load_tokenizer(source),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR) if lora else None,
            callbacks=[taking],
        )
        trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
