"""Configurations of other tools, each with the recipe that it means, worked out by hand.

They have the structure of the examples that come with Axolotl, LLaMA-Factory and TRL; names, sizes and combinations are made up.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A file and what becomes of it."""

    tool: str
    file: str
    recipe: dict[str, Any]
    left: set[str]
    """Keys that are not carried over."""
    needless: Set[str] = frozenset()
    remarks: Set[str] = frozenset()
    """Keys of the recipe at which something differs."""


OF_PAIRS = {"max_length": 1024, "on_bad_row": "skip"}

CASES: dict[str, Case] = {
    "axolotl-full": Case(
        "axolotl",
        """
        base_model: acme/Base-8B
        revision_of_model: v2
        datasets: [{path: acme/instructions, type: alpaca}]
        dataset_prepared_path: prepared
        val_set_size: 0.05
        output_dir: ./outputs/full
        sequence_len: 4096
        sample_packing: true
        pad_to_sequence_len: true
        wandb_project: trials
        wandb_entity:
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 2
        optimizer: paged_adamw_8bit
        adam_beta2: 0.95
        max_grad_norm: 0.5
        weight_decay: 0.1
        lr_scheduler: cosine
        learning_rate: 2e-5
        bf16: true
        tf32: false
        gradient_checkpointing: true
        logging_steps: 1
        attn_implementation: flash_attention_2
        warmup_ratio: 0.1
        saves_per_epoch: 1
        evals_per_epoch: 2
        fsdp_version: 2
        fsdp_config: {auto_wrap_policy: TRANSFORMER_BASED_WRAP, state_dict_type: FULL_STATE_DICT}
        special_tokens: {pad_token: <|end|>}
        """,
        {
            "name": "full",
            "model": "acme/Base-8B",
            "revision": "v2",
            "tune": "full",
            "rows": {"train": "hub:acme/instructions", "max_length": 4096, "on_bad_row": "skip", "validate": 0.05},
            "optimizer": [{"clip": {"norm": 0.5}}, {"adamw": {"weight_decay": 0.1, "beta2": 0.95}}],
            "train": {
                "epochs": 2,
                # 2 blocks of 4096 tokens, 4 times.
                "batch_tokens": 32768,
                "micro_batch_tokens": 8192,
                "learning_rate": 2e-5,
                "schedule": "cosine",
                "warmup": 0.1,
                "precision": "bf16",
                "gradient_checkpointing": True,
                "sharding": "full",
            },
            "track": "wandb",
            "out": "outputs",
        },
        {"wandb_project", "saves_per_epoch", "evals_per_epoch"},
        {"dataset_prepared_path", "pad_to_sequence_len", "tf32", "logging_steps", "attn_implementation", "fsdp_version",
         "fsdp_config.auto_wrap_policy", "fsdp_config.state_dict_type", "special_tokens.pad_token"},
        {"name", "rows.train", "rows.on_bad_row", "rows.validate", "optimizer", "train.batch_tokens", "train.micro_batch_tokens",
         "train.precision", "train.sharding"},
    ),
    "axolotl-lora": Case(
        "axolotl",
        """
        base_model: acme/Base-1B
        load_in_8bit: false
        load_in_4bit: false
        datasets:
          - {path: acme/talk, type: chat_template, split: "train[:10%]", field_messages: dialogue, roles_to_train: [assistant]}
        chat_template: tokenizer_default
        output_dir: lora
        adapter: lora
        lora_model_dir:
        sequence_len: 1024
        excess_length_strategy: truncate
        sample_packing: false
        lora_r: 16
        lora_alpha: 32
        lora_dropout: 0.05
        lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
        lora_modules_to_save: [embed_tokens, lm_head]
        peft_use_rslora: true
        gradient_accumulation_steps: 8
        micro_batch_size: 1
        max_steps: 300
        num_epochs: 3
        optimizer: adamw_torch_fused
        lr_scheduler: constant_with_warmup
        learning_rate: 1e-3
        warmup_steps: 20
        bf16: auto
        save_steps: 100
        save_total_limit: 4
        seed: 7
        train_on_inputs: true
        unheard_of: {a: 1}
        """,
        {
            "name": "lora",
            "model": "acme/Base-1B",
            "tune": [
                {"lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "rank_stabilized": True, "target_modules": ["attention"]}},
                {"full": {"target_modules": ["embedding", "head"]}},
            ],
            "rows": {
                "train": "hub:acme/talk:train[:10%]",
                "columns": {"messages": "dialogue"},
                "max_length": 1024,
                "too_long": "right",
                "loss_on": "all",
            },
            "train": {
                "steps": 300,
                "batch_rows": 8,
                "micro_batch_tokens": 1024,
                "learning_rate": 1e-3,
                "schedule": "constant",
                "warmup": 20,
                "save_every": 100,
                "keep_checkpoints": 4,
            },
            "seed": 7,
        },
        {"unheard_of"},
        set(),
        {"name", "tune", "rows.columns", "train.steps", "train.batch_rows", "train.micro_batch_tokens"},
    ),
    "axolotl-qlora": Case(
        "axolotl",
        """
        base_model: acme/Base-70B
        trust_remote_code: true
        load_in_4bit: true
        datasets: [{path: rows.jsonl, ds_type: json, type: alpaca}]
        val_set_size: 200
        adapter: qlora
        sequence_len: 512
        lora_r: 8
        lora_alpha: 16
        lora_target_linear: true
        lora_target_modules: 'model.layers.[0-9]+.(self_attn|mlp).(q|k|v|o|gate|up|down)_proj'
        lora_modules_to_save: [lm_head]
        gradient_accumulation_steps: 4
        micro_batch_size: 1
        num_epochs: 1
        optimizer: adamw_torch
        lr_scheduler: linear
        learning_rate: 0.0001
        fp16: true
        gradient_checkpointing: offload
        fsdp: [full_shard, auto_wrap]
        fsdp_config: {fsdp_offload_params: true}
        eval_steps: 50
        early_stopping_patience: 3
        """,
        {
            "model": "acme/Base-70B",
            "trust_remote_code": True,
            "quantize": "nf4",
            "tune": {"lora": {"rank": 8, "alpha": 16}},
            "rows": {"train": "rows.jsonl", "max_length": 512, "on_bad_row": "skip", "validate": 200},
            "train": {
                "epochs": 1,
                "batch_rows": 4,
                "micro_batch_tokens": 512,
                "learning_rate": 0.0001,
                "schedule": "linear",
                "gradient_checkpointing": True,
                "evaluate_every": 50,
                "best": "validation",
                "patience": 3,
            },
        },
        {"fp16", "fsdp", "fsdp_config", "fsdp_config.fsdp_offload_params", "lora_modules_to_save"},
        set(),
        {"trust_remote_code", "quantize", "tune", "rows.train", "rows.on_bad_row", "rows.validate", "train.batch_rows", "train.best",
         "train.micro_batch_tokens", "train.gradient_checkpointing"},
    ),
    "axolotl-dpo": Case(
        "axolotl",
        """
        base_model: acme/Chat-8B
        load_in_8bit: true
        chat_template: llama3
        rl: dpo
        rl_beta: 0.2
        dpo_label_smoothing: 0.1
        datasets:
          - path: acme/compared
            type: chat_template.default
            field_messages: conversation
            field_chosen: better
            field_rejected: worse
            message_property_mappings: {role: role, content: content}
        adapter: lora
        sequence_len: 1024
        lora_r: 32
        lora_alpha: 16
        lora_target_modules: [q_proj, v_proj, w1, embed_tokens]
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 1
        optimizer: adamw_torch
        lr_scheduler: rex
        learning_rate: 1e-6
        precompute_ref_log_probs: true
        """,
        {
            "model": "acme/Chat-8B",
            "quantize": "int8",
            "tune": {"lora": {"rank": 32, "alpha": 16, "target_modules": ["attention_query", "attention_value", "w1"]}},
            "rows": {
                "train": "hub:acme/compared",
                "columns": {"prompt": "conversation", "chosen": "better", "rejected": "worse"},
                **OF_PAIRS,
            },
            "objective": {"dpo": {"beta": 0.2, "label_smoothing": 0.1}},
            "train": {
                "epochs": 1,
                "batch_rows": 8,
                # Two pairs of two texts.
                "micro_batch_tokens": 4096,
                "learning_rate": 1e-6,
                "schedule": "cosine",
            },
        },
        {"chat_template", "lora_target_modules", "lr_scheduler", "precompute_ref_log_probs"},
        set(),
        {"quantize", "tune", "rows.columns", "rows.on_bad_row", "train.batch_rows", "train.micro_batch_tokens"},
    ),
    "axolotl-kto": Case(
        "axolotl",
        """
        base_model: acme/Chat-1B
        rl: kto
        trl: {beta: 0.5, num_generations: 4}
        kto_desirable_weight: 0.2
        kto_undesirable_weight: 1.0
        datasets: [{path: acme/judged, type: llama3.argilla, split: test}]
        sequence_len: 1024
        micro_batch_size: 2
        num_epochs: 1
        optimizer: sgd
        adam_beta1: 0.8
        lr_scheduler: constant
        warmup_steps: 10
        learning_rate: 1e-6
        save_strategy: no
        eval_strategy: no
        """,
        {
            "model": "acme/Chat-1B",
            "tune": "full",
            "rows": {"train": "hub:acme/judged:test", "columns": {"prompt": "instruction"}, **OF_PAIRS},
            "objective": {"kto": {"beta": 0.5, "desirable_weight": 0.2}},
            "optimizer": ["clip", "sgd"],
            "train": {
                "epochs": 1,
                "batch_rows": 2,
                "micro_batch_tokens": 2048,
                "learning_rate": 1e-6,
                "schedule": "constant",
                "warmup": 0,
            },
        },
        {"trl.num_generations", "adam_beta1"},
        set(),
        {"rows.columns", "rows.on_bad_row", "train.batch_rows", "train.micro_batch_tokens", "train.warmup"},
    ),
    "axolotl-orpo": Case(
        "axolotl",
        """
        base_model: acme/Base-7B
        rl: orpo
        orpo_alpha: 0.3
        datasets: [{path: acme/compared, type: chat_template.argilla}]
        sequence_len: 1024
        batch_size: 12
        micro_batch_size: 3
        optimizer: lion_pytorch
        learning_rate: 1e-5
        """,
        {
            "model": "acme/Base-7B",
            "tune": "full",
            "rows": {"train": "hub:acme/compared", **OF_PAIRS},
            "objective": {"orpo": {"weight": 0.3}},
            "optimizer": ["clip", "adamw"],
            "train": {
                "epochs": 1.0,
                "batch_rows": 12,
                "micro_batch_tokens": 6144,
                "learning_rate": 1e-5,
                "schedule": "cosine",
            },
        },
        {"optimizer"},
        set(),
        {"rows.on_bad_row", "optimizer", "train.batch_rows", "train.micro_batch_tokens"},
    ),
    "axolotl-pretraining": Case(
        "axolotl",
        """
        base_model: acme/Tiny
        pretraining_dataset: [{path: acme/web, name: sample, type: pretrain, text_column: body}]
        sequence_len: 2048
        sample_packing: true
        max_steps: 500
        micro_batch_size: 4
        gradient_accumulation_steps: 2
        optimizer: adamw_torch
        weight_decay: 0.1
        learning_rate: 5e-4
        warmup_ratio: 0.01
        shuffle_merged_datasets: false
        """,
        {
            "model": "acme/Tiny",
            "tune": "full",
            "rows": {
                "train": "hub:acme/web/sample",
                "columns": {"text": "body"},
                "streaming": True,
                "max_length": 2048,
                "blocks": {"tokens": 2048, "at": "token"},
            },
            "optimizer": ["clip", {"adamw": {"weight_decay": 0.1}}],
            "train": {
                "steps": 500,
                "batch_tokens": 16384,
                "micro_batch_tokens": 8192,
                "learning_rate": 5e-4,
                "schedule": "cosine",
                "warmup": 0.01,
            },
        },
        {"shuffle_merged_datasets"},
        set(),
        {"rows.columns", "rows.streaming", "rows.blocks", "train.batch_tokens", "train.micro_batch_tokens"},
    ),
    "axolotl-several": Case(
        "axolotl",
        """
        base_model: acme/Base-3B
        datasets:
          - {path: json, data_files: [one.jsonl, two.jsonl], type: chat_template, field_messages: turns,
             message_property_mappings: {role: from, content: value},
             roles: {user: [human], assistant: [gpt, model], system: [system]}, message_field_training: train,
             train_on_eos: all}
          - {path: "s3://bucket/three.parquet", type: completion, field: body, shards: 4}
          - {path: wikitext, name: raw, type: completion}
          - path: four.csv
            type: {field_instruction: ask, field_output: reply, format: "[INST] {instruction} [/INST]"}
          - {path: acme/strange, type: jeopardy, split: validation}
        test_datasets: [{path: held.jsonl, ds_type: json, type: alpaca}]
        val_set_size: 0.0
        sequence_len: 512
        excess_length_strategy: raise
        learning_rate: 1e-5
        unfrozen_parameters: ["^lm_head.weight$"]
        noisy_embedding_alpha: 5
        """,
        {
            "model": "acme/Base-3B",
            "tune": "full",
            "rows": {
                "train": [
                    {"rows": "one.jsonl", "columns": {"conversations": "turns"}},
                    {"rows": "two.jsonl", "columns": {"conversations": "turns"}},
                    {"rows": "s3://bucket/three.parquet", "columns": {"text": "body"}},
                    "hub:wikitext",
                    {"rows": "four.csv", "columns": {"instruction": "ask", "output": "reply"}},
                    "hub:acme/strange:validation",
                ],
                "max_length": 512,
                "blocks": {"tokens": 512, "at": "token"},
                "validate": "held.jsonl",
            },
            "objective": {"neftune": {"alpha": 5}},
            "train": {"epochs": 1.0, "batch_rows": 1, "micro_batch_tokens": 512, "learning_rate": 1e-5, "schedule": "cosine"},
        },
        {"datasets[0].roles", "datasets[0].train_on_eos", "datasets[1].path", "datasets[1].shards", "datasets[2].name",
         "datasets[3].type.format", "datasets[4].type",
         "unfrozen_parameters"},
        set(),
        {"tune", "rows.blocks", "rows.validate", "train.batch_rows", "train.micro_batch_tokens"},
    ),
    "llama-factory-lora": Case(
        "llama-factory",
        """
        model_name_or_path: acme/Chat-4B
        stage: sft
        do_train: true
        finetuning_type: lora
        lora_rank: 8
        lora_target: all
        dataset: selves, asked, online
        dataset_dir: shelf
        template: chat
        cutoff_len: 2048
        max_samples: 1000
        overwrite_cache: true
        preprocessing_num_workers: 16
        output_dir: saves/chat/lora
        run_name: first try
        logging_steps: 10
        save_steps: 500
        plot_loss: true
        overwrite_output_dir: true
        report_to: none
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 8
        learning_rate: 1.0e-4
        num_train_epochs: 3.0
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        bf16: true
        ddp_timeout: 180000000
        resume_from_checkpoint: null
        val_size: 0.1
        eval_strategy: epoch
        mask_history: true
        enable_thinking: false
        default_system: Be brief.
        """,
        {
            "name": "first-try",
            "model": "acme/Chat-4B",
            "tune": {"lora": {"rank": 8, "alpha": 16}},
            "rows": {
                "train": [
                    "shelf/selves.json",
                    {"rows": "shelf/asked.jsonl", "columns": {"instruction": "ask", "output": "reply", "system": "role"}},
                    {"rows": "hub:acme/talk/short:test", "columns": {"messages": "turns"}},
                ],
                "max_length": 2048,
                "too_long": "right",
                "loss_on": "last",
                "chat_template_options": {"enable_thinking": False},
                "validate": 0.1,
            },
            "train": {
                "epochs": 3.0,
                "batch_rows": 8,
                "micro_batch_tokens": 2048,
                "learning_rate": 1e-4,
                "schedule": "cosine",
                "warmup": 0.1,
                "precision": "bf16",
                "gradient_checkpointing": True,
                "save_every": 500,
            },
            "out": "saves/chat/lora",
        },
        {"template", "max_samples", "preprocessing_num_workers", "eval_strategy", "default_system", "dataset.asked.columns.images",
         "dataset.online.tags", "dataset.online.num_samples"},
        {"do_train", "overwrite_cache", "logging_steps", "plot_loss", "overwrite_output_dir", "ddp_timeout"},
        {"name", "rows.too_long", "rows.chat_template_options", "rows.validate", "train.batch_rows", "train.micro_batch_tokens",
         "train.precision", "train.gradient_checkpointing"},
    ),
    "llama-factory-full": Case(
        "llama-factory",
        """
        model_name_or_path: acme/Chat-4B
        stage: sft
        finetuning_type: full
        deepspeed: examples/deepspeed/ds_z3_config.json
        dataset: acme/one,acme/two
        dataset_dir: ONLINE
        mix_strategy: interleave_over
        interleave_probs: 0.7,0.3
        template: default
        per_device_train_batch_size: 4
        pure_bf16: true
        disable_gradient_checkpointing: true
        packing: true
        train_on_prompt: true
        use_dft_loss: true
        optim: adamw_torch
        max_grad_norm: 0
        warmup_steps: 25
        report_to: [wandb, mlflow]
        """,
        {
            "model": "acme/Chat-4B",
            "tune": "full",
            "rows": {
                "train": [{"rows": "hub:acme/one", "weight": 0.7}, {"rows": "hub:acme/two", "weight": 0.3}],
                "max_length": 2048,
                "too_long": "right",
                "loss_on": "all",
            },
            "token_weight": "dft",
            "optimizer": [{"clip": {"norm": 0}}, "adamw"],
            "train": {
                "epochs": 3.0,
                "batch_tokens": 8192,
                "micro_batch_tokens": 8192,
                "learning_rate": 5e-5,
                "schedule": "linear",
                "warmup": 25,
                "precision": "bf16",
                "master_weights": "none",
                "sharding": "full",
            },
            "track": "wandb",
        },
        {"report_to"},
        set(),
        {"rows.train", "rows.max_length", "rows.too_long", "train.batch_tokens", "train.micro_batch_tokens", "train.learning_rate",
         "train.master_weights", "train.sharding"},
    ),
    "llama-factory-dpo": Case(
        "llama-factory",
        """
        model_name_or_path: acme/Chat-4B
        stage: dpo
        finetuning_type: lora
        lora_rank: 16
        lora_alpha: 16
        lora_target: q_proj,v_proj
        additional_target: lm_head
        use_rslora: true
        loraplus_lr_ratio: 16
        quantization_bit: 8
        pref_loss: sigmoid
        pref_beta: 0.2
        pref_ftx: 0.1
        ld_alpha: 0.6
        ref_model: acme/Other
        dataset: pairs
        dataset_dir: shelf
        cutoff_len: 1024
        per_device_train_batch_size: 2
        learning_rate: 5e-6
        """,
        {
            "model": "acme/Chat-4B",
            "quantize": "int8",
            "models": {"reference": "acme/Other"},
            "tune": {
                "lora": {"rank": 16, "alpha": 16, "rank_stabilized": True, "target_modules": ["attention_query", "attention_value"]}
            },
            "rows": {"train": "shelf/pairs.json", "columns": {"prompt": "instruction"}, "max_length": 1024, "too_long": "left"},
            "objective": [{"dpo": {"beta": 0.2}}, {"cross_entropy": {"weight": 0.1}}, "model_reference"],
            "token_weight": {"length_desensitization": {"alpha": 0.6}},
            "train": {
                "epochs": 3.0,
                "batch_rows": 2,
                "micro_batch_tokens": 4096,
                "learning_rate": 5e-6,
                "schedule": "linear",
                "warmup": 0,
                "gradient_checkpointing": True,
            },
        },
        {"loraplus_lr_ratio", "lora_modules_to_save"},
        set(),
        {"quantize", "rows.columns", "rows.too_long", "train.batch_rows", "train.micro_batch_tokens", "train.warmup",
         "train.gradient_checkpointing"},
    ),
    "llama-factory-kto": Case(
        "llama-factory",
        """
        model_name_or_path: acme/Chat-4B
        stage: kto
        finetuning_type: lora
        lora_target: all
        pref_beta: 0.3
        kto_rejected_weight: 2.0
        dataset: judged
        dataset_dir: shelf
        cutoff_len: 1024
        streaming: true
        preprocessing_num_workers: 4
        max_steps: 50
        """,
        {
            "model": "acme/Chat-4B",
            "tune": {"lora": {"rank": 8, "alpha": 16}},
            "rows": {
                "train": "shelf/judged.json",
                "columns": {"messages": "turns"},
                "streaming": True,
                "workers": 4,
                "max_length": 1024,
                "too_long": "right",
            },
            "objective": {"kto": {"beta": 0.3, "undesirable_weight": 2.0, "column": "good"}},
            "train": {
                "steps": 50,
                "batch_rows": 8,
                "micro_batch_tokens": 8192,
                "learning_rate": 5e-5,
                "schedule": "linear",
                "warmup": 0,
                "gradient_checkpointing": True,
            },
        },
        set(),
        set(),
        {"tune", "rows.columns", "rows.streaming", "rows.too_long", "train.batch_rows", "train.micro_batch_tokens", "train.learning_rate",
         "train.warmup", "train.gradient_checkpointing"},
    ),
    "llama-factory-pretraining": Case(
        "llama-factory",
        """
        model_name_or_path: acme/Base-4B
        stage: pt
        finetuning_type: freeze
        freeze_trainable_layers: 8
        dataset: pages, lost
        dataset_dir: shelf
        cutoff_len: 1024
        eval_dataset: selves
        eval_strategy: steps
        eval_steps: 20
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 3
        learning_rate: 1e-4
        deepspeed: ds_z2.json
        """,
        {
            "model": "acme/Base-4B",
            "tune": "freeze_lower",
            "rows": {
                "train": [{"rows": "shelf/pages.jsonl", "columns": {"text": "page"}}, "lost"],
                "max_length": 1024,
                "blocks": {"tokens": 1024, "at": "token"},
                "validate": "shelf/selves.json",
            },
            "train": {
                "epochs": 3.0,
                # Pretraining packs by itself.
                "batch_tokens": 6144,
                "micro_batch_tokens": 2048,
                "learning_rate": 1e-4,
                "schedule": "linear",
                "warmup": 0,
                "gradient_checkpointing": True,
                "evaluate_every": 20,
            },
        },
        {"freeze_trainable_layers", "dataset", "deepspeed"},
        set(),
        {"tune", "rows.train", "rows.blocks", "rows.validate", "train.batch_tokens", "train.micro_batch_tokens", "train.warmup",
         "train.gradient_checkpointing"},
    ),
    "llama-factory-reward": Case(
        "llama-factory",
        """
        model_name_or_path: acme/Chat-4B
        stage: rm
        finetuning_type: oft
        oft_block_size: 32
        dataset: online
        template: chat
        learning_rate: 1e-4
        label_smoothing_factor: 0.1
        """,
        {
            "model": "acme/Chat-4B",
            "tune": "lora",
            "rows": {"train": "online", "max_length": 2048, "too_long": "left"},
            "objective": {"reward_model": {"center_rewards_coefficient": 0.0}},
            "train": {
                "epochs": 3.0,
                "batch_rows": 8,
                "micro_batch_tokens": 32768,
                "learning_rate": 1e-4,
                "schedule": "linear",
                "warmup": 0,
                "gradient_checkpointing": True,
            },
        },
        {"finetuning_type", "oft_block_size", "dataset", "template", "label_smoothing_factor"},
        set(),
        {"tune", "rows.train", "rows.max_length", "rows.too_long", "train.batch_rows", "train.micro_batch_tokens", "train.warmup",
         "train.gradient_checkpointing"},
    ),
    "trl-sft": Case(
        "trl",
        """
        model_name_or_path: acme/Base-1B
        dtype: bfloat16
        datasets:
          - {path: acme/talk, fraction: 0.75}
          - {path: csv, data_files: more.csv, split: train, fraction: 0.25}
        test_split_size: 0.2
        dataset_text_field: body
        use_peft: true
        lora_target_modules: [all-linear]
        load_in_4bit: true
        bnb_4bit_quant_type: nf4
        assistant_only_loss: true
        packing: true
        max_length: 512
        num_processes: 4
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 2
        learning_rate: 1e-3
        lr_scheduler_type: warmup_stable_decay
        lr_scheduler_kwargs: {num_decay_steps: 10}
        optim: adafactor
        gradient_checkpointing: false
        torch_compile: true
        neftune_noise_alpha: 5
        report_to: tensorboard
        output_dir: /models/out/
        load_best_model_at_end: true
        metric_for_best_model: eval_accuracy
        """,
        {
            "name": "out",
            "model": "acme/Base-1B",
            "quantize": "nf4",
            "tune": {"lora": {"rank": 16, "alpha": 32, "dropout": 0.05}},
            "rows": {
                "train": [{"rows": "hub:acme/talk", "weight": 0.75}, {"rows": "more.csv", "weight": 0.25}],
                "columns": {"text": "body"},
                "max_length": 512,
                "too_long": "right",
                "loss_on": "assistant",
                "validate": 0.2,
            },
            "objective": {"neftune": {"alpha": 5}},
            "optimizer": ["clip", "adamw"],
            "train": {
                "epochs": 3.0,
                "batch_tokens": 8192,
                "micro_batch_tokens": 1024,
                "learning_rate": 1e-3,
                "schedule": "warmup_stable_decay",
                "warmup": 0,
                "precision": "bf16",
                "master_weights": "none",
                "compile": True,
                "best": "validation",
            },
            "track": "tensorboard",
            "out": "/models",
        },
        {"lr_scheduler_kwargs", "optim", "metric_for_best_model"},
        set(),
        {"name", "quantize", "tune", "rows.columns", "rows.validate", "objective", "optimizer", "train.batch_tokens",
         "train.micro_batch_tokens", "train.schedule", "train.warmup", "train.master_weights", "train.compile", "train.best"},
    ),
    "trl-dpo": Case(
        "trl",
        """
        model_name_or_path: acme/Chat-1B
        model_revision: main
        dataset_name: acme/compared
        dataset_config: short
        dataset_test_split: held
        eval_strategy: steps
        eval_steps: 25
        loss_type: [sigmoid, bco_pair, sft]
        loss_weights: [0.8, 0.2, 1.0]
        beta: 0.05
        sync_ref_model: true
        ref_model_sync_steps: 64
        max_length: null
        truncation_mode: keep_end
        num_train_epochs: 1
        bf16: false
        """,
        {
            "model": "acme/Chat-1B",
            "tune": "full",
            "rows": {"train": "hub:acme/compared/short", "validate": "hub:acme/compared/short:held"},
            "objective": [
                {"dpo": {"beta": 0.05, "weight": 0.8}},
                {"bco": {"beta": 0.05, "shift": False, "weight": 0.2}},
                "cross_entropy",
                {"following_reference": {"sync_every": 64, "mix": 0.6}},
            ],
            "train": {
                "epochs": 1,
                "batch_rows": 8,
                "learning_rate": 1e-6,
                "schedule": "linear",
                "warmup": 0,
                "precision": "fp32",
                "gradient_checkpointing": True,
                "evaluate_every": 25,
            },
        },
        {"truncation_mode"},
        set(),
        {"rows.validate", "objective", "train.batch_rows", "train.learning_rate", "train.warmup", "train.gradient_checkpointing"},
    ),
    "trl-kto": Case(
        "trl",
        """
        model_name_or_path: acme/Chat-1B
        dataset_name: acme/judged
        dataset_test_split: held
        loss_type: apo_zero_unpaired
        desirable_weight: 1.5
        use_peft: true
        lora_r: 4
        lora_alpha: 8
        lora_dropout: 0
        learning_rate: 2e-6
        lr_scheduler_type: polynomial
        """,
        {
            "model": "acme/Chat-1B",
            "tune": {"lora": {"rank": 4, "alpha": 8, "target_modules": ["attention_query", "attention_value"]}},
            "rows": {"train": "hub:acme/judged", "max_length": 1024, "too_long": "right"},
            "objective": {"apo_zero_unpaired": {"beta": 0.1, "desirable_weight": 1.5}},
            "train": {
                "epochs": 3.0,
                "batch_rows": 8,
                "micro_batch_tokens": 8192,
                "learning_rate": 2e-6,
                "schedule": "cosine",
                "warmup": 0,
                "gradient_checkpointing": True,
            },
        },
        {"dataset_test_split", "lr_scheduler_type"},
        set(),
        {"tune", "rows.max_length", "objective", "train.batch_rows", "train.micro_batch_tokens", "train.warmup",
         "train.gradient_checkpointing"},
    ),
}  # fmt: skip

SHELF: dict[str, Any] = {
    "selves": {"file_name": "selves.json"},
    "asked": {
        "file_name": "asked.jsonl",
        "columns": {"prompt": "ask", "query": "input", "response": "reply", "system": "role", "images": "pictures"},
    },
    "online": {
        "hf_hub_url": "acme/talk",
        "ms_hub_url": "elsewhere/talk",
        "subset": "short",
        "split": "test",
        "num_samples": 50,
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "visitor", "assistant_tag": "assistant"},
    },
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    },
    "judged": {
        "file_name": "judged.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "kto_tag": "good"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "pages": {"file_name": "pages.jsonl", "columns": {"prompt": "page"}},
}
"""A `dataset_info.json` of LLaMA-Factory."""
