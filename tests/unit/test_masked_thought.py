"""Masked thought: the exact replications of the paper, and input maps in general: what they may touch, and where they never stand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import luthier
from luthier import registry
from luthier.columns.chunked import resolve
from luthier.errors import LuthierError
from luthier.kinds import Batch, InputMap, Now, Reading, StepTable, TokenWeight, Vocabulary
from luthier.methods.input_map.masked_thought import chance_at
from luthier.models.attention import use_attention
from luthier.models.modes import evaluating
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.training.inputs import Inputs, Mapped, bare_vocabulary, vocabulary_of
from luthier.training.services import RunServices, view_of
from tests.conftest import make_batch, split
from tests.toys.helpers import gap, gradients, model_of, plain_loss, rows_of_eight, toys  # noqa: F401

MASK = 3
ALWAYS = {"mask_probability": 1.0, "warmup": 0.0, "random_share": 0.0, "mask_id": MASK}
HALF = {"mask_probability": 0.5, "warmup": 0.0, "random_share": 0.5, "mask_id": MASK}
VOCABULARY = 259


def inputs(vocabulary: Any = None, /, **options: Any) -> Inputs:
    """The map alone."""
    (value,) = registry.part("masked_thought", **options).values
    return Inputs(vocabulary or bare_vocabulary(VOCABULARY), [Mapped("masked_thought", value)])


def masked(**options: Any) -> list[Any]:
    """What a recipe has under `objective`."""
    return [{"masked_thought": options}, "cross_entropy"]


def masters(run: Any) -> dict[str, Tensor]:
    return {name: one.master.detach().clone() for name, one in run.tune.trained.items()}


def trained(run: Any, now: Now, steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a few steps, and what they came to."""
    run.tune.model.train()
    losses = [run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i)).loss for i in range(steps)]
    return losses, masters(run)


def test_a_rate_of_zero_is_supervised_fine_tuning_bit_for_bit(engine: Any, now: Now) -> None:
    plain_losses, plain = trained(engine(), now)
    losses, same = trained(engine(objective=masked(**{**HALF, "mask_probability": 0.0})), now)
    assert losses == plain_losses
    assert all(torch.equal(same[name], value) for name, value in plain.items())
    other_losses, other = trained(engine(objective=masked(**HALF)), now)
    assert other_losses[0] > plain_losses[0] + 0.001 or other_losses[0] < plain_losses[0] - 0.001
    assert not any(torch.equal(other[name], value) for name, value in plain.items())


def test_labels_prompts_and_padding_are_untouched(now: Now) -> None:
    batch = rows_of_eight()
    read = inputs(**ALWAYS).read(batch, now)
    assert torch.equal(read.label_BT, batch.label_BT) and torch.equal(read.attend_BT, batch.attend_BT)
    assert torch.equal(read.position_BT, batch.position_BT) and read.row_ids == batch.row_ids
    answer_BT = batch.label_BT >= 0
    assert torch.equal(read.token_ids_BT[~answer_BT], batch.token_ids_BT[~answer_BT])
    # 4 + 5 + 2 + 0 + 6 + 9 + 1 + 3 answer tokens, the first of each answer among them.
    assert int((read.token_ids_BT == MASK).sum()) == int(answer_BT.sum()) == 30
    empty = make_batch([])
    assert inputs(**ALWAYS).read(empty, now).token_ids_BT.shape == empty.token_ids_BT.shape


def test_the_first_id_is_hidden_too_where_it_stands_for_text(now: Now) -> None:
    """Only ids below 0 stand for no token."""
    batch = rows_of_eight()
    answer_BT = batch.label_BT >= 0
    zeros = batch._replace(token_ids_BT=batch.token_ids_BT.masked_fill(answer_BT, 0), label_BT=torch.where(answer_BT, 0, -100))
    for special in (1, 0):
        vocabulary = Vocabulary(torch.arange(VOCABULARY) != special)
        assert (inputs(vocabulary, **ALWAYS).read(zeros, now).token_ids_BT[answer_BT] == (MASK if special else 0)).all()


