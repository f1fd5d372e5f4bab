"""NoiseFiT (Khadangi et al., 2025), after the authors' first version: noise behind some blocks, and predictions that do not mind it."""

from __future__ import annotations

from math import inf
from typing import Literal

from torch import Tensor

from luthier.columns.losses import kl
from luthier.errors import LuthierError
from luthier.kinds import Callback, Chunk, Column, Disturbed, LossTerm, OtherPass, Services, State, Tensors, View
from luthier.methods.loss_term._noise import absolute_scale, relative_scale, signal_to_noise
from luthier.registry import method

FIRST, SECOND = "noisefit first", "noisefit second"
SOFT, CONSISTENCY = "noisefit soft", "noisefit consistency"
CALIBRATION_ROWS = 4
"""The authors' batch."""
SCALES = {"absolute": absolute_scale, "relative": relative_scale}


@method(
    title="NoiseFiT",
    paper="arXiv:2504.03302",
    row=167,
    reduces_to="mix 1 and consistency 0: plain cross-entropy, in one pass",
    departs="the spread and the mean variance are those of each row, where the authors take the padded batch; `noise_std` multiplies the "
    "noise once, where their training multiplies it twice; blocks are compared by the noise's expectation instead of 10 draws, and the "
    "last one before the final norm; labels are shifted, where they weigh unshifted logits; without a gradient through the noise's "
    "size and through the clean distribution, unless asked for",
    replication="noisefit",
)
def noisefit(
    *,
    noise_std: float = 0.1,
    mix: float = 0.5,
    consistency: float = 0.1,
    temperature: float = 1.0,
    layers: int = 3,
    choose: Literal["highest", "lowest"] = "highest",
    scale: Literal["absolute", "relative"] = "absolute",
    detach_clean: bool = True,
    detach_scale: bool = True,
) -> tuple[LossTerm, Callback]:
    """Learn the labels, and predict alike when noise is added behind some blocks: a x cross-entropy + (1 - a) x the divergence of two
    noisy predictions from the clean one + lambda x that of one noisy prediction from the other.

    It stands for cross-entropy and contains it. Every step runs the model three times forward and back, and keeps what backward needs
    of all three. The blocks are chosen once, at the start, on 4 rows. Evaluation has no noise.

    Args:
        noise_std: how strong the noise is.
        mix: a, the share of the cross-entropy; the rest is the soft loss.
        consistency: lambda, the weight of the divergence between the noisy predictions.
        temperature: divides the clean logits in the soft loss, and only these.
        layers: k, how many blocks get noise.
        choose: those whose signal-to-noise ratio is highest, or lowest. With the absolute scale the highest have the smallest states.
        scale: `absolute`, as in the paper, grows with the square of the hidden states; `relative` with the states.
        detach_clean: whether the soft loss leaves the clean prediction alone; the authors' code does not.
        detach_scale: whether the size of the noise counts as given; in the authors' code the states are also pulled by it.

    Raises:
        LuthierError: an option is out of its range, the model has fewer blocks, or they cannot be reached.
    """
    for name, value, most in (("noise_std", noise_std, inf), ("mix", mix, 1.0), ("consistency", consistency, inf)):
        if not 0.0 <= value <= most or value == inf:
            raise LuthierError(
                f"`{name}` is {value}", where=f"noisefit: {name}", fix="use 0 to 1" if most == 1.0 else "use 0 or more"
            )
    if not 0.0 < temperature < inf:
        raise LuthierError(f"`temperature` is {temperature}", where="noisefit: temperature", fix="use more than 0")
    if layers < 1:
        raise LuthierError(f"`layers` is {layers}", where="noisefit: layers", fix="use 1 or more")
    scale_of = SCALES[scale]

    def start(services: Services) -> State:
        blocks = services.parts.blocks
        if layers > blocks:
            raise LuthierError(
                f"`layers` is {layers}, and the model has {blocks} blocks", where="noisefit: layers", fix=f"use 1 to {blocks}"
            )
        ratios = signal_to_noise(services, services.batches(CALIBRATION_ROWS), scale_of, noise_std)
        ordered = sorted(range(blocks), key=lambda block: ratios[block], reverse=choose == "highest")
        return {_noisy(block): int(block in ordered[:layers]) for block in range(blocks)}

    def disturb(one: Disturbed) -> Tensor:
        if not one.state[_noisy(one.block)]:
            return one.hidden_BTD
        scale_BTD = scale_of(one.hidden_BTD.detach() if detach_scale else one.hidden_BTD, one.own_BT)
        noise_BTD = noise_std * scale_BTD * one.normal_BTD(0).to(scale_BTD.dtype)
        return one.hidden_BTD + noise_BTD.to(one.hidden_BTD.dtype)

    passes = tuple(OtherPass(name, gradient=True, disturb=disturb) for name in (FIRST, SECOND))

    def soft(chunk: Chunk) -> Tensor:
        clean_CV = chunk.logits_CV.detach() if detach_clean else chunk.logits_CV
        target_CV = (clean_CV / temperature).log_softmax(1)
        first_C, second_C = (kl(target_CV, chunk.other_log_probabilities(name)) for name in (FIRST, SECOND))
        return 0.5 * (first_C + second_C)

    def between(chunk: Chunk) -> Tensor:
        return kl(chunk.other_log_probabilities(SECOND), chunk.other_log_probabilities(FIRST))

    weights = {SOFT: 1.0 - mix, CONSISTENCY: consistency}
    made = (Column(SOFT, soft, passes), Column(CONSISTENCY, between, passes))
    columns = tuple(one for one in made if weights[one.name])

    def total(view: View, own: Tensors) -> Tensor:
        loss_N = mix * view["nll"]
        for column in columns:
            loss_N = loss_N + weights[column.name] * view[column.name]
            view.note(column.name, view[column.name])
        return (loss_N * view.weight_N).sum()

    return LossTerm(total, columns=("nll", *columns)), Callback(start=start if columns else None)


def _noisy(block: int) -> str:
    return f"noise behind block {block}"
