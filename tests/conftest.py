"""Shared fixtures: a tiny model, a tuned engine, batches of made-up rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from luthier import machine, registry
from luthier.kinds import Batch, Now
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.planning import estimate
from luthier.registry import Part
from luthier.training.build import build_engine
from luthier.training.engine import Engine
from luthier.tune import Tune
from tests.costs import Costs
from tests.processor import describe
from tests.stub_endpoint import KEY, Stub, serving
from tests.unit.browser import Browser, find_browser, running

torch.set_num_threads(int(os.environ.get("LUTHIER_TEST_THREADS", "1")))


def pytest_report_header() -> str:
    """Tell the processor: results differ in the last digits between processors, and times in much more."""
    return f"processor: {describe()}"


def pytest_configure(config: pytest.Config) -> None:
    """Measure what the tests cost."""
    config.pluginmanager.register(Costs(config), "costs")


def pytest_collection_finish() -> None:
    """Leave what stands for the whole session out of the garbage collector's rounds: every run of luthier asks for one."""
    machine.keep_what_stands()


def make_batch(rows: Sequence[tuple[int, int]], *, vocabulary: int = 250, seed: int = 0, first: int = 0, pad_to: int = 0) -> Batch:
    """A batch of random rows: (length, targets at the end) each."""
    rng = torch.Generator().manual_seed(seed)
    time = max([length for length, _ in rows] + [pad_to])
    ids = torch.zeros(len(rows), time, dtype=torch.long)
    attend = torch.zeros(len(rows), time, dtype=torch.bool)
    label = torch.full((len(rows), time), -100)
    position = torch.zeros(len(rows), time, dtype=torch.long)
    for i, (length, targets) in enumerate(rows):
        ids[i, :length] = torch.randint(5, vocabulary, (length,), generator=rng)
        attend[i, :length] = True
        position[i, :length] = torch.arange(length)
        if targets:
            label[i, length - targets : length] = ids[i, length - targets : length]
    return Batch(ids, attend, position, label, tuple(f"row{first + i}" for i in range(len(rows))))


TASKS = ("code", "chat", "math", "code", "math", "code", "chat", "math")
RIGHT_SHARES = (0.0, 0.01, 0.05, float("nan"), 0.5, 0.02, 0.003, 0.09)
QUALITY = (2.0, 1.0, 2.0, 2.0, 1.0, 3.0, 3.0, 1.0)


def with_columns(batch: Batch) -> Batch:
    """A batch whose rows have the free columns that some techniques read: the text `task`, and the numbers `quality`, two likelihoods
    under other models, and two shares, of which `right_share` row 3, the one of `rows_of_eight` without a target, lacks."""
    rows = len(batch.row_ids)
    aligned_B = torch.linspace(-1.4, -0.6, rows)
    share_B = torch.tensor(RIGHT_SHARES[:rows])
    numbers = {
        "quality": torch.tensor(QUALITY[:rows]),
        "aligned_log_likelihood": aligned_B,
        "other_log_likelihood": aligned_B.flip(0),
        "right_share": share_B,
        "other_share": torch.full((rows,), 0.02),
        "label": torch.arange(rows).float() % 2,
    }
    return batch._replace(columns=numbers, texts={"task": TASKS[:rows]})


def split(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """The same rows as several micro-batches; rows that belong together stay so, whatever the sizes."""
    parts, start = [], 0
    ends = [end - next((end - g[0] for g in batch.groups if g[0] < end <= g[-1]), 0) for end in accumulate(sizes)]
    for end in ends:
        cut, size = slice(start, end), end - start
        length = max(int(batch.attend_BT[cut].sum(-1).max()), 1) if size else 1
        parts.append(
            Batch(
                batch.token_ids_BT[cut, :length],
                batch.attend_BT[cut, :length],
                batch.position_BT[cut, :length],
                batch.label_BT[cut, :length],
                batch.row_ids[cut],
                {name: column[cut] for name, column in batch.columns.items()},
                {name: texts[cut] for name, texts in batch.texts.items()},
                {name: column[cut, :length] for name, column in batch.token_columns.items()},
                tuple(tuple(place - start for place in group) for group in batch.groups if start <= group[0] < end),
            )
        )
        start = end
    return parts


CALIBRATION = ((9, 4), (5, 2), (12, 6), (7, 1), (3, 1), (10, 5), (6, 0), (8, 3))
"""Length and targets of the rows that `calibration` gives."""


def calibration(rows: int, source: str) -> list[Batch]:
    """A few rows in micro-batches of three, with the free columns of `with_columns`; others for another source."""
    whole = with_columns(make_batch(CALIBRATION[:rows], seed=len(source), first=100))
    sizes = [min(3, len(whole.row_ids) - first) for first in range(0, len(whole.row_ids), 3)]
    return split(whole, sizes)


def parts_of(**specs: Any) -> dict[str, list[Part]]:
    """Just the parts that are named, by key: nothing joins them, as it would in a recipe."""
    return {name: registry.make_all(specs.get(name), name) for name in registry.KEYS}


@cache
def _other(name: str, dtype: torch.dtype) -> Tune:
    model = tiny("llama", seed=len(name), layers=3).to(dtype)
    return Tune(model, map_parts(model))


def other_models(dtype: torch.dtype) -> Callable[[Mapping[str, str]], dict[str, Tune]]:
    """Loads a model of its own for every name that techniques ask for."""
    return lambda asked: {name: _other(name, dtype) for name in asked}


@pytest.fixture
def engine() -> Callable[..., Engine]:
    """Make an engine on a tiny model: `engine(tune="half", dtype=torch.float64, ...)`."""

    def make(
        tune: Any = "full",
        *,
        architecture: str = "llama",
        model: Any = None,
        objective: Any = "cross_entropy",
        token_weight: Any = None,
        optimizer: Any = "sgd",
        gradient_estimator: Any = "backprop",
        callbacks: Any = None,
        freeze: Any = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        **options: Any,
    ) -> Engine:
        model = tiny(architecture, seed=1, layers=4) if model is None else model
        return build_engine(
            model.to(dtype),
            map_parts(model),
            parts_of(
                tune=tune,
                objective=objective,
                token_weight=token_weight,
                optimizer=optimizer,
                gradient_estimator=gradient_estimator,
                callbacks=callbacks,
                freeze=freeze,
            ),
            now=Now(steps=20, learning_rate=0.1, seed=seed),
            **{"calibration": calibration, "load_others": other_models(dtype), **options},
        )

    return make


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans count on shapes however little there is to count."""
    monkeypatch.setattr(estimate, "SMALL", -1)


@pytest.fixture
def now() -> Now:
    """A clock at the first of 20 steps, with a learning rate of 0.1."""
    return Now(step=0, steps=20, learning_rate=0.1, factor=1.0)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    """An endpoint on this machine; what luthier keeps of it goes into the test's own folder, and the user's key is that of tests."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Stub()) as found:
        yield found


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Models that evaluation sets are measured on say what they are told: `answering([...], [...])`, a list for each measurement in turn,
    the last one ever after."""
    turns: list[list[str]] = []

    def generate(tune: Any, tokenizer: Any, prompts: Sequence[Any], **options: Any) -> list[str]:
        found = turns.pop(0) if len(turns) > 1 else turns[0]
        assert len(found) == len(prompts)
        return found

    def told(*lists: list[str]) -> None:
        turns[:] = lists

    monkeypatch.setattr("luthier.evaluate.sets.generate", generate)
    return told


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of a file."""
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium on this machine: looked for chromium, chromium-browser, google-chrome, chrome")
    with running(program, tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found
