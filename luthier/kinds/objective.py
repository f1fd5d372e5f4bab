"""What the model reads while it learns, and what is minimized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from luthier.kinds.base import Batch, Now, Services, Tensors, sides_of
from luthier.kinds.columns import Column, OtherPass, StepTable, View

if TYPE_CHECKING:
    from torch import Tensor


class Stored(NamedTuple):
    """Numbers that a model gave to the run's rows beforehand, which an objective reads from a store (`luthier rows store`).

    Of `likelihood` rows have the free columns `reference_chosen` and `reference_rejected` where they are pairs, else `log_likelihood`: of
    all labels of an answer, in nats. One that stands by itself has it as `reference_chosen`, too. Of `teacher` each label has
    `view.likeliest()`.
    """

    kind: Literal["likelihood", "teacher"]
    unless: tuple[str, ...] = ()
    """Free columns of the rows that say the same: where a row has one of them, no store is looked for."""
    of_base: bool = False
    """They are those of the model before training. A store of another model is then taken only where the recipe names it."""


class Vocabulary(NamedTuple):
    """What an input map may know of token ids."""

    text_V: Tensor
    """True at ids that stand for text; False at special tokens, at those a chat template writes, and where the tokenizer has none."""
    mask: int | None = None
    """The id that says that a token is missing; None where the tokenizer has no such token."""


class Reading(NamedTuple):
    """What an input map gets beside the batch."""

    now: Now
    vocabulary: Vocabulary
    uniform_BT: Callable[[int], Tensor]
    """`uniform_BT(stream)` draws a number from [0, 1) for each token, in fp64, by seed, step, row and position: whatever is made of it
    does not depend on how a step is split. Streams are independent of each other and of other input maps' streams."""
    uniform_BTD: Callable[[int, int], Tensor]
    """`uniform_BTD(stream, width)` draws so many for each token."""


class InputMap(NamedTuple):
    """What does the model read while it learns?

    `map(batch, reading)` returns the token ids [B, T] that the model reads instead, anew in every step, on the processor. Labels,
    padding, positions and virtual ids stay what they are, and so do evaluation and rules over the whole step. Other passes of the step,
    such as the base's, read the same.
    `check(vocabulary)` refuses a tokenizer the map cannot work with, before anything trains.

    `embed(embeds_BTD, batch, reading)` returns the embeddings that the model reads instead, in the same passes and on the model's
    device; `batch` is as the maps of ids left it. Embeddings of virtual ids stay what they are.
    """

    map: Callable[[Batch, Reading], Tensor] | None = None
    check: Callable[[Vocabulary], None] | None = None
    embed: Callable[[Tensor, Batch, Reading], Tensor] | None = None


class LossTerm(NamedTuple):
    """What is minimized? Every objective is lowered to this.

    `total(view, own)` returns a *sum* over the unit; the loop alone divides, by the units of the whole step. `count(batch)` counts
    units where the default (kept labels, rows with labels, groups, or 1 a step) is wrong. A term whose unit is the row or the group
    sees and counts the rows' own labels alone, not those of a prompt's virtual tokens. Where rows belong together, all terms but those
    whose unit is the group see and count the labels of each group's first row alone: of a pair, the chosen answer. `start(services)`
    makes trained tensors of its own.

    Where `count` returns several numbers, `total` returns as many sums, [K]: each is divided by its own units.
    """

    total: Callable[[View, Tensors], Tensor]
    unit: Literal["token", "row", "group", "step"] = "token"
    count: Callable[[Batch], float | tuple[float, ...]] | None = None  # type: ignore[assignment]
    start: Callable[[Services], Tensors] | None = None
    columns: tuple[str | Column, ...] = ("nll",)
    weight: float = 1.0
    hidden: bool = False
    """Ask for `view.hidden_BTD`."""
    routers: bool = False
    """Ask for `view.routed`, which models with experts alone have."""
    others: tuple[OtherPass, ...] = ()
    """Other passes of which it asks for the last hidden states, `view.other_hidden[name]`."""
    rate: float = 1.0
    """What the learning rate of its own tensors is multiplied with."""
    penalty: bool = False
    """It holds something back and teaches nothing by itself: a recipe that names nothing else minimizes cross-entropy, too."""
    check: Callable[[Batch], None] | None = None
    """Refuses rows that lack what it reads of them. It is asked about all rows before the first step: the batch has their ids, their
    free columns and which of them have labels, but not their tokens."""
    stored: Stored | None = None
    """Numbers of another model that it reads."""


