"""LoFiT (Yin et al., 2024, section 3): find the attention heads that matter for a task, then learn an offset for each of those."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Freezing, LossTerm, Place, RepresentationEdit, Resize, Services, State, Tensors, TrainedLike, View
from luthier.methods.representation_edit._heads import offsets, shift, top_heads
from luthier.methods.representation_edit._scaling import scaled, scaled_inputs
from luthier.registry import method


@method(
    title="LoFiT",
    paper="arXiv:2406.01563",
    row=44,
    reduces_to="share 1, second phase: training a bias of attention's output map, in the space of its columns",
    departs="both phases are one run; starts at zero, the base, where the paper draws from N(0, 0.001): `deviation`",
    learning_rate=5e-3,
    replication="lofit",
)
def lofit(
    *, share: float = 0.03, selection: float = 0.5, penalty: float = 5e-4, learning_rate_factor: float = 2.0, deviation: float = 0.0
) -> tuple[RepresentationEdit, LossTerm, Freezing]:
    """Scale every head first; then drop the scales and learn offsets at the heads whose scales moved most.

    The offsets fold into the bias of attention's output map; a model without that bias keeps them beside the weights.

    Args:
        share: of all heads of the model, how many get an offset; 3 % as in the paper (32 of 1024), at least one head.
        selection: share of the run's steps that selects heads; half, as in the paper (5 epochs each).
        penalty: lambda, the weight of the sum of all |A| in the first phase; 5e-4 as in the paper.
        learning_rate_factor: multiplies the learning rate in the second phase; 2 as in the paper (5e-3, then 1e-2).
        deviation: standard deviation of scales and offsets where they start; 0.001 in the paper.
    """
    if not 0.0 < share <= 1.0:
        raise LuthierError(f"the share is {share}", where="lofit: share", fix="use more than 0 and at most 1")
    if not 0.0 < selection < 1.0:
        raise LuthierError(
            f"the selection takes {selection} of the steps", where="lofit: selection", fix="use 0.5, or another share"
        )
    if penalty < 0.0 or learning_rate_factor <= 0.0 or deviation < 0.0:
        raise LuthierError(
            f"penalty {penalty}, learning_rate_factor {learning_rate_factor}, deviation {deviation}",
            where="lofit",
            fix="none may be negative, and the factor not 0",
        )

    def start(place: Place, width_in: int, width_out: int, services: Services) -> Tensors:
        heads, width = services.parts.heads, services.parts.head_width
        if width_in != heads * width:
            raise LuthierError(
                f"attention's output map reads {width_in} channels, not {heads} heads of {width}",
                where=str(place),
                fix="use another technique for this model",
            )
        return {"scale": deviation * torch.randn(heads, width, generator=services.rng(f"scale {place}"))}

    def refresh(state: State, services: Services) -> dict[Place, Resize]:
        state["learning_rate"] = max(state.get("learning_rate", 0.0), services.now.learning_rate)
        if "heads" in state or services.now.after().phase((selection,)) == 0:
            return {}
        scales = _scales(services)
        count = max(1, round(share * services.parts.heads * len(scales)))
        chosen = top_heads([one.master.detach() for one in scales], count, state["learning_rate"])
        state["heads"] = torch.tensor(chosen)
        return {_place(one): offsets(i, chosen, _place(one), deviation, services) for i, one in enumerate(scales)}

    def total(view: View, own: Tensors) -> Tensor:
        assert view.services is not None
        sizes = [one.value.abs().sum() for one in _scales(view.services)]
        return penalty * torch.stack(sizes).sum() if sizes else view["nll"].new_zeros(())

    edit = RepresentationEdit(
        start,
        _apply,
        ("attention_output",),
        _fold,
        of="input",
        frozen=frozenset({"heads"}),
        undecayed=frozenset({"scale", "offset"}),
        rates={"offset": learning_rate_factor},
        refresh=refresh,
    )
    return edit, LossTerm(total, unit="step", penalty=True), Freezing(ends=(selection,), restart=True)


def _scales(services: Services) -> list[TrainedLike]:
    """The technique's scales in the order of the layers; none in the second phase."""
    return [one for one in services.trained() if one.slot == services.slot and one.name.endswith(".scale")]


def _place(one: TrainedLike) -> Place:
    assert one.place is not None
    return one.place


def _apply(tensors: Tensors, x: Tensor, y: Tensor) -> Tensor:
    new = scaled(y, tensors["scale"].flatten()) if "scale" in tensors else y
    return new + shift(tensors, y.shape[-1]) if "offset" in tensors else new


def _fold(tensors: Tensors, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if "offset" in tensors:
        # Offsets stand behind scales, so the map reads them as they are.
        added_O = weight_OI @ shift(tensors, weight_OI.shape[1])
        bias_O = added_O if bias_O is None else bias_O + added_O
    return scaled_inputs(weight_OI, tensors["scale"].flatten()) if "scale" in tensors else weight_OI, bias_O