def test_what_has_no_chance_never_happens(now: Now) -> None:
    """Draws begin at 0: a rate of 0 replaces nothing at it, and a random share of 0 puts the mask."""
    batch = make_batch([(4, 3)])
    reading = Reading(
        now, bare_vocabulary(VOCABULARY), lambda stream: torch.zeros(1, 4).double(), lambda stream, width: torch.empty(0)
    )
    for rate, replaced in ((0.0, False), (1e-9, True)):
        (value,) = registry.part("masked_thought", **{**ALWAYS, "mask_probability": rate}).values
        wanted_BT = torch.where(batch.label_BT >= 0, MASK, batch.token_ids_BT) if replaced else batch.token_ids_BT
        assert torch.equal(value.map(batch, reading), wanted_BT)
    assert inputs(random_share=1.0).maps, "without a chance of the mask none is needed"


@pytest.mark.parametrize(("step", "chance"), [(0, 0.0), (1, 0.006), (20, 0.12), (50, 0.3), (66, 0.396), (67, 0.4), (99, 0.4)])
def test_the_chance_rises_in_a_straight_line(step: int, chance: float) -> None:
    now = Now(step=step, steps=100)
    assert chance_at(now, 0.4, 2 / 3) == pytest.approx(chance, abs=1e-15)
    assert chance_at(now, 0.4, 0.0) == 0.4 and chance_at(now, 0.4, 1.0) == pytest.approx(0.004 * step)
    batch = make_batch([(60, 50)] * 200)
    replaced = int((inputs(random_share=0.0, mask_id=MASK).read(batch, now).token_ids_BT == MASK).sum())
    count = 200 * 50
    assert abs(replaced - count * chance) <= 3 * math.sqrt(count * chance * (1 - chance))


def test_random_ids_come_at_their_share_and_from_the_whole_vocabulary(now: Now) -> None:
    count, own = 400 * 60, MASK + 1
    ids_BT = torch.full((400, 60), own)
    batch = make_batch([(60, 60)] * 400)._replace(token_ids_BT=ids_BT, label_BT=ids_BT)
    read_BT = inputs(mask_probability=0.5, warmup=0.0, random_share=0.3, mask_id=MASK).read(batch, now).token_ids_BT
    drawn = read_BT[(read_BT != MASK) & (read_BT != own)]
    # Of the random ids one in 259 is the mask's, and one the token's own.
    for found, chance in ((read_BT == MASK, 0.5 * (0.7 + 0.3 / VOCABULARY)), (read_BT == own, 0.5 * (1 + 0.3 / VOCABULARY))):
        assert abs(int(found.sum()) - count * chance) <= 3 * math.sqrt(count * chance * (1 - chance))
    others = VOCABULARY - 2
    expected = len(drawn) / others
    seen_V = torch.bincount(drawn, minlength=VOCABULARY)
    surprise = float(((seen_V - expected) ** 2 / expected).sum() - 2 * expected)
    # Chi-squared, whose mean are its degrees of freedom and whose variance is twice that.
    assert abs(surprise - (others - 1)) < 3 * math.sqrt(2 * (others - 1))


def test_draws_are_made_anew_in_every_step_and_repeat_for_the_same_one(now: Now) -> None:
    batch, map = rows_of_eight(), inputs(**HALF)
    first = map.read(batch, now).token_ids_BT
    assert torch.equal(map.read(batch, now).token_ids_BT, first)
    for other in (now._replace(step=1), now._replace(seed=1), now._replace(stage=1)):
        assert not torch.equal(map.read(batch, other).token_ids_BT, first)
    pieces = [map.read(piece, now) for piece in split(batch, (3, 1, 4))]
    together = torch.cat([piece.token_ids_BT[piece.attend_BT] for piece in pieces])
    assert torch.equal(together, first[batch.attend_BT])


