"""What is minimized: losses over pairs and labelled answers by TRL's names, and what is added to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.convert.config import Config
from luthier.convert.draft import Draft
from luthier.errors import LuthierError

SAMPLED = ("ppo", "grpo", "gdpo", "rloo", "online_dpo", "xpo", "nash_md", "ebft")
PAIRS = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "robust": "robust",
    "bco_pair": "bco",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "aot_pair": "aot",
    "aot_unpaired": "aot_unpaired",
    "discopop": "discopop",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "sft": "cross_entropy",
}
"""TRL's `loss_type` of pairs to the technique."""
SMOOTHED = ("dpo", "exo", "aot", "aot_unpaired")
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "jensen_shannon", "alpha_divergence": "alpha"}


def refuse_sampled(config: Config, key: str, name: str) -> None:
    """Refuse what trains on answers that it samples in the same run.

    Raises:
        LuthierError: it does.
    """
    if name in SAMPLED:
        raise LuthierError(
            f"{name} trains on answers that it samples in the same run, and luthier does not",
            where=f"{config.where}: {key}",
            fix="sample answers before training: `luthier rows answers`, `luthier rows best-of`",
        )


def pair_losses(config: Config, draft: Draft, names: Sequence[str], weights: Sequence[float] | None, beta: float) -> list[Any]:
    """Losses over pairs, each a technique with its options.

    Args:
        config, draft: as for every converter.
        names: TRL's names of them.
        weights: of each; None: 1.
        beta: of all of them.

    Raises:
        LuthierError: a loss has no counterpart.
    """
    smoothing = config.number("label_smoothing", "dpo_label_smoothing")
    divergence, alpha = config.text("f_divergence_type"), config.number("f_alpha_divergence_coef")
    weighted, tau = config.flag("use_weighting", "dpo_use_weighting"), config.number("discopop_tau")
    if weights is not None and (not isinstance(weights, list) or len(weights) != len(names)):
        raise LuthierError(
            f"{len(names)} losses have the weights {weights}",
            where=f"{config.where}: loss weights",
            fix="one weight for each loss",
        )
    made: list[Any] = []
    for place, name in enumerate(names):
        if name not in PAIRS:
            raise LuthierError(
                f"the loss `{name}` has no counterpart",
                where=f"{config.where}: loss",
                fix="choose one of `luthier techniques --kind pair_loss` and write the recipe with it",
            )
        technique = PAIRS[name]
        options: dict[str, Any] = {} if name == "sft" else {"beta": beta}
        if name == "sigmoid" and divergence in DIVERGENCES:
            technique = "f_dpo"
            options["divergence"] = DIVERGENCES[divergence]
            if divergence == "alpha_divergence":
                options["alpha"] = 1.0 - (0.5 if alpha is None else alpha)
        elif name == "sigmoid" and weighted:
            technique = "wpo"
        if smoothing and technique in SMOOTHED:
            options["label_smoothing"] = smoothing
        options |= {"wrong": smoothing or 0.0} if name == "robust" else {}
        options |= {"length_normalized": True} if name == "sigmoid_norm" else {}
        options |= {"shift": False} if name == "bco_pair" else {}
        options |= {"temperature": tau} if name == "discopop" and tau is not None else {}
        options |= {"weight": weights[place]} if weights is not None and weights[place] != 1 else {}
        made.append({technique: options} if options else technique)
    used = {next(iter(one)) if isinstance(one, dict) else one for one in made}
    if smoothing and not used & {*SMOOTHED, "robust"}:
        draft.leave("label_smoothing", smoothing, "none of these losses smooths labels")
    if divergence not in (None, "reverse_kl") and "f_dpo" not in used:
        draft.leave("f_divergence_type", divergence, "the paper has it for DPO")
    if weighted and "wpo" not in used:
        draft.leave("use_weighting", True, "the paper has it for DPO")
    return made


def kto(config: Config, beta: float) -> Mapping[str, Any]:
    """The loss over labelled answers."""
    options: dict[str, Any] = {"beta": beta}
    for ours, theirs in (
        ("desirable_weight", ("desirable_weight", "kto_desirable_weight", "kto_chosen_weight")),
        ("undesirable_weight", ("undesirable_weight", "kto_undesirable_weight", "kto_rejected_weight")),
    ):
        weight = config.number(*theirs)
        if weight is not None and weight != 1:
            options[ours] = weight
    name = config.text("loss_type") if config.data.get("loss_type") in ("kto", "apo_zero_unpaired") else None
    return {name or "kto": options}


def simpo(config: Config, beta: float, cross_entropy: float) -> list[Any]:
    """SimPO with its margin, and the supervised part that TRL adds unless told otherwise."""
    margin = config.number("simpo_gamma")
    parts: list[Any] = [{"simpo": {"beta": beta, "margin": 0.5 if margin is None else margin}}]
    return [*parts, {"cross_entropy": {"weight": cross_entropy}}] if cross_entropy else parts


def reward_model(config: Config) -> Mapping[str, Any]:
    """A reward model; the others center nothing unless told so."""
    return {"reward_model": {"center_rewards_coefficient": config.number("center_rewards_coefficient") or 0.0}}


def minimized(config: Config, draft: Draft, losses: Sequence[Any], remark: str = "") -> None:
    """Put everything under `objective`, with what stands beside any loss."""
    parts = list(losses)
    noise = config.number("neftune_noise_alpha", "noisy_embedding_alpha")
    if noise:
        parts.append({"neftune": {"alpha": noise}})
    smoothing = config.number("label_smoothing_factor")
    if smoothing and losses:
        draft.leave("label_smoothing_factor", smoothing, "it is of cross-entropy, and something else is minimized")
    elif smoothing:
        parts.append({"label_smoothing": {"amount": smoothing}})
    if config.flag("sync_ref_model"):
        every, mix = config.whole("ref_model_sync_steps"), config.number("ref_model_mixup_alpha")
        parts.append({"following_reference": {"sync_every": every or 512, "mix": 0.6 if mix is None else mix}})
    if (other := config.text("ref_model")) is not None:
        parts.append("model_reference")
        draft.put("models", {"reference": other})
    if config.flag("precompute_ref_log_probs"):
        draft.leave("precompute_ref_log_probs", True, "`luthier rows store likelihood` makes them once, for `stored_reference`")
    if (alpha := config.number("ld_alpha")) is not None:
        draft.put("token_weight", {"length_desensitization": {"alpha": alpha}})
    if parts:
        draft.put("objective", parts[0] if len(parts) == 1 else parts, remark)
