"""From gradients to a step, and what happens between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from luthier.kinds.base import Batch, Now, Services, State, TrainedLike
from luthier.kinds.tune import Seen

if TYPE_CHECKING:
    from torch import Tensor


class GradientTransform(NamedTuple):
    """What happens to a gradient, or, behind the optimizer in the chain, to an update?

    `init(trained)` makes the state of one tensor, `update(value, state, trained, now)` returns the new value. With scope `all` the
    functions get lists over all tensors. `takes(trained)` says which tensors it is for; one that a technique returns beside what it
    trains is for its own tensors alone.
    """

    init: Callable[[TrainedLike], State]
    update: Callable[..., Any]
    scope: Literal["tensor", "all"] = "tensor"
    takes: Callable[[TrainedLike], bool] | None = None


class Optimizer(NamedTuple):
    """How does a gradient become a step? `step(value, gradient, state, trained, now)` moves `value` in place. `now.learning_rate` is
    already scheduled; `trained.rate` multiplies it. `seed(state, is_new, seen)` begins the moments of entries that joined (a boolean
    mask in the master's shape) from what was seen of their gradients."""

    init: Callable[[TrainedLike], State]
    step: Callable[[Tensor, Tensor, State, TrainedLike, Now], None]
    takes: Callable[[TrainedLike], bool] | None = None
    seed: Callable[[State, Tensor, Seen], None] | None = None


def _never(trained: TrainedLike, state: State, now: Now) -> bool:
    return False


class Freezing(NamedTuple):
    """What stands still in this step?

    `frozen(trained, state, now)` is asked before every step for each tensor of its own technique, or `everywhere` of the whole run. A
    frozen tensor gets no gradient and takes no step, weight decay included. `forget` drops its optimizer state; once it moves again
    that starts anew.

    A technique with phases names them here, whether or not anything stands still in them: what follows from them is the run's to do.
    The best state of a run is one of the last phase, and patience is counted in it.
    """

    frozen: Callable[[TrainedLike, State, Now], bool] = _never
    everywhere: bool = False
    forget: bool = False
    ends: tuple[float, ...] = ()
    """Where phases end, as shares of the technique's own steps (`Now`), in rising order; the last ends with the run."""
    settles: bool = False
    """The last phase has one step at least, however small its share: only a state behind that is what the technique leaves."""
    restart: bool = False
    """The learning rate schedule begins again with each phase."""
    alone: frozenset[int] = frozenset()
    """Phases, from 0, in which nothing trains but the technique's own numbers. The clocks of all others stand still meanwhile."""

    def borders(self, steps: int) -> list[int]:
        """The own steps with which the phases behind the first begin, of so many."""
        most = max(0, steps - 1) if self.settles else steps
        return [min(most, round(end * steps)) for end in self.ends]


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
        """The step's loss without gradients and without dropout, over all micro-batches and processes."""

    def write(self, trained: TrainedLike, value: Tensor) -> None:
        """Set a trained tensor, and the live weight with it: for sources that try other values."""

    def apply(self, trained: TrainedLike) -> None:
        """Take the step of one tensor now and free its gradient."""

    def when_ready(self, do: Callable[[TrainedLike], None]) -> Any:
        """A context in which `do` is called as soon as a tensor's gradient has arrived; for slices of frozen weights at its end."""


class GradientEstimator(NamedTuple):
    """Where do gradients come from? `gradients(work)` fills them.

    `gives` says what reaches the rest of the run. `gradients`: they come from `work.backward`, so each process has its own
    and they are summed. `all`: they are all there when `gradients` returns, and the step follows. Without `all` the source
    applies each tensor itself; with neither it sets gradients that are the same on every process.
    """

    gradients: Callable[[Pass], None]
    gives: frozenset[str] = frozenset({"gradients", "all"})


class Callback(NamedTuple):
    """What happens between steps? `start(services)` gives the first state, `after_step(state, services)` and
    `after_stage(state, services)` may rewrite trained tensors through `services.write`. Who needs `gradients` finds them in
    `services.trained()` after the step, as the optimizer received them; `base` keeps the base's values."""

    after_step: Callable[[State, Services], None] | None = None
    after_stage: Callable[[State, Services], None] | None = None
    start: Callable[[Services], State] | None = None
    needs: frozenset[str] = frozenset()
    notes: Callable[[State], Mapping[str, float]] | None = None
    """Numbers to log with each step, by name; the same on every process."""
    by_clock: bool = False
    """`after_step` goes by the clock, and is called behind steps without rows, too. Those of others hear of steps that moved something."""
