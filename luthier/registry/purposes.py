"""What people want of techniques, and which ones do it: every technique has one purpose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar


class Named(Protocol):
    """A technique in some form."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def kind(self) -> str:
        """The folder that it stands in."""


One = TypeVar("One", bound=Named)


class Purpose(NamedTuple):
    """What somebody wants, and the techniques for it: those that are named, then all others of these kinds that no purpose names."""

    title: str
    advice: str
    """Where it stands in a recipe, in Markdown with links to the pages of the documentation."""
    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


PURPOSES = (
    Purpose(
        "Train all of a model, or parts of it in place",
        "Under `tune`. The result is a model of the same size, and a delta. No quantized base.",
        ("full", "half"),
        ("selective",),
    ),
    Purpose(
        "Train a small adapter on frozen weights",
        "Under `tune`. Little optimizer state, small files, a quantized base if you like; low-rank ones leave as PEFT adapters.",
        ("lora",),
        ("weight_delta",),
    ),
    Purpose(
        "Train something beside frozen weights: hidden states, prefixes, prompts",
        "Under `tune`. Very few parameters. Most cannot be merged into the weights.",
        ("ia3", "adapter"),
        ("representation_edit", "prefix", "prompt"),
    ),
    Purpose(
        "Learn from good answers",
        "Under `objective`; [Objectives](objectives.md) says how they go together.",
        ("cross_entropy",),
        ("loss_term", "token_loss"),
    ),
    Purpose(
        "Forget less: stay near the model before training",
        "Under `objective`, beside a loss or instead of one. Rows of what should be retained, mixed in, are the other way.",
        ("kl", "asft", "f_divergence", "f_divergence_rows"),
    ),
    Purpose(
        "Keep all experts of a mixture in use",
        "Under `objective`, beside a loss; see [Mixtures of experts](experts.md).",
        ("load_balance",),
    ),
    Purpose(
        "Disturb what is read, so that it is learned more robustly",
        "Under `objective`, beside a loss.",
        ("neftune", "noisefit"),
        ("input_map",),
    ),
    Purpose(
        "Decide which tokens and rows count in the loss",
        "Under `token_weight`, with any loss.",
        (),
        ("token_weight",),
    ),
    Purpose(
        "Prefer some answers to others",
        "Under `objective`; [Preferences](preferences.md) says which for what.",
        ("dpo", "kto", "orpo", "simpo"),
        ("pair_loss", "step_loss", "reference"),
    ),
    Purpose(
        "Learn from a teacher",
        "Under `objective`; see [Distillation](distillation.md).",
        ("distill", "distill_stored", "self_distillation", "weak_to_strong"),
    ),
    Purpose(
        "Classify, tag, score, embed",
        "Under `objective`, except `ptec` (`tune`); see [Heads](heads.md).",
        ("classify", "multi_label", "classify_tokens", "regress", "reward_model", "embed", "ptec"),
        ("head",),
    ),
    Purpose(
        "Take a step: optimizers, clipping, memory of gradients",
        "Under `optimizer` and `gradient_estimator`.",
        ("adamw",),
        ("optimizer", "gradient_transform", "gradient_estimator", "callback", "freezing"),
    ),
    Purpose(
        "Make other rows before training",
        "Under `rows: map`.",
        (),
        ("row_map",),
    ),
    Purpose(
        "Choose rows",
        "`luthier rows score` and `luthier rows select`; see [scores of rows](rows.md#scores-of-rows).",
        (),
        ("row_score",),
    ),
    Purpose(
        "Look inside a model",
        "`luthier probe NAME RUN`.",
        (),
        ("probe",),
    ),
)


def sorted_out(among: Iterable[One]) -> Iterator[tuple[Purpose, list[One]]]:
    """The purposes that have techniques, each with them: those it names in its order, the rest of its kinds behind them."""
    left = {one.name: one for one in among}
    named = {name for purpose in PURPOSES for name in purpose.names}
    for purpose in PURPOSES:
        of_kind = [name for name, one in left.items() if one.kind in purpose.kinds and name not in named]
        if found := [left[name] for name in (*purpose.names, *of_kind) if name in left]:
            yield purpose, found
