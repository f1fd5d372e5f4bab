"""The kinds: what a technique can be. Each is a small immutable value of functions; together they are one fine-tuning run.

A run takes rows, lowers its objectives to terms that sum over a batch, lets a step move the few numbers that a tune has
freed, and leaves a delta behind. Every kind answers one question in that sentence.

Shapes are part of the names: B rows, T time, N labelled positions, C labelled positions of one chunk, V vocabulary, D width,
L layers, R rank, H heads, P prompt or prefix length, I and O a linear's input and output width. `logits_NV` has shape [N, V].

A value holds no state: what a technique must remember is in the `state` it is handed, a flat dictionary that the run owns,
saves in checkpoints and shares among the values one technique returns. Every function can read the clock (`Now`).

The modules import torch where they compute, and else for types alone: the recipe's keys follow from the kinds, and a mistake in a
recipe is told before torch is loaded.
"""

from __future__ import annotations

from luthier.kinds.base import Batch, Form, Now, Services, State, Tensors, TrainedLike, sides_of
from luthier.kinds.columns import BASE, TEACHER, Chunk, Column, Disturbed, Likeliest, OtherPass, Routed, StepTable, View
from luthier.kinds.objective import (
    Annotation,
    Combine,
    Head,
    InputMap,
    LossTerm,
    Means,
    PairLoss,
    Pairs,
    Pool,
    Reading,
    Reference,
    RowTable,
    Side,
    StepLoss,
    Stored,
    TokenLoss,
    TokenWeight,
    Vocabulary,
    Written,
)
from luthier.kinds.parts import Place
from luthier.kinds.probe import Cell, Comparison, Drawing, Finding, Line, Probe, Table
from luthier.kinds.rows import RowLikelihood, RowMap, RowScore, RowServices
from luthier.kinds.step import Callback, Freezing, GradientEstimator, GradientTransform, Optimizer, Pass
from luthier.kinds.tune import Prefix, Prompt, Refresh, RepresentationEdit, Resize, Seen, Select, Selective, WeightDelta

__all__ = [
    "BASE",
    "TEACHER",
    "Annotation",
    "Batch",
    "Callback",
    "Cell",
    "Chunk",
    "Column",
    "Combine",
    "Comparison",
    "Disturbed",
    "Drawing",
    "Finding",
    "Form",
    "Freezing",
    "GradientEstimator",
    "GradientTransform",
    "Head",
    "InputMap",
    "Likeliest",
    "Line",
    "LossTerm",
    "Means",
    "Now",
    "Optimizer",
    "OtherPass",
    "PairLoss",
    "Pairs",
    "Pass",
    "Place",
    "Pool",
    "Prefix",
    "Probe",
    "Prompt",
    "Reading",
    "Reference",
    "Refresh",
    "RepresentationEdit",
    "Resize",
    "Routed",
    "RowLikelihood",
    "RowMap",
    "RowScore",
    "RowServices",
    "RowTable",
    "Seen",
    "Select",
    "Selective",
    "Services",
    "Side",
    "State",
    "StepLoss",
    "StepTable",
    "Stored",
    "Table",
    "Tensors",
    "TokenLoss",
    "TokenWeight",
    "TrainedLike",
    "View",
    "Vocabulary",
    "WeightDelta",
    "Written",
    "sides_of",
]
