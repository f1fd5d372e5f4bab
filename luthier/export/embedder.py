"""A tuned model whose head gives vectors, as a folder of `sentence-transformers`, read back and compared before anyone relies on it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.export.folder import new_folder
from luthier.export.model import PROBES, check_tokenizer, dtype_of, merged, save
from luthier.models.context import context_of
from luthier.models.load import load_tokenizer
from luthier.models.modes import evaluating
from luthier.models.quiet import quiet
from luthier.models.weights import load_weights
from luthier.rows.batches import collate
from luthier.rows.encode import Encoded
from luthier.training.readout import pool_of, pooled, read, states_of
from luthier.tune import Tune

POOLING: Mapping[str, str] = {"first": "cls_token", "last": "lasttoken", "mean": "mean_tokens"}
"""What `sentence-transformers` calls the state that is read."""
MODULES = ("Transformer", "Pooling", "Normalize")
"""What a text passes through there, in order."""


def export_embedder(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the merged model as a folder that `sentence_transformers.SentenceTransformer` loads, and check it by loading its parts.

    The folder holds the model without a language head, its tokenizer, and which state is read and made to length 1. Texts longer than the
    model reads are cut there, and rows are padded on the right.

    Args:
        tune: the tuned model, with a head that gives vectors; afterwards it is as it was.
        tokenizer: saved with it.
        folder: must not exist; it appears when everything has been checked.
        dtype: of the weights that are written; none: the model's.
        texts: files of text that belong beside them, by name.

    Returns:
        `max_vector_difference` between the live model's vectors and those of the folder on texts of many kinds, and `dtype`.

    Raises:
        LuthierError: the folder exists, something here is no change of a weight, or what was read back differs.
    """
    assert tune.head is not None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pool = pool_of(tune.head[1], causal=tune.parts.causal)
    with new_folder(Path(folder)) as beside, merged(tune, dtype):
        expected_BD = _ours(tune, tokenizer)
        save(tune.model.base_model, tokenizer, beside, texts)
        check_tokenizer(tokenizer, beside)
        _describe(tune, pool, beside)
        difference = _check(tune, beside, pool, expected_BD)
        written = dtype_of(tune.model)
    return {"max_vector_difference": difference, "dtype": written}


def _describe(tune: Tune, pool: str, folder: Path) -> None:
    """Write what `sentence-transformers` has beside a model, in the form that all of its versions since 2 read."""
    places = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{module}"}
        for number, (place, module) in enumerate(zip(places, MODULES, strict=True))
    ]
    modes = {f"pooling_mode_{mode}": mode == POOLING[pool] for mode in (*POOLING.values(), "max_tokens", "mean_sqrt_len_tokens")}
    context = context_of(tune.model.config)
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": tune.parts.output_width, **modes},
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": context, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _ours(tune: Tune, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The live model's vectors of the probes, each by itself, [B, D]."""
    assert tune.head is not None
    own, head = tune.head
    device = next(tune.model.parameters()).device
    found = []
    with evaluating(tune.model):
        for text in PROBES:
            ids = tuple(tokenizer(text)["input_ids"])
            batch = collate([Encoded("", ids, (False,) * len(ids), "", {}, 0, "text")]).to(device)
            states_BTD = tune.run(lambda batch=batch: states_of(tune, batch))  # type: ignore[misc]
            found.append(read(head, own.masters(), states_BTD, batch, causal=tune.parts.causal)[0])
    return torch.stack(found)


def _check(tune: Tune, folder: Path, pool: str, expected_BD: Tensor) -> float:
    """Read model and tokenizer back, and compare the vectors of padded texts. Returns the largest difference."""
    tokenizer = load_tokenizer(str(folder))
    given = tokenizer(list(PROBES), padding=True, return_tensors="pt")
    with quiet():
        model, _ = load_weights(transformers.AutoModel, folder, folder, dtype="auto", local_files_only=True)
    reloaded: Any = model.to(expected_BD.device)  # type: ignore[arg-type]
    ids_BT, attend_BT = (torch.as_tensor(given[name]).to(expected_BD.device) for name in ("input_ids", "attention_mask"))
    with evaluating(reloaded):
        states_BTD = reloaded(input_ids=ids_BT, attention_mask=attend_BT).last_hidden_state
        found_BD = functional.normalize(pooled(states_BTD, attend_BT.bool(), pool).to(expected_BD), dim=-1)
    difference = float((found_BD - expected_BD).abs().max())
    allowed = torch.finfo(next(tune.model.parameters()).dtype).eps ** 0.5
    if not difference <= allowed:
        raise LuthierError(
            f"the saved model gives other vectors: they differ by {difference:g}, where rounding explains {allowed:g}",
            where=type(reloaded).__name__,
            fix="use the run itself, with luthier.open_run",
        )
    return difference