class TokenLoss(NamedTuple):
    """A loss for each label: `loss(view)` returns [N]. The spelling of a LossTerm that most objectives need."""

    loss: Callable[[View], Tensor]
    columns: tuple[str | Column, ...] = ("nll",)
    weight: float = 1.0
    penalty: bool = False
    """As a LossTerm's."""
    stored: Stored | None = None
    """As a LossTerm's."""


class Side(NamedTuple):
    """One answer of each pair: the chosen one or the rejected one. Shapes: P pairs."""

    log_likelihood_P: Tensor
    """Of the whole answer, in nats, each label times its token weight."""
    reference_P: Tensor
    """The same under the reference, without a gradient; zeros where the loss has none."""
    targets_P: Tensor
    """How many labels the answer has, at least 1."""
    mean_P: Tensor
    """Log-likelihood of a label, a mean over the answer."""
    gained_P: Tensor
    """By how much the answer is likelier than under the reference, log pi(y) - log reference(y)."""

    @classmethod
    def of(cls, log_likelihood_P: Tensor, reference_P: Tensor, targets_P: Tensor) -> Side:
        """A side, with what follows from its likelihoods."""
        return cls(log_likelihood_P, reference_P, targets_P, log_likelihood_P / targets_P, log_likelihood_P - reference_P)


class Pairs(NamedTuple):
    """What a loss over pairs sees of one micro-batch."""

    chosen: Side
    rejected: Side
    view: View
    """Of both answers' labels."""
    first_P: Tensor
    """The places of the chosen answers in the batch."""
    second_P: Tensor
    """Those of the rejected ones."""
    margin_P: Tensor
    """By how much more the chosen answer gained on the reference than the rejected one."""

    @property
    def mean_margin_P(self) -> Tensor:  # noqa: N802
        """The same of what a label gained, a mean over each answer."""
        return self.chosen.gained_P / self.chosen.targets_P - self.rejected.gained_P / self.rejected.targets_P

    def column(self, name: str) -> Tensor:
        """A free number of the rows, [P]; NaN where a row lacks it.

        Raises:
            KeyError: no row has it.
        """
        if not len(self.first_P) and name not in self.view.batch.columns:
            # Rows without anything to learn, which some process has to run, have no columns.
            return self.margin_P.detach()
        return self.view.batch.columns[name][self.first_P]

    def note(self, name: str, value_P: Tensor) -> None:
        """Log the mean of a number over the step's pairs."""
        self.view.note_groups(name, value_P)


class Reference(NamedTuple):
    """What answers are compared with, where a loss over them has a reference.

    `read(view)` gives the log-likelihood of each row's labels under it, [B], without a gradient, from columns that it names; token weights
    count there, too. A run in which nothing brings one compares with the base.
    """

    read: Callable[[View], Tensor]
    columns: tuple[str | Column, ...] = ()
    check: Callable[[Batch], None] | None = None
    """That of a LossTerm."""
    stored: Stored | None = None
    """That of a LossTerm."""


class PairLoss(NamedTuple):
    """Which of two answers is preferred? `loss(pairs)` returns [P], in nats or as its paper has it.

    The spelling of a LossTerm over rows of a prompt, a chosen and a rejected answer, which are always in one micro-batch; the loop divides
    by the pairs of the whole step. With `reference` the pairs hold the likelihoods under the run's reference. `check` is that of a
    LossTerm.
    """

    loss: Callable[[Pairs], Tensor]
    reference: bool = False
    columns: tuple[str | Column, ...] = ()
    """Beside `nll`."""
    weight: float = 1.0
    reward_scale: float = 1.0
    """What is told as an answer's reward is its gain on the reference times this."""
    check: Callable[[Batch], None] | None = None


Combine = Literal["mean", "median", "min", "mean_minus_deviation"]
"""How the scores that several reward models give an answer become one (Eisenstein et al., 2023)."""
Pool = Literal["auto", "first", "last", "mean"]
"""Which last hidden state of a row a head reads."""
Means = Literal["score", "classes", "labels", "value", "vector", "tags", "entities"]
"""What a head's numbers are: a score, logits of classes of which one is right, logits of labels of which any may be, a number, a vector;
of words, logits of tags, or of those that mark entities."""


