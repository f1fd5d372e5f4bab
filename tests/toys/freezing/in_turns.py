"""A toy freezing: matrices and vectors move in turns."""

from __future__ import annotations

from luthier.kinds import Freezing, Now, State, TrainedLike
from luthier.registry import method


@method(title="In turns")
def in_turns(*, every: int = 1, forget: bool = False) -> Freezing:
    """Let matrices move for some steps, then everything else for as many.

    Args:
        every: steps of a turn.
        forget: drop the optimizer state of what stands still.
    """

    def frozen(trained: TrainedLike, state: State, now: Now) -> bool:
        return (trained.master.ndim > 1) == bool(now.step // every % 2)

    return Freezing(frozen, everywhere=True, forget=forget)
