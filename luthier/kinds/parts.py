"""What is known of a model's tensors: their roles, where each lives, and the map of them all. `luthier.models.parts` makes the map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

from luthier.errors import LuthierError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

ROLES: tuple[str, ...] = (
    "embedding",
    "position_embedding",
    "attention_query",
    "attention_key",
    "attention_value",
    "attention_query_key_value",
    "attention_query_gate",
    "attention_latent",
    "attention_output",
    "mlp_up",
    "mlp_gate",
    "mlp_gate_up",
    "mlp_down",
    "mixer_input",
    "mixer_output",
    "linear_other",
    "expert",
    "router",
    "attention_norm",
    "mlp_norm",
    "query_norm",
    "key_norm",
    "final_norm",
    "other_norm",
    "head",
    "other",
    "other_modality",
)
"""Every role a tensor can have.

`attention_query_key_value` and `mlp_gate_up` are fused matrices whose parts are not contiguous rows (GPT-NeoX
interleaves query, key and value head by head) or whose order is not known; they count as one matrix.
`attention_query_gate` is a query fused with the gate of attention's output (Qwen3-Next), `attention_latent` one of the
maps to or from the narrow states of multi-head latent attention (DeepSeek-V3). `mixer_input` and `mixer_output` are the
linear maps of what mixes tokens without attention: state spaces, gated delta nets, short convolutions. `linear_other` is
any further linear map in a block. `expert` is any tensor of a mixture's experts, `router` what chooses among them.
`attention_norm` and `mlp_norm` stand before or after their part of the block. `other` is none of these: token-type
embeddings, poolers, OPT's projections, attention sinks, convolutions and decays of a mixer, and what no name tells.
`other_modality` reads or writes images or sound, and text gives it no gradient.
"""


GROUPS: dict[str, tuple[str, ...]] = {
    "attention": (
        "attention_query",
        "attention_key",
        "attention_value",
        "attention_query_key_value",
        "attention_query_gate",
        "attention_latent",
        "attention_output",
    ),
    "mlp": ("mlp_up", "mlp_gate", "mlp_gate_up", "mlp_down"),
    "mixer": ("mixer_input", "mixer_output"),
    "norm": ("attention_norm", "mlp_norm", "query_norm", "key_norm", "final_norm", "other_norm"),
}
GROUPS["linear"] = (*GROUPS["attention"], *GROUPS["mlp"], *GROUPS["mixer"], "linear_other")
GROUPS["all"] = tuple(role for role in ROLES if role != "other_modality")


NAMED = 4
"""How many names of parameters one sentence tells."""

SUBLAYERS: dict[str, str] = {"attention_layer": "attention", "mlp_layer": "mlp"}
"""Roles of whole sub-layers of a block, which edits of hidden states can name, and the groups of their matrices."""


def expand_roles(names: str | Iterable[str]) -> tuple[str, ...]:
    """Module types and groups of them as module types, each once, in the order of `ROLES`.

    Raises:
        LuthierError: a name is neither a module type nor a group.
    """
    names = [names] if isinstance(names, str) else list(names)
    chosen: set[str] = set()
    for name in names:
        if name not in ROLES and name not in GROUPS:
            raise LuthierError(
                f"`{name}` is neither a module type nor a group of them",
                where="target_modules",
                fix=nearest(name, (*ROLES, *GROUPS)) or f"groups: {', '.join(GROUPS)}; module types: {', '.join(ROLES)}",
            )
        chosen.update(GROUPS.get(name, (name,)))
    return tuple(role for role in ROLES if role in chosen)


class Heads(NamedTuple):
    """How a block's attention is cut into heads."""

    query: int
    key_value: int
    width: int


