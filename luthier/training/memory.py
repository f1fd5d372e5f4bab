"""Memory that runs out within a step: the attempt is taken back, so that the step can be taken in smaller micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, State
from luthier.training.engine import Engine, StepResult

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What allocators say (CUDA and MPS, the processor's on Linux, on Windows, cuBLAS) where they raise no error of their own."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def attempt(engine: Engine, batches: Sequence[Batch], now: Now) -> StepResult | None:
    """Take a step, or nothing where memory ran out and smaller micro-batches may help: then no trace of the attempt is left.

    Args:
        engine: takes the step.
        batches: the step's micro-batches.
        now: the clock.

    Raises:
        LuthierError: memory ran out, and the step cannot be taken back or cannot be cut smaller.
    """
    before = {slot: (state, dict(state), _versions(state)) for slot, state in engine.states.items()}
    try:
        return engine.step(batches, now)
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        changed = engine.committed or any(_versions(values) != versions for _, values, versions in before.values())
        _refuse(engine, batches, now, error, changed=changed)
    # Only here: an error that is being handled holds on to the attempt's activations.
    _take_back(engine)
    for state, values, _ in before.values():
        state.clear()
        state.update(values)
    return None


def _refuse(engine: Engine, batches: Sequence[Batch], now: Now, error: Exception, *, changed: bool) -> None:
    """Say why the step cannot be tried again in smaller micro-batches, if it cannot."""
    where = f"step {now.step + 1}"
    if changed:
        raise LuthierError(
            f"memory ran out after the step had begun to change numbers, and it cannot be taken back: {error}",
            where=where,
            fix="resume with a smaller train.micro_batch_tokens, or train fewer numbers (tune: half, tune: lora)",
        ) from error
    if engine.world.size > 1:
        raise LuthierError(
            f"memory ran out on process {engine.world.rank}, and several processes cannot take a step back: {error}",
            where=where,
            fix="resume with a smaller train.micro_batch_tokens",
        ) from error
    if all(len(batch.row_ids) <= 1 for batch in batches):
        longest = max(batches, key=lambda batch: batch.token_ids_BT.numel())
        raise LuthierError(
            f"memory ran out with one row at a time, the longest of {longest.token_ids_BT.numel()} tokens: {error}",
            where=f"{where}, row {', '.join(longest.row_ids)}",
            fix="set train.gradient_checkpointing: true, shorten the rows (rows.max_length), or train fewer numbers (tune: lora)",
        ) from error


def _versions(state: State) -> list[int]:
    """Counts of changes in place, which a copy of the mapping would not undo."""
    return [value._version for value in state.values() if isinstance(value, Tensor)]


def _take_back(engine: Engine) -> None:
    engine.tune.free_gradients()
    engine.tune.observing = frozenset()
    for one in engine.tune.trained.values():
        # A gradient may have been formed and not have arrived.
        one.leaf.grad = None
    machine.free_broken_backward()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller(batches: Sequence[Batch], limit: int) -> int:
    """Half the tokens of the largest micro-batch, padding not counted, or half the limit where that is less: it is cut, packed or
    padded."""
    return max(1, min(limit, max(batch.tokens for batch in batches)) // 2)
