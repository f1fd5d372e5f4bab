"""What trains: LoRA with its options, and names of modules as module types."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from luthier.convert.config import Config
from luthier.convert.draft import Draft
from luthier.kinds.parts import GROUPS
from luthier.models.roles import role_in_block, role_outside

ALL = frozenset({"all", "all-linear", "all_linear"})
EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"})
FUSED = {
    "attention_query_key_value": ("attention_query", "attention_key", "attention_value"),
    "mlp_gate_up": ("mlp_gate", "mlp_up"),
}
"""A fused matrix stands for its parts where the map of the model knows where they lie in it, and for itself where it does not."""


SELDOM = {*FUSED, "attention_query_gate", "attention_latent", *GROUPS["mixer"], "linear_other"}
"""Linear maps that a list of names need not have to mean all of a usual model."""

ABOVE = ("model.layers.", "model.language_model.layers.", "language_model.model.layers.", "layers.")
"""What usual models call their blocks."""
LONGEST_PATTERN = 300
BLOCKS = (0, 1, 2, 5, 9, 10, 17, 31, 40, 79)


def module_types(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of modules as module types, and those that no type is known for, which a recipe takes as they are."""
    found: list[str] = []
    unknown: list[str] = []
    for name in names:
        last = name.rpartition(".")[2]
        kind = "linear" if name in ALL else "embedding" if last in EMBEDDINGS else role_in_block(name, ()) or role_outside(last)
        if kind is None:
            unknown.append(name)
        else:
            found += [*FUSED.get(kind, ()), kind]
    return _grouped(list(dict.fromkeys(found))), unknown


def _grouped(types: list[str]) -> list[str]:
    """The same types, with a group's name where all of it is there."""
    for group in ("linear", "attention", "mlp"):
        if group in types or set(GROUPS[group]) - SELDOM <= set(types):
            types = list(dict.fromkeys(group if one in GROUPS[group] else one for one in types))
    return types


def lora(
    config: Config, draft: Draft, tool: str, *, rank: int | None, alpha: float | None, dropout: float, everywhere: bool
) -> None:
    """LoRA under `tune`.

    Args:
        config, draft: as for every converter.
        tool: whose defaults the following are.
        rank, alpha, dropout: where the file has none; alpha None: twice the rank.
        everywhere: whether it stands beside all linear maps where the file names none; else where PEFT puts it.
    """
    options: dict[str, Any] = {}
    remarks = []
    found = config.whole("lora_r", "lora_rank")
    if found is None and rank is not None:
        remarks.append(f"The rank is the default of {tool}.")
    if (size := found or rank) is not None:
        options["rank"] = size
    weight = config.number("lora_alpha")
    weight = weight if weight is not None else alpha if alpha is not None else 2 * (size or 8)
    options["alpha"] = weight
    if drop := config.number("lora_dropout"):
        options["dropout"] = drop
    elif dropout and not config.has("lora_dropout"):
        options["dropout"] = dropout
    if config.flag("use_rslora", "peft_use_rslora"):
        options["rank_stabilized"] = True
    types, own, said = _targets(config, draft, everywhere)
    if types or own:
        options["target_modules"] = [*types, *own]
    parts: list[Any] = [{"lora": options}]
    saved = config.names("lora_modules_to_save", "additional_target") or []
    if saved and draft.values.get("quantize"):
        draft.leave("lora_modules_to_save", saved, "weights of a quantized model do not train, only what stands beside them")
    elif saved:
        trained, named = module_types(saved)
        parts.append({"full": {"target_modules": [*trained, *named]}})
        own = [*own, *named]
        said = f"{said} What is saved beside LoRA trains in place, and a tied head with the embedding.".strip()
    if own:
        remarks.append(f"Not module types but the model's own names: {', '.join(own)}.")
    draft.put("tune", parts[0] if len(parts) == 1 else parts, " ".join(one for one in (*remarks, said) if one))


def _targets(config: Config, draft: Draft, everywhere: bool) -> tuple[list[str], list[str], str]:
    """The module types and the model's own names, none of both for all linear maps, and what to say of it."""
    linear = config.flag("lora_target_linear")
    key = "lora_target_modules" if config.has("lora_target_modules") else "lora_target"
    raw = config.data.get(key)
    if isinstance(raw, str) and re.search(r"[\\()\[\]|*^$+?]", raw):
        config.take(key)
        types = ["linear"] if linear else _matched(raw)
        if not types:
            draft.leave(key, raw, "a pattern of names; name modules or module types under `target_modules`")
            return [], [], f"{key}, a pattern of names, is left out: all linear maps of the blocks."
        return [] if types == ["linear"] else types, [], f"{key} is the pattern {raw}."
    names = config.names("lora_target_modules", "lora_target")
    if linear or (names is None and everywhere):
        names = [*(names or ()), "all-linear"]
    if names is None:
        return ["attention_query", "attention_value"], [], "Where PEFT puts it in most models: q_proj and v_proj."
    types, own = module_types(names)
    if "embedding" in types:
        draft.leave(key, "embed_tokens", "LoRA stands beside linear maps, and the embedding is none; `full` trains it in place")
        types.remove("embedding")
    # The default of `lora`, in a block: neither the embedding nor the head.
    return [] if types == ["linear"] and not own else types, own, ""


def _matched(pattern: str) -> list[str]:
    """The module types that a pattern means, tried on the names of usual models; none where it does not mean the same of all blocks."""
    try:
        # A repeated group, or a very long pattern, could search for ever.
        asked = re.compile("" if len(pattern) > LONGEST_PATTERN or re.search(r"\)[*+{]", pattern) else pattern)
    except re.error:
        return []
    found = []
    for part in (*(f"self_attn.{one}_proj" for one in "qkvo"), *(f"mlp.{one}_proj" for one in ("gate", "up", "down"))):
        hits = {block for block in BLOCKS if any(asked.fullmatch(f"{above}{block}.{part}") for above in ABOVE)}
        if hits and len(hits) < len(BLOCKS):
            return []
        found += [part] if hits else []
    return module_types(found)[0]


def quantized(config: Config, draft: Draft, four: bool = False) -> None:
    """A base in 4 or 8 bits; `four`: where the file need not say so."""
    bits = config.whole("quantization_bit")
    eight, said = config.flag("load_in_8bit"), config.flag("load_in_4bit")
    if four or said or bits == 4:
        draft.put("quantize", "nf4", "luthier's own, without bitsandbytes or a second quantization")
    elif eight or bits == 8:
        draft.put("quantize", "int8", "luthier's own, without bitsandbytes")
    elif bits is not None:
        draft.leave("quantization_bit", bits, "there are 4 and 8")
    for key in ("bnb_4bit_quant_type", "quantization_type"):
        if config.data.get(key) == "nf4":
            config.take(key)
