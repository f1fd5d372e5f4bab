"""Lottery-ticket sparse fine-tuning (Ansell et al., 2022), section 3: find what moves most, go back to the start, train that alone."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Freezing, LossTerm, Now, Place, Refresh, Select, Selective, Services, State, Tensors, TrainedLike, View
from luthier.kinds.parts import Parts
from luthier.methods.selective._ticket import everything, ticket
from luthier.registry import method


@method(
    title="LT-SFT",
    paper="arXiv:2110.07560",
    row=13,
    reduces_to="share 1: a second full fine-tuning of the same tensors, from the base, with the steps behind the first phase",
    departs="exactly K entries, where the authors' threshold takes ties too, and none that did not move; numbers that weight decay "
    "would move off the ticket do not train at all, and on it decay pulls towards the base; both phases share one run of steps",
    merges="is in place",
    learning_rate=5e-5,
    replication="lt_sft",
)
def lt_sft(
    *,
    share: float = 0.08,
    first: float = 0.5,
    iterations: int = 1,
    l1: float = 0.0,
    target_modules: tuple[str, ...] = ("embedding", "position_embedding", "linear"),
) -> tuple[Selective | Freezing | LossTerm, ...]:
    """Train everything, keep the places of the parameters that moved most, rewind them to the base, and train these alone.

    The learning rate schedule and the optimizer begin anew with each phase. The deltas of runs on the same base can be added.

    Args:
        share: K, how much of the parameters trains in the end; 0.08 are the paper's 14 million of multilingual BERT.
        first: share of the steps, of each iteration, that trains everything; the paper gives both phases equally many.
        iterations: n, how often the two phases follow each other. Each adds K / n entries, chosen by how far they moved since it
            began, and the next goes on from what was learned; the paper's 1. More than 1 hold all numbers as single entries in the
            later first phases, which takes more memory.
        l1: lambda, the weight of the mean distance of all parameters from the base in the loss, a mean over all the model's parameters;
            0 for tasks, 0.1 for languages, as in the paper.
        target_modules: module types or groups of them that may train, biases with them; norms and an untied head stay frozen, as in the
            paper.

    Raises:
        LuthierError: an option is out of its range.
    """
    if not 0.0 < share <= 1.0:
        raise LuthierError(f"the share is {share}", where="lt_sft: share", fix="use more than 0 and at most 1")
    if not 0.0 < first < 1.0:
        raise LuthierError(f"the first phase has a share of {first}", where="lt_sft: first", fix="use more than 0 and less than 1")
    if iterations < 1:
        raise LuthierError(f"there are {iterations} iterations", where="lt_sft: iterations", fix="use 1 or more")
    if l1 < 0.0:
        raise LuthierError(f"the weight of the penalty is {l1}", where="lt_sft: l1", fix="use 0 or more")
    ends = tuple(end for i in range(iterations) for end in ((i + first) / iterations, (i + 1) / iterations))[:-1]

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {place: Select("whole", decay="start") for place in parts.select(target_modules=target_modules, tensor=None)}

    def refresh(state: State, services: Services) -> dict[Place, Refresh]:
        phase = services.now.after().phase(ends)
        if phase == state.get("phase", 0):
            return {}
        state["phase"] = phase
        mine = [one for one in services.trained() if one.slot == services.slot]
        if phase % 2:
            return ticket(state, services, mine, share * (phase // 2 + 1) / iterations)
        return everything(state, services, mine)

    values = Selective(choose, refresh=refresh), Freezing(_is_empty, ends=ends, restart=True)
    return (*values, _penalty(l1)) if l1 else values


def _is_empty(trained: TrainedLike, state: State, now: Now) -> bool:
    """Whether one entry stands in where none was chosen."""
    index = state.get(f"index {trained.place}")
    return index is not None and not len(index) and trained.master.numel() == 1


def _penalty(l1: float) -> LossTerm:
    """The mean distance from the base, over all the model's numbers."""

    def total(view: View, own: Tensors) -> Tensor:
        services = view.services
        assert services is not None
        numbers = sum(services.shape(place).numel() for place in services.parts.places)
        far = [
            _distance(one.value, one.anchor) for one in services.trained() if one.slot == services.slot and one.anchor is not None
        ]
        return torch.stack(far).sum() * (l1 / numbers)

    return LossTerm(total, unit="step", penalty=True)


def _distance(values: Tensor, start: Tensor) -> Tensor:
    wide = torch.promote_types(values.dtype, torch.float32)
    return (values.to(wide) - start.to(wide)).abs().sum()