def test_padding_on_the_left_draws_the_same(now: Now) -> None:
    batch = make_batch([(7, 5)])
    left = Batch(
        *(torch.cat([torch.full((1, 4), fill), one], 1) for one, fill in zip(batch[:4], (0, 0, 0, -100), strict=True)), ("row0",)
    )
    left = left._replace(attend_BT=left.attend_BT.bool())
    map = inputs(**HALF)
    assert torch.equal(map.read(left, now).token_ids_BT[:, 4:], map.read(batch, now).token_ids_BT)


def test_one_replaced_input_moves_later_predictions_alone(engine: Any, now: Now) -> None:
    run, batch, place = engine(), make_batch([(12, 10)]), 6
    ids_BT = batch.token_ids_BT.clone()
    ids_BT[0, place] = MASK
    read, columns = batch._replace(token_ids_BT=ids_BT), resolve(["nll"])
    clean = view_of(run.tune, batch, columns, now, keep_hidden=True)
    other = view_of(run.tune, batch, columns, now, read=read, keep_hidden=True)
    assert torch.equal(other.hidden_BTD[0, :place], clean.hidden_BTD[0, :place])
    assert ((other.hidden_BTD - clean.hidden_BTD)[0, place:].abs().amax(-1) > 1e-6).all()
    # The token in that place is predicted from the one before it.
    before_N = clean.position_N <= place
    assert place in clean.position_N and int(before_N.sum()) == 5
    assert torch.equal(other["nll"][before_N], clean["nll"][before_N])
    assert (other["nll"][~before_N] != clean["nll"][~before_N]).all()
    assert torch.equal(other.label_N, clean.label_N)


def test_a_mask_that_is_the_padding_token_is_still_attended(engine: Any, now: Now) -> None:
    run, batch = engine(), rows_of_eight()
    read = inputs(**{**ALWAYS, "mask_id": 0}).read(batch, now)
    found = view_of(run.tune, batch, resolve(["nll"]), now, read=read)["nll"].mean()
    model = copy.deepcopy(run.tune.model)
    assert float(found - plain_loss(model, read)) == pytest.approx(0.0, abs=1e-6)
    hidden_from_attention = read._replace(attend_BT=read.token_ids_BT != 0)
    assert abs(float(found - plain_loss(model, hidden_from_attention))) > 1e-4


def test_at_a_rate_of_one_the_answer_is_read_nowhere_and_still_is_the_target(engine: Any, now: Now) -> None:
    run, batch, columns = engine(), rows_of_eight(), resolve(["nll"])
    map, answer_BT = inputs(**ALWAYS), batch.label_BT >= 0
    other = batch._replace(token_ids_BT=torch.where(answer_BT, 250 - batch.token_ids_BT, batch.token_ids_BT))
    read = map.read(batch, now)
    assert torch.equal(map.read(other, now).token_ids_BT, read.token_ids_BT)
    loss = float(view_of(run.tune, batch, columns, now, read=read)["nll"].mean())
    clean = float(view_of(run.tune, batch, columns, now)["nll"].mean())
    on_masks = float(view_of(run.tune, read._replace(label_BT=torch.where(answer_BT, MASK, -100)), columns, now)["nll"].mean())
    assert abs(loss - clean) > 1e-3 and abs(loss - on_masks) > 1e-3
    # A learning rate of 0.1 later the step has reported that very loss.
    step = engine(objective=masked(**ALWAYS)).step(split(batch, (5, 3)), now)
    assert step.loss == pytest.approx(loss, abs=1e-9) and step.nll == pytest.approx(loss, abs=1e-9)


SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"tune": "lora"},
    "half": {"tune": "half"},
    "prompt": {"tune": "plain_prompt"},
    "two objectives": {"objective": ["cross_entropy", {"masked_thought": HALF}, {"likely_less": {}}]},
    "two maps": {"objective": ["cross_entropy", {"masked_thought": HALF}, "drop_tokens"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_splits_checkpointing_and_packing_change_no_gradient(engine: Any, now: Now, name: str) -> None:
    setting = {"objective": masked(**HALF), **SETTINGS[name]}
    batch = rows_of_eight()

    def found(sizes: tuple[int, ...], prepare: Callable[[Any], Any] = lambda model: None, packs: bool = False) -> dict[str, Tensor]:
        model = model_of()
        prepare(model)
        run = engine(**{**setting, "model": model})
        run.tune.packs = packs
        model.train()
        for one, master in masters(run).items():
            run.tune.set({one: master + 0.01})
        return gradients(run, split(batch, sizes), now)

    whole = found((8,))
    for sizes in ((2, 2, 2, 2), (3, 1, 4, 0)):
        assert gap(found(sizes), whole) < 1e-10
    again = found((8,), lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}))
    assert gap(again, whole) == 0.0
    assert gap(found((8,), use_attention, packs=True), whole) < 1e-10
    clean = gradients(engine(**{**setting, "objective": "cross_entropy", "model": model_of()}), [batch], now)
    assert gap(clean, whole) > 1e-3


def test_two_maps_and_one_map_twice_draw_differently(engine: Any, now: Now) -> None:
    options = {**HALF, "random_share": 0.0}
    run = engine(objective=["cross_entropy", {"masked_thought": options}, {"masked_thought": options}])
    assert [one.slot for one in run.inputs.maps] == ["masked_thought", "masked_thought.2"]
    batch = make_batch([(60, 50)] * 100)
    replaced = int((run.inputs.read(batch, now).token_ids_BT == MASK).sum())
    count = 100 * 50
    assert abs(replaced - count * 0.75) <= 3 * math.sqrt(count * 0.75 * 0.25)


