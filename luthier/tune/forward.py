"""The forward passes of a run: hidden states of the tuned model, and of the base."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from luthier import draws
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, Routed
from luthier.models.attention import Context, Mass
from luthier.models.head import finish
from luthier.models.modes import drops
from luthier.tune.attached import Attached
from luthier.tune.packed import Packed
from luthier.tune.packed import pack as pack_rows
from luthier.tune.routing import listening

EmbedChange = Callable[[Tensor], Tensor]
"""What becomes of the embeddings [B, T, D] of a batch."""

BlockChange = Callable[[int, Tensor], Tensor]
"""What becomes of the hidden states [B, T, D] behind a block, by its number."""


class Hidden(NamedTuple):
    """Last hidden states of a batch, without what trained prompts put before the rows."""

    values: Tensor
    """[B, T, D], or [N, D] where the rows were packed."""
    place_BT: Tensor | None = None
    """Where each real token of a packed batch stands in `values`: several at one place where rows begin alike and that was run once."""
    mass: Tensor | None = None
    """The last block's attention to the context, where it was asked for: [B, T], or [N] where the rows were packed."""
    routed: tuple[Routed, ...] = ()
    """What each router said of the rows' own tokens, where it was asked for."""

    def at(self, row_N: Tensor, time_N: Tensor) -> Tensor:
        """The states [N, D] at these tokens."""
        return self._pick(self.values, row_N, time_N)

    def mass_at(self, row_N: Tensor, time_N: Tensor) -> Tensor:
        """The attention of these tokens to the context, [N]."""
        assert self.mass is not None
        return self._pick(self.mass, row_N, time_N)

    def _pick(self, values: Tensor, row_N: Tensor, time_N: Tensor) -> Tensor:
        return values[row_N, time_N] if self.place_BT is None else values[self.place_BT[row_N, time_N]]

    def padded(self, attend_BT: Tensor) -> Tensor:
        """All of them [B, T, D], zero where a packed batch has no token."""
        if self.place_BT is None:
            return self.values
        spread = self.values[self.place_BT.clamp(min=0)]
        return torch.where(attend_BT[..., None], spread, torch.zeros((), dtype=spread.dtype, device=spread.device))