class Head(NamedTuple):
    """What does the model say of a whole row?

    `start(services)` makes trained tensors, `read(tensors, hidden_BD)` gives K numbers a row, [B, K] in fp32 or wider, from one of its last
    hidden states: the `first` token's, the `last` token's, or the `mean` of all; `auto` is that of the token which has seen the whole
    row, the last of a causal model and the first of an encoder. They are `view.outputs_BK` for terms. A head is part of the result: it is
    saved with the run, and stands beside the model when that is used. `means` says what the numbers are.

    A head of `words` reads the states of the first tokens of all words that have labels instead, row by row, [N, D], and `view.outputs_BK`
    is [N, K].
    """

    start: Callable[[Services], Tensors]
    read: Callable[[Tensors, Tensor], Tensor]
    means: Means
    pool: Pool | Literal["words"] = "auto"
    names: tuple[str, ...] = ()
    """Of classes, labels or tags, in the order of their numbers."""
    rate: float = 1.0
    """What the learning rate of its tensors is multiplied with."""
    centered: bool = False
    """Of scores, which pairs tell up to a constant: whether training held that constant at 0, so that several models' can be compared."""


class RowTable(NamedTuple):
    """All rows of a step, over micro-batches and processes, sorted by row id. Shapes: R rows."""

    value: Tensor
    """What the loss made of each row, [R, ...]; its gradient goes on to the rows from here."""
    groups: tuple[tuple[int, ...], ...]
    """Places of rows that belong together; empty where every row stands alone."""
    columns: Mapping[str, Tensor]
    """Free numbers of the rows, [R], in fp64; NaN where a row lacks one."""
    now: Now

    def sides(self) -> tuple[Tensor, Tensor]:
        """Places of the first and of the second row of each group, [G] each."""
        return sides_of(self.groups)


class StepLoss(NamedTuple):
    """A loss of all rows of a step together, such as one whose negatives are the other rows.

    `value(view, own)` makes numbers of each row of a micro-batch, [B, ...]; `loss(table)` the loss, summed over its units. Where a step is
    more than one micro-batch the numbers are first made without gradients, and each micro-batch then gets its part of the loss's
    gradient: any split, and any number of processes, gives the same. That costs one forward pass. Where it reads columns, rows and groups
    without labels are left out. With `reference` the view has likelihoods under the run's reference. `check` is that of a LossTerm.
    """

    value: Callable[[View, Tensors], Tensor]
    loss: Callable[[RowTable], Tensor]
    unit: Literal["row", "group", "step"] = "row"
    columns: tuple[str | Column, ...] = ("nll",)
    reference: bool = False
    weight: float = 1.0
    check: Callable[[Batch], None] | None = None
    routers: bool = False
    """As a LossTerm's."""
    penalty: bool = False
    """As a LossTerm's."""


class Written(NamedTuple):
    """A row as it is encoded, before anything is cut off."""

    row: Any
    """The row (`luthier.rows.shapes.Row`)."""
    text: str
    targets: Sequence[tuple[int, int]]
    """Characters of the text that are labels: the first, and the one behind the last; in order, apart from each other."""
    token_ids: Sequence[int]
    write: Callable[[Any], str]
    """The text of another row, written as this one is."""
    replace: Callable[[int, int, str], Sequence[int]]
    """`replace(start, stop, text)` returns the row's token ids with another text in place of the characters from start to stop."""


class Annotation(NamedTuple):
    """A number for each token of a row, given once, when rows are encoded: `View.token_column(name)` has it at the labels.

    `annotate(written, **options)` returns one finite number for each of `written.token_ids`. Rows that are streamed are encoded in
    other processes and kept between runs: for that `annotate` is a function at the top of its module, and what it does follows from
    that module's text and the options.
    """

    name: str
    annotate: Callable[..., Sequence[float]]
    options: Mapping[str, Any] = {}


class TokenWeight(NamedTuple):
    """How much does a token count?

    `weigh(view)` returns [N], from columns of whole rows, without gradient. `count(batch)` gives the labels of each row that will be
    kept, [B], where that is known beforehand and differs from all of them; a row that keeps none counts as no row.

    `look(table)` is a rule over the whole step: it gets every label of the step, over micro-batches and processes, and returns their
    weights [M]; then those above 0 are counted, and rows of which nothing is kept are not run. Columns come from a pass of their own,
    without gradients and in evaluation mode; a rule that asks for none costs no pass.

    `annotation` gives the rows' tokens numbers of their own, which `weigh` reads. `check` is that of a LossTerm.
    """

    weigh: Callable[[View], Tensor] | None = None
    columns: tuple[str | Column, ...] = ()
    count: Callable[[Batch], Tensor] | None = None  # type: ignore[assignment]
    look: Callable[[StepTable], Tensor] | None = None
    annotation: Annotation | None = None
    check: Callable[[Batch], None] | None = None
    virtual: bool = False
    """It also weighs labels of a prompt's virtual tokens. Others see the rows' own labels alone, and leave those as they are."""
