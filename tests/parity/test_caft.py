"""Concept-Aware Fine-Tuning: which token each head predicts, what it weighs, when it trains, and that nothing of it is left."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

import luthier
from luthier.columns import losses
from luthier.delta import Delta
from luthier.errors import LuthierError
from luthier.export import export_model, export_peft
from luthier.kinds import Batch, Freezing, LossTerm, Now, TokenWeight, View
from luthier.methods.loss_term._heads import MAKES, ahead, loss_ahead, targets_ahead
from luthier.methods.loss_term.caft import caft, strength
from luthier.models.attention import use_attention
from luthier.models.load import load_model, resolve
from luthier.models.tiny import tiny
from luthier.training.checkpoint import restore, save
from luthier.training.engine import Work
from tests.conftest import make_batch, split
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight, toys  # noqa: F401
from tests.unit.test_kinds_resume import assert_equal, everything

HEADS = 4
AT_ONCE = {"heads_first": 0.0, "schedule": "constant", "weight": 0.3}
"""The model trains from the first step on, with heads that count."""


def objective(**options: Any) -> list[Any]:
    return [{"caft": {**AT_ONCE, **options}}]


def shaken(run: Any) -> Any:
    """Heads that are not what they start as."""
    rng = torch.Generator().manual_seed(7)
    for name, one in run.tune.trained.items():
        if one.form == "free":
            run.tune.set({name: one.master.detach() + 0.2 * torch.randn(one.master.shape, generator=rng, dtype=torch.float64)})
    return run


def masters(run: Any) -> dict[str, Tensor]:
    return {name: one.master.detach().clone() for name, one in run.tune.trained.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def loss_of(run: Any, batches: Sequence[Batch], now: Now) -> float:
    """The loss of a step that is not taken."""
    units = run.objective.units(batches, None, run.world)
    return Work(run, batches, now, units, None).loss()


def by_hand(run: Any, batch: Batch, weigh: Callable[[int, int], float] = lambda row, place: 1.0) -> Tensor:
    """The whole loss as the paper has it, in loops over rows and positions, from logits of plain transformers."""
    model, own = run.tune.model, {name.removeprefix("caft."): one.leaf for name, one in run.tune.trained.items()}
    hidden_BTD = model.model(batch.token_ids_BT, attention_mask=batch.attend_BT.long(), use_cache=False).last_hidden_state
    loss = hidden_BTD.new_zeros(())
    for head in range(HEADS + 1):
        x_BTD = hidden_BTD
        if head and f"ahead_{head}_weight_DD" in own:
            inner_BTD = x_BTD @ own[f"ahead_{head}_weight_DD"].T + own[f"ahead_{head}_bias_D"]
            x_BTD = x_BTD + inner_BTD * torch.sigmoid(inner_BTD)
        elif head:
            before = f"ahead_{head}_"
            weights = {name.removeprefix(before): one for name, one in own.items() if name.startswith(before)}
            angles = model.model.rotary_emb(x_BTD, torch.arange(x_BTD.shape[1])[None])
            x_BTD = functional_call(model.model.layers[-2], weights, (x_BTD,), {"position_embeddings": angles})
        log_BTV = model.lm_head(x_BTD).log_softmax(-1)
        losses = []
        for row, labels in enumerate(batch.label_BT.tolist()):
            real = [t for t, here in enumerate(batch.attend_BT[row].tolist()) if here]
            losses += [-log_BTV[row, t, labels[t + 1 + head]] * weigh(row, t + 1 + head)
                       for t in real if t + 1 + head in real and labels[t + 1 + head] >= 0]  # fmt: skip
        if losses:
            loss = loss + torch.stack(losses).mean() * (0.3 * 0.8**head if head else 1.0)
    return loss


# What each head predicts, and what it counts.


def test_a_shift_by_one_would_be_seen() -> None:
    """Labels 0 to S - 1, and a head whose logits at t are 50 higher at t + 1 + i than elsewhere: every loss is 0, else 50."""
    size = 12
    ids_BT = torch.arange(size)[None]
    batch = Batch(ids_BT, ids_BT >= 0, ids_BT, ids_BT, ("row",))
    services: Any = SimpleNamespace(nll=losses.nll)
    view = View(
        batch,
        {},
        label_N=torch.arange(1, size),
        row_N=torch.zeros(size - 1, dtype=torch.long),
        position_N=torch.arange(1, size),
        hidden_BTD=50.0 * torch.eye(size, dtype=torch.float64)[None],
        services=services,
    )
    for head in range(1, HEADS + 1):
        for off in (-1, 0, 1):
            # SiLU(100) = 100 at t + 1 + i, beside the 50 at t.
            map_DD = 2.0 * torch.eye(size, dtype=torch.float64).roll(1 + head + off, 0)
            own = {f"ahead_{head}_weight_DD": map_DD, f"ahead_{head}_bias_D": torch.zeros(size, dtype=torch.float64)}
            count = targets_ahead(batch, head)
            assert count == size - 1 - head == len(ahead(view, head).source_M)
            mean = float(loss_ahead(MAKES["residual"], view, own, head)) / count
            assert mean == pytest.approx(0.0, abs=1e-12) if off == 0 else mean > 49.9


def test_padding_predicts_nothing() -> None:
    """Behind one padded place the first head has the targets of a row without it, and none that the padding would predict."""
    ids_BT = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    batch = Batch(ids_BT, ids_BT > 0, ids_BT, ids_BT.masked_fill(ids_BT < 1, -100), ("row0", "row1"))
    row_N, position_N = torch.tensor([0, 0, 0, 1]), torch.tensor([2, 3, 4, 4])
    view = View(batch, {}, label_N=ids_BT[row_N, position_N], row_N=row_N, position_N=position_N)
    for head, sources in ((1, [1, 2]), (2, [1]), (3, [])):
        found = ahead(view, head)
        assert (found.row_M.tolist(), found.source_M.tolist()) == ([0] * len(sources), sources)
        assert targets_ahead(batch, head) == len(sources) == int(found.chosen_N.sum())


def test_equal_losses_add_up_to_the_papers_factors(engine: Any) -> None:
    """Weights 0.8, 0.64, 0.512 and 0.4096: 1.023616 times the loss at c = 0.01, and 1 + 2.3616 while the heads learn alone."""
    model = tiny("llama", seed=1)
    torch.nn.init.zeros_(model.lm_head.weight)
    nats = math.log(259)
    model_before = copy.deepcopy(model)
    run = engine(model=model, objective=objective(weight=0.01))
    now = Now(steps=20, learning_rate=0.0)
    assert run.step([rows_of_eight()], now).loss == pytest.approx(1.023616 * nats, rel=1e-12)
    alone = engine(model=copy.deepcopy(model_before), objective=objective(heads_first=0.5))
    assert alone.step([rows_of_eight()], now).loss == pytest.approx(3.3616 * nats, rel=1e-12)
    assert alone.step([rows_of_eight()], now._replace(step=10)).loss == pytest.approx((1 + 0.3 * 2.3616) * nats, rel=1e-12)


@pytest.mark.parametrize("head", ["residual", "block"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_are_the_papers(engine: Any, now: Now, weighted: bool, head: str) -> None:
    """Against loops over rows and positions; micro-batches in which the last heads have no target, or no head has one."""

    def weigh(view: View) -> Tensor:
        return 0.1 * view.position_N.double()

    batch = rows_of_eight()
    run = shaken(engine(model=model_of(), objective=objective(head=head), token_weight=TokenWeight(weigh) if weighted else None))
    wanted = by_hand(run, batch, (lambda row, place: 0.1 * place) if weighted else (lambda row, place: 1.0))
    leaves = {name: one.leaf for name, one in run.tune.trained.items()}
    short = split(batch, (3, 1, 2, 1, 1))
    assert [targets_ahead(one, 4) for one in short] == [7.0, 0.0, 7.0, 0.0, 3.0] and short[3].supervised == 1
    plain = dict(zip(leaves, torch.autograd.grad(wanted, list(leaves.values())), strict=True))
    for batches in ([batch], short):
        assert loss_of(run, batches, now) == pytest.approx(float(wanted.detach()), rel=1e-12)
        assert gap(gradients(run, batches, now), plain) < 1e-9


def test_a_step_without_targets_for_the_last_head(engine: Any, now: Now) -> None:
    """A head that has no target in the whole step adds nothing, and is no number that is not finite."""
    batch = make_batch([(3, 2), (4, 3)])
    assert [targets_ahead(batch, head) for head in (1, 2, 3, 4)] == [3.0, 1.0, 0.0, 0.0]
    run = shaken(engine(model=model_of(), objective=objective()))
    assert loss_of(run, split(batch, (1, 1)), now) == pytest.approx(float(by_hand(run, batch).detach()), rel=1e-12)
    assert targets_ahead(make_batch([(1, 0)]), 4) == 0.0
    # The vocabulary's first id is a target like any other.
    assert targets_ahead(batch._replace(label_BT=batch.label_BT.clamp(max=0)), 1) == 3.0


def test_gradients_are_finite_differences(engine: Any, now: Now) -> None:
    run = shaken(engine(model=model_of(), objective=objective()))
    batches = split(rows_of_eight(), (5, 3))
    found = gradients(run, batches, now)
    rng = torch.Generator().manual_seed(0)
    # Below the last norm the model itself has the digits of fp32.
    steps = dict.fromkeys((name for name in found if name.startswith("caft.") or "lm_head" in name), (1e-5, 1e-6))
    assert len(steps) == 2 * HEADS + 1
    for name, (step, within) in {**steps, "full/model.layers.0.mlp.up_proj.weight": (1e-3, 1e-3)}.items():
        start = run.tune.trained[name].master.detach().clone()
        way = torch.randn(start.shape, generator=rng, dtype=torch.float64)
        ends = []
        for sign in (1.0, -1.0):
            run.tune.set({name: start + sign * step * way})
            ends.append(loss_of(run, batches, now))
        run.tune.set({name: start})
        assert float((found[name] * way).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=within, abs=1e-9), name


def test_heads_start_as_the_identity_and_can_learn(engine: Any, now: Now) -> None:
    """Head i's loss is that of the plain logits for its targets, and W's gradient is SiLU'(0) = 0.5 of that of its output, times x."""
    batch = make_batch([(9, 8)])
    run = engine(model=model_of(), objective=objective(heads=1, decay=1.0, weight=1.0))
    with torch.no_grad():
        hidden_TD = run.tune.model.model(batch.token_ids_BT, use_cache=False).last_hidden_state[0]
    out_TD = hidden_TD.clone().requires_grad_(True)
    log_TV = run.tune.model.lm_head(out_TD).log_softmax(-1)
    loss = -log_TV[torch.arange(7), batch.label_BT[0, 2:]].mean()
    (slope_TD,) = torch.autograd.grad(loss, out_TD)
    plain = loss_of(engine(model=model_of()), [batch], now)
    assert loss_of(run, [batch], now) == pytest.approx(plain + float(loss), rel=1e-12)
    found = gradients(run, [batch], now)["caft.ahead_1_weight_DD"]
    assert torch.allclose(found, 0.5 * slope_TD.T @ hidden_TD, rtol=1e-9, atol=1e-12) and float(found.abs().max()) > 1e-4


