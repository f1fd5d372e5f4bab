"""One map of the model: where every parameter lives, what it does, and in which block.

Selections, adapters, pruning, freezing and reports all name tensors by this map, so that they mean the same tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import LuthierError
from luthier.kinds import Place
from luthier.kinds.parts import GROUPS, Heads, Parts, common_module
from luthier.models.experts import stores_inputs_first
from luthier.models.quantized import QuantizedLinear, named_weights
from luthier.models.roles import FUSED_ROWS, GATED_QUERIES, LAYERS, role_in_block, role_outside

LINEAR = (nn.Linear, QuantizedLinear, Conv1D)
"""Classes of modules that are one linear map."""


def map_parts(model: nn.Module) -> Parts:
    """The map of a plain `transformers` model, before anything is attached to it.

    Raises:
        LuthierError: the blocks can not be found, or the model has an encoder and a decoder. A parameter whose name is not known gets
            the role `linear_other` or `other`, and so does a matrix of attention whose shape the head counts do not explain.
    """
    transformer: Any = model
    config = transformer.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(model, "encoder-decoder models are not mapped")
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name, None) is None:
            raise _refusal(model, f"its configuration has no {name}, as that of a language model has")
    embedding = _name_of(model, transformer.get_input_embeddings())
    blocks = _find_blocks(model, getattr(config, "num_hidden_layers", None), embedding)
    heads = [_heads(one) for one in _configurations(config, len(blocks))]
    parts = Parts(
        architecture=config.model_type,
        places=(),
        ties={},
        blocks=len(blocks),
        width=config.hidden_size,
        heads=heads[0].query,
        key_value_heads=heads[0].key_value,
        head_width=heads[0].width,
        vocabulary=config.vocab_size,
        block_modules=blocks,
        backbone=common_module(embedding, blocks[0]),
        head=_name_of(model, transformer.get_output_embeddings()),
        embedding=embedding,
        causal=bool(transformer.can_generate()),
        transposed=frozenset(name for name, module in model.named_modules() if _is_transposed(module)),
        output_width=(config.hidden_size if config.model_type != "opt" else config.word_embed_proj_dim),
        layer=() if transformer.can_generate() else LAYERS.get(config.model_type, ()),
        initial_deviation=_initial_deviation(config),
        other_heads={block: one for block, one in enumerate(heads) if one != heads[0]},
    )
    names, ties = _distinct_parameters(model, embedding)
    whole = _assign_roles(model, parts, names, text_alone=config is transformer.config)
    pieces = [piece for place in whole for piece in _split(model, parts, place)]
    return replace(parts, places=tuple(_checked(model, parts, place) for place in pieces), ties=ties)


def _refusal(model: nn.Module, what: str, found: Iterable[str] = ()) -> LuthierError:
    listed = "".join(f"\n    {line}" for line in found)
    return LuthierError(
        f"{type(model).__name__} can not be mapped: {what}{listed}",
        where="luthier.models.parts",
        fix="use a causal model or an encoder that `transformers` loads, whose blocks are one list",
    )


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    """The dotted name of a submodule; empty when there is none."""
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _configurations(config: Any, blocks: int) -> list[Any]:
    """The configuration of each block, which may differ from block to block (Gemma 4)."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config] * blocks


