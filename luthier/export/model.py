"""A tuned model as a plain Hugging Face folder, read back and compared before anyone relies on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from luthier import machine
from luthier.delta.forms import bits
from luthier.delta.sources import live, tied, untie
from luthier.errors import LuthierError
from luthier.export.folder import new_folder
from luthier.generation.generate import stop_ids
from luthier.models.classes import auto_class
from luthier.models.load import ModelSource, load_tokenizer
from luthier.models.modes import evaluating
from luthier.models.quiet import quiet
from luthier.models.weights import load_weights
from luthier.rows.encode import encode_prompt
from luthier.rows.shapes import Row
from luthier.rows.template import choice_of, give
from luthier.tune import Tune

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def scale(x):\n\treturn 2.5 * x  # twice and a half",
    "  Größe: 3,5 m² → naïve café, 東京, 🎻",
    "0123456789 <html> & \\n",
)
"""What a saved tokenizer and model are tried on: prose, code, spaces, scripts and signs."""
CONVERSATION = Row("conversation", "messages", {"messages": [{"role": "user", "content": "Hello, who are you?"}]}, "a conversation")


def export_model(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the merged model and its tokenizer as a folder that plain `transformers` loads, and check it by loading it.

    Args:
        tune: the tuned model; afterwards it is as it was.
        tokenizer: saved with its exact chat template.
        folder: must not exist; it appears when everything has been checked.
        dtype: of the weights that are written; none: the model's.
        texts: files of text that belong beside them, by name.

    Returns:
        `max_logit_difference` between the live merged model, in the type it is written in, and the reloaded one on `PROBES` (last hidden
        states for an encoder), `merge_kl`, the mean KL(merged, unmerged) there in nats a token, with what another type costs (None for
        an encoder, or where the tune was merged already), `dtype`, and whether embedding and head were `untied`, which a delta on a
        tied head asks for.

    Raises:
        LuthierError: the folder exists, something here is no change of a weight, or what was read back differs: weights
            or token ids at all, logits by more than half the digits of the weights' type.
    """
    with new_folder(Path(folder)) as beside:
        ids = [tokenizer(text)["input_ids"] for text in PROBES]
        unmerged = outputs(tune.model, ids) if tune.merged is None and tune.parts.causal else None
        with merged(tune, dtype) as untied:
            after = outputs(tune.model, ids)
            with _stopping(tune, tokenizer):
                save(tune.model, tokenizer, beside, texts)
            check_tokenizer(tokenizer, beside)
            difference = _check_model(tune, beside, ids, after)
            written = dtype_of(tune.model)
    return {
        "max_logit_difference": difference,
        "merge_kl": None if unmerged is None else divergence(after, unmerged),
        "dtype": written,
        "untied": untied,
    }


def dtype_of(model: nn.Module) -> str:
    """The name of a model's type."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


@contextmanager
def merged(tune: Tune, dtype: torch.dtype | None = None) -> Iterator[bool]:
    """The merged model inside the block, in another type where one is named; the unmerged one again afterwards, bit for bit.

    A tune that was merged before stays merged. A head that is tied to the embedding and has a delta of its own is
    untied for as long. Yields whether one was.

    Raises:
        LuthierError: something here is no change of a weight.
    """
    if tune.merged is not None:
        with _in_type(tune.model, dtype):
            yield False
        return
    own = {one.place.module for one in tune.additions if one.place is not None}
    names = [module for module in tune.parts.ties if module in own]
    parts = tune.parts
    with tied(tune.model):
        for module in names:
            untie(tune.model, f"{module}.weight")
        tune.parts = replace(parts, ties={name: to for name, to in parts.ties.items() if name not in names})
        try:
            tune.merge()
            try:
                with _in_type(tune.model, dtype):
                    yield bool(names)
            finally:
                tune.unmerge()
        finally:
            tune.parts = parts


@contextmanager
def _in_type(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """A model's weights in another type inside the block. What an architecture keeps in a type of its own stays in it."""
    own = next(model.parameters()).dtype
    changed = [] if dtype in (None, own) else [(one, one.data) for one in model.parameters() if one.dtype == own]
    try:
        for parameter, values in changed:
            parameter.data = values.to(dtype)
        yield
    finally:
        for parameter, values in changed:
            parameter.data = values


