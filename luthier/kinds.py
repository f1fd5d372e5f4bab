"""The kinds: what a technique can be. Each is a small immutable value of functions; together they are one fine-tuning run.

A run takes rows, lowers its objectives to terms that sum over a batch, lets a step move the few numbers that a tune has
freed, and leaves a delta behind. Every kind answers one question in that sentence.

Shapes are part of the names: B rows, T time, N labelled positions, C labelled positions of one chunk, V vocabulary, D width,
L layers, R rank, H heads, P prompt or prefix length, I and O a linear's input and output width. `logits_NV` has shape [N, V].

A value holds no state: what a technique must remember is in the `state` it is handed, a flat dictionary that the run owns,
saves in checkpoints and shares among the values one technique returns. Every function can read the clock (`Now`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from luthier.models.parts import Parts

State = dict[str, Any]
"""Tensors, numbers and strings a technique remembers; flat, so that a checkpoint can hold it."""

Tensors = dict[str, Tensor]
"""A technique's own trained tensors, by name."""

Form = Literal["whole", "rows", "cols", "flat", "factor", "free"]


class Now(NamedTuple):
    """The clock: every technique gets it, so that no option repeats what the run already knows."""

    step: int = 0
    """Optimizer steps taken before this one, from 0."""
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
        return f"{self.module}.{self.tensor}" if self.module else self.tensor

    def __str__(self) -> str:
        return self.parameter if self.start is None else f"{self.parameter}[{self.start}:{self.stop}]"


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
    """Free numeric columns of the rows, shape [B]."""

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.attend_BT.sum())

    @property
    def supervised(self) -> int:
        """Targets that directly follow an attended token, which can predict them."""
        return int(((self.label_BT[:, 1:] >= 0) & self.attend_BT[:, :-1]).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.token_ids_BT.to(device),
            self.attend_BT.to(device),
            self.position_BT.to(device),
            self.label_BT.to(device),
            self.row_ids,
            {name: column.to(device) for name, column in self.columns.items()},
        )


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
    leaf: Tensor
    """What autograd sees: read it to put a trained number into a loss."""
    gradient: Tensor | None