class _Layout(NamedTuple):
    """Where the rows' own tokens stand in what the model runs."""

    own_BT: Tensor
    before: int
    """Virtual tokens before every row."""
    place_BT: Tensor | None
    """As in `Hidden`."""

    def rows(self, values_NE: Tensor) -> Tensor:
        """Numbers of each token that is run, in the order in which they are, at the rows' own tokens: [B, T, E]."""
        if self.place_BT is not None:
            return values_NE[self.place_BT.clamp(min=0)]
        return values_NE.reshape(len(self.own_BT), -1, values_NE.shape[-1])[:, self.before :]

    def change(self, values: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Change the states of the rows' own tokens, which `change` sees as [B, T, D]."""
        old_BTD = values[:, self.before :] if self.place_BT is None else values[0, self.place_BT.clamp(min=0)]
        new_BTD = change(old_BTD)
        if new_BTD is old_BTD:
            return values
        if self.place_BT is not None:
            return values[0].index_put((self.place_BT[self.own_BT],), new_BTD[self.own_BT].to(values.dtype))[None]
        rows_BTD = torch.where(self.own_BT[..., None], new_BTD.to(values.dtype), old_BTD)
        return torch.cat([values[:, : self.before], rows_BTD], dim=1) if self.before else rows_BTD


def without_virtual(ids_BT: Tensor, attend_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids and what is attended to, as a model reads them that has no such prompt: its tokens are padding there."""
    return ids_BT.clamp(min=0), attend_BT & (ids_BT >= 0)


def hidden(
    tune: Attached,
    batch: Batch,
    *,
    pack: bool = False,
    embed: EmbedChange | None = None,
    blocks: BlockChange | None = None,
    context_BT: Tensor | None = None,
    draws_at: Now | None = None,
    share: bool = True,
    routed: bool = False,
) -> Hidden:
    """Run the model's body on a batch.

    A causal model with padding on the right needs no mask: no real token can see the padding behind it.

    Args:
        tune: the model, with what is attached to it.
        batch: the rows.
        pack: leave the padding out and run the real tokens one behind the other.
        embed: what becomes of the embeddings of the rows' own tokens, neither padding nor virtual.
        blocks: what becomes of their hidden states behind each block.
        context_BT: True at tokens of which the last block shall say how much it attends to them. What trained prompts and prefixes
            put before the rows always counts.
        draws_at: the run trains, and this is its clock: techniques that drop numbers do so. Else none does.
        share: where rows are packed, run what those of a group begin with alike once, unless something may tell them apart there.
        routed: keep what routers say of the tokens.

    Raises:
        LuthierError: `embed` or `blocks` are given, and the model's embeddings or blocks cannot be reached; or the last block does not
            tell where it looks; or it is asked for routers that it does not have.
    """
    ids_BT, attend_BT = batch.token_ids_BT, batch.attend_BT
    virtual = bool((ids_BT < 0).any())
    # Rows with virtual tokens of their own hold the prompt already.
    length = 0 if tune.is_off or virtual else tune.prompt_length
    if tune.is_off and virtual:
        ids_BT, attend_BT = without_virtual(ids_BT, attend_BT)
    if length:
        before = -1 - torch.arange(length, device=ids_BT.device)
        ids_BT = torch.cat([before.expand(len(ids_BT), -1), ids_BT], dim=1)
        attend_BT = torch.cat([attend_BT.new_ones(len(attend_BT), length), attend_BT], dim=1)
        context_BT = None if context_BT is None else functional.pad(context_BT, (length, 0), value=1.0)
    backbone = tune.model.get_submodule(tune.parts.backbone)
    # Each of these may be another thing for each row.
    apart = embed is not None or blocks is not None or context_BT is not None or draws_apart(tune, trains=draws_at is not None)
    places = _pack(ids_BT, attend_BT, batch.groups if share and not apart else ()) if pack else None
    layout = _Layout(batch.own_tokens(), length, None if places is None else places.place_BT[:, length:])
    if places is None:
        arguments = _padded(backbone, ids_BT, attend_BT, causal=tune.parts.causal)
    else:
        arguments = _packed(tune, ids_BT, attend_BT, places, prompted=bool(length) or virtual)
    asked = None
    if context_BT is not None:
        asked = Mass(tune.parts.blocks - 1, context_BT if places is None else context_BT[places.run_BT][None])
        arguments["luthier"] = arguments.get("luthier", Context())._replace(mass=asked)
    if embed is not None:
        arguments["inputs_embeds"] = layout.change(_embedded(tune, arguments.pop("input_ids")), embed)
    key_N = None
    if draws_at is not None:
        key_BT = _keys(batch, length, draws_at)
        key_N = key_BT.flatten() if places is None else key_BT[places.run_BT]
    with tune.drawing_at(key_N), listening(tune) if routed else nullcontext(()) as heard:
        values = _last(backbone, arguments) if blocks is None else _last_open(tune, arguments, layout, blocks)
    if key_N is not None:
        # The backward pass may run parts of the model again, and must draw the same.
        tune.drawing = key_N
    mass_BT = None if asked is None else _told(tune, asked)
    said = tuple(Routed(*(layout.rows(one) for one in both)) for both in heard)
    if places is not None:
        return Hidden(values[0], layout.place_BT, None if mass_BT is None else mass_BT[0], said)
    return Hidden(values[:, length:], mass=None if mass_BT is None else mass_BT[:, length:], routed=said)


def _keys(batch: Batch, length: int, now: Now) -> Tensor:
    """A key for the draws of each token, and of those of a prompt before the rows, [B, length + T]."""
    position_BT = batch.position_BT
    before = -1 - torch.arange(length, device=position_BT.device)
    row_B = draws.seeds_of(batch.row_ids, position_BT.device)
    return draws.keys(now.seed, now.step, row_B[:, None], torch.cat([before.expand(len(row_B), -1), position_BT], dim=1))


def _told(tune: Attached, asked: Mass) -> Tensor:
    if asked.found_BT is None:
        raise LuthierError(
            f"the last block of {tune.parts.architecture} does not tell where it looks",
            where="context_attention",
            fix="use another token weight, or a model with the exchangeable attention of transformers",
        )
    return asked.found_BT


def draws_apart(tune: Attached, *, trains: bool) -> bool:
    """Whether anything drops numbers, in each row other ones: techniques in a pass that trains, the model in its own mode."""
    return (trains and tune.draws) or (tune.model.training and drops(tune.model))


def _pack(ids_BT: Tensor, attend_BT: Tensor, groups: Sequence[tuple[int, ...]]) -> Packed | None:
    """The batch without padding and what would be run twice; None where it has neither."""
    if not groups and bool(attend_BT.all()):
        return None
    found = pack_rows(ids_BT, attend_BT, groups)
    return None if bool(found.run_BT.all()) else found


def _packed(tune: Attached, ids_BT: Tensor, attend_BT: Tensor, places: Packed, *, prompted: bool) -> dict[str, Any]:
    """What the model's body gets of the tokens that are run alone, [1, N]."""
    run_BT = places.run_BT
    arguments: dict[str, Any] = {
        "input_ids": ids_BT[run_BT][None],
        "position_ids": places.position_BT[run_BT][None],
        # One that is ready made, so that none is made; attention is told the lengths and looks at no mask.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids_BT.device),
        "use_cache": False,
        "luthier": places.context,
    }
    if prompted and places.context.shared:
        # A prompt may tell a token's place by what stands before it, which is elsewhere for a row that shares its beginning.
        arguments["inputs_embeds"] = _embedded(tune, ids_BT[attend_BT][None])[:, run_BT[attend_BT]]
        del arguments["input_ids"]
    return arguments


def _padded(backbone: torch.nn.Module, ids_BT: Tensor, attend_BT: Tensor, *, causal: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": None, "use_cache": False}
    padded_left = bool((attend_BT[:, 1:] & ~attend_BT[:, :-1]).any())
    if padded_left or not causal:
        arguments["attention_mask"] = attend_BT.long()
    if padded_left:
        # Else the model counts by itself: encoders of the RoBERTa kind do not begin at 0.
        arguments["position_ids"] = (attend_BT.long().cumsum(-1) - 1).clamp(min=0)
    known = _known(backbone)
    return {name: value for name, value in arguments.items() if name in known}


def _known(backbone: torch.nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(backbone.forward).parameters


def _embedded(tune: Attached, ids_BT: Tensor) -> Tensor:
    """The embeddings as the model's body makes them, prompts among them."""
    if "inputs_embeds" not in _known(tune.model.get_submodule(tune.parts.backbone)):
        raise LuthierError("this model takes no embeddings", where=tune.parts.architecture, fix="change its token ids instead")
    embeds: Tensor = tune.model.get_submodule(tune.parts.embedding)(ids_BT)
    return embeds


def _last(backbone: torch.nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Last hidden states [B, T, D], or [1, N, D] of packed rows."""
    values: Tensor = backbone(**arguments).last_hidden_state
    return values


def _last_open(tune: Attached, arguments: dict[str, Any], layout: _Layout, blocks: BlockChange) -> Tensor:
    """The same where each block's output passes through `blocks`."""
    tune.open_blocks()
    backbone = tune.model.get_submodule(tune.parts.backbone)
    reached: set[int] = set()

    def change(number: int, values: Tensor) -> Tensor:
        reached.add(number)
        return layout.change(values, lambda hidden_BTD: blocks(number, hidden_BTD))

    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in _known(backbone).values()):
        context = arguments.get("luthier", Context())._replace(blocks=change)
        values = _last(backbone, {**arguments, "luthier": context})
        if len(reached) == tune.parts.blocks:
            return values
    raise LuthierError(
        "this model does not hand its blocks what a forward pass is told, so hidden states between them cannot be changed",
        where=tune.parts.architecture,
        fix="use another model, or a technique that leaves hidden states alone",
    )


def head_now(tune: Attached) -> Callable[[Tensor], Tensor]:
    """The head as the model has it now, hidden states to logits, without a graph of its own numbers: it stays what it is when these
    are exchanged or trained on. So `with tune.at(name)` gives the head of the base or of a snapshot, to be used afterwards."""
    module: Any = tune.model.get_submodule(tune.parts.head)
    weight = _values_now(tune, tune.parts.ties.get(tune.parts.head, tune.parts.head), "weight", module.weight)
    bias = getattr(module, "bias", None)
    bias = None if bias is None else _values_now(tune, tune.parts.head, "bias", bias)
    site = None if tune.is_off or not tune.touches(tune.parts.head) else tune.site(tune.parts.head).now()
    after = finish(tune.model)

    def head(hidden_ND: Tensor) -> Tensor:
        hidden_ND = hidden_ND.to(weight.dtype)
        if site is None:
            return after(functional.linear(hidden_ND, weight, bias))
        return after(site.run(hidden_ND, lambda x: functional.linear(x, weight, bias)))

    return head


def _values_now(tune: Attached, module: str, tensor: str, live: Tensor) -> Tensor:
    # What stands beside the weights of another has none itself: they train there.
    tune = tune if tune.beneath is None else tune.beneath
    name = f"{module}.{tensor}"
    here = [one for one in tune.trained.values() if one.place is not None and one.place.parameter == name]
    here = [one for one in here if one.form not in ("factor", "free")]
    if tune.is_off:
        # What is kept of the base does not change: no copy is needed.
        kept = [one.start for one in here if one.form == "whole" and one.start is not None]
        if name in tune.altered or kept:
            return tune.altered.get(name, *kept)
    values = live.detach()
    return values.clone() if here else values