def _heads(config: Any) -> Heads:
    """How attention is cut into heads by a configuration; all zeros where it knows no attention (Mamba)."""
    query = int(getattr(config, "num_attention_heads", None) or 0)
    if not query:
        return Heads(0, 0, 0)
    return Heads(query, _key_value_heads(config), getattr(config, "head_dim", None) or config.hidden_size // query)


def _key_value_heads(config: Any) -> int:
    # Falcon and GPT-BigCode spell "one key-value head" as a flag, and keep a head count that then means nothing.
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return int(config.num_attention_heads)


def _initial_deviation(config: Any) -> float | None:
    named = [getattr(config, name, None) for name in ("initializer_range", "init_std")]
    return next((float(value) for value in named if value), None)


def _find_blocks(model: nn.Module, count: int | None, embedding: str) -> tuple[str, ...]:
    """The dotted names of the transformer blocks: the one outermost list of as many modules as the model has layers.

    Some count layers otherwise (LongCat has two in a block): then it is the one outermost list of modules of one class.
    An encoder of images may have as many blocks; the language model's list stands closest to the embedding of tokens.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            lists[name] = module
    found = [name for name, modules in lists.items() if len(modules) == count]
    found = _closest(found or [name for name, modules in lists.items() if len({type(one) for one in modules}) == 1], embedding)
    if len(found) != 1:
        raise _refusal(model, f"its blocks are not one list of {count} modules; lists that could be:", found or ["none"])
    return tuple(f"{found[0]}.{number}" for number in range(len(lists[found[0]])))


def _closest(lists: Sequence[str], embedding: str) -> list[str]:
    """Those of some modules that share most with the embedding's name, and of these the ones that lie least deep."""
    shared = {name: len(common_module(name, embedding)) for name in lists}
    nearest = [name for name in lists if shared[name] == max(shared.values())]
    depth = [name.count(".") for name in nearest]
    return [name for name, deep in zip(nearest, depth, strict=True) if deep == min(depth)]


def _distinct_parameters(model: nn.Module, embedding: str) -> tuple[list[str], dict[str, str]]:
    """Every parameter's name once, and what the further names of shared parameters are tied to."""
    shared: defaultdict[int, list[str]] = defaultdict(list)
    for name, weight in named_weights(model):
        shared[id(weight)].append(name)
    names, ties = [], {}
    for group in shared.values():
        first = next((name for name in group if name == f"{embedding}.weight"), group[0])
        names.append(first)
        for name in group:
            if name != first and name.endswith(".weight") and first.endswith(".weight"):
                ties[name.removesuffix(".weight")] = first.removesuffix(".weight")
            elif name != first:
                ties[name] = first
    return names, ties


def _assign_roles(model: nn.Module, parts: Parts, names: list[str], *, text_alone: bool) -> list[Place]:
    """A place for every parameter, whole tensors only.

    Args:
        model: the model.
        parts: its map so far.
        names: of its parameters.
        text_alone: False for a model that also reads images or sound, of which text reaches the language model and the head.
    """
    block_of = {name: _block_of(name, parts.block_modules) for name in names}
    inner = {name: _inner_name(name, parts, block_of[name]) for name in names}
    siblings: defaultdict[int | None, set[str]] = defaultdict(set)
    for name in names:
        siblings[block_of[name]].add(inner[name])
    roles: dict[str, str | None] = {}
    for name in names:
        module, block = name.rpartition(".")[0], block_of[name]
        if module in (parts.embedding, parts.head) and module:
            roles[name] = "embedding" if module == parts.embedding else "head"
        elif block is not None:
            roles[name] = role_in_block(inner[name], siblings[block])
        else:
            reached = text_alone or name.startswith(f"{parts.backbone}.")
            roles[name] = role_outside(inner[name]) if reached else "other_modality"
    for block in range(parts.blocks):
        inside = [name for name in names if block_of[name] == block]
        has_mlp = any(roles[name] in (*GROUPS["mlp"], "expert") for name in inside)
        roles.update(_roles_by_shape(model, [name for name in inside if roles[name] is None], parts.width, has_mlp))
    places = []
    for name in names:
        module, _, tensor = name.rpartition(".")
        linear = block_of[name] is not None and isinstance(model.get_submodule(module), LINEAR)
        role = roles[name] or ("linear_other" if linear else "other")
        places.append(Place(module, tensor, role, block_of[name]))
    return places


def _block_of(name: str, block_modules: tuple[str, ...]) -> int | None:
    listing = block_modules[0].rpartition(".")[0]
    return int(name[len(listing) + 1 :].split(".")[0]) if name.startswith(f"{listing}.") else None


def _inner_name(name: str, parts: Parts, block: int | None) -> str:
    """The name inside its block, without `.weight` or `.bias`."""
    inside = name if block is None else name.removeprefix(f"{parts.block_modules[block]}.")
    return inside.removesuffix(".weight").removesuffix(".bias")


def _roles_by_shape(model: nn.Module, names: list[str], width: int, has_mlp: bool) -> dict[str, str]:
    """The roles of a block's parameters with unknown names where class or shape leave no doubt.

    A norm is known by its class. Where a block without an MLP has just two unknown matrices, and one widens the hidden
    states to what the other narrows again, they are the MLP.
    """
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    roles = {name: "other_norm" for name, module in owners.items() if "norm" in type(module).__name__.lower()}
    linears = list(dict.fromkeys(module for module in owners.values() if isinstance(module, nn.Linear | QuantizedLinear)))
    if has_mlp or len(linears) != 2:
        return roles
    up, down = sorted(linears, key=lambda linear: linear.out_features, reverse=True)
    if up.in_features == down.out_features == width < up.out_features == down.in_features:
        mlp: dict[nn.Module, str] = {up: "mlp_up", down: "mlp_down"}
        roles |= {name: mlp[module] for name, module in owners.items() if module in mlp}
    return roles


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or (isinstance(module, QuantizedLinear) and module.transposed) or stores_inputs_first(module)


def _output_rows(model: nn.Module, place: Place) -> int:
    """How many outputs the place's module has; asked of the module, because a packed weight no longer tells."""
    module: Any = model.get_submodule(place.module)
    for attribute in ("out_features", "nf"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    return int(module.get_parameter(place.tensor).shape[0])


def _split(model: nn.Module, parts: Parts, place: Place) -> list[Place]:
    """The pieces of a fused place whose layout is known; the place itself otherwise."""
    roles = FUSED_ROWS.get((parts.architecture, place.module.rpartition(".")[2]))
    if roles is None or place.role not in ("attention_query_key_value", "mlp_gate_up"):
        return [place]
    rows = _output_rows(model, place)
    if place.role == "mlp_gate_up":
        sizes = [rows // 2] * 2
    else:
        heads = parts.heads_of(place.block)
        sizes = [heads.query * heads.width, *[heads.key_value * heads.width] * 2]
    if sum(sizes) != rows:
        return [place]
    ends = list(accumulate(sizes))
    return [place._replace(role=role, start=end - size, stop=end) for role, size, end in zip(roles, sizes, ends, strict=True)]


def _checked(model: nn.Module, parts: Parts, place: Place) -> Place:
    """The place with another role where the head counts would cut its matrix at the wrong rows."""
    query, key_value, width = parts.heads_of(place.block)
    heads = {"attention_query": query, "attention_key": key_value, "attention_value": key_value}.get(place.role)
    if heads is None:
        return place
    rows = _output_rows(model, place) if place.stop is None else place.stop - (place.start or 0)
    if place.role == "attention_query" and parts.architecture in GATED_QUERIES and rows == 2 * heads * width:
        return place._replace(role="attention_query_gate")
    linear = isinstance(model.get_submodule(place.module), LINEAR)
    return place if rows == heads * width else place._replace(role="linear_other" if linear else "other")
