"""Passes at an earlier state of the model: their heads, what a visit leaves alone, averages over time, and resuming."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.columns.chunked import resolve
from luthier.columns.losses import nll
from luthier.errors import LuthierError
from luthier.kinds import Callback, Column, Now, OtherPass, RepresentationEdit, Resize, TokenWeight
from luthier.registry import Part
from luthier.training import services
from luthier.training.checkpoint import restore, save
from luthier.training.services import view_of
from tests.toys.helpers import model_of, rows_of_eight, toys  # noqa: F401
from tests.unit.test_kinds_resume import assert_equal, build, everything, go

EARLY = OtherPass("early", at="early")
EARLY_NLL = Column("early_nll", lambda chunk: nll(chunk.others["early"], chunk.label_C), (EARLY,), gradient=False)
HEADS: list[Any] = [
    "full",
    "half",
    {"lora": {"target_modules": ["head"]}},
    {"scale_shift": {"target_modules": ["head"]}},
    {"some_cols": {"target_modules": ["embedding"]}},
    {"spiel": {"every": 2, "gather": 1, "target_modules": ["embedding"]}},
]
"""What trains the head or the embedding that may be tied to it, a part of them, or stands on the head."""
OTHERS: list[Any] = [
    [{"lora": {"target_modules": ["head"]}}, {"some_rows": {"target_modules": ["head"]}}],
    "keep_entries",
    "svd_start",
    "growing",
    "plain_prefix",
    "plain_prompt",
    ["some_entries", "lora", "bottleneck"],
]


def keeps(*, every: int = 0, share: float = 1.0, reads: bool = True) -> list[Part]:
    """A token weight that reads an early state and lets every target count, with what keeps that state."""

    def start(services: Any) -> dict[str, Any]:
        services.remember("early", share)
        return {}

    def after_step(state: Any, services: Any) -> None:
        if every and (services.now.step + 1) % every == 0:
            services.remember("early", share)

    weight = TokenWeight(lambda view: torch.ones_like(view["nll"]), (EARLY_NLL,) if reads else ())
    return [Part(name="keeps", kind="token_weight", options={}, values=(weight, Callback(after_step, start=start)))]


def nll_of(run: Any, now: Now) -> Tensor:
    return run.services("test", now).forward(rows_of_eight(), ["nll"])["nll"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("tune", "tied"), [*product(HEADS, (False, True)), *product(OTHERS, (False,))], ids=str)
def test_an_earlier_state_gives_what_it_gave_then(engine: Any, now: Now, tune: Any, tied: bool) -> None:
    """Its own head too: a matrix that trains, parts of it, a tied embedding, and what stands on the head."""
    run = engine(tune, model=model_of(tied=tied), optimizer="adamw")
    go(run, now, 0, 1)
    run.tune.snapshot("early")
    early_N = nll_of(run, now)
    go(run, now, 1, 4)
    late_N = nll_of(run, now)
    for pack in (False, None):
        found = view_of(run.tune, rows_of_eight(), resolve(["nll", EARLY_NLL]), now, pack=pack)
        torch.testing.assert_close(found["early_nll"], early_N, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["nll"].detach(), late_N, rtol=1e-12, atol=1e-12)
    assert float((late_N - early_N).abs().max()) > 1e-4


def test_the_head_of_then_is_used_again_where_chunks_are_made_anew(engine: Any, now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are recomputed in backward, when the weights are those of now; a divergence from then flows into these alone."""
    column = Column(
        "to_early",
        lambda chunk: (chunk.log_probabilities.exp() * (chunk.log_probabilities - chunk.other_log_probabilities("early"))).sum(-1),
        (EARLY,),
    )
    run = engine({"lora": {"target_modules": ["linear", "head"]}}, model=model_of(tied=True), optimizer="adamw")
    run.tune.snapshot("early")
    go(run, now, 0, 2)
    found = []
    compute = services.chunked.compute
    for limit in (2**28, 1):
        monkeypatch.setattr(services.chunked, "compute", lambda *a, limit=limit, **o: compute(*a, **o, limit_bytes=limit))
        value = view_of(run.tune, rows_of_eight(), resolve([column]), now)["to_early"].sum()
        value.backward()
        found.append({name: one.gradient for name, one in run.tune.trained.items()})
        run.tune.free_gradients()
        assert float(value.detach()) > 1e-3
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