def test_no_weight_is_supervised_fine_tuning_bit_for_bit(engine: Any, now: Now) -> None:
    batches = split(rows_of_eight(), (5, 3))
    plain = gradients(engine(), batches, now)
    none = gradients(shaken(engine(objective=objective(weight=0.0))), batches, now)
    assert gap(none, plain) == 0.0
    some = gradients(shaken(engine(objective=objective())), batches, now)
    assert max(float((some[name] - plain[name]).abs().max()) for name in plain) > 1e-3
    # A schedule that has fallen to 0 leaves the same.
    ended = shaken(engine(objective=objective(schedule="reverse_sine", over=0.5)))
    assert gap(gradients(ended, batches, now._replace(step=10)), plain) == 0.0


@pytest.mark.parametrize(
    ("schedule", "over", "step", "value"),
    [
        ("reverse_sine", 1.0, 0, 1.0),
        ("reverse_sine", 1.0, 50, 0.707107),
        ("reverse_sine", 1.0, 99, 0.015707),
        ("reverse_sine", 1.0, 100, 0.0),
        ("reverse_sine", 0.5, 50, 0.0),
        ("sine", 0.2, 10, 0.707107),
        ("sine", 0.2, 20, 1.0),
        ("sine", 0.2, 60, 1.0),
        ("sine", 1.0, 50, 0.707107),
        ("linear", 1.0, 25, 0.25),
        ("constant", 1.0, 0, 1.0),
    ],
)
def test_schedules(schedule: str, over: float, step: int, value: float) -> None:
    assert strength(Now(step=step, steps=100), schedule, over=over) == pytest.approx(value, abs=5e-7)
    if over == 1.0:
        assert strength(Now(step=step, steps=100), schedule) == pytest.approx(value, abs=5e-7)
    # Behind the heads' own steps it is the same over the rest.
    assert strength(Now(step=step + 25, steps=125), schedule, 0.2, over) == pytest.approx(value, abs=5e-7)


