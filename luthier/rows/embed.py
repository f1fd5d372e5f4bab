"""What texts are about, as points on a sphere: by a model, or by their words alone.

An embedder is named by `hash`, which needs no model, or by any name `luthier.models.resolve` takes. Of a sentence encoder and of a causal
model alike it is the mean of the last hidden states over the real tokens, scaled to length 1: the recipe all-MiniLM-L6-v2 was trained
with. Encoders that were trained with another pooling are pooled by the mean as well.

What a model made is kept in luthier's cache folder, under a key made of the model's files, the texts, and the code and libraries.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier import disk
from luthier.errors import LuthierError, Say, silent
from luthier.models.load import ModelSource, load_model, load_tokenizer, resolve
from luthier.models.wheel import cache_folder
from luthier.rows.ids import canonical

Embed = Callable[[Sequence[str]], Tensor]
"""From B texts to embedding_BD in fp32, each of length 1."""

DEFAULT = "minilm-l6"
HASH = "hash"
HASH_WIDTH = 2048
LONGEST = 512
"""Most tokens of a text, where neither the model nor its recipe says less."""
BATCH_TOKENS = 8192
_WORD = re.compile(r"\w+|[^\w\s]")
_READ = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def embedder(name: str = DEFAULT, *, device: torch.device | str = "cpu", say: Say = silent) -> Embed:
    """An embedder by its name; a model is found, loaded and run only for texts that are not in the cache.

    Equal texts get equal embeddings, whichever others are with them.

    Args:
        name: `hash`, or the name of a model.
        device: where a model runs; the embeddings come back to the processor.
        say: hears what takes time.

    Raises:
        LuthierError: there is no such model, when the embedder is used; or the cache cannot be written.
    """

    def embed(texts: Sequence[str]) -> Tensor:
        once = list(dict.fromkeys(texts))
        place = {text: number for number, text in enumerate(once)}
        found_MD = hashed(once) if name == HASH else _kept(name, once, torch.device(device), say)
        return found_MD[[place[text] for text in texts]]

    return embed


def hashed(texts: Sequence[str]) -> Tensor:
    """Bags of words and of pairs of neighboring words, hashed into 2,048 columns: 1 + log(count), scaled to length 1.

    Deterministic on every platform. Words are not weighted by how rare they are, so that a text's embedding is its own.
    """
    embedding_BD = torch.zeros(len(texts), HASH_WIDTH)
    for number, text in enumerate(texts):
        words = _WORD.findall(text.lower()) or [""]
        counts = Counter(zlib.crc32(gram.encode()) % HASH_WIDTH for gram in (*words, *map(" ".join, pairwise(words))))
        embedding_BD[number, list(counts)] = 1.0 + torch.tensor(list(counts.values()), dtype=torch.float32).log()
    return functional.normalize(embedding_BD, dim=-1)


def pooled(model: PreTrainedModel, token_ids: Sequence[Sequence[int]]) -> Tensor:
    """The mean of the last hidden states over each text's tokens, scaled to length 1, in fp32. Returns embedding_BD."""
    device = next(model.parameters()).device
    longest = max(map(len, token_ids))
    token_ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in token_ids], device=device)
    attend_BT = torch.tensor([[True] * len(ids) + [False] * (longest - len(ids)) for ids in token_ids], device=device)
    body: nn.Module = model.base_model
    with torch.no_grad():
        hidden_BTD = body(input_ids=token_ids_BT, attention_mask=attend_BT.long()).last_hidden_state.float()
    total_BD = (hidden_BTD * attend_BT[..., None]).sum(1)
    return functional.normalize(total_BD / attend_BT.sum(1, keepdim=True), dim=-1)


def _kept(name: str, texts: list[str], device: torch.device, say: Say) -> Tensor:
    """Embeddings from the cache, or made and put there. A set of texts is kept as a whole: a text's last digits depend on its batch."""
    try:
        source = resolve(name, say=say)
    except LuthierError as error:
        fix = f"use `{HASH}`, which needs no model, or a model. {error.fix}"
        raise LuthierError(error.what, where="embedder", fix=fix) from error
    inputs = [
        _identity(source),
        texts,
        str(device),
        torch.__version__,
        transformers.__version__,
        inspect.getsource(sys.modules[__name__]),
    ]
    file = cache_folder() / "embeddings" / f"{hashlib.sha256(canonical(inputs).encode()).hexdigest()[:24]}.safetensors"
    if file.exists():
        try:
            return load_file(file)["embedding"]
        except (OSError, SafetensorError, KeyError) as problem:
            say(f"the embeddings in {file} are damaged ({problem}) and are made again")
    say(f"embedding {len(texts)} texts with {name}")
    embedding_BD = _made(source, texts, device, say)
    with disk.written(file, fix="or set LUTHIER_CACHE to another folder") as beside:
        save_file({"embedding": embedding_BD}, beside)
    return embedding_BD


def _identity(source: ModelSource) -> Any:
    """Names the files a model is made of; a tiny one is made of its name."""
    if source.path is None:
        return source.name
    if source.path.is_file():
        return disk.sha256(source.path)
    return {file.name: disk.sha256(file) for pattern in _READ for file in sorted(source.path.glob(pattern))}


def _made(source: ModelSource, texts: list[str], device: torch.device, say: Say) -> Tensor:
    model, tokenizer = load_model(source, say=say).to(device), load_tokenizer(source)  # type: ignore[arg-type]
    longest = min(_longest(source.path, model), tokenizer.model_max_length)
    whole = [tokenizer(text)["input_ids"] for text in texts]
    over = sum(len(ids) > longest for ids in whole)
    if over:
        say(f"{over} of {len(texts)} texts are longer than {longest} tokens: their beginnings are embedded")
    cut = [_cut(text, ids, tokenizer, longest) for text, ids in zip(texts, whole, strict=True)]
    order = sorted(range(len(cut)), key=lambda number: len(cut[number]))
    embedding_BD = torch.empty(len(cut), model.config.get_text_config().hidden_size)
    while order:
        # The longest first, so that what does not fit in memory fails at once.
        batch = order[-max(1, BATCH_TOKENS // len(cut[order[-1]])) :]
        del order[-len(batch) :]
        embedding_BD[batch] = pooled(model, [cut[number] for number in batch]).cpu()
    return embedding_BD


def _cut(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[int]:
    """At most `longest` tokens, with the tokenizer's own at both ends; a text that has none stands as one token."""
    if len(ids) > longest:
        ids = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
    return ids or [tokenizer.eos_token_id or 0]


def _longest(folder: Path | None, model: PreTrainedModel) -> int:
    """What the sentence encoder's own recipe says, else what the model can hold, and never more than 512."""
    recipe = folder / "sentence_bert_config.json" if folder is not None else None
    if recipe is not None and recipe.is_file():
        said = json.loads(recipe.read_text(encoding="utf-8")).get("max_seq_length")
        if isinstance(said, int) and said > 0:
            return said
    return min(LONGEST, getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST)
