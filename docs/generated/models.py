"""The families of models, from what the tests of the families tried and wrote down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generated.tables import cell, code, table

FACTS = Path(__file__).with_name("families.json")
SPECIAL = (
    ("attention_query_gate", "a query fused with a gate"),
    ("attention_latent", "latent attention"),
    ("mixer_input", "mixers without attention"),
    ("expert", "experts"),
    ("linear_other", "other linear maps"),
    ("other_modality", "an encoder of images"),
)
"""Roles that tell families apart, in words; attention and an MLP go without saying."""


def page() -> str:
    """A table of all families."""
    found: Mapping[str, Mapping[str, Any]] = json.loads(FACTS.read_text(encoding="utf-8"))
    header = ("family", "`model_type`", "beside attention and MLP", "full", "half", "LoRA", "packing", "merges", "GGUF")
    return table(header, [_row(family, one) for family, one in found.items()])


def _row(family: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    roles = one["roles"]
    beside = ", ".join(f"{words} ({roles[role]})" for role, words in SPECIAL if role in roles)
    return (
        cell(family),
        code(one["model_type"]),
        beside,
        "yes" if one["full"] == one["parameters"] else "yes, what text reaches",
        "yes" if one["half"] else "no",
        ("yes" if one["lora"] else "no")
        + (", at experts where they are named" if "expert" in roles and not one["lora_beside_experts"] else ""),
        f"no: {cell(one['packing'])}" if one["packing"] else "yes",
        "yes" if one["merges"] else "no",
        "yes" if one["gguf"] else "no",
    )