def test_every_source_of_gradients_reads_the_same(engine: Any, now: Now) -> None:
    found = [trained(engine(objective=masked(**HALF), gradient_estimator=source), now) for source in ("backprop", "per_layer")]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[1][1][name], value) for name, value in found[0][1].items())
    # Without gradients too, at a point so close that the loss is the same.
    losses = [
        engine(objective=masked(**HALF), gradient_estimator=source).step([rows_of_eight()], now).loss
        for source in ("backprop", {"zeroth_order": {"scale": 1e-7}})
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_the_base_reads_what_the_model_reads_and_rules_and_services_read_clean_rows(engine: Any, now: Now) -> None:
    run, batch, columns = engine(objective=masked(**ALWAYS), keep_base=True), rows_of_eight(), resolve(["nll", "reference_nll"])
    clean = view_of(run.tune, batch, columns, now)
    seen = view_of(run.tune, batch, columns, now, read=run.inputs.read(batch, now))
    assert torch.equal(seen["reference_nll"], seen["nll"]) and not torch.equal(seen["nll"], clean["nll"])
    assert torch.equal(RunServices(run.tune, "any", now).forward(batch, ["nll"])["nll"], clean["nll"])
    tables: list[Tensor] = []

    def look(table: StepTable) -> Tensor:
        tables.append(table["nll"])
        return torch.ones(len(table))

    for objective in ("cross_entropy", masked(**ALWAYS)):
        engine(objective=objective, token_weight=TokenWeight(columns=("nll",), look=look)).step([batch], now)
    assert torch.equal(tables[0], tables[1])


def test_virtual_ids_survive(now: Now) -> None:
    batch = rows_of_eight()
    batch.token_ids_BT[:, :2] = torch.tensor([-1, -2])
    batch.label_BT[:, :2] = 7
    toy = Inputs(bare_vocabulary(VOCABULARY), [Mapped("drop_tokens", registry.part("drop_tokens", rate=1.0).values[0])])
    for map in (inputs(**ALWAYS), toy):
        read_BT = map.read(batch, now).token_ids_BT
        assert torch.equal(read_BT[:, :2], batch.token_ids_BT[:, :2])
        assert not torch.equal(read_BT[:, 2:], batch.token_ids_BT[:, 2:])


def test_a_map_cannot_touch_the_batch(now: Now) -> None:
    def greedy(batch: Batch, reading: Reading) -> Tensor:
        for one in batch[:4]:
            one.zero_()  # type: ignore[union-attr]
        batch.columns["weight"].zero_()
        return batch.token_ids_BT + 9

    batch = rows_of_eight()._replace(columns={"weight": torch.ones(8)})
    before = batch.to("cpu")._replace(
        **{name: getattr(batch, name).clone() for name in ("token_ids_BT", "label_BT", "position_BT")}
    )
    read = Inputs(bare_vocabulary(VOCABULARY), [Mapped("greedy", InputMap(greedy))]).read(batch, now)
    assert torch.equal(batch.token_ids_BT, before.token_ids_BT) and torch.equal(read.label_BT, before.label_BT)
    assert (
        torch.equal(read.position_BT, before.position_BT) and int(read.attend_BT.sum()) == 61 and bool(read.columns["weight"].all())
    )
    assert torch.equal(read.token_ids_BT, torch.where(batch.attend_BT, 9, 0))


@pytest.mark.parametrize(
    ("map", "what"),
    [
        (lambda batch, reading: batch.token_ids_BT[:, 1:], r"of shape \(8, 11\) for token ids of shape \(8, 12\)"),
        (lambda batch, reading: batch.token_ids_BT.float(), "returned torch.float32"),
        (lambda batch, reading: batch.token_ids_BT * 0 + 259, "the token id 259, and the model has ids from 0 to 258"),
        (lambda batch, reading: batch.token_ids_BT * 0 - 1, "the token id -1"),
    ],
)
def test_what_no_model_can_read_is_refused(now: Now, map: Any, what: str) -> None:
    with pytest.raises(LuthierError, match=what):
        Inputs(bare_vocabulary(VOCABULARY), [Mapped("odd", InputMap(map))]).read(rows_of_eight(), now)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"mask_probability": 1.5}, "`mask_probability` is 1.5"),
        ({"warmup": -0.1}, "`warmup` is -0.1"),
        ({"random_share": 2.0}, "`random_share` is 2.0"),
        ({"random_share": 0.5}, "no token that could be the mask"),
        ({"mask_id": 259}, "no token id 259"),
        ({"mask_id": -1}, "no token id -1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_training(options: dict[str, Any], what: str) -> None:
    with pytest.raises(LuthierError, match=what):
        inputs(**options)


def test_special_tokens_are_neither_replaced_nor_drawn(now: Now) -> None:
    vocabulary = vocabulary_of(tiny_tokenizer(), 300)
    assert vocabulary.text_V.logical_not().nonzero()[:, 0].tolist() == [0, 1, 2, *range(259, 300)]
    assert vocabulary.mask == 0, "the padding token, which does not end a turn"
    batch = make_batch([(60, 60)] * 200)
    batch.token_ids_BT[:, ::3] = torch.arange(20) % 3
    read_BT = inputs(vocabulary, mask_probability=1.0, warmup=0.0).read(batch, now).token_ids_BT
    assert torch.equal(read_BT[:, ::3], batch.token_ids_BT[:, ::3])
    drawn = read_BT[batch.token_ids_BT > 2]
    assert set(drawn.tolist()) == set(range(3, 259))


def test_the_mask_is_found_in_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert vocabulary_of(tokenizer, 259).mask is None, "a mask that ends the text would say something else"
    tokenizer.unk_token = "a"
    assert vocabulary_of(tokenizer, 259).mask == tokenizer.convert_tokens_to_ids("a")
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    assert vocabulary_of(tokenizer, 260).mask == 259
    assert vocabulary_of(tokenizer, 259).mask == tokenizer.convert_tokens_to_ids("a"), "the model has no row for the mask"
    plain = tiny_tokenizer()
    plain.add_tokens(["<|role|>", "<thing>", "  "])
    plain.chat_template = "{#  #}<|role|>" + plain.chat_template
    assert vocabulary_of(plain, 262).text_V[259:].tolist() == [False, True, True], "a token that the template writes is special"


ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}, {word} and {word}!"} for word in ("one", "two", "three", "four")]
RECIPE: dict[str, Any] = {
    "model": "tiny:llama",
    "rows": {"train": ROWS},
    "train": {
        "steps": 3,
        "batch_rows": 4,
        "micro_batch_tokens": 150,
        "precision": "fp32",
        "learning_rate": 1e-2,
        "evaluate_every": 1,
    },
    "evaluate": {"held out": {"rows": ROWS, "metric": "loss"}},
    "repeat_baseline": False,
}


