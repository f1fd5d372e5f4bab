"""What a technique may ask of the run, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from luthier import draws
from luthier.columns import chunked
from luthier.columns.targets import Targets, find_targets
from luthier.errors import LuthierError
from luthier.kinds import Batch, Column, Now, OtherPass, Place, State, Tensors, TrainedLike, View
from luthier.kinds.columns import Routed, at_targets
from luthier.models import blocks
from luthier.models.attention import alike
from luthier.models.head import head_of
from luthier.models.modes import evaluating
from luthier.models.quantized import shape_of
from luthier.models.sharding import whole
from luthier.training import calibrate
from luthier.training.disturb import disturbance
from luthier.tune import Tune
from luthier.tune.forward import BlockChange, EmbedChange, Hidden, draws_apart, head_now, hidden, without_virtual


class RunServices:
    """One technique's view of the run: its clock, the model by places, its own tensors, draws by name, forward passes."""

    expert: int | None = None

    def __init__(self, tune: Tune, slot: str, now: Now, calibration: Calibration | None = None) -> None:
        self._tune, self.slot, self._run, self._calibration = tune, slot, now, calibration
        self.now, self.parts = tune.turns.own(slot, now), tune.parts

    def rng(self, key: str) -> torch.Generator:
        """A generator for this seed, stage and key."""
        return draws.generator(self.now.seed, self.slot, self.now.stage, key)

    def weight(self, place: Place) -> Tensor:
        """The values at a place, as optimizers hold them where they train."""
        return whole(self._tune.held(place))

    def shape(self, place: Place) -> torch.Size:
        """The shape of the values at a place."""
        return self.parts.outputs(place, torch.empty(shape_of(self._tune.model, place.parameter), device="meta")).shape

    def start_weight(self, place: Place) -> Tensor:
        """The base's values of the numbers this technique trains at a place."""
        trained = self._tune.trained.get(f"{self.slot}/{place}")
        if trained is None or trained.start is None:
            raise LuthierError(
                f"`{self.slot}` asks for base values that are not kept",
                where=str(place),
                fix="keep the base in the recipe",
            )
        return trained.start

    def tensors(self, place: Place) -> Tensors:
        """The technique's own trained tensors at a place."""
        for own in self._tune.owns:
            if own.slot == self.slot and own.place == place:
                return own.masters()
        return {}

    def trained(self) -> Sequence[TrainedLike]:
        """Every trained tensor of the run."""
        return list(self._tune.trained.values())

    def write(self, trained: TrainedLike, value: Tensor) -> None:
        """Set a trained tensor and the live weight with it."""
        self._tune.set({trained.name: value})

    def remember(self, name: str, share: float = 1.0) -> None:
        """Move a snapshot a share of the way to the trained numbers as they are now."""
        if name in ("", "base", "best") or "|" in name:
            raise LuthierError(f"a snapshot of `{self.slot}` cannot be called `{name}`", fix="give it the technique's name")
        if self._tune.root is not None:
            raise LuthierError(
                f"`{self.slot}` runs an earlier state of the model, which a model spread over processes cannot do",
                where="train.sharding",
                fix="use train.sharding: none",
            )
        self._tune.snapshot(name, share)

    def nll(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """Negative log-likelihood of labels for any hidden states."""
        found = chunked.compute(
            hidden_ND,
            label_N,
            head_of(self._tune.model, self.parts),
            chunked.resolve(["nll"]),
            # These are not the tokens of the pass.
            drawing=lambda key_N: self._tune.drawing_at(None),
            vocabulary=self.parts.vocabulary,
        )
        return found["nll"]

    def block(self, number: int) -> Tensors:
        """A copy of a transformer block's weights."""
        return blocks.weights(self._tune.model, self.parts, number)

    def run_block(self, number: int, weights: Tensors, hidden_BTD: Tensor, attend_BT: Tensor) -> Tensor:
        """What a block with these weights makes of hidden states."""
        with self._tune.bare():
            return blocks.run(self._tune.model, self.parts, number, weights, hidden_BTD, attend_BT)

    def forward(self, batch: Batch, columns: Sequence[str]) -> View:
        """Columns of a batch without gradients, in evaluation mode."""
        with evaluating(self._tune.model):
            return view_of(self._tune, batch, chunked.resolve(columns), self._run)

    def batches(self, rows: int, source: str = "") -> Sequence[Batch]:
        """Batches for calibration, the same at every call and on every process."""
        if self._calibration is None:
            raise LuthierError(
                f"`{self.slot}` needs rows for calibration, and there are none here",
                fix="give build_engine a `calibration`, as a run from a recipe does",
            )
        device = next(self._tune.model.parameters()).device
        return [batch.to(device) for batch in self._calibration(rows, source) if batch.row_ids]

    def inputs(self, batches: Sequence[Batch], places: Sequence[Place], take: Callable[[Place, Tensor], None]) -> None:
        """Hand over what each linear map reads, once a batch and place."""
        calibrate.inputs(self._tune, batches, places, take)

    def block_outputs(self, batches: Sequence[Batch], take: Callable[[int, Tensor, Tensor], None]) -> None:
        """Hand over what each block gives, once a batch and block."""
        calibrate.block_outputs(self._tune, batches, take)

    def gradients(
        self, batches: Sequence[Batch], places: Sequence[Place], moved: Mapping[Place, Tensor] | None = None
    ) -> dict[Place, Tensor]:
        """Dense gradients of the mean cross-entropy over the batches' labels, by place."""
        return calibrate.gradients(self._tune, batches, places, moved or {}, self.nll)


Calibration = Callable[[int, str], Sequence[Batch]]
"""Gives batches with so many rows of a source; of the run's own training rows where the source is empty."""


def view_of(
    tune: Tune,
    batch: Batch,
    columns: Sequence[Column],
    now: Now,
    *,
    read: Batch | None = None,
    embed: EmbedChange | None = None,
    remembered: Mapping[str, State] = {},
    keep_hidden: bool = False,
    keep_others: Sequence[OtherPass] = (),
    keep_routed: bool = False,
    pack: bool | None = None,
    trains: bool = False,
) -> View:
    """Run the model on a batch and make columns of its labels.

    Args:
        tune: the model, with what is attached to it.
        batch: the rows.
        columns: what to make.
        now: the clock.
        read: what the model reads instead of the batch, in every pass.
        embed: what becomes of the embeddings [B, T, D], in every pass.
        remembered: the state of the technique that asks for another pass, by the pass's name.
        keep_hidden: keep the last hidden states.
        keep_others: other passes whose last hidden states are kept, beside those that columns read.
        keep_routed: keep what routers say of the tokens.
        pack: run the rows without padding; None: as the run does.
        trains: the run learns from this pass, so that techniques drop numbers in it, as the model does.
    """
    pack = tune.packs if pack is None else pack
    share = embed is None and shares_beginnings(tune, columns, keep_others, trains=trains)
    where = find_targets(batch)
    row_number = draws.seeds_of(batch.row_ids, where.row_N.device)
    keys = draws.keys(now.seed, now.step, row_number[where.row_N], where.source_N)
    carried = dict.fromkeys(name for column in columns for name in column.given)
    given = {name: at_targets(batch, name, where.row_N, where.source_N + 1) for name in carried}

    asked = chunked.passes_of(columns)

    # What is compared must have read the same.
    reading = batch if read is None else read

    def run(
        change: BlockChange | None = None, context_BT: Tensor | None = None, *, trains: bool = trains, routed: bool = False
    ) -> Hidden:
        at = now if trains else None
        return hidden(
            tune, reading, pack=pack, embed=embed, blocks=change, context_BT=context_BT, draws_at=at, share=share, routed=routed
        )

    def make() -> tuple[Tensor | None, dict[str, Tensor], dict[str, Tensor], tuple[Routed, ...]]:
        # Other weights run first: exchanging weights under a graph that waits for backward would be wrong.
        others, states_of = {}, {}
        named = {one.name: one for one in (*asked, *keep_others)}
        for one in sorted(named.values(), key=_is_own):
            change = disturbance(one, batch, now, remembered.get(one.name, {}))
            if one.model:
                made, head = _of_model(tune, one, reading, pack=pack, share=share, embed=embed, change=change)
            else:
                # Dropout is the training pass's alone.
                draws_here = trains and one.gradient and not one.at
                made, head = (_again if _is_own(one) else _other)(tune, one, partial(run, change, trains=draws_here))
            others[one.name] = chunked.Other(made.at(where.row_N, where.source_N), head, one.gradient)
            if one in keep_others:
                states_of[one.name] = made.padded(batch.attend_BT)
        context_BT = _context(batch, where) if chunked.CONTEXT_ATTENTION in columns else None
        states = run(context_BT=context_BT, routed=keep_routed)
        wanted = [column for column in columns if column is not chunked.CONTEXT_ATTENTION]
        # An encoder has no language head to ask for.
        found: dict[str, Tensor] = {}
        if wanted:
            found = chunked.compute(
                states.at(where.row_N, where.source_N),
                where.label_N,
                head_of(tune.model, tune.parts),
                wanted,
                key_N=keys,
                drawing=(lambda key_N: tune.drawing_at(key_N if trains else None)),
                others={one.name: others[one.name] for one in asked},
                given=given,
                vocabulary=tune.parts.vocabulary,
            )
        if context_BT is not None:
            found[chunked.CONTEXT_ATTENTION.name] = states.mass_at(where.row_N, where.source_N + 1)
        return states.padded(batch.attend_BT) if keep_hidden else None, found, states_of, states.routed

    with alike(trains):
        hidden_BTD, found, other_hidden, routed = tune.run(make)
    view = View(
        batch,
        found,
        label_N=where.label_N,
        row_N=where.row_N,
        position_N=where.source_N + 1,
        hidden_BTD=hidden_BTD,
        now=now,
    )
    view.other_hidden, view.routed = other_hidden, routed
    return view


def shares_beginnings(tune: Tune, columns: Sequence[Column], others: Sequence[OtherPass] = (), *, trains: bool) -> bool:
    """Whether every pass that columns need, and others, may run what rows of a group begin with once.

    All do or none does: what is compared is rounded alike, so that a difference of zero is zero.
    """
    if draws_apart(tune, trains=trains) or chunked.CONTEXT_ATTENTION in columns:
        return False
    return all(one.disturb is None for one in (*chunked.passes_of(columns), *others))


def _context(batch: Batch, where: Targets) -> Tensor:
    """True at real tokens that are no labels, [B, T]."""
    context_BT = batch.attend_BT.clone()
    context_BT[where.row_N, where.source_N + 1] = False
    return context_BT


def _is_own(one: OtherPass) -> bool:
    """Whether a pass runs the weights that train."""
    return not one.at and not one.model


def _other(tune: Tune, one: OtherPass, run: Callable[[], Hidden]) -> tuple[Hidden, chunked.Head]:
    """A pass of other weights, as far as the head."""
    with tune.at(one.at), evaluating(tune.model):
        return run(), head_now(tune)


def _again(tune: Tune, one: OtherPass, run: Callable[[], Hidden]) -> tuple[Hidden, chunked.Head]:
    """The weights that train once more, as far as the head; with gradients the model runs as it trains."""
    with nullcontext() if one.gradient else evaluating(tune.model):
        return run(), head_of(tune.model, tune.parts)


def _of_model(
    tune: Tune,
    one: OtherPass,
    reading: Batch,
    *,
    pack: bool,
    share: bool,
    embed: EmbedChange | None,
    change: BlockChange | None,
) -> tuple[Hidden, chunked.Head]:
    """A pass of another model of the run, as far as the head. It reads the rows' own tokens."""
    ids_BT, attend_BT = without_virtual(reading.token_ids_BT, reading.attend_BT)
    own = reading._replace(token_ids_BT=ids_BT, attend_BT=attend_BT)
    with tune.running(one.model) as other, evaluating(other.model):
        made = hidden(other, own, pack=pack and other.packs, share=share, embed=embed, blocks=change)
        return made, head_now(other)
