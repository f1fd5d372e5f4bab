"""Which numbers may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from luthier.kinds.base import Now, Services, State, Tensors
from luthier.kinds.parts import Place

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.kinds.parts import Parts


class Select(NamedTuple):
    """Which numbers of one place train: all, some output rows, some input columns, or some entries of the flattened [O, I]."""

    form: Literal["whole", "rows", "cols", "flat"]
    index: Tensor | None = None  # type: ignore[assignment]
    rate: float = 1.0
    """Multiplies the learning rate here."""
    start: Tensor | None = None
    """Values to begin with instead of the base's, in the shape of what trains."""
    decay: Literal["zero", "start"] = "zero"
    """What weight decay pulls towards: zero, or the values before training."""


class Seen(NamedTuple):
    """What is known of the gradients of new entries from before they joined; read only where an entry is new."""

    mean: Tensor
    square: Tensor
    """The mean of their squares."""
    steps: float
    """How many steps were looked at."""


class Refresh(NamedTuple):
    """A changed selection: the new index, and for each of its entries the old entry it continues, or -1."""

    index: Tensor  # type: ignore[assignment]
    take: Tensor
    seed: Tensor | None = None
    """What new entries start from, added to their live values; None: nothing."""
    form: Literal["rows", "cols", "flat"] | None = None
    """The form of the new selection where it is another one; then every entry is new (`take` is -1 throughout)."""
    seen: Seen | None = None
    """Optimizers that can begin with moments (`Optimizer.seed`) take them from here; None: they begin at zero."""


class Selective(NamedTuple):
    """Which existing numbers train?

    `choose(parts, services)` gives the selection by place. `observe(state, place, gradient_OI)` gets the whole dense gradient of
    each selected place once a step while `observing(now)`, summed over micro-batches and processes. `refresh(state, services)`
    may change selections after a step, also after one without rows, in which nothing was observed. Numbers that leave go back to the
    base (`revert`) or keep what they learned (`keep`).
    """

    choose: Callable[[Parts, Services], Mapping[Place, Select]]
    observe: Callable[[State, Place, Tensor], None] | None = None
    observing: Callable[[Now], bool] | None = None
    refresh: Callable[[State, Services], Mapping[Place, Refresh]] | None = None
    leave: Literal["revert", "keep"] = "revert"


class Resize(NamedTuple):
    """The tensors that stand at a place from now on. Names that are missing leave, others are new or have new values.

    `take` says for a tensor which old entry each entry continues, or -1, along the tensor's axis (`axes`); a tensor that is not
    named there is new throughout.
    """

    tensors: Tensors
    take: Mapping[str, Tensor] = {}


class WeightDelta(NamedTuple):
    """Which delta is added to a weight?

    `start(place, weight_OI, services)` makes the tensors, `apply(tensors, x)` the change of the linear's output, `delta(tensors)`
    the same change as a weight [O, I]: routers and experts compute with the weight and that change. `subtract` takes the starting
    delta out of the frozen weight, so that training starts at the base. `observe` and `refresh` as in Selective, for deltas that grow
    or shrink.

    Tensors named in `frozen` do not train; they belong to the technique and keep their type. `shared(places, services)` makes trained
    tensors that all places have in common; `apply` and `delta` get them among their own.
    """

    start: Callable[[Place, Tensor, Services], Tensors]
    apply: Callable[[Tensors, Tensor], Tensor]
    delta: Callable[[Tensors], Tensor]
    target_modules: tuple[str, ...] = ("linear",)
    subtract: bool = False
    observe: Callable[[State, Place, Tensor], None] | None = None
    observing: Callable[[Now], bool] | None = None
    refresh: Callable[[State, Services], Mapping[Place, Resize]] | None = None
    axes: Mapping[str, int] = {}
    """The axis along which entries of a tensor come and go in a refresh, by tensor name; 0 where not named."""
    rates: Mapping[str, float] = {}
    """Multiplies the learning rate, by tensor name."""
    pair: tuple[str, str] | None = None
    """Names of the factors (down [R, I], up [O, R]) when the delta is `scale * up @ down`: then PEFT can hold it, and they can be had
    back from it."""
    scale: float = 1.0
    factors: Callable[[Tensors], tuple[Tensor, Tensor]] | None = None
    """Makes factors (down [R, I], up [O, R]) of a delta `up @ down` that is low-rank in another way: it is stored by them, and PEFT can
    hold it."""
    frozen: frozenset[str] = frozenset()
    shared: Callable[[Sequence[Place], Services], Tensors] | None = None
    wide: frozenset[str] = frozenset()
    """Names of tensors that `apply` gets as they are held, in fp32 or wider, and not in the type of the computation: those in which
    rounding would hide what was learned, as of numbers near 1. What is merged is then what was trained with."""
    draws: bool = False
    """`apply` drops numbers (`luthier.draws.dropout`), in each row other ones: rows that begin alike are then run apart."""
    stacks: bool = True
    """It may stand at a stack of experts' matrices as well, where each has tensors of its own, which train as stacks [E, ...]; False where
    other parts of the technique take these tensors for those of one matrix."""


