"""Memory that runs out within a step leaves no trace, and the step is taken in smaller micro-batches."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from luthier import machine
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now
from luthier.models.load import load_model
from luthier.training import memory
from luthier.training.engine import Engine, Work
from luthier.training.world import World
from tests.conftest import split
from tests.toys.helpers import model_of, rows_of_eight, toys  # noqa: F401
from tests.unit.test_kinds_resume import SETTINGS, assert_equal, build, everything

TAKES_BACK = [name for name in SETTINGS if name not in ("per layer", "zeroth order")]


def exhaust() -> None:
    """More than any machine has: the allocator's own error."""
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let memory run out when backward has just passed through a micro-batch of more tokens: all it changes is changed by then."""
    plain = Work.backward

    def limit(tokens: int) -> None:
        def backward(self: Work, batch: Batch) -> None:
            plain(self, batch)
            if batch.token_ids_BT.numel() > tokens:
                exhaust()

        monkeypatch.setattr(Work, "backward", backward)

    return limit


def batches(seed: int, sizes: Sequence[int]) -> list[Batch]:
    return split(rows_of_eight(seed=seed), sizes)


@pytest.mark.parametrize("name", TAKES_BACK)
def test_an_attempt_that_ran_out_of_memory_leaves_no_trace(engine: Any, now: Now, name: str, little_memory: Any) -> None:
    """The second micro-batch of the second step fails; taken smaller, everything equals a run that never failed, bit for bit."""
    found = []
    for fails in (False, True):
        run = build(engine, **SETTINGS[name])
        little_memory(1000)
        run.step(batches(0, (5, 3)), now)
        before = everything(run)
        if fails:
            little_memory(30)
            assert memory.attempt(run, batches(1, (2, 6)), now._replace(step=1)) is None
            assert_equal(everything(run), before)
            assert all(one.gradient is None and one.leaf.grad is None for one in run.tune.trained.values())
            assert not run.tune.dense and not run.tune.observing
        for i in (1, 2, 3):
            little_memory(1000)
            assert memory.attempt(run, batches(i, (2, 2, 2, 2)), now._replace(step=i)) is not None
        found.append(everything(run))
    assert_equal(found[1], found[0])


def test_a_backward_pass_that_broke_off_holds_no_activations(engine: Any, now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch keeps its graph until the thread's next backward pass, which would come beside those of the second attempt."""
    run: Engine = engine("full", model=model_of(), optimizer="adamw")
    made: list[weakref.ref[torch.Tensor]] = []
    for one in run.tune.model.modules():
        if isinstance(one, torch.nn.Linear):
            one.register_forward_hook(lambda module, given, output: made.append(weakref.ref(output)))
    amid = list(run.tune.trained.values())[len(run.tune.trained) // 2]

    def arrive(gradient: Any) -> None:
        exhaust()

    with monkeypatch.context() as broken:
        broken.setattr(amid, "arrive", arrive)
        assert memory.attempt(run, batches(0, (5, 3)), now) is None
    gc.collect()
    assert made and not [one for one in made if one() is not None]


def test_a_gradient_that_was_formed_and_did_not_arrive_is_dropped(engine: Any, now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Engine = engine("lora", model=model_of(), optimizer="adamw")
    one = next(iter(run.tune.trained.values()))

    def arrive(gradient: Any) -> None:
        exhaust()

    with monkeypatch.context() as broken:
        broken.setattr(one, "arrive", arrive)
        assert memory.attempt(run, batches(0, (5, 3)), now) is None
    assert one.leaf.grad is None


def test_what_a_technique_remembered_in_an_attempt_is_forgotten(
    engine: Any, now: Now, little_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Engine = engine("lora", model=model_of(), optimizer="adamw")
    slot, state = next(iter(run.states.items()))
    state |= {"count": 1, "seen": torch.zeros(2)}
    plain = run.source.gradients

    def gradients(work: Any) -> None:
        state["count"] += 1
        state["more"] = torch.ones(1)
        plain(work)

    monkeypatch.setattr(run, "source", run.source._replace(gradients=gradients))
    little_memory(30)
    assert memory.attempt(run, batches(0, (4, 4)), now) is None
    assert run.states[slot] is state and state["count"] == 1 and "more" not in state

    def in_place(work: Any) -> None:
        state["seen"].add_(1)
        plain(work)

    monkeypatch.setattr(run, "source", run.source._replace(gradients=in_place))
    with pytest.raises(LuthierError, match="cannot be taken back"):
        memory.attempt(run, batches(0, (4, 4)), now)


@pytest.mark.parametrize("name", ["per layer", "zeroth order"])
def test_a_step_that_has_begun_to_change_numbers_is_not_tried_again(
    engine: Any, now: Now, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(engine, **SETTINGS[name])
    what = "apply" if name == "per layer" else "write"
    plain, left = getattr(Work, what), [3]

    def touch(self: Work, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            exhaust()
        plain(self, *arguments)

    monkeypatch.setattr(Work, what, touch)
    with pytest.raises(LuthierError, match="had begun to change numbers") as caught:
        memory.attempt(run, batches(0, (4, 4)), now._replace(step=6))
    assert caught.value.where == "step 7" and "train.micro_batch_tokens" in caught.value.fix


def test_updates_inside_backward_are_tried_again_before_the_first_of_them(engine: Any, now: Now, little_memory: Any) -> None:
    run = build(engine, **SETTINGS["per layer"])
    before = everything(run)
    little_memory(30)
    assert memory.attempt(run, batches(0, (6, 2)), now) is None
    assert_equal(everything(run), before)


def test_memory_that_runs_out_in_the_optimizer_is_no_matter_of_micro_batches(
    engine: Any, now: Now, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Engine = engine("lora", model=model_of(), optimizer="adamw")
    monkeypatch.setattr(run.chain, "step", lambda now: exhaust())
    with pytest.raises(LuthierError, match="had begun to change numbers"):
        memory.attempt(run, batches(0, (4, 4)), now)


def test_a_single_row_that_does_not_fit_is_named(engine: Any, now: Now, little_memory: Any) -> None:
    run: Engine = engine("lora", model=model_of())
    little_memory(1)
    with pytest.raises(LuthierError, match="one row at a time, the longest of 12 tokens") as caught:
        memory.attempt(run, batches(0, (1,) * 8), now)
    assert caught.value.where == "step 1, row row2"
    assert all(words in caught.value.fix for words in ("train.gradient_checkpointing", "rows.max_length", "lora"))


def test_two_rows_at_a_time_can_be_cut(engine: Any, now: Now, little_memory: Any) -> None:
    run: Engine = engine("lora", model=model_of())
    little_memory(1)
    assert memory.attempt(run, batches(0, (2, 2, 2, 2)), now) is None


def test_several_processes_do_not_try_again(engine: Any, now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Engine = engine("lora", model=model_of())

    def step(batches: Any, now: Now) -> None:
        exhaust()

    monkeypatch.setattr(run, "step", step)
    monkeypatch.setattr(run, "world", World(2, 1))
    with pytest.raises(LuthierError, match="process 1") as caught:
        memory.attempt(run, batches(0, (4, 4)), now)
    assert "train.micro_batch_tokens" in caught.value.fix


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error: Exception, is_memory: bool) -> None:
    assert memory.ran_out(error) is is_memory


def test_other_errors_pass_through(engine: Any, now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Engine = engine("lora", model=model_of())

    def step(batches: Any, now: Now) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(run, "step", step)
    with pytest.raises(RuntimeError, match="something else"):
        memory.attempt(run, batches(0, (4, 4)), now)


def test_the_next_size_always_cuts_the_largest_micro_batch() -> None:
    """Rows of 9, 6, 12, 5, 7 and 10, 4, 8 tokens: 39 and 22."""
    assert memory.smaller(batches(0, (5, 3)), 2048) == 19
    assert memory.smaller(batches(0, (5, 3)), 30) == 15
    assert memory.smaller(batches(0, (1,) * 8), 1) == 1


def test_large_models_that_are_gone_are_freed_before_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for gone models took a third of a second at every start, also where none could be, or none that matters."""
    model = load_model("tiny:llama")
    model.itself = model  # type: ignore[assignment]
    gone, collections = weakref.ref(model), list[None]()
    held = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    del model
    collect = gc.collect
    monkeypatch.setattr(machine, "_LOADED", weakref.WeakSet([gone()]))
    monkeypatch.setattr(gc, "collect", lambda: collections.append(None) or collect())
    monkeypatch.setattr(machine, "WORTH_FREEING", held + 1)
    machine.free_what_is_gone()
    assert not collections
    monkeypatch.setattr(machine, "WORTH_FREEING", held)
    machine.free_what_is_gone()
    assert len(collections) == 1 and gone() is None


def test_every_loaded_model_is_known() -> None:
    model = load_model("tiny:llama")
    assert model in machine._LOADED