# When what trains.


@pytest.mark.parametrize("train_heads", [False, True])
@pytest.mark.parametrize("partner", ["full", "lora", "prompt_tuning"])
def test_heads_move_first_and_alone(engine: Any, now: Now, partner: str, train_heads: bool) -> None:
    step = [{"adamw": {"weight_decay": 0.1}}]
    run = engine(partner, model=model_of(), objective=objective(heads_first=0.15, train_heads=train_heads), optimizer=step)
    heads = {name for name in run.tune.trained if name.startswith("caft.")}
    assert len(heads) == 2 * HEADS and all(run.tune.trained[name].rate == 10.0 for name in heads)
    start = masters(run)
    for i in range(5):
        before = masters(run)
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))
        changed = moved(before, masters(run))
        if i < 3:
            assert changed == heads
        else:
            assert changed - heads and changed & heads == (heads if train_heads else set())
    # LoRA's first factor waits for the second.
    assert len(moved(start, masters(run))) >= 0.5 * len(start)


def test_the_schedule_of_the_learning_rate_begins_again() -> None:
    for share, ends in ((0.25, (0.25,)), (0.0, ())):
        plain, heads, freezing = caft(heads_first=share, head_learning_rate_factor=7.0)
        assert isinstance(plain, LossTerm) and isinstance(heads, LossTerm) and heads.rate == 7.0
        assert isinstance(freezing, Freezing) and freezing.restart and freezing.ends == ends
        assert freezing.alone == ({0} if ends else set())