class RepresentationEdit(NamedTuple):
    """What changes a hidden state? `start(place, width_in, width_out, services)`, then `apply(tensors, x, y)` gives the new output of the
    module at each place of `target_modules`; `fold(tensors, weight_OI, bias_O)` gives the merged weight and bias where that is possible.

    Roles are those of weights, `block` for whole blocks, `attention_layer` and `mlp_layer` for whole sub-layers, whose input `x` is
    what enters them. With `of` `input` the edit is made before the module, with `y` its input as well, and its result is what the
    module reads. `frozen`, `refresh`, `shared`, `wide` and `draws` as in WeightDelta.
    """

    start: Callable[[Place, int, int, Services], Tensors]
    apply: Callable[[Tensors, Tensor, Tensor], Tensor]
    target_modules: tuple[str, ...]
    fold: Callable[[Tensors, Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None = None
    of: Literal["output", "input"] = "output"
    frozen: frozenset[str] = frozenset()
    rates: Mapping[str, float] = {}
    wide: frozenset[str] = frozenset()
    undecayed: frozenset[str] = frozenset()
    """Names of tensors with several axes that weight decay leaves alone all the same, since they are vectors side by side."""
    refresh: Callable[[State, Services], Mapping[Place, Resize]] | None = None
    shared: Callable[[Sequence[Place], Services], Tensors] | None = None
    draws: bool = False


class Prefix(NamedTuple):
    """What joins keys and values? `start(parts, services)`, then `keyvalue(tensors, block)` gives keys and values [H, P, width of a
    head] with H the model's key/value heads; every query of every row may attend to them."""

    start: Callable[[Parts, Services], Tensors]
    keyvalue: Callable[[Tensors, int], tuple[Tensor, Tensor]]
    frozen: frozenset[str] = frozenset()
    rates: Mapping[str, float] = {}


class Prompt(NamedTuple):
    """What stands before the input? `start(table_VD, services)`; virtual ids -1 to -`length` stand before each row, and
    `apply(tensors, token_ids_BT, embeds_BTD)` puts their embeddings in.

    Where `labels(services)` is given, it returns a label for each virtual token [P], -100 where there is none; they are then learned
    with those of the row, at positions 0 to P - 1 in front of it, and the length is theirs.
    """

    start: Callable[[Tensor, Services], Tensors]
    apply: Callable[[Tensors, Tensor, Tensor], Tensor]
    length: int = 0
    labels: Callable[[Services], Tensor] | None = None
    frozen: frozenset[str] = frozenset()
    rates: Mapping[str, float] = {}
    own_rates: Mapping[str, float] = {}
    """Learning rates by tensor name in the place of the run's, whose schedule they follow."""
    wide: frozenset[str] = frozenset()
    """As in WeightDelta."""
