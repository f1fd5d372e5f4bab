"""Where the numbers of a model are read from: a model in memory, a mapping of tensors, or safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.models.sharding import is_sharded, local, whole

Source: TypeAlias = "nn.Module | Mapping[str, Tensor] | str | Path"


class Weights(NamedTuple):
    """The tensors of a source, read one at a time."""

    distinct: tuple[str, ...]
    """Each tensor under its first name: tied ones once."""
    read: Mapping[str, Callable[[], Tensor]]
    """By every name, also further ones of tied tensors."""


def weights_of(source: Source) -> Weights:
    """The saved tensors of a source.

    Raises:
        LuthierError: a path without safetensors files, or files that cannot be read.
    """
    if isinstance(source, str | Path):
        return _from_files(Path(source))
    tensors = live(source) if isinstance(source, nn.Module) else source
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        first.setdefault(_storage(name, tensor), name)
    distinct = tuple(first.values())
    return Weights(distinct, {name: _whole(tensor) for name, tensor in tensors.items()})


def _whole(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: whole(tensor.detach())


def live(model: nn.Module) -> dict[str, Tensor]:
    """What the model would save, by every name, sharing its memory."""
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def in_words(dtypes: Iterable[torch.dtype]) -> str:
    """The types of a model's tensors, e.g. `float32`."""
    return "+".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def ties(model: nn.Module) -> list[str]:
    """Names whose tensor has an earlier name already."""
    weights = weights_of(model)
    return [name for name in weights.read if name not in set(weights.distinct)]


def untie(model: nn.Module, name: str) -> None:
    """Give a tied parameter a copy of its own, and let the configuration say so."""
    owner, _, tensor = name.rpartition(".")
    module = model.get_submodule(owner)
    module.register_parameter(tensor, nn.Parameter(module.get_parameter(tensor).detach().clone(), requires_grad=False))
    for config in _configs(model):
        config.tie_word_embeddings = False
    # What `transformers` ties again when it saves or loads.
    getattr(model, "all_tied_weights_keys", {}).pop(name, None)


@contextmanager
def tied(model: nn.Module) -> Iterator[None]:
    """Restore every tie that `untie` cuts inside the block."""
    names = set(ties(model))
    shared = {name: one for name, one in model.named_parameters(remove_duplicate=False) if name in names}
    flags = [(config, config.tie_word_embeddings) for config in _configs(model)]
    keys = dict(getattr(model, "all_tied_weights_keys", {}))
    try:
        yield
    finally:
        for name, parameter in shared.items():
            owner, _, tensor = name.rpartition(".")
            model.get_submodule(owner).register_parameter(tensor, parameter)
        for config, flag in flags:
            config.tie_word_embeddings = flag
        getattr(model, "all_tied_weights_keys", {}).update(keys)


def _configs(model: nn.Module) -> list[Any]:
    config: Any = getattr(model, "config", None)
    both = [] if config is None else [config, config.get_text_config()]
    return [one for one in both if hasattr(one, "tie_word_embeddings")]


def _storage(name: str, tensor: Tensor) -> tuple[object, ...]:
    if is_sharded(tensor):
        return tensor.shape, *_storage(name, local(tensor))
    if not tensor.numel() or tensor.device.type == "meta":
        return (name,)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, str(tensor.device)


def _from_files(path: Path) -> Weights:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise LuthierError("there are no safetensors files", where=str(path), fix="name a folder or a file that holds some")
    read: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                read.update({name: _reader(file, name) for name in tensors.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise LuthierError(f"the file cannot be read: {error}", where=str(file), fix="copy it again") from error
    return Weights(tuple(read), read)


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(file, "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    return read


def fits(base: Tensor, tuned: Tensor, name: str) -> Tensor:
    """The tuned numbers in the type of the base.

    Raises:
        LuthierError: other shapes, numbers that the base's type cannot hold, or whole numbers that differ.
    """
    if base.shape != tuned.shape:
        raise LuthierError(
            f"the shapes differ: {tuple(base.shape)} in the base, {tuple(tuned.shape)} in the tuned model",
            where=name,
            fix="compare with the model that was trained, vocabulary and all",
        )
    same = tuned.to(base.device, base.dtype)
    if tuned.dtype != base.dtype and not torch.equal(same.to(tuned.dtype), tuned.to(base.device)):
        raise LuthierError(
            f"{base.dtype} of the base cannot hold the tuned numbers, which are {tuned.dtype}",
            where=name,
            fix=f"load the base in {tuned.dtype}",
        )
    if not base.is_floating_point() and not torch.equal(base, same):
        raise LuthierError(
            f"{base.dtype} numbers differ, and a delta holds changes of fractions",
            where=name,
            fix="compare models that are not quantized",
        )
    return same
