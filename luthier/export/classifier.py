"""A tuned model with its head as `transformers` has it, for sequence classification, read back and compared before anyone relies on it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.export.folder import new_folder
from luthier.export.model import PROBES, check_tokenizer, dtype_of, merged, save
from luthier.kinds import Batch, Head, Means
from luthier.models.modes import evaluating
from luthier.models.quiet import quiet
from luthier.models.weights import load_weights
from luthier.rows.spans import WORD
from luthier.training.readout import pool_of, read, states_of
from luthier.tune import Tune

PROBLEMS: Mapping[Means, str | None] = {
    "classes": "single_label_classification",
    "labels": "multi_label_classification",
    "value": "regression",
    "score": "regression",
    "tags": None,
    "entities": None,
}
"""What `transformers` calls what a head's numbers mean."""


def export_classifier(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the merged model and its head as a folder that `AutoModelForSequenceClassification` loads, or `AutoModelForTokenClassification`
    where the head reads words, and check it by loading it.

    Args:
        tune: the tuned model, with a head; afterwards it is as it was.
        tokenizer: saved with it.
        folder: must not exist; it appears when everything has been checked.
        dtype: of the weights that are written; none: the model's.
        texts: files of text that belong beside them, by name.

    Returns:
        `max_logit_difference` between the live model's head and the reloaded one on texts of many kinds, and `dtype`.

    Raises:
        LuthierError: the folder exists, `transformers` has no such class or head for this model, or what was read back differs.
    """
    assert tune.head is not None
    own, head = tune.head
    with new_folder(Path(folder)) as beside:
        ids = [list(tokenizer(text)["input_ids"]) for text in PROBES]
        with merged(tune, dtype):
            expected = _ours(tune, head, ids)
            model = _with_head(tune, tokenizer, own.masters(), head)
            save(model, tokenizer, beside, texts)
            check_tokenizer(tokenizer, beside)
            difference = _check(beside, ids, expected, tune, head)
            written = dtype_of(tune.model)
    return {"max_logit_difference": difference, "dtype": written}


def _with_head(tune: Tune, tokenizer: PreTrainedTokenizerBase, tensors: dict[str, Tensor], head: Head) -> Any:
    config: Any = copy.deepcopy(tune.model.config)
    pool = pool_of(head, causal=tune.parts.causal)
    pools = {"last": "last"} if tune.parts.causal else {"first": "cls"}
    if head.pool == "words":
        pools = {"words": "words"}
    elif hasattr(config, "classifier_pooling"):
        pools = {"first": "cls", "mean": "mean"}
        config.classifier_pooling = pools.get(pool)
    if head.means not in PROBLEMS or pool not in pools or "weight" not in tensors:
        raise _impossible(tune, "transformers has no head that reads rows as this one does")
    config.num_labels = len(tensors["weight"])
    config.problem_type = PROBLEMS[head.means]
    if head.names:
        config.id2label, config.label2id = dict(enumerate(head.names)), {name: number for number, name in enumerate(head.names)}
    # Rows are padded with it; without one a batch of several rows is refused.
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    parameter = next(tune.model.parameters())
    try:
        with quiet():
            model: Any = _class_of(head).from_config(config)
    except ValueError as error:
        words = "words" if head.pool == "words" else "rows"
        raise _impossible(tune, f"transformers has no class that reads {words} with this model") from error
    model = model.to(parameter.dtype)
    # OPT's blocks and embedding stand within its body.
    body = model.get_submodule(tune.parts.backbone or model.base_model_prefix)
    # A pooler, of which the head may have taken the place, is not read.
    found = body.load_state_dict(tune.model.get_submodule(tune.parts.backbone).state_dict(), strict=False)
    if any(not name.startswith("pooler.") for name in (*found.missing_keys, *found.unexpected_keys)):
        raise _impossible(tune, "its weights there are others")
    # A layer is named by its activation, of which the comparison tells whether it is the same there.
    layer = re.compile(f"^({'|'.join(tune.parts.layer)})_(?=weight|bias)") if tune.parts.layer else None
    given = {name if layer is None or name == "norm_weight" else layer.sub("layer_", name): one for name, one in tensors.items()}
    if not _fill(model, body, given):
        raise _impossible(tune, "its head there is of another kind")
    return model.eval()


def _fill(model: Any, body: Any, given: dict[str, Tensor]) -> bool:
    """Put a head's tensors into the modules that are it in `transformers`. Returns whether all have a place, and all places one."""
    modules = {
        "": _first(model, "score", "classifier.out_proj", "classifier"),
        "layer_": _first(model, "classifier.dense", "pre_classifier", "head.dense") or _first(body, "pooler.dense"),
        "norm_": _first(model, "head.norm"),
    }
    places = {
        f"{prefix}{name}": parameter
        for prefix, module in modules.items()
        if module is not None
        for name, parameter in module.named_parameters()
    }
    lacking = places.keys() - given.keys()
    if given.keys() - places.keys() or any(not name.endswith("bias") for name in lacking):
        return False
    with torch.no_grad():
        for name, parameter in places.items():
            parameter.copy_(given.get(name, torch.zeros_like(parameter)))
    return True


def _first(model: Any, *names: str) -> Any:
    """The first of these modules that there is, without modules of its own."""
    known = dict(model.named_modules())
    return next((known[name] for name in names if name in known and not [*known[name].children()]), None)


def _class_of(head: Head) -> Any:
    return transformers.AutoModelForTokenClassification if head.pool == "words" else transformers.AutoModelForSequenceClassification


def _impossible(tune: Tune, why: str) -> LuthierError:
    return LuthierError(
        f"this result cannot be written for classification: {why}",
        where=tune.parts.architecture,
        fix="use the run itself, with luthier.open_run",
    )


def _ours(tune: Tune, head: Head, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    assert tune.head is not None
    device = next(tune.model.parameters()).device
    found = []
    with evaluating(tune.model):
        for row in ids:
            ids_BT = torch.tensor([row], device=device)
            time_BT = torch.arange(len(row), device=device)[None]
            # To a head of words every token begins one here.
            words = {WORD: time_BT + 1.0}
            batch = Batch(ids_BT, ids_BT >= 0, time_BT, torch.full_like(ids_BT, -100), ("",), token_columns=words)
            states_BTD = tune.run(partial(states_of, tune, batch))
            found.append(read(head, tune.head[0].masters(), states_BTD, batch, causal=tune.parts.causal))
    return found


def _check(folder: Path, ids: Sequence[Sequence[int]], expected: Sequence[Tensor], tune: Tune, head: Head) -> float:
    with quiet():
        model, _ = load_weights(_class_of(head), folder, folder, dtype="auto", local_files_only=True)
    reloaded: Any = model.to(next(tune.model.parameters()).device)  # type: ignore[arg-type]
    differences = []
    with evaluating(reloaded):
        for row, wanted_NK in zip(ids, expected, strict=True):
            found_NK = reloaded(input_ids=torch.tensor([row], device=wanted_NK.device)).logits.view_as(wanted_NK).to(wanted_NK)
            differences.append(float((found_NK - wanted_NK).abs().max()))
    allowed = torch.finfo(next(tune.model.parameters()).dtype).eps ** 0.5 * max(1.0, *(float(one.abs().max()) for one in expected))
    if not max(differences) <= allowed:
        raise LuthierError(
            f"the saved model says other things: its numbers differ by {max(differences):g}, where rounding explains {allowed:g}",
            where=type(reloaded).__name__,
            fix="use the run itself, with luthier.open_run",
        )
    return max(differences)
