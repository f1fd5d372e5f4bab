"""What every kind meets: the clock, places, batches, and the services of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from luthier.kinds.parts import Parts, Place

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.kinds.columns import View


State = dict[str, Any]
"""Tensors, numbers and strings a technique remembers; flat, so that a checkpoint can hold it."""

Tensors: TypeAlias = "dict[str, Tensor]"
"""A technique's own trained tensors, by name."""

Form = Literal["whole", "rows", "cols", "flat", "factor", "free"]


class Now(NamedTuple):
    """The clock: every technique gets it, so that no option repeats what the run already knows.

    A technique that frees numbers has a clock of its own, whose steps are those in which another technique does not hold it still: a
    share of the run is a share of the steps in which it can learn. A step without rows counts, too: phases end where they were to.
    """

    step: int = 0
    """Optimizer steps before this one, from 0."""
    steps: int = 1
    """Optimizer steps of the whole stage."""
    epoch: float = 0.0
    """Passes over the rows so far, with a fraction."""
    stage: int = 0
    stages: int = 1
    factor: float = 1.0
    """What the schedule multiplies the learning rate with now."""
    learning_rate: float = 0.0
    """The run's learning rate times `factor`."""
    seed: int = 0

    @property
    def run_rate(self) -> float:
        """The run's learning rate, without the schedule."""
        return self.learning_rate / self.factor if self.factor else self.learning_rate

    def phase(self, ends: Sequence[float]) -> int:
        """Which phase this step is in, from 0, where phases end at these shares of all steps."""
        return sum(self.step >= round(end * self.steps) for end in ends)

    def after(self) -> Now:
        """The clock when this step is taken."""
        return self._replace(step=self.step + 1)