@pytest.mark.parametrize(("head", "train_heads"), [("residual", False), ("residual", True), ("block", True)])
@pytest.mark.parametrize("tune", ["half", "lora"])
def test_fault_27_killed_and_resumed(engine: Any, now: Now, tmp_path: Path, tune: str, head: str, train_heads: bool) -> None:
    """Fault 27: bit for bit, from before, at and behind the step in which the model begins to train."""

    def build() -> Any:
        options = {"head": head, "heads": 2, "heads_first": 0.15, "train_heads": train_heads}
        run = engine(tune, model=model_of(), optimizer="adamw", objective=objective(**options))
        run.tune.model.train()
        return run

    def go(run: Any, first: int) -> None:
        for i in range(first, 6):
            if first == 0 and i in (2, 3, 4):
                save(tmp_path / f"step-{i}", run, {"step": i})
            run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))

    run = build()
    go(run, 0)
    for i in (2, 3, 4):
        fresh = build()
        restore(tmp_path / f"step-{i}", fresh)
        go(fresh, i)
        assert_equal(everything(fresh), everything(run))


# With what it goes together.

TUNES: dict[str, Any] = {
    "half": "half",
    "lora": "lora",
    "prompt_tuning": "prompt_tuning",
    "spiel": {"spiel": {"every": 3, "gather": 1}},
}


