"""A model's identity: one hash over its numbers, the same in every process and on every device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from luthier.models.sharding import whole


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of everything `model.state_dict()` would save: names, dtypes, shapes and bytes, sorted by name.

    Tensors that are one object under several names (tied embeddings) count once, under the name that sorts first, so a
    model whose head is a mere copy of its embedding has another fingerprint. So has the same model in another dtype.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        # The lengths are part of the header, so that no two different models feed the same bytes to the hash.
        digest.update(f"{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    # Bytes, because NumPy has no bfloat16.
    flat = whole(tensor.detach()).cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
