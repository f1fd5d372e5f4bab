"""The other side of pairs: TRL's DPOTrainer, with PEFT for LoRA, as its documentation has it."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from bench.peer import LINEAR, Taking, arguments_for
from bench.turns import Turn
from luthier.models.load import load_model, load_tokenizer, resolve


class Counting(DPOTrainer):
    """Counts the real and the supervised tokens of each step, and takes rows that are tokens already."""

    taking: Taking

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
        return dataset

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """One step of DPOTrainer."""
        self.taking.tokens = int(inputs["attention_mask"].sum())
        self.taking.supervised = int(inputs["completion_mask"][:, 1:].sum())
        return super().training_step(model, inputs, *arguments, **options)


def main(setting: dict[str, Any]) -> None:
    """Train on the pairs that luthier's side wrote, in the same order, as many a step."""
    taking = Taking(Turn())
    narrow, lora = setting["precision"] == "bf16", setting["tune"] == "lora"
    source = resolve(setting["model"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(**arguments_for(setting, folder), learning_rate=1e-5 if lora else 1e-6, beta=0.1)
        Counting.taking = taking
        dtype = torch.bfloat16 if narrow and lora else torch.float32
        trainer = Counting(
            model=load_model(source, dtype=dtype),
            # Without adapters to switch off, the reference is a second model.
            ref_model=None if lora else load_model(source, dtype=dtype),
            args=arguments,
            train_dataset=Dataset.from_list(json.loads(Path(setting["encoded"]).read_text())),
            processing_class=load_tokenizer(source),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR) if lora else None,
            callbacks=[taking],
        )
        trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
