"""Models: loading them by name, mapping their parts, tiny ones for tests, and fingerprints."""

from luthier.kinds.parts import GROUPS, ROLES, Parts, expand_roles
from luthier.models.fingerprint import fingerprint
from luthier.models.known import KNOWN, KnownModel
from luthier.models.load import ModelSource, load_model, load_tokenizer, resolve
from luthier.models.parts import map_parts
from luthier.models.tiny import ARCHITECTURES, tiny, tiny_tokenizer

__all__ = [
    "ARCHITECTURES",
    "GROUPS",
    "KNOWN",
    "ROLES",
    "KnownModel",
    "ModelSource",
    "Parts",
    "expand_roles",
    "fingerprint",
    "load_model",
    "load_tokenizer",
    "map_parts",
    "resolve",
    "tiny",
    "tiny_tokenizer",
]