@pytest.mark.parametrize("head", ["residual", "block"])
@pytest.mark.parametrize("tune", TUNES)
def test_any_split_is_the_same_in_both_phases(engine: Any, now: Now, tune: str, head: str) -> None:
    found = []
    for sizes in ((8,), (3, 1, 4)):
        run = engine(TUNES[tune], model=model_of(), objective=objective(head=head, heads_first=0.05), token_weight="dft")
        batches, each = split(rows_of_eight(), sizes), []
        for i in (0, 1):
            run.tune.freeze(now._replace(step=i))
            each.append(gradients(run, batches, now._replace(step=i)))
            assert math.isfinite(run.step(batches, now._replace(step=i, learning_rate=0.01)).loss)
        found.append(each)
    for one, other in zip(*found, strict=True):
        assert one and gap(other, one) < 1e-9
    heads = {name for name in run.tune.trained if name.startswith("caft.ahead_")}
    assert {name for name in found[0][0] if not name.startswith("dense")} == heads
    assert len(heads) == HEADS * (2 if head == "residual" else 9)


@pytest.mark.parametrize("head", ["residual", "block"])
@pytest.mark.parametrize("tune", ["full", {"half": {"share": 0.9}}])
def test_checkpointing_packing_and_padding_on_the_left_with_tied_embeddings(engine: Any, now: Now, tune: Any, head: str) -> None:
    batches = split(rows_of_eight(), (5, 3))
    left = [
        Batch(*(torch.cat([torch.full((len(b.row_ids), 3), f), x], 1).to(x.dtype) for x, f in zip(b[:4], (0, 0, 0, -100), strict=True)),
              b.row_ids)
        for b in batches
    ]  # fmt: skip

    def found(prepare: Callable[[Any], Any] = lambda model: None, packs: bool = False, given: Any = batches) -> dict[str, Tensor]:
        model = tiny("llama", seed=1, tied=True).double()
        prepare(model)
        run = shaken(engine(tune, model=model, objective=objective(head=head)))
        assert run.tune.parts.ties
        run.tune.packs = packs
        model.train()
        return gradients(run, given, now)

    plain = found()
    again = found(lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}))
    assert gap(again, plain) == 0.0
    assert gap(found(use_attention, packs=True), plain) < 1e-10
    assert gap(found(given=left), plain) < 1e-10


def test_the_logits_of_the_heads_are_never_kept(engine: Any, now: Now) -> None:
    """Between forward and backward there are those of the next token alone."""

    def kept(goal: Any) -> int:
        run, sizes = engine(model=model_of(), objective=goal), []
        batch = rows_of_eight()

        def pack(saved: Tensor) -> Tensor:
            sizes.append(saved.numel() if saved.ndim == 2 and saved.shape[-1] == 259 else 0)
            return saved

        units = run.objective.units([batch], None, run.world)
        with saved_tensors_hooks(pack, lambda saved: saved):
            run.objective.total(run.tune, batch, units, now, first=True, services_of=lambda slot: run.services(slot, now))
        return sum(sizes)

    assert kept(objective()) == kept("cross_entropy") >= 30 * 259


# What is left of it: nothing.

ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}, {word} and {word}!"} for word in ("one", "two", "three", "four")]


