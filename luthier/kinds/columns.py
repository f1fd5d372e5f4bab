"""What objectives see: other passes over the rows, chunks of logits, columns made of them, and the labels of a micro-batch or a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from luthier.kinds.base import Batch, Now, Services, State

if TYPE_CHECKING:
    from torch import Tensor


class Disturbed(NamedTuple):
    """What a disturbance sees of one block in one pass."""

    block: int
    hidden_BTD: Tensor
    """What the block gives."""
    own_BT: Tensor
    """True at the rows' own tokens; padding and virtual tokens stay as they are, whatever a disturbance returns for them."""
    normal_BTD: Callable[[int], Tensor]
    """`normal_BTD(stream)` draws standard normal numbers in fp64, by seed, step, row, position, feature, block and pass."""
    now: Now
    state: State
    """Of the technique that asks for the pass."""


class OtherPass(NamedTuple):
    """Another pass over the same rows, whose distributions columns compare with the model's own.

    Whatever its weights, it reads what the model reads in this step, maps of the input included: both sides of a comparison see the same.
    """

    name: str
    at: str = ""
    """The weights it runs with: those that train, `base`, or the name of a snapshot."""
    gradient: bool = False
    """Gradients flow through it, too; for the weights that train alone. Without, it runs in evaluation mode."""
    disturb: Callable[[Disturbed], Tensor] | None = None
    """What each block's output becomes before the next block reads it; `hidden_BTD` itself where nothing shall happen."""
    model: str = ""
    """Another model, by its name under `models:`, instead of the run's own. Its vocabulary is the run's, but for ids behind all tokens,
    of which it may have more or fewer."""


BASE = OtherPass("base", at="base")
"""The model before training."""


TEACHER = ("teacher_log_probability", "teacher_token_id", "teacher_rest")
"""The names under which tokens carry what a store holds of another model's distributions: [K], [K] and one number a token."""


class Likeliest(NamedTuple):
    """Another model's distribution at each of N labels, as far as it is stored; at labels of virtual tokens it means nothing."""

    log_probability_NK: Tensor
    """The K largest, in nats, the largest first."""
    token_id_NK: Tensor
    """Whose they are, in int64."""
    rest_N: Tensor
    """The probability of all other tokens together; 0 where K is the whole vocabulary."""

    @classmethod
    def of(cls, numbers: Mapping[str, Tensor]) -> Likeliest:
        """What tokens carry under the names of `TEACHER`."""
        log_NK, id_NK, rest_N = (numbers[name] for name in TEACHER)
        return cls(log_NK, id_NK.long(), rest_N)


