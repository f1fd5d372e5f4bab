"""What the tests of the kinds share: the toys, a step's gradients without the step, and plain-model references."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier import registry
from luthier.kinds import TEACHER, Batch, Now
from luthier.models.tiny import tiny
from luthier.training.engine import Engine, Work
from tests.conftest import make_batch, with_columns

TOYS = Path(__file__).parent


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    """The toys stand in the registry for one test, and other tests see none of them."""
    registry.add_folder(TOYS)
    yield
    registry.remove_folder(TOYS)


@cache
def _made(architecture: str, layers: int, **options: Any) -> Any:
    return tiny(architecture, seed=1, layers=layers, **options).double()


def model_of(architecture: str = "llama", *, layers: int = 2, **options: Any) -> Any:
    """A tiny model in fp64, always the same: it is made once and copied."""
    return copy.deepcopy(_made(architecture, layers, **options))


ANNOTATED = ("tool_calls",)
"""Numbers that techniques want of each token."""


def numbers_of_tokens(batch: Batch) -> dict[str, Tensor]:
    """What techniques want of each token: numbers from 0 to 8 in turn, and a teacher's three likeliest tokens."""
    numbers_BT = ((batch.position_BT + 2) % 9).float()
    share_BTK = torch.tensor([0.5, 0.3, 0.1]).expand(*numbers_BT.shape, -1) - 0.01 * numbers_BT[..., None]
    token_id_BTK = (batch.position_BT[..., None] * 7 + torch.tensor([3, 50, 101])) % 200
    teacher = (share_BTK.log(), token_id_BTK.float(), 1.0 - share_BTK.sum(-1))
    return {**dict.fromkeys(ANNOTATED, numbers_BT), **dict(zip(TEACHER, teacher, strict=True))}


def rows_of_eight(**options: Any) -> Batch:
    """Eight rows of unequal length and unequal numbers of targets, one without any; with the free columns of `with_columns`, and numbers
    of their tokens."""
    batch = with_columns(make_batch([(9, 4), (6, 5), (12, 2), (5, 0), (7, 6), (10, 9), (4, 1), (8, 3)], **options))
    return batch._replace(token_columns=numbers_of_tokens(batch))


def rows_of_pairs(**options: Any) -> Batch:
    """Four pairs of unequal answers to the same prompts, with the columns and numbers of `rows_of_eight`, and what losses over pairs
    read."""
    batch = with_columns(make_batch([(9, 4), (7, 2), (12, 2), (13, 3), (7, 6), (10, 9), (8, 3), (6, 1)], **options))
    groups = tuple((place, place + 1) for place in range(0, 8, 2))
    for first, second in groups:
        prompt = int((batch.label_BT[first] >= 0).nonzero()[0])
        batch.token_ids_BT[second, :prompt] = batch.token_ids_BT[first, :prompt]
    firsts = torch.tensor([first for first, _ in groups]).repeat_interleave(2)
    columns = {name: column[firsts] for name, column in batch.columns.items()}
    columns |= {"margin": torch.linspace(0.1, 2.0, 8)[firsts], "better": torch.linspace(1.5, 0.2, 8)[firsts]}
    columns |= {"label": (firsts % 4 > 0).double(), "verdict": (firsts > 2).double(), "weak": torch.linspace(0.1, 0.8, 8)}
    stored = {"reference_chosen": -21.0, "reference_rejected": -19.5, "other_chosen": -18.0}
    columns |= {name: value - torch.arange(8.0)[firsts] for name, value in stored.items()}
    texts = {name: tuple(values[place] for place in firsts) for name, values in batch.texts.items()}
    # A head of words reads three of each row.
    texts["tags"] = tuple(("O\nB-no\nI-no", "B-yes\nO\nB-no")[place % 2] for place in range(8))
    word_BT = torch.where(batch.attend_BT & (batch.position_BT % 2 == 1) & (batch.position_BT < 6), (batch.position_BT + 1) // 2, 0)
    token_columns = {**numbers_of_tokens(batch), "word": word_BT.float()}
    return batch._replace(columns=columns, texts=texts, token_columns=token_columns, groups=groups)


def gradients(engine: Engine, batches: Sequence[Batch], now: Now) -> dict[str, Tensor]:
    """The gradients one step would use, by name, without taking the step; observed dense ones too."""
    batches = [batch for batch in batches if batch.row_ids]
    looked = engine._look(batches, now)
    batches, keeps = (batches, None) if looked is None else (looked.batches, looked.keeps)
    units = engine.objective.units(batches, keeps, engine.world)
    engine.tune.start_observing(now)
    work = Work(engine, batches, now, units, keeps)
    work.gather()
    engine.source.gradients(work)
    found = {name: one.gradient.clone() for name, one in engine.tune.trained.items() if one.gradient is not None}
    found |= {f"dense {place}": value.clone() for (_, place), value in engine.tune.dense.items()}
    engine.tune.free_gradients()
    return found


def gap(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference between gradients, relative to the largest of each tensor; the names must agree.

    Some gradients are zero but for rounding, such as that of a key's bias: below 1e-6 the difference counts as it is.
    """
    assert left.keys() == right.keys()
    largest = [float((left[n] - right[n]).abs().max() / right[n].abs().max().clamp(min=1e-6)) for n in left]
    return max(largest, default=0.0)


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of the targets as plain transformers and PyTorch give it."""
    logits_BTV = model(input_ids=batch.token_ids_BT, attention_mask=batch.attend_BT.long()).logits
    label_N = batch.label_BT[:, 1:].reshape(-1)
    return functional.cross_entropy(logits_BTV[:, :-1].reshape(len(label_N), -1), label_N)


def plain_gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Autograd's gradient of every parameter of an untouched copy."""
    model = copy.deepcopy(model).requires_grad_(True)
    plain_loss(model, batch).backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """All logits of a model."""
    with torch.no_grad():
        logits_BTV: Tensor = model(input_ids=batch.token_ids_BT).logits
        return logits_BTV