def outputs(model: Any, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits (an encoder: last hidden states) of each row, [T, V], in fp32 or wider, without dropout."""
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for row in token_ids:
            output = model(input_ids=torch.tensor([row], device=device))
            values = output.logits if hasattr(output, "logits") else output.last_hidden_state
            found.append(values[0].to(torch.promote_types(values.dtype, torch.float32)))
    return found


def divergence(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """KL(left, right) of the distributions that logits [T, V] give, in nats, averaged over all positions."""
    total, count = 0.0, 0
    for one, other in zip(left, right, strict=True):
        log_p, log_q = machine.widened(one).log_softmax(-1), machine.widened(other).log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(one)
    return total / count


@contextmanager
def _stopping(tune: Tune, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Let the model's own settings end an answer where it learned to: a chat template may do so with another token than they know."""
    settings: Any = getattr(tune.model, "generation_config", None)
    ends = list(stop_ids(tune, tokenizer)) if settings is not None and tune.parts.causal else []
    before = settings.eos_token_id if ends else None
    if set(ends) == set(before if isinstance(before, list) else [before]) - {None}:
        yield
        return
    settings.eos_token_id = ends
    try:
        yield
    finally:
        settings.eos_token_id = before


def save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a model and its tokenizer as `transformers` does, and texts beside them.

    Raises:
        LuthierError: `transformers` refuses.
    """
    try:
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        write_texts(folder, texts)
    # A generation configuration that contradicts itself is refused here, among others.
    except ValueError as error:
        raise LuthierError(
            f"transformers refuses to save this model: {error}",
            where=type(model).__name__,
            fix="correct the model's generation configuration",
        ) from error


def write_texts(folder: Path, texts: Mapping[str, str] | None) -> None:
    """Write files of text, by name."""
    for name, text in (texts or {}).items():
        (folder / name).write_text(text, encoding="utf-8")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Read a saved tokenizer back and compare it.

    Raises:
        LuthierError: it cuts text differently.
    """
    # An adapter's folder holds no model that a name could stand for.
    reloaded: Any = load_tokenizer(ModelSource(str(folder), "causal", "written here", folder))
    give(reloaded, choice_of(tokenizer))
    if _token_ids(tokenizer) != _token_ids(reloaded) or tokenizer.chat_template != reloaded.chat_template:
        raise LuthierError(
            "the tokenizer cuts text differently after saving",
            where=type(tokenizer).__name__,
            fix="keep the tokenizer's own files beside the weights, and report which tokenizer this is",
        )


def _token_ids(tokenizer: Any) -> list[list[int]]:
    ids = [tokenizer(text)["input_ids"] for text in PROBES]
    if tokenizer.chat_template:
        ids.append(list(encode_prompt(CONVERSATION, tokenizer)))
    return ids


def _check_model(tune: Tune, folder: Path, ids: Sequence[Sequence[int]], expected: Sequence[Tensor]) -> float:
    """Read a model back and compare it. Returns the largest difference of its outputs."""
    device = next(tune.model.parameters()).device
    # Routers send close calls to other experts when another kernel rounds differently.
    experts = getattr(tune.model.config, "_experts_implementation", None)
    kernel = {} if experts is None else {"experts_implementation": experts}
    with quiet():
        loader = auto_class(tune.model.config, causal=tune.parts.causal)
        model, _ = load_weights(loader, folder, folder, dtype="auto", local_files_only=True, **kernel)
    reloaded = model.to(device)  # type: ignore[arg-type]
    found, weights = live(reloaded), live(tune.model)
    wrong = [name for name, values in weights.items() if name not in found or not _same(found[name], values)]
    if wrong:
        raise LuthierError(
            f"{len(wrong)} of {len(weights)} tensors differ after saving and loading",
            where=wrong[0],
            fix="transformers does not write this architecture as it reads it; keep the delta instead",
        )
    pairs = list(zip(outputs(reloaded, ids), expected, strict=True))
    difference = max(float((one - other).abs().max()) for one, other in pairs)
    precision = torch.finfo(next(tune.model.parameters()).dtype).eps
    allowed = precision**0.5 * max(1.0, *(float(other.abs().max()) for _, other in pairs))
    if not difference <= allowed:
        raise LuthierError(
            f"the saved model gives other outputs: they differ by {difference:g}, where rounding explains {allowed:g}",
            where=type(tune.model).__name__,
            fix="compare config.json with the configuration of the base",
        )
    return difference


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(bits(left), bits(right))