@pytest.mark.parametrize(
    ("tune", "head"),
    [("full", "residual"), ({"lora": {"rank": 2}}, "residual"), ("full", "block"), ({"lora": {"rank": 2}}, "block")],
)
def test_the_result_has_no_heads(tmp_path: Path, tune: Any, head: str) -> None:
    settings = {"steps": 4, "batch_rows": 4, "micro_batch_tokens": 150, "precision": "fp32", "learning_rate": 1e-2}
    recipe = {
        "model": "tiny:llama",
        "rows": {"train": ROWS},
        "tune": tune,
        "objective": {"caft": {"head": head, "heads_first": 0.25}},
    }
    run = luthier.train({**recipe, "train": settings, "out": str(tmp_path)})
    base = load_model(resolve("tiny:llama"), dtype=torch.float32)
    keys = set(base.state_dict())
    heads = [name for name in run.tune.trained if name.startswith("caft.")]
    assert len(heads) >= 2 * HEADS and all(float(run.tune.trained[name].master.abs().max()) > 0 for name in heads)
    assert {name for name in keys if "ahead" in name} == set() == {n for n in run.model.state_dict() if n not in keys}
    delta = Delta.load(run.folder / "delta.safetensors")
    assert delta.changes and set(delta.changes) <= keys
    ids = run.tokenizer("Say two.", return_tensors="pt").input_ids

    def answer(model: Any) -> list[int]:
        with torch.no_grad():
            found: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[
                0
            ].tolist()
        return found

    trained = answer(run.model.eval())
    opened, _ = luthier.open_run(luthier.read_run(str(run.folder)))
    assert not opened.trained and set(opened.model.state_dict()) == keys and answer(opened.model.eval()) == trained
    export_model(run.tune, run.tokenizer, tmp_path / "exported")
    exported = load_model(resolve(str(tmp_path / "exported")), dtype=torch.float32)
    assert set(exported.state_dict()) == keys and answer(exported) == trained
    assert any(not torch.equal(value, base.state_dict()[name]) for name, value in exported.state_dict().items())
    if tune != "full":
        export_peft(run.tune, tmp_path / "adapter", "tiny:llama", fingerprint=None)
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_prompt_that_was_trained_beside_heads_is_an_adapter(engine: Any, now: Now, tmp_path: Path) -> None:
    run = engine("prompt_tuning", model=tiny("llama", seed=1), objective=objective(), dtype=torch.float32)
    run.step([rows_of_eight()], now)
    assert export_peft(run.tune, tmp_path / "adapter", "tiny:llama", fingerprint=None)["peft_type"] == "PROMPT_TUNING"


@pytest.mark.parametrize(("layers", "copied"), [(3, 1), (2, 0), (1, 0)])
def test_heads_may_start_as_the_last_block_but_one(engine: Any, layers: int, copied: int) -> None:
    """Or as the only one."""
    run = engine(model=model_of(layers=layers), objective=objective(head="block"))
    for head in range(1, HEADS + 1):
        for name, live in run.tune.model.model.layers[copied].named_parameters():
            assert torch.equal(run.tune.trained[f"caft.ahead_{head}_{name}"].master, live)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": 0}, "`heads` is 0"),
        ({"weight": -0.1}, "`weight` is -0.1"),
        ({"decay": 0.0}, "`decay` is 0.0"),
        ({"decay": 1.01}, "`decay` is 1.01"),
        ({"over": 1.5}, "`over` is 1.5"),
        ({"heads_first": 1.0}, "`heads_first` is 1.0"),
        ({"head_learning_rate_factor": 0.0}, "`head_learning_rate_factor` is 0.0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(LuthierError, match=says):
        caft(**options)


def test_options_at_the_ends_of_their_ranges_are_taken() -> None:
    for options in (
        {"heads": 1, "weight": 0.0, "decay": 1.0, "over": 1.0, "heads_first": 0.0},
        {"decay": 0.1, "over": 0.1, "head_learning_rate_factor": 0.1},
    ):
        assert len(caft(**options)) == 3


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_phase_without_a_step_is_refused(engine: Any, share: float) -> None:
    with pytest.raises(LuthierError, match="a run of 20 steps has 20 for `caft`, which are too few for its 2 phases"):
        engine(objective=objective(heads_first=share))