class Chunk:
    """Some labelled positions with their whole distributions: the only place where logits exist.

    `logits_CV` in fp32 or wider, `label_C`, and `key_C`, one integer a position, from (seed, step, row, position): draws made with it
    do not depend on how a batch is split. `others` are the logits of other passes by name, `given` what the rows carry for these tokens,
    [C, ...]. What several columns need is made once.
    """

    def __init__(
        self,
        logits_CV: Tensor,
        label_C: Tensor,
        key_C: Tensor,
        others: Mapping[str, Tensor] | None = None,
        kept: dict[str, Tensor] | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.logits_CV, self.label_C, self.key_C, self.others = logits_CV, label_C, key_C, others or {}
        self.given = given or {}
        self.kept = {} if kept is None else kept
        self._made: dict[str, Tensor] = {}

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What columns of their own share, made by the first of them that asks. `name` says all that it depends on."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The same for what has no gradient and is small, far below [C, V]: backward gets it and need not make it again."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    @cached_property
    def log_probabilities(self) -> Tensor:
        """Log-probabilities of the whole vocabulary, [C, V]."""
        return self.logits_CV.log_softmax(-1)

    @cached_property
    def label_log_probability(self) -> Tensor:
        """The label's log-probability, [C]."""
        return self.log_probabilities.gather(-1, self.label_C[:, None])[:, 0]

    def other_log_probabilities(self, name: str = "base") -> Tensor:
        """Log-probabilities in another pass, [C, V]."""
        if name not in self.others:
            raise RuntimeError(f"a column reads the pass `{name}` without asking for it: Column(..., passes=(...,))")
        return self.others[name].log_softmax(-1)


class Column(NamedTuple):
    """A value for each labelled position, made where the logits are. `value(chunk)` returns [C]; without a gradient also [C, ...]."""

    name: str
    value: Callable[[Chunk], Tensor]
    passes: tuple[OtherPass, ...] = ()
    """Other passes whose logits it reads."""
    gradient: bool = True
    """False: computed without a graph, which saves memory."""
    given: tuple[str, ...] = ()
    """Numbers that the rows carry for each token and that it reads, as `chunk.given[name]`."""


def at_targets(batch: Batch, name: str, row_N: Tensor, position_N: Tensor) -> Tensor:
    """What the rows of a batch carry under a name, at some of their tokens: [N], or [N, K].

    Raises:
        RuntimeError: they carry no such numbers.
    """
    column_BT = batch.token_columns.get(name)
    if column_BT is not None:
        return column_BT[row_N, position_N]
    if len(row_N):
        raise RuntimeError(
            f"the rows carry no `{name}` for each token: TokenWeight(..., annotation=Annotation(...)), or LossTerm(..., stored=Stored(...))"
        )
    import torch

    return torch.zeros((0, 1) if name in TEACHER[:2] else 0, device=row_N.device)


class Routed(NamedTuple):
    """What one router of a mixture of experts made of a batch's tokens. What stands at padding means nothing."""

    logits_BTE: Tensor
    """In fp32 or wider, with their graph."""
    chosen_BTE: Tensor
    """1 at the experts that a token was sent to, 0 at all others."""


class View:
    """The labelled positions of one micro-batch: columns by name (`view["nll"]`, shape [N]) and where each belongs.

    `label_N`, `row_N` (the row's place in the batch), `position_N` (the label's place in its row), `weight_N` (the product of
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
        import torch

        self.batch, self.columns, self.hidden_BTD = batch, dict(columns), hidden_BTD
        self.label_N, self.row_N, self.position_N = label_N, row_N, position_N
        self.weight_N = torch.ones(len(label_N), device=label_N.device) if weight_N is None else weight_N
        self.now, self.services, self.state = now, services, {} if state is None else state
        self.notes: dict[str, Tensor] = {}
        """What to log beside the loss, by name: numbers whose mean over the step is told."""
        self.head_output_BK: Tensor | None = None
        """What the run's head says of each row, [B, K], where it has one."""
        self.other_hidden: Mapping[str, Tensor] = {}
        """Last hidden states [B, T, D] of the other passes that a term asks for, by name, without a graph unless the pass has one."""
        self.routed: tuple[Routed, ...] = ()
        """What each router said of the tokens, in the order of the blocks, where a term asks for it."""
        self.reference_B: Tensor | None = None
        """In a loss of the whole step that asks for it: the log-likelihood of each row under the reference, without a gradient."""

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def example(self) -> Tensor:
        """Some numbers of it, for their type and device: a column, or what a head says where there is none."""
        return next(iter(self.columns.values())) if self.columns else self.outputs_BK

    def for_technique(self, state: State, weight_N: Tensor | None = None) -> View:
        """The same view with another technique's state, and weights when given."""
        view = View(
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
        view.notes, view.head_output_BK, view.other_hidden = self.notes, self.head_output_BK, self.other_hidden
        view.routed = self.routed
        return view

    @property
    def is_own(self) -> Tensor:
        """True at the rows' own labels, False at those of a prompt's virtual tokens."""
        return self.batch.token_ids_BT[self.row_N, self.position_N] >= 0

    def of_own(self) -> View:
        """The same view of the rows' own labels alone; what is logged through it joins what this one logs."""
        own = self.batch.own()
        # By place: a mask would make shapes depend on numbers, where only shapes are run.
        return self if own is self.batch else self._only(own, self.is_own.nonzero()[:, 0])

    def of_first(self) -> View:
        """The same view of the labels of each group's first row alone; itself where every row stands alone."""
        first = self.batch.of_first()
        if first is self.batch:
            return self
        return self._only(first, (first.label_BT[self.row_N, self.position_N] >= 0).nonzero()[:, 0])

    def _only(self, batch: Batch, place_N: Tensor) -> View:
        view = View(
            batch,
            {name: column[place_N] for name, column in self.columns.items()},
            label_N=self.label_N[place_N],
            row_N=self.row_N[place_N],
            position_N=self.position_N[place_N],
            hidden_BTD=self.hidden_BTD,
            weight_N=self.weight_N[place_N],
            now=self.now,
            services=self.services,
            state=self.state,
        )
        view.notes, view.head_output_BK, view.other_hidden = self.notes, self.head_output_BK, self.other_hidden
        view.routed = self.routed
        return view

    def sum_rows(self, value_N: Tensor) -> Tensor:
        """Sum a column within each row: [N] to [B]."""
        return value_N.new_zeros(len(self.batch.row_ids)).index_add(0, self.row_N, value_N)

    def log_likelihoods(self, column: str = "nll") -> Tensor:
        """The log-likelihood of each row's labels, each times its token weight, in nats: [B].

        Args:
            column: negative log-likelihoods of the labels, of the model itself or of another pass.
        """
        return self.sum_rows(-self[column] * self.weight_N)

    def gains(self) -> Tensor:
        """By how much each row is likelier than under the reference, in nats: [B].

        Raises:
            RuntimeError: the loss asks for no reference.
        """
        if self.reference_B is None:
            raise RuntimeError("a loss reads the reference without asking for it: StepLoss(..., reference=True)")
        return self.log_likelihoods() - self.reference_B

    def sum_rows_wide(self, value_N: Tensor) -> Tensor:
        """The same without a graph, summed in fp64: [B], rounded to fp32 where the device has no fp64."""
        from luthier import machine

        rows = len(self.batch.row_ids)
        add = lambda wide_N, row_N: wide_N.new_zeros(rows).index_add(0, row_N, wide_N)  # noqa: E731
        return machine.computed_wide(add, value_N.detach(), self.row_N)

    def targets_by_row(self) -> Tensor:
        """How many labels each row has, [B]."""
        return self.row_N.bincount(minlength=len(self.batch.row_ids))

    def token_column(self, name: str) -> Tensor:
        """What the rows carry for each token, at the labels: [N], or [N, K]."""
        return at_targets(self.batch, name, self.row_N, self.position_N)

    def likeliest(self) -> Likeliest:
        """What a store holds of another model's distributions at the labels; columns have it as `Likeliest.of(chunk.given)`."""
        return Likeliest.of({name: self.token_column(name) for name in TEACHER})

    def note(self, name: str, value_N: Tensor) -> None:
        """Log the mean over the step's labels of a column [N], beside the loss; labels of virtual tokens do not count."""
        is_all = self.batch.own() is self.batch
        self.notes[name] = value_N.detach() if is_all else value_N.detach()[self.is_own.nonzero()[:, 0]]

    @property
    def outputs_BK(self) -> Tensor:  # noqa: N802
        """What the run's head says of each row.

        Raises:
            RuntimeError: the run has no head.
        """
        if self.head_output_BK is None:
            raise RuntimeError("a term reads what a head says of rows, and no part of the run brings a head")
        return self.head_output_BK

    def note_groups(self, name: str, value_P: Tensor) -> None:
        """Log the mean over the step's groups, or rows, of a number of each, [P]."""
        self.notes[name] = value_P.detach()


class StepTable:
    """Every label of a step's rows, over micro-batches and processes, sorted by row id and position: what a rule over the whole step
    sees. Labels of a prompt's virtual tokens are not among them.

    Shapes: M labels. `row_M` numbers the step's rows that have labels from 0, `position_M` is the label's place in its row, and
    `table["nll"]` a column that the rule asked for. All on the processor.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        *,
        row_M: Tensor,
        position_M: Tensor,
        of_rows: Mapping[str, Tensor],
        now: Now = Now(),
        state: State | None = None,
        services: Services | None = None,
    ) -> None:
        self.columns, self.row_M, self.position_M, self._of_rows = columns, row_M, position_M, of_rows
        self.now, self.state, self.services = now, {} if state is None else state, services
        self.notes: dict[str, float] = {}
        """What to log beside the loss, by name."""

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.row_M)

    @property
    def rows(self) -> int:
        """Rows with labels."""
        return int(self.row_M.max()) + 1 if len(self.row_M) else 0

    def of_rows(self, name: str) -> Tensor | None:
        """A free column of the rows at each label, [M]: numbers in fp64, texts as `luthier.draws.seed_of(text)`, and so numbers where
        other rows of the step have texts; None where no row has it."""
        return self._of_rows.get(name)

    def sum_rows(self, value_M: Tensor) -> Tensor:
        """Sum a column within each row: [M] to [rows]."""
        return value_M.new_zeros(self.rows).index_add(0, self.row_M, value_M)

    def targets_by_row(self) -> Tensor:
        """How many labels each row has."""
        return self.row_M.bincount(minlength=self.rows)

    def note(self, name: str, value: float) -> None:
        """Log a number beside the loss."""
        self.notes[name] = float(value)
