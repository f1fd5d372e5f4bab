"""Self-distillation for further pre-training (Lee et al., 2023): train twice, the second time near the first result's hidden states."""

from __future__ import annotations

from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Batch, LossTerm, OtherPass, Tensors, View
from luthier.registry import method


@method(
    title="Self-distillation",
    paper="arXiv:2210.02871",
    row=198,
    reduces_to="weight 0: no penalty",
    departs="a causal model reads nothing masked, so the model's states are those of the pass that learns, with its dropout; a mean over "
    "positions and features, where the paper has a squared norm",
)
def self_distillation(*, teacher: str = "teacher", weight: float = 1.0) -> LossTerm:
    """Hold the last hidden states near those of a teacher, which is the result of a first run of the same recipe.

    Train once; then train again from the same model, not from the result, with `models: {teacher: RUN}`. The squared distance is a mean
    over the rows' own tokens, labels or not, and over features. It stands beside another objective: cross-entropy, unless one is named.
    It costs one forward pass of the teacher. The log has the distance.

    Args:
        teacher: which of the recipe's `models`; as wide as the model.
        weight: multiplies the term; 1 in the paper.
    """
    one = OtherPass(teacher, model=teacher)

    def count(batch: Batch) -> float:
        return float(batch.own_tokens().sum())

    def total(view: View, own: Tensors) -> Tensor:
        mine_BTD, theirs_BTD = view.hidden_BTD, view.other_hidden[teacher]
        assert mine_BTD is not None
        if mine_BTD.shape[-1] != theirs_BTD.shape[-1]:
            raise LuthierError(
                f"the hidden states of `{teacher}` have {theirs_BTD.shape[-1]} features, those of the model {mine_BTD.shape[-1]}",
                where="self_distillation",
                fix="name a run of the same model, or use distill, which compares distributions",
            )
        own_BT = view.batch.own_tokens()
        distance_N = (mine_BTD[own_BT] - theirs_BTD[own_BT].to(mine_BTD)).square().mean(1)
        view.note_groups("distance to the teacher", distance_N)
        return distance_N.sum()

    return LossTerm(total, count=count, columns=(), weight=weight, hidden=True, others=(one,), penalty=True)
