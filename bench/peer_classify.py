"""The other side of classes: transformers' Trainer over AutoModelForSequenceClassification, with PEFT for LoRA, as their pages have it."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from bench.peer import LINEAR, Taking
from bench.turns import Turn
from luthier.models.load import load_model, load_tokenizer, resolve


class Counting(Trainer):
    """Counts the real tokens of each step."""

    taking: Taking

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """One step of Trainer."""
        self.taking.tokens = int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *arguments, **options)


def classifier(setting: dict[str, Any], padding: int) -> Any:
    """The same weights below a head that transformers makes."""
    narrow, lora = setting["precision"] == "bf16", setting["tune"] == "lora"
    base: Any = load_model(resolve(setting["model"]), dtype=torch.bfloat16 if narrow and lora else torch.float32)
    config = base.config
    config.num_labels, config.pad_token_id = len(setting["labels"]), padding
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    model.model = base.model
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=LINEAR))


def main(setting: dict[str, Any]) -> None:
    """Train on the rows that luthier's side wrote, in the same order, as many a step; then measure the same test rows."""
    taking = Taking(Turn())
    tokenizer = load_tokenizer(resolve(setting["model"]))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = json.loads(Path(setting["encoded"]).read_text())
    number = {name: place for place, name in enumerate(setting["labels"])}
    held = [{"input_ids": tokenizer(row["text"])["input_ids"], "label": number[row["label"]]} for row in setting["test"]]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=setting["rows_a_step"],
            max_steps=setting["train"]["steps"],
            train_sampling_strategy="sequential",
            learning_rate=setting["train"]["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=1,
            bf16=setting["precision"] == "bf16",
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Counting.taking = taking
        trainer = Counting(
            model=classifier(setting, tokenizer.pad_token_id),
            args=arguments,
            train_dataset=Dataset.from_list([{**row, "label": number[row["label"]]} for row in rows]),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[taking],
        )
        trainer.train()
        said = trainer.predict(Dataset.from_list(held)).predictions.argmax(-1)
    taking.turn.end({"held_out": float((said == [row["label"] for row in held]).mean())})


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