@pytest.mark.usefixtures("counted")
def test_objectives_that_minimize_nothing_get_cross_entropy(tmp_path: Path) -> None:
    def planned(objective: Any) -> Any:
        return make_plan(make_recipe({**RECIPE, "out": str(tmp_path), "objective": objective}))

    alone, plain = planned("masked_thought"), planned("cross_entropy")
    (line,) = [line for line in alone.lines() if line.startswith("objective")]
    assert line.startswith("objective     masked_thought (mask_probability 0.4, ") and line.endswith(
        "random_share 1), then cross_entropy (weight 1)"
    )
    assert [part.name for part in planned(["cross_entropy", "masked_thought"]).chosen["objective"]] == [
        "cross_entropy",
        "masked_thought",
    ]
    assert [part.name for part in planned(["likely_less", "masked_thought"]).chosen["objective"]] == [
        "likely_less",
        "masked_thought",
    ]
    assert alone.engine.inputs.vocabulary.mask == 0 and not bool(alone.engine.inputs.vocabulary.text_V[:3].any())
    assert alone.estimate.activations == plain.estimate.activations > 0, (
        "no memory, and the pass over shapes reads rows as they are"
    )
    with pytest.raises(LuthierError, match="its kind is input_map: put it under `objective`"):
        make_plan(make_recipe({**RECIPE, "token_weight": "masked_thought"}))


def test_evaluation_during_training_reads_clean_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = Inputs.read

    def counted(self: Inputs, batch: Batch, now: Now) -> Batch:
        reads.append(now.step)
        return read(self, batch, now)

    monkeypatch.setattr(Inputs, "read", counted)
    runs = {
        name: luthier.train({**RECIPE, "name": name, "out": str(tmp_path), "objective": objective})
        for name, objective in {
            "plain": "cross_entropy",
            "clean": {"masked_thought": {"mask_probability": 0.0}},
            "always": {"masked_thought": {**ALWAYS, "mask_id": None}},
            "listed": [{"masked_thought": {**ALWAYS, "mask_id": None}}, "cross_entropy"],
        }.items()
    }
    facts = {name: run.facts for name, run in runs.items()}
    micro_batches = len(reads) // 12
    assert reads == [step for _ in runs for step in range(3) for _ in range(micro_batches)], (
        "once for each training pass and no other"
    )
    assert facts["clean"]["weights_sha256"] == facts["plain"]["weights_sha256"] != facts["always"]["weights_sha256"]
    assert facts["listed"]["weights_sha256"] == facts["always"]["weights_sha256"]
    assert facts["always"]["metrics"]["held out"]["before"] == facts["plain"]["metrics"]["held out"]["before"]
    # The last step begins with what the evaluation after the second step measured on the same four rows.
    last, evaluated = facts["always"]["history"][2], facts["always"]["evaluations"][1]
    assert facts["plain"]["history"][2]["loss"] == pytest.approx(_loss(facts["plain"]["evaluations"][1]), abs=1e-4)
    assert abs(last["loss"] - _loss(evaluated)) > 0.05
    # A model of its own, which knows of no map, has the loss that the run measured at its end.
    model = copy.deepcopy(runs["always"].model)
    tune = luthier.train({**RECIPE, "name": "other", "out": str(tmp_path), "train": {**RECIPE["train"], "steps": 1}}).tune
    tune.model.load_state_dict(model.state_dict())
    with evaluating(tune.model):
        rows = make_plan(make_recipe({**RECIPE, "out": str(tmp_path)})).feed.at(0)[1]
        views = [view_of(tune, batch, resolve(["nll"]), Now()) for batch in rows]
    found = torch.cat([view["nll"] for view in views]).mean()
    assert float(found) == pytest.approx(facts["always"]["metrics"]["held out"]["after"], abs=1e-5)


def _loss(evaluation: Any) -> float:
    return float(evaluation["metrics"]["held out"])
