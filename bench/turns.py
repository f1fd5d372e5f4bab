"""Taking turns: a training run in a process of its own stops before every step until it is told to go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from luthier import machine


class Turn:
    """The side of the process that trains. What it prints goes to standard error, so that nothing mixes with what it reports."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = self._used = 0.0
        self.imported_bytes = machine.resident_bytes()
        """What the process took before there was a model."""
        self.facts: dict[str, Any] = {}
        """What the other side should know before the first step."""

    def wait(self) -> None:
        """Before a step: go on when told to."""
        if not self._began:
            machine.reset_peak(torch.device("cpu"))
        self._tell({"ready": True, "imported_bytes": self.imported_bytes, **self.facts})
        sys.stdin.readline()
        self._began, self._used = time.perf_counter(), time.process_time()

    def done(self, tokens: int, supervised: int) -> None:
        """After a step: report it."""
        self._tell(
            {
                "tokens": tokens,
                "supervised": supervised,
                "seconds": time.perf_counter() - self._began,
                "processor_seconds": time.process_time() - self._used,
                "peak_bytes": machine.peak_bytes(torch.device("cpu")),
            }
        )

    def end(self, facts: dict[str, Any]) -> None:
        """After the last step, where there is one: what else came of it."""
        self._tell(facts)

    def _tell(self, facts: dict[str, Any]) -> None:
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()


class Player:
    """The side that says whose turn it is.

    Args:
        module: what to run, as `python -m`.
        setting: a file with its setting.
        log: gets what it prints.
    """

    def __init__(self, module: str, setting: Path, log: Path) -> None:
        self.name, self.log = module, log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(setting)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.loaded = {key: value for key, value in self._hear().items() if key != "ready"}
        """What it told about itself before its first step."""
        self.ended: dict[str, Any] = {}
        """What it told behind its last step."""

    def step(self) -> dict[str, Any]:
        """Let it take one step, and wait until it stands before the next."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        facts = self._hear()
        told = self._hear()
        self.ended = {} if "ready" in told else told
        return facts

    def end(self) -> None:
        """It has done its part."""
        self._process.kill()
        self._process.wait()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early:\n{self.log.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found
