"""How OpenMP's threads wait for work, said before torch is loaded: the library reads it once, as it comes in."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping

SPINS = "20000"
"""How often a thread of libgomp, which comes with torch for Linux, looks for work before it sleeps: some tens of microseconds, longer
than the gaps between the operations of a step. Left alone it looks for milliseconds, and takes the core from whatever else runs."""
_SAID_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def let_wait(environment: MutableMapping[str, str] = os.environ, modules: Mapping[str, object] = sys.modules) -> None:
    """Let threads sleep soon, unless the environment says otherwise or torch is loaded already, which would not hear it.

    Args:
        environment: where OpenMP looks.
        modules: what is loaded.
    """
    if "torch" not in modules and not any(name in environment for name in _SAID_BY_USER):
        environment["GOMP_SPINCOUNT"] = SPINS