def exchanges() -> list[Part]:
    """An edit whose tensors are others from the third step on."""

    def refresh(state: Any, services: Any) -> dict[Any, Resize]:
        places = services.parts.select(target_modules=("mlp_down",)) if services.now.step == 2 else []
        return {place: Resize({"shift": torch.zeros(services.parts.width)}) for place in places}

    def apply(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return y * tensors["scale"] if "scale" in tensors else y + tensors["shift"]

    value = RepresentationEdit(
        lambda place, i, o, services: {"scale": torch.ones(o)}, apply, target_modules=("mlp_down",), refresh=refresh
    )
    return [Part(name="exchanges", kind="representation_edit", options={}, values=(value,))]


CHANGING: list[Any] = ["growing", "some_entries", "keep_entries", {"lofit": {"share": 0.15}}, {"lt_sft": {"share": 0.15}}]


@pytest.mark.parametrize("tune", ["full", "lora", *CHANGING, "exchanges"], ids=str)
def test_a_visit_changes_nothing(engine: Any, now: Now, tune: Any) -> None:
    """Moments, gradients of earlier micro-batches, indices and tensors that have come and gone since: bit for bit, in every step."""
    chosen = exchanges() if tune == "exchanges" else tune
    runs = [build(engine, tune=chosen, token_weight=keeps(reads=reads), keep_base=True) for reads in (True, False)]
    for run in runs:
        go(run, now, 0, 6)
    assert_equal(everything(runs[0]), everything(runs[1]))
    assert list(runs[0].tune.trained) == list(runs[1].tune.trained)
    assert runs[0].tune.snapshots.keys() == {"early"}
    with runs[0].tune.off(), runs[1].tune.off():
        assert torch.equal(nll_of(runs[0], now), nll_of(runs[1], now))


def test_a_visit_leaves_the_first_steps_base_alone(engine: Any, now: Now) -> None:
    run = engine("svd_start", model=model_of(), keep_base=False)
    run.tune.snapshot("early")
    was = run.tune.untouched
    with run.tune.at("early"):
        pass
    assert run.tune.untouched == was


@pytest.mark.parametrize("tune", ["full", "half", "lora", ["some_rows", "bottleneck", "plain_prompt"]], ids=str)
def test_an_average_over_time_is_that_of_the_numbers(engine: Any, now: Now, tune: Any) -> None:
    """h <- 0.9 h + 0.1 now after every second step, in closed form."""
    run = build(engine, tune=tune, token_weight=keeps(every=2, share=0.1))
    then = [{name: one.master.detach().clone() for name, one in run.tune.trained.items()}]
    for i in range(6):
        go(run, now, i, i + 1)
        if i % 2:
            then.append({name: one.master.detach().clone() for name, one in run.tune.trained.items()})
    for name in run.tune.trained:
        start, one, two, three = (values[name] for values in then)
        expected = 0.9**3 * start + 0.1 * (0.9**2 * one + 0.9 * two + three)
        torch.testing.assert_close(run.tune.snapshots["early"][f"master|{name}"], expected, rtol=1e-12, atol=1e-14)
        assert not torch.equal(expected, three)


def test_a_small_share_is_not_lost_in_a_narrow_type(engine: Any, now: Now) -> None:
    run = engine("full", dtype=torch.bfloat16, masters="none")
    name, one = next(iter(run.tune.trained.items()))
    asked = run.services("any", now)
    asked.remember("early")
    run.tune.set({name: one.master.detach() * 1.25})
    now_V = one.master.detach().float()
    before = run.tune.snapshots["early"][f"master|{name}"].float()
    for _ in range(10):
        asked.remember("early", 0.001)
    found = run.tune.snapshots["early"][f"master|{name}"]
    expected = before + (1 - 0.999**10) * (now_V - before)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    with run.tune.at("early"):
        assert torch.equal(one.master.detach(), found.bfloat16())
    assert torch.equal(one.master.detach().float(), now_V)


@pytest.mark.parametrize(
    "setting",
    [
        {"tune": "full"},
        {"tune": "half", "dtype": torch.bfloat16},
        {"tune": "full", "dtype": torch.bfloat16, "masters": "none"},
        {"tune": {"lora": {"dropout": 0.2}}},
        {"tune": "growing", "share": 1.0},
        {"tune": {"spiel": {"every": 2, "gather": 1}}, "share": 1.0},
        {"tune": {"lofit": {"share": 0.15}}, "share": 1.0},
    ],
    ids=str,
)
def test_killed_between_two_refreshes_and_resumed(engine: Any, now: Now, tmp_path: Path, setting: dict[str, Any]) -> None:
    """Six steps with a refresh after every second; killed after any of them: the weights and what is remembered, bit for bit."""
    setting = dict(setting)
    share = setting.pop("share", 0.3)

    def fresh() -> Any:
        return build(engine, token_weight=keeps(every=2, share=share), **setting)

    run, saved = fresh(), []
    for k in range(6):
        if k == 2:
            run.tune.snapshot("best")
        saved.append(save(tmp_path / f"step-{k}", run, {"step": k}))
        go(run, now, k, k + 1)
    for k, folder in list(enumerate(saved))[1:]:
        again = fresh()
        restore(folder, again)
        go(again, now, k, 6)
        assert_equal(everything(again), everything(run))
        assert again.tune.snapshots.keys() == ({"early", "best"} if k >= 2 else {"early"})
        for name, values in again.tune.snapshots.items():
            assert_equal(values, run.tune.snapshots[name])


def test_the_best_state_is_another(engine: Any, now: Now) -> None:
    run = build(engine, tune="lora", token_weight=keeps(every=1, share=0.5))
    go(run, now, 0, 2)
    run.tune.snapshot("best")
    best = nll_of(run, now)
    go(run, now, 2, 5)
    assert not torch.equal(nll_of(run, now), best)
    run.tune.go_back("best")
    assert torch.equal(nll_of(run, now), best)


@pytest.mark.parametrize("name", ["", "base", "best", "a|b"])
def test_names_that_mean_something_else_are_refused(engine: Any, now: Now, name: str) -> None:
    with pytest.raises(LuthierError, match="cannot be called"):
        engine("lora").services("any", now).remember(name)


@pytest.mark.parametrize("tune", CHANGING, ids=str)
def test_an_average_of_numbers_that_come_and_go_is_refused_before_training(engine: Any, tune: Any) -> None:
    with pytest.raises(LuthierError, match="come and go"):
        engine(tune, token_weight=keeps(every=5, share=0.5))


def test_a_model_spread_over_processes_is_refused(engine: Any, now: Now) -> None:
    run = engine("lora")
    run.tune.root = nn.Module()
    with pytest.raises(LuthierError, match="spread over processes"):
        run.services("any", now).remember("early")