class Services(Protocol):
    """All that a technique may ask of the run."""

    now: Now
    parts: Parts
    slot: str
    """The technique's own name in this run, which its trained tensors carry."""

    def rng(self, key: str) -> torch.Generator:
        """A generator for this seed, stage and key; the same at every call, so that resuming needs no saved state."""

    def weight(self, place: Place) -> Tensor:
        """The live values at a place, [O, I] for a linear however it is stored; detached."""

    def start_weight(self, place: Place) -> Tensor:
        """The values at a place before training; needs `keeps the base`."""

    def tensors(self, place: Place) -> Tensors:
        """The technique's own trained tensors at a place."""

    def trained(self) -> Sequence[TrainedLike]:
        """Every trained tensor of the run."""

    def write(self, trained: TrainedLike, value: Tensor) -> None:
        """Set a trained tensor, and the live weight with it."""

    def nll(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """Negative log-likelihood of labels under the language-model head, for any hidden states. Returns loss_N."""

    def forward(self, batch: Batch, columns: Sequence[str]) -> View:
        """Columns of a batch without gradients, in evaluation mode."""


class Chunk(NamedTuple):
    """Some labelled positions with their whole distributions: the only place where logits exist."""

    logits_CV: Tensor
    """In fp32."""
    label_C: Tensor
    key_C: Tensor
    """One integer a position, from (seed, step, row, position): draws made with it do not depend on how a batch is split."""
    reference_logits_CV: Tensor | None = None
    """The base model's logits, where a column asked for them."""


class Column(NamedTuple):
    """A value for each labelled position, made where the logits are. `value(chunk)` returns [C]."""

    name: str
    value: Callable[[Chunk], Tensor]
    reference: bool = False
    """Ask for the base model's logits."""
    gradient: bool = True
    """False: computed without a graph, which saves memory."""


class View:
    """The labelled positions of one micro-batch: columns by name (`view["nll"]`, shape [N]) and where each belongs.

    `label_N`, `row_N` (the row's place in the batch), `position_N` (the target's place in its row), `weight_N` (the product of
    all token weights), `hidden_BTD` (last hidden states, with their graph) and the batch itself.
    """

    def __init__(
        self,
        batch: Batch,
        columns: Mapping[str, Tensor],
        *,
        label_N: Tensor,
        row_N: Tensor,
        position_N: Tensor,
        hidden_BTD: Tensor | None = None,
        weight_N: Tensor | None = None,
        now: Now = Now(),
        services: Services | None = None,
        state: State | None = None,
    ) -> None:
        self.batch, self.columns, self.hidden_BTD = batch, dict(columns), hidden_BTD
        self.label_N, self.row_N, self.position_N = label_N, row_N, position_N
        self.weight_N = torch.ones(len(label_N), device=label_N.device) if weight_N is None else weight_N
        self.now, self.services, self.state = now, services, {} if state is None else state

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def for_technique(self, state: State, weight_N: Tensor | None = None) -> View:
        """The same view with another technique's state, and weights when given."""
        return View(
            self.batch,
            self.columns,
            label_N=self.label_N,
            row_N=self.row_N,
            position_N=self.position_N,
            hidden_BTD=self.hidden_BTD,
            weight_N=self.weight_N if weight_N is None else weight_N,
            now=self.now,
            services=self.services,
            state=state,
        )

    def sum_rows(self, value_N: Tensor) -> Tensor:
        """Sum a column within each row: [N] to [B]."""
        return value_N.new_zeros(len(self.batch.row_ids)).index_add(0, self.row_N, value_N)


# Which rows, and what else to learn from


class RowMap(NamedTuple):
    """Rows in, rows out, before training. `map(rows, services)` returns a list of `luthier.rows.Row`."""

    map: Callable[[Sequence[Any], Services], list[Any]]


# Which numbers may change


class Select(NamedTuple):
    """Which numbers of one place train: all, some output rows, some input columns, or some entries of the flattened [O, I]."""

    form: Literal["whole", "rows", "cols", "flat"]
    index: Tensor | None = None  # type: ignore[assignment]
    rate: float = 1.0
    """Multiplies the learning rate here."""


class Refresh(NamedTuple):
    """A changed selection: the new index, and for each of its entries the old entry it continues, or -1."""

    index: Tensor  # type: ignore[assignment]
    take: Tensor
    seed: Tensor | None = None
    """What new entries start from, added to their live values; None: nothing."""


class Selective(NamedTuple):
    """Which existing numbers train?

    `choose(parts, services)` gives the selection by place. `observe(state, place, gradient_OI)` gets the whole dense gradient of
    each selected place once a step while `observing(now)`, summed over micro-batches and processes. `refresh(state, services)`
    may change selections after a step. Numbers that leave go back to the base (`revert`) or keep what they learnt (`keep`).
    """

    choose: Callable[[Parts, Services], Mapping[Place, Select]]
    observe: Callable[[State, Place, Tensor], None] | None = None
    observing: Callable[[Now], bool] | None = None
    refresh: Callable[[State, Services], Mapping[Place, Refresh]] | None = None
    leave: Literal["revert", "keep"] = "revert"


class Resize(NamedTuple):
    """Trained tensors of another size: new values, and for each tensor which old entry each entry continues, or -1, along
    the tensor's axis (`Additive.axes`)."""

    tensors: Tensors
    take: Mapping[str, Tensor]


class Additive(NamedTuple):
    """Which delta is added to a weight?

    `start(place, weight_OI, services)` makes the tensors, `apply(tensors, x)` the change of the linear's output, `delta(tensors)`
    the same change as a weight [O, I]. `subtract` takes the starting delta out of the frozen weight, so that training starts at
    the base. `observe` and `refresh` as in Selective, for deltas that grow or shrink.
    """

    start: Callable[[Place, Tensor, Services], Tensors]
    apply: Callable[[Tensors, Tensor], Tensor]
    delta: Callable[[Tensors], Tensor]
    roles: tuple[str, ...] = ("linear",)
    subtract: bool = False
    observe: Callable[[State, Place, Tensor], None] | None = None
    observing: Callable[[Now], bool] | None = None
    refresh: Callable[[State, Services], Mapping[Place, Resize]] | None = None
    axes: Mapping[str, int] = {}
    """The axis along which entries of a tensor come and go in a refresh, by tensor name; 0 where not named."""
    rates: Mapping[str, float] = {}
    """Multiplies the learning rate, by tensor name."""
    pair: tuple[str, str] | None = None
    """Names of the factors (down [R, I], up [O, R]) when the delta is `scale * up @ down`: then PEFT can hold it."""
    scale: float = 1.0


class HiddenEdit(NamedTuple):
    """What changes a hidden state? `start(place, width_in, width_out, services)`, then `apply(tensors, x, y)` gives the new output of
    the module at each place of `roles`; `fold(tensors, weight_OI, bias_O)` gives the merged weight and bias where that is possible."""

    start: Callable[[Place, int, int, Services], Tensors]
    apply: Callable[[Tensors, Tensor, Tensor], Tensor]
    roles: tuple[str, ...]
    fold: Callable[[Tensors, Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None = None


class Prefix(NamedTuple):
    """What joins keys and values? `start(parts, services)`, then `keyvalue(tensors, block)` gives keys and values [H, P, width of a
    head] with H the model's key/value heads; every query of every row may attend to them."""

    start: Callable[[Parts, Services], Tensors]
    keyvalue: Callable[[Tensors, int], tuple[Tensor, Tensor]]


class Prompt(NamedTuple):
    """What stands before the input? `start(table_VD, services)`; virtual ids -1 to -`length` stand before each row, and
    `apply(tensors, token_ids_BT, embeds_BTD)` puts their embeddings in."""

    start: Callable[[Tensor, Services], Tensors]
    apply: Callable[[Tensors, Tensor, Tensor], Tensor]
    length: int


# What is minimized


class Term(NamedTuple):
    """What is minimized? Every objective is lowered to this.

    `total(view, own)` returns a *sum* over the unit; the loop alone divides, by the units of the whole step. `count(batch)` counts
    units where the default (kept targets, rows, or 1 a step) is wrong. `start(services)` makes trained tensors of its own.
    """

    total: Callable[[View, Tensors], Tensor]
    unit: Literal["token", "row", "step"] = "token"
    count: Callable[[Batch], float] | None = None  # type: ignore[assignment]
    start: Callable[[Services], Tensors] | None = None
    columns: tuple[str | Column, ...] = ("nll",)
    weight: float = 1.0
    hidden: bool = False
    """Ask for `view.hidden_BTD`."""


class TokenLoss(NamedTuple):
    """A loss for each target: `loss(view)` returns [N]. The spelling of a Term that most objectives need."""

    loss: Callable[[View], Tensor]
    columns: tuple[str | Column, ...] = ("nll",)
    weight: float = 1.0


class TokenWeight(NamedTuple):
    """How much does a token count?

    `weigh(view)` returns [N], from columns of whole rows, without gradient. `count(batch)` gives the units where they are known
    beforehand and differ from the targets. `look(table)` is a rule over the whole step: it gets the columns of every target of the
    step, over micro-batches and processes, sorted by row id and position, and returns keep weights [M]; then the kept are counted.
    """

    weigh: Callable[[View], Tensor] | None = None
    columns: tuple[str | Column, ...] = ()
    count: Callable[[Batch], float] | None = None  # type: ignore[assignment]
    look: Callable[[Mapping[str, Tensor], Now], Tensor] | None = None


# The step


class Transform(NamedTuple):
    """What happens to a gradient, or, behind the optimizer in the chain, to an update?

    `init(trained)` makes the state of one tensor, `update(value, state, trained, now)` returns the new value. With scope `all` the
    functions get lists over all tensors. `takes(trained)` says which tensors it is for.
    """

    init: Callable[[TrainedLike], State]
    update: Callable[..., Any]
    scope: Literal["tensor", "all"] = "tensor"
    takes: Callable[[TrainedLike], bool] | None = None


class Optimizer(NamedTuple):
    """How does a gradient become a step? `step(value, gradient, state, trained, now)` moves `value` in place. `now.learning_rate` is
    already scheduled; `trained.rate` multiplies it."""

    init: Callable[[TrainedLike], State]
    step: Callable[[Tensor, Tensor, State, TrainedLike, Now], None]
    takes: Callable[[TrainedLike], bool] | None = None


class Pass(Protocol):
    """One step's work, as a source of gradients sees it."""

    batches: Sequence[Batch]
    now: Now

    @property
    def trained(self) -> Sequence[TrainedLike]:
        """Every trained tensor."""

    def backward(self, batch: Batch) -> None:
        """Forward and backward of one micro-batch, divided by the units of the whole step; gradients add up in `trained`."""

    def loss(self) -> float:
        """The step's loss without gradients, over all micro-batches and processes."""

    def write(self, trained: TrainedLike, value: Tensor) -> None:
        """Set a trained tensor, and the live weight with it: for sources that try other values."""

    def apply(self, trained: TrainedLike) -> None:
        """Take the step of one tensor now and free its gradient."""

    def when_ready(self, do: Callable[[TrainedLike], None]) -> Any:
        """A context in which `do` is called as soon as a tensor's gradient has arrived; for slices of frozen weights at its end."""


class Source(NamedTuple):
    """Where do gradients come from? `gradients(work)` fills them.

    `gives` says what reaches the rest of the run. `gradients`: they come from `work.backward`, so each process has its own
    and they are summed. `all`: they are all there when `gradients` returns, and the step follows. Without `all` the source
    applies each tensor itself; with neither it sets gradients that are the same on every process.
    """

    gradients: Callable[[Pass], None]
    gives: frozenset[str] = frozenset({"gradients", "all"})


class Keeper(NamedTuple):
    """What happens between steps? `start(services)` gives the first state, `after_step(state, services)` and
    `after_stage(state, services)` may rewrite trained tensors through `services.write`."""

    after_step: Callable[[State, Services], None] | None = None
    after_stage: Callable[[State, Services], None] | None = None
    start: Callable[[Services], State] | None = None
    needs: frozenset[str] = frozenset()


KINDS: dict[str, type] = {
    "row_map": RowMap,
    "selective": Selective,
    "additive": Additive,
    "hidden_edit": HiddenEdit,
    "prefix": Prefix,
    "prompt": Prompt,
    "term": Term,
    "token_loss": TokenLoss,
    "token_weight": TokenWeight,
    "transform": Transform,
    "optimizer": Optimizer,
    "source": Source,
    "keeper": Keeper,
}
"""Folder under `luthier/methods/` to kind."""

TUNES = ("selective", "additive", "hidden_edit", "prefix", "prompt")
OBJECTIVES = ("term", "token_loss")
STEPS = ("transform", "optimizer")


def kind_of(value: object) -> str:
    """The folder name of a value's kind."""
    for name, kind in KINDS.items():
        if isinstance(value, kind):
            return name
    raise TypeError(f"{type(value).__name__} is no kind of luthier")
