"""What an adapter says of its base: by what other tools find it, which weights they are, and what a user should know of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from luthier.models.known import KNOWN
from luthier.models.load import ModelSource, resolve
from luthier.models.packaged import BUILT, PACKAGED

FILE = "base.json"


class Base(NamedTuple):
    """The base of an adapter."""

    hub: str | None
    """Its name on the hub; None where these weights are not there. A path is never written: it means nothing elsewhere, and tells of
    the machine it is on."""
    revision: str | None
    origin: str
    """Where its weights come from, in words that hold no path."""
    note: str = ""
    """What the user, on this machine, should know of it."""

    def config(self) -> dict[str, Any]:
        """Its keys of adapter_config.json."""
        return {"base_model_name_or_path": self.hub, **({"revision": self.revision} if self.revision else {})}

    def write(self, folder: Path, fingerprint: str, dtype: str) -> None:
        """Write what the adapter was trained on, for whoever gets the folder without having seen the terminal."""
        told = {"hub": self.hub, "revision": self.revision, "origin": self.origin, "fingerprint": fingerprint, "dtype": dtype}
        (folder / FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def base_of(base: ModelSource | str) -> Base:
    """The base that a source, or a name, stands for; luthier's own short names are looked up."""
    if isinstance(base, ModelSource):
        return _of_source(base)
    if base in KNOWN or base in PACKAGED or base in BUILT:
        return _of_source(resolve(base))
    path = Path(base).expanduser()
    if path.exists() or base.startswith((".", "~", "/")) or base.count("/") > 1 or "\\" in base or base.endswith(".gguf"):
        return _of_source(ModelSource(base, "causal", base, path))
    if base.startswith("tiny:"):
        return _of_source(ModelSource(base, "causal", f"random {base}"))
    return Base(base, None, f"Hugging Face hub {base}")


def _of_source(source: ModelSource) -> Base:
    if source.hub:
        return Base(source.hub, source.revision, source.origin)
    named = source.name in (*KNOWN, *PACKAGED, *BUILT)
    if source.path is None:
        return Base(None, None, source.origin, f"no other tool can make this base ({source.origin}): export the model instead")
    origin = f"{source.name}, {source.origin}" if named else f"a {'file' if source.path.suffix else 'folder'} that is on no hub"
    note = f"the base is on no hub, so the adapter names none; give it to other tools yourself: {source.path}"
    if source.name in KNOWN:
        note += f" ({source.origin}; {KNOWN[source.name].hub} on the hub has other numbers, for which this adapter was not trained)"
    return Base(None, None, origin, note)