class Batch(NamedTuple):
    """One micro-batch, padded on one side. The causal shift is not done here but once, where hidden states become columns."""

    token_ids_BT: Tensor
    """Token ids; virtual ids -1 to -P stand for prompt embeddings; 0 where padded."""
    attend_BT: Tensor
    """True at real tokens."""
    position_BT: Tensor
    """0, 1, ... along each row's real tokens."""
    label_BT: Tensor
    """The token id where that token is a target, -100 elsewhere."""
    row_ids: tuple[str, ...]
    columns: Mapping[str, Tensor] = {}
    """Free numeric columns of the rows, shape [B], in fp64 where the device has it; NaN where a row lacks one."""
    texts: Mapping[str, tuple[str, ...]] = {}
    """Free text columns of the rows, one text each; empty where a row lacks one."""
    token_columns: Mapping[str, Tensor] = {}
    """Numbers that the rows carry for each token, shape [B, T], or [B, T, K] where they are K each; 0 where padded."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Places of rows that belong together, such as a chosen answer and the rejected one behind it; empty where every row stands alone.
    All rows of a group are in one micro-batch."""

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.attend_BT.sum())

    @property
    def supervised(self) -> int:
        """Labels that directly follow an attended token, which can predict them."""
        return int(self.targets_by_row().sum())

    def targets_by_row(self) -> Tensor:
        """How many such labels each row has, [B]."""
        return ((self.label_BT[:, 1:] >= 0) & self.attend_BT[:, :-1]).sum(-1)

    def own_tokens(self) -> Tensor:
        """True [B, T] at tokens that are neither padding nor virtual."""
        return self.attend_BT & (self.token_ids_BT >= 0)

    def own(self) -> Batch:
        """The same with the rows' own labels alone, without those of virtual tokens; itself where no virtual token is a target."""
        virtual_BT = (self.token_ids_BT < 0) & (self.label_BT >= 0)
        return self._replace(label_BT=self.label_BT.masked_fill(virtual_BT, -100)) if bool(virtual_BT.any()) else self

    def learnt_groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups of which every row has labels, without those of virtual tokens."""
        if not self.groups:
            return ()
        targets = self.own().targets_by_row().tolist()
        return tuple(group for group in self.groups if all(targets[place] for place in group))

    def of_first(self) -> Batch:
        """The same with the labels of each group's first row alone; itself where every row stands alone."""
        if not self.groups:
            return self
        others = [place for group in self.groups for place in group[1:]]
        label_BT = self.label_BT.clone()
        label_BT[others] = -100
        return self._replace(label_BT=label_BT)

    def take(self, chosen: Tensor) -> Batch:
        """Some rows of it, by their places [B]; as long as the longest of all. Groups of which a row is missing are none."""
        places = chosen.tolist()
        return Batch(
            self.token_ids_BT[chosen],
            self.attend_BT[chosen],
            self.position_BT[chosen],
            self.label_BT[chosen],
            tuple(self.row_ids[place] for place in places),
            {name: column[chosen] for name, column in self.columns.items()},
            {name: tuple(texts[place] for place in places) for name, texts in self.texts.items()},
            {name: column[chosen] for name, column in self.token_columns.items()},
            self._groups_of(places),
        )

    def _groups_of(self, places: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        new = {place: number for number, place in enumerate(places)}
        return tuple(tuple(new[one] for one in group) for group in self.groups if all(one in new for one in group))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        import torch

        from luthier import machine

        widest = None if machine.has_fp64(device) else torch.float32
        return Batch(
            self.token_ids_BT.to(device),
            self.attend_BT.to(device),
            self.position_BT.to(device),
            self.label_BT.to(device),
            self.row_ids,
            {name: column.to(device, widest) for name, column in self.columns.items()},
            self.texts,
            {name: column.to(device) for name, column in self.token_columns.items()},
            self.groups,
        )


def sides_of(groups: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Places of the first and of the second row of each group of two, [P] each: of a pair, the chosen and the rejected answer."""
    import torch

    first_P, second_P = torch.tensor(groups, dtype=torch.int64, device=device).reshape(-1, 2).t()
    return first_P, second_P


class TrainedLike(Protocol):
    """What optimizers and transforms see of one trained tensor (the owner is `luthier.tune`)."""

    name: str
    slot: str
    place: Place | None
    form: Form
    index: Tensor | None
    rate: float
    decay: bool
    changes: bool
    axis: int
    master: Tensor
    gradient: Tensor | None
    """In a callback that needs gradients: what the optimizer received in this step."""

    @property
    def anchor(self) -> Tensor | None:
        """What weight decay pulls towards; None: zero."""

    @property
    def value(self) -> Tensor:
        """The numbers as optimizers hold them, whatever the model rounds them to: what to put into a loss. Gradients flow."""


class Services(Protocol):
    """All that a technique may ask of the run."""

    now: Now
    parts: Parts
    slot: str
    """The technique's own name in this run, which its trained tensors carry."""
    expert: int | None
    """While a delta starts at a stack of experts' matrices: the matrix, from 0, at which it starts; else None."""

    def rng(self, key: str) -> torch.Generator:
        """A generator for this seed, stage and key; the same at every call, so that resuming needs no saved state."""

    def weight(self, place: Place) -> Tensor:
        """The values at a place, [O, I] for a linear however it is stored; detached. Of numbers that train these are the ones that
        optimizers hold, in their type, whatever the model rounds them to."""

    def shape(self, place: Place) -> torch.Size:
        """The shape of the values at a place."""

    def start_weight(self, place: Place) -> Tensor:
        """The values at a place before training; needs `keeps the base`."""

    def tensors(self, place: Place) -> Tensors:
        """The technique's own trained tensors at a place."""

    def trained(self) -> Sequence[TrainedLike]:
        """Every trained tensor of the run."""

    def write(self, trained: TrainedLike, value: Tensor) -> None:
        """Set a trained tensor, and the live weight with it."""

    def remember(self, name: str, share: float = 1.0) -> None:
        """Make or move a snapshot of all trained numbers, which `OtherPass(at=name)` can run: (1 - share) of what it was and `share` of
        what they are now, in fp32 or wider; with a share of 1 a copy. A snapshot that is new is a copy. Of a low-rank delta it is
        the factors that are averaged. Refused, with a share below 1, where numbers come and go."""

    def nll(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """Negative log-likelihood of labels under the language-model head, for any hidden states. Returns loss_N."""

    def block(self, number: int) -> Tensors:
        """A copy of a transformer block's weights as they are now, by their names in it, without what stands beside them."""

    def run_block(self, number: int, weights: Tensors, hidden_BTD: Tensor, attend_BT: Tensor) -> Tensor:
        """What a block with these weights makes of hidden states [B, T, D], in evaluation mode and with nothing beside the weights.
        Gradients flow through the weights and the states."""

    def forward(self, batch: Batch, columns: Sequence[str]) -> View:
        """Columns of a batch without gradients, in evaluation mode."""

    def batches(self, rows: int, source: str = "") -> Sequence[Batch]:
        """Batches for calibration, the same at every call and on every process: some of the run's training rows, drawn by the seed,
        or the first rows of another source, named as under `rows` in a recipe."""

    def inputs(self, batches: Sequence[Batch], places: Sequence[Place], take: Callable[[Place, Tensor], None]) -> None:
        """Run the model on batches, and hand over what each linear map reads: `take(place, x_NI)` once a batch and place, without
        padding, detached."""

    def block_outputs(self, batches: Sequence[Batch], take: Callable[[int, Tensor, Tensor], None]) -> None:
        """Run the model on batches, and hand over what each block gives: `take(block, hidden_BTD, own_BT)` once a batch and block,
        detached; `own_BT` is False at padding and virtual tokens."""

    def gradients(
        self, batches: Sequence[Batch], places: Sequence[Place], moved: Mapping[Place, Tensor] | None = None
    ) -> dict[Place, Tensor]:
        """Dense gradients of the mean cross-entropy over the batches' labels, by place, in fp32 or wider, [O, I] for linear maps.
        With `moved`, as if the weights at these places, as optimizers hold them, were changed by it, in fp32 or wider unless the model is
        quantized; afterwards they are as before, bit for bit."""