class Place(NamedTuple):
    """Where one tensor of a model lives: enough to find it again, never the tensor itself."""

    module: str
    """Dotted name of the module, e.g. `model.layers.3.self_attn.q_proj`."""
    tensor: str
    """`weight`, `bias` or another parameter's name."""
    role: str
    """What it does: `attention_query`, `mlp_down`, `embedding` ..., see `luthier.models.parts`."""
    block: int | None
    """The transformer block, None outside the blocks."""
    start: int | None = None
    """First output row of this place in a fused projection; None: the whole tensor."""
    stop: int | None = None

    @property
    def parameter(self) -> str:
        """Dotted name of the parameter."""
        return ".".join(part for part in (self.module, self.tensor) if part)

    def __str__(self) -> str:
        return self.parameter if self.start is None else f"{self.parameter}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Parts:
    """The map of one model. It holds names and numbers only, so it outlives sharding, moving and copying the model."""

    architecture: str
    """The model type of the configuration, e.g. `llama`."""
    places: tuple[Place, ...]
    """Every parameter exactly once: a fused one as disjoint places that cover it, a tied one under its first name."""
    ties: Mapping[str, str]
    """What shares a tensor with what: modules for weights (`{"lm_head": "model.embed_tokens"}`), else whole names."""
    blocks: int
    width: int
    heads: int
    """Of the first block, as the next two; see `uniform_heads`."""
    key_value_heads: int
    head_width: int
    vocabulary: int
    block_modules: tuple[str, ...]
    """Dotted names of the blocks, in order."""
    backbone: str
    """The smallest module that holds embedding and blocks; it returns the last hidden state. Empty: the model."""
    head: str
    """The module that turns hidden states into logits; empty for a model without one."""
    embedding: str
    causal: bool
    """Whether the model predicts next tokens."""
    transposed: frozenset[str]
    """Modules whose weight is stored [in, out] instead of [out, in] (GPT-2's Conv1D), or a stack of them [E, in, out] (gpt-oss)."""
    output_width: int = 0
    """Width of the last hidden states, which some OPT narrow again."""
    layer: tuple[str, ...] = ()
    """What classification heads of an encoder's family put between a state and the classes: an activation behind a linear map, `tanh`,
    `relu` or `gelu`, and maybe a `norm`; empty where that is not known."""
    initial_deviation: float | None = None
    """The standard deviation with which this model's matrices began, by its own configuration; None where that does not say."""
    added: tuple[int, ...] = ()
    """Ids of the tokens that were added for this run, whose rows train."""
    other_heads: Mapping[int, Heads] = field(default_factory=dict)
    """Blocks whose attention is cut into heads otherwise than that of the first (Gemma 4)."""

    def heads_of(self, block: int | None) -> Heads:
        """How the attention of a block is cut into heads, by the model's configuration."""
        usual = Heads(self.heads, self.key_value_heads, self.head_width)
        return usual if block is None else self.other_heads.get(block, usual)

    def uniform_heads(self, asks: str) -> Heads:
        """The heads of every block, for what needs them to be alike.

        Args:
            asks: what needs that, for the error.

        Raises:
            LuthierError: a block has no attention with queries, keys and values, or its heads are others.
        """
        keys = {"attention_key", "attention_query_key_value"}
        having = {place.block for place in self.places if place.role in keys}
        lacking = sorted({place.block for place in self.places if place.block is not None} - having)
        if lacking or self.other_heads:
            odd = lacking or sorted(self.other_heads)
            what = "no keys and values of their own" if lacking else "heads of another number or width"
            raise LuthierError(
                f"`{asks}` needs the same heads in every block, and blocks {', '.join(map(str, odd))} have {what}",
                where=self.architecture,
                fix="use a prompt, LoRA or another technique",
            )
        return self.heads_of(None)

    def select(
        self,
        target_modules: str | Iterable[str] | None = None,
        blocks: Iterable[int] | None = None,
        tensor: str | None = "weight",
    ) -> list[Place]:
        """The places of some modules in some blocks, in the model's order.

        Args:
            target_modules: module types, groups of them, or modules by the model's own names, whole or from the right, such as
                `q_proj` or `mlp.down_proj`, or stacks of experts' matrices, such as `experts` or `experts.down_proj`; None for all that
                text reaches, which is the group `all`.
            blocks: block numbers from 0; None for every place, also outside the blocks.
            tensor: `weight` for all that is no bias, `bias`, or None for both.

        Raises:
            LuthierError: an unknown name, what text does not reach, a block the model does not have, or another `tensor`.
        """
        if tensor not in ("weight", "bias", None):
            raise LuthierError(f"`{tensor}` is not a kind of tensor", where="tensor", fix="use weight, bias or None")
        named = [target_modules] if isinstance(target_modules, str) else list(target_modules or ())
        if "other_modality" in named:
            raise LuthierError(
                "rows of text do not reach what has the module type other_modality",
                where="target_modules",
                fix="leave it out: it reads images or sound, and stays frozen",
            )
        modules = tuple(f".{name}" for name in named if name not in ROLES and name not in GROUPS)
        self._check_names(modules)
        wanted = set(GROUPS["all"] if target_modules is None else expand_roles(name for name in named if f".{name}" not in modules))
        allowed = None if blocks is None else set(blocks)
        missing = sorted((allowed or set()) - set(range(self.blocks)))
        if missing:
            raise LuthierError(
                f"the model has no block {', '.join(map(str, missing))}",
                where="blocks",
                fix=f"name blocks from 0 to {self.blocks - 1}",
            )
        return [
            place
            for place in self.places
            if (
                place.role in wanted
                or (place.role != "other_modality" and any(name.endswith(modules) for name in _own_names(place)))
            )
            and (allowed is None or place.block in allowed)
            and (tensor is None or place.tensor.endswith("bias") == (tensor == "bias"))
        ]

    def _check_names(self, modules: Iterable[str]) -> None:
        for name in modules:
            if not any(own.endswith(name) for place in self.places for own in _own_names(place)):
                own = {place.module.rpartition(".")[2] for place in self.places}
                raise LuthierError(
                    f"`{name[1:]}` is no module type, no group of them and no module of this model",
                    where="target_modules",
                    fix=nearest(name[1:], (*ROLES, *GROUPS, *sorted(own))) or f"module types: {', '.join(ROLES)}",
                )

    def by_block(self, block: int | None) -> list[Place]:
        """Every place of one block, weights and biases; None for what stands outside the blocks."""
        if block is None:
            return [place for place in self.places if place.block is None]
        return self.select(blocks=[block], tensor=None)

    def sublayer(self, group: str, block: int) -> str:
        """Dotted name of the module of a block that is its `attention` or its `mlp`.

        Raises:
            LuthierError: the block's matrices of this group have no module of their own.
        """
        modules = {place.module for place in self._sublayer(group, block)}
        owner = reduce(common_module, [module.rpartition(".")[0] for module in modules]) if modules else ""
        if not owner.startswith(f"{self.block_modules[block]}."):
            raise LuthierError(
                f"the {group} of a block is no module of its own in this model",
                where=f"{self.architecture}, block {block}",
                fix="edit its matrices instead, or the whole block",
            )
        return owner

    def has_sublayer(self, group: str, block: int) -> bool:
        """Whether a block has matrices of `attention` or of `mlp`: those of a hybrid may have one alone."""
        return bool(self._sublayer(group, block))

    def _sublayer(self, group: str, block: int) -> list[Place]:
        return self.select((*GROUPS[group], *(("expert", "router") if group == "mlp" else ())), blocks=[block])

    def roles(self) -> list[str]:
        """The roles that this model has."""
        return [role for role in ROLES if any(place.role == role for place in self.places)]

    def module(self, model: nn.Module, place: Place) -> nn.Module:
        """The module that owns the place's tensor."""
        return model.get_submodule(place.module)

    def parameter(self, model: nn.Module, place: Place) -> nn.Parameter:
        """The whole parameter, also for a place that is a slice of it."""
        return model.get_parameter(place.parameter)

    def view(self, model: nn.Module, place: Place) -> Tensor:
        """The place's own numbers, sharing memory with the parameter: a matrix as [out, in], a stack of E experts' matrices as
        [E, out, in], a bias as [out].

        A transposed weight is turned, so that rows are always outputs. Gradients flow through the view.
        """
        return self.outputs(place, self.parameter(model, place))

    def outputs(self, place: Place, values: Tensor) -> Tensor:
        """The part of a parameter's values, as it is stored, that is a place: a view whose rows are outputs."""
        return outputs_first(values, place, self.transposed)[place.start : place.stop]

    def unknown(self) -> list[str]:
        """What the map holds without knowing more of it, and what text does not reach: a sentence each."""
        said = []
        for role, what in (("linear_other", "linear maps"), ("other", "parameters"), ("other_modality", "parameters")):
            found = [place for place in self.places if place.role == role]
            linear = [place for place in found if role != "linear_other" or not place.tensor.endswith("bias")]
            if linear:
                names = list(dict.fromkeys(self._short(place) for place in linear))
                shown = ", ".join([*names[:NAMED], *(["..."] if len(names) > NAMED else [])])
                frozen = ", frozen: rows of text do not reach them" if role == "other_modality" else ""
                said.append(f"{what} that are `{role}`: {len(linear):,}{frozen} ({shown})")
        return said

    def _short(self, place: Place) -> str:
        """A parameter's name, the same for every block; of another modality the name of what holds all of it."""
        if place.role == "other_modality":
            return ".".join(place.parameter.split(".")[:2])
        inside = "" if place.block is None else f"{self.block_modules[place.block]}."
        return place.parameter.removeprefix(inside).removesuffix(".weight")

    def describe(self) -> str:
        """The map in words, a line a role."""
        shape = (
            f"{self.architecture}: {self.blocks} blocks, width {self.width}, {self.heads} heads of {self.head_width}"
            f" ({self.key_value_heads} key-value), vocabulary {self.vocabulary}"
        )
        counts = Counter((place.role, place.tensor.endswith("bias")) for place in self.places)
        lines = [
            f"  {role}: weights {counts[role, False]}, biases {counts[role, True]}"
            for role in ROLES
            if counts[role, False] or counts[role, True]
        ]
        ties = [f"  {name} is tied to {target}" for name, target in self.ties.items()]
        return "\n".join([shape, *lines, *ties])


def _own_names(place: Place) -> tuple[str, ...]:
    """What the model calls a place: its module, and its parameter where a module has several matrices."""
    named = place.tensor not in ("weight", "bias")
    return (f".{place.module}", f".{place.parameter}") if named else (f".{place.module}",)


def outputs_first(values: Tensor, place: Place, transposed: frozenset[str]) -> Tensor:
    """A parameter's values with outputs before inputs, however they are stored: a view.

    Args:
        values: a matrix, a stack of matrices, or a bias or vector, which stays as it is.
        place: whose parameter it is.
        transposed: modules that store inputs before outputs.
    """
    turned = place.module in transposed and values.ndim > 1 and not place.tensor.endswith("bias")
    return values.mT if turned else values


def common_module(first: str, second: str) -> str:
    """The dotted name of the smallest module that holds both."""
    shared = []
    for left, right in zip(first.split("."), second.split("."), strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)


class Reads(NamedTuple):
    """What a model can read."""

    context: int | None = None
    """The most tokens at once; None where it does not say."""
    vocabulary: int | None = None
    """How many token ids it knows, from 0 on; None where that is not known."""
    conversations: bool = True
    """False: an encoder, which reads texts alone."""
