"""GreenTrainer (Huang et al., 2024): train the tensors that reduce the loss most for what their backward pass costs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError
from luthier.kinds import Batch, Callback, Freezing, Now, Place, Select, Selective, Services, State, TrainedLike
from luthier.kinds.parts import Parts
from luthier.methods.selective._backward_cost import costs, load_of, spent, worth_training
from luthier.registry import method


@method(
    title="GreenTrainer",
    paper="arXiv:2309.13192",
    row=15,
    reduces_to="target 1, where every tensor is of use: full fine-tuning of the same tensors",
    departs="the selection is exact, where the authors' recurrence misses some; importance is measured with a step from fresh moments "
    "and leaves the optimizer alone, and for plain cross-entropy without dropout, whatever the run minimizes; a tensor that trains again "
    "begins with fresh moments; the head is computed at labels only; a target below the forward pass is refused; what checkpointing "
    "computes again and passes for selections are not counted as cost",
    merges="is in place",
    learning_rate=2e-5,
    replication="greentrainer",
)
def greentrainer(
    *,
    target: float = 0.5,
    selections: int = 3,
    calibration_rows: int = 4,
    target_modules: tuple[str, ...] = ("linear", "norm"),
) -> tuple[Selective, Freezing, Callback]:
    """Choose which tensors train so that a step costs a share of full fine-tuning's, and choose again in the course of the run.

    What share of full fine-tuning's backward pass the choice really costs is logged as `greentrainer backward share`. Backward passes end
    at the earliest tensor that trains. What does not train keeps what it learned and has no optimizer state.

    Args:
        target: rho, the cost of forward and backward pass as a share of full fine-tuning's; the paper's 0.5, or 0.7.
        selections: how often the tensors are chosen over the run, at equal distances; 3 is every other of the paper's 5 epochs.
        calibration_rows: rows on which importance is measured, the same each time; the paper's batch of 4.
        target_modules: module types or groups of them that may train, biases with them. With `embedding`, the gradient may have to be
            passed through the whole model.

    Raises:
        LuthierError: an option is out of its range, no tensor fits, or the model is a mixture of experts.
    """
    if not 0.0 < target <= 1.0:
        raise LuthierError(f"the target is {target}", where="greentrainer: target", fix="use more than 0 and at most 1")
    if selections < 1:
        raise LuthierError(f"there are {selections} selections", where="greentrainer: selections", fix="use 1 or more")
    if calibration_rows < 1:
        raise LuthierError(f"there are {calibration_rows} rows", where="greentrainer: calibration_rows", fix="use 1 or more")
    ends = [number / selections for number in range(1, selections)]

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {place: Select("whole") for place in parts.select(target_modules=target_modules, tensor=None)}

    def start(services: Services) -> State:
        chosen = _selected(services, target, calibration_rows)
        if not chosen:
            raise LuthierError(
                f"no tensor that lowers the loss fits into a target of {target}",
                where="greentrainer: target",
                fix="raise it, or lower the learning rate: its steps may be too long for any tensor to be of use",
            )
        return {"selection": 0, **chosen}

    def after_step(state: State, services: Services) -> None:
        selection = services.now.after().phase(ends)
        if selection != state["selection"]:
            state |= {"selection": selection, **_selected(services, target, calibration_rows)}

    return Selective(choose), Freezing(_stands_still, forget=True), Callback(after_step, start=start, notes=_notes, by_clock=True)


def _notes(state: State) -> dict[str, float]:
    return {"greentrainer backward share": state["backward share"]}


def _stands_still(trained: TrainedLike, state: State, now: Now) -> bool:
    return not state[f"trains {trained.place}"]


def _selected(services: Services, target: float, rows: int) -> State:
    """Which tensors train from here on, and what share of a full backward pass that really costs; nothing where none is worth it, so
    that the last choice stays."""
    batches = services.batches(rows)
    found = costs(services, load_of(batches))
    mine = [one.place for one in services.trained() if one.slot == services.slot and one.place is not None]
    value = dict(zip(mine, _importances(services, batches, mine), strict=True))
    trains = worth_training(list(found.values()), [value.get(place, 0.0) for place in found], target)
    if not any(trains):
        return {}
    chosen = {f"trains {place}": int(wanted) for place, wanted in zip(found, trains, strict=True) if place in value}
    return {**chosen, "backward share": spent(list(found.values()), trains)}


def _importances(services: Services, batches: Sequence[Batch], places: Sequence[Place]) -> list[float]:
    """How much one step of AdamW from fresh moments lowers the loss through each tensor."""
    before = services.gradients(batches, places)
    # The first step of Adam: both moments, corrected, are the gradient's own.
    moved = {place: -services.now.learning_rate * g / (g.abs() + 1e-8) for place, g in before.items()}
    after = services.gradients(batches, places, moved)
    return [importance(after[place], moved[place]) for place in places]


def importance(gradient: Tensor, moved: Tensor) -> float:
    """How much a move lowered the loss, to first order, by the gradient where it led to: -sum(gradient x move)."""
    return -machine.total(gradient * moved)
