"""What is tried on each family: whether its map is whole, and what a step, a delta, a merge and packed rows make of it."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.export.gguf import ARCHITECTURES
from luthier.kinds import Batch, Now
from luthier.kinds.parts import Parts
from luthier.models.attention import replace_sdpa
from luthier.models.head import head_of
from luthier.models.parts import map_parts
from luthier.training.build import build_engine
from luthier.training.engine import Engine
from luthier.training.packing import obstacle
from luthier.tune import Tune
from luthier.tune.forward import hidden
from tests.conftest import make_batch, parts_of
from tests.families import configurations
from tests.tolerance import TINY, rounding

NOW = Now(steps=1, learning_rate=0.1, seed=0)
BATCH = make_batch([(9, 6), (5, 4)], vocabulary=250)
LENGTHS = BATCH.attend_BT.sum(1).tolist()
TECHNIQUES: dict[str, Any] = {"full": "full", "half": "half", "lora": {"lora": {"rank": 2}}}


@cache
def base(family: str) -> PreTrainedModel:
    """The untouched model, one for all tests: nothing may change it."""
    return configurations.build(family)


def untouched(family: str) -> Tune:
    """A copy of it, with nothing attached but luthier's attention."""
    model = copy.deepcopy(base(family))
    replace_sdpa(model)
    return Tune(model, map_parts(model))


@cache
def stepped(family: str, technique: str) -> Engine:
    """A copy of it after one step, one for all tests."""
    tune = untouched(family)
    parts = parts_of(tune=TECHNIQUES[technique], objective="cross_entropy", optimizer="sgd", gradient_estimator="backprop")
    engine = build_engine(tune.model, tune.parts, parts, now=NOW)
    engine.step([BATCH], NOW)
    return engine


def logits(tune: Tune, batch: Batch = BATCH, *, pack: bool = False) -> Tensor:
    """What luthier makes of the rows' own tokens, one behind the other, [N, V]."""
    with torch.no_grad():
        states_BTD = hidden(tune, batch, pack=pack).padded(batch.attend_BT)
        return head_of(tune.model, tune.parts)(states_BTD)[batch.attend_BT]


def own_logits(model: PreTrainedModel, batch: Batch = BATCH) -> Tensor:
    """What the model itself makes of them."""
    run: Any = model
    with torch.no_grad():
        found: Tensor = run(input_ids=batch.token_ids_BT, use_cache=False).logits
    return found[batch.attend_BT]


SAME = rounding(torch.float32, 2 * TINY, condition=4.0)
"""How far apart two orders of the same sums may end: 5.5e-5. The models here have up to twice as many blocks as the usual tiny ones, and a
state that goes on from token to token magnifies what was rounded."""


def apart(mine: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((mine - other).abs().max() / other.abs().max())


def moved(tune: Tune, family: str) -> set[str]:
    """Parameters of a model that are other than the untouched one's, by the names of the latter."""
    before = dict(base(family).named_parameters())
    return {name for name, values in tune.model.named_parameters() if name in before and not torch.equal(values, before[name])}


def freed(engine: Engine) -> set[str]:
    """Parameters that train in place, wholly or some experts of them."""
    inside = [one for one in engine.tune.trained.values() if one.form not in ("factor", "free")]
    return {one.place.parameter for one in inside if one.place is not None}


def linear(parts: Parts) -> list[str]:
    """The linear maps of the blocks."""
    return [str(place) for place in parts.select("linear")]


def facts(family: str) -> dict[str, Any]:
    """What the documentation says of a family."""
    model, tune = base(family), untouched(family)
    roles = Counter(place.role for place in tune.parts.places if not place.tensor.endswith("bias"))
    lora = stepped(family, "lora")
    beside = {one.place for one in lora.tune.trained.values()}
    before = logits(lora.tune)
    lora.tune.merge()
    after = logits(lora.tune)
    lora.tune.unmerge()
    return {
        "model_type": model.config.model_type,
        "roles": {role: roles[role] for role in sorted(roles)},
        "blocks": tune.parts.blocks,
        "parameters": len(list(model.parameters())),
        "full": len(freed(stepped(family, "full"))),
        "half": len(freed(stepped(family, "half"))),
        "lora": len(beside),
        "lora_beside_experts": any(place is not None and place.role == "expert" for place in beside),
        "packing": obstacle(tune),
        "merges": apart(after, before) < SAME,
        "gguf": model.config.model_type in ARCHITECTURES,
    }
