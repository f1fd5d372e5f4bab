"""Other models of a run: what they read, where they stand, and what is learnt from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import luthier
from luthier.columns import chunked
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, View
from luthier.methods.loss_term.self_distillation import self_distillation
from luthier.models.fingerprint import fingerprint
from luthier.models.load import load_model
from luthier.models.modes import evaluating
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.report.compare import recipe_lines
from luthier.results.opened import open_run
from luthier.training.services import view_of
from luthier.tune import Tune
from tests.conftest import split
from tests.contracts.fixtures import shake
from tests.recipes.test_recipes import recipe
from tests.toys.helpers import gradients, model_of, rows_of_eight, rows_of_pairs, toys  # noqa: F401


def apart(model: Any) -> Any:
    """A way to load that gives this model whatever is asked for."""
    return lambda asked: dict.fromkeys(asked, Tune(model, map_parts(model)))


def teacher_of() -> Any:
    return tiny("llama", seed=7, layers=1).double()


def logits_at(model: Any, batch: Batch) -> Tensor:
    """The model's logits where a target comes next, [N, V]."""
    found_BTV = model(input_ids=batch.token_ids_BT, attention_mask=batch.attend_BT.long()).logits
    return found_BTV[:, :-1][(batch.label_BT[:, 1:] >= 0) & batch.attend_BT[:, :-1]]


def with_rest(log_NV: Tensor, place_NK: Tensor) -> Tensor:
    some_NK = log_NV.exp().gather(1, place_NK)
    return torch.cat([some_NK, 1.0 - some_NK.sum(1, keepdim=True)], 1).log()


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (2.5, None), (1.7, 5), (0.4, 1)])
def test_the_divergence_is_that_of_its_definition(
    engine: Any, now: Now, divergence: str, temperature: float, top_k: int | None
) -> None:
    """The loss and its gradient equal torch's own divergences of the two plain models, with the square of the temperature."""
    model, teacher, batch = model_of(), teacher_of(), rows_of_eight()
    options = {"divergence": divergence, "temperature": temperature, "top_k": top_k, "weight": 0.7}
    run = engine(model=model, objective={"distill": options}, load_others=apart(teacher))
    found = gradients(run, split(batch, (3, 5)), now)
    plain = model_of()
    theirs = (logits_at(teacher, batch) / temperature).log_softmax(-1).detach()
    mine = (logits_at(plain, batch) / temperature).log_softmax(-1)
    if top_k is not None:
        place = theirs.argsort(dim=-1, descending=True)[:, :top_k]
        theirs, mine = with_rest(theirs, place), with_rest(mine, place)
    middle = ((theirs.exp() + mine.exp()) / 2).log()
    # `kl_div(input, target)` is KL(target || input).
    each = {
        "forward": lambda: functional.kl_div(mine, theirs, log_target=True, reduction="sum"),
        "reverse": lambda: functional.kl_div(theirs, mine, log_target=True, reduction="sum"),
        "js": lambda: sum(functional.kl_div(middle, one, log_target=True, reduction="sum") for one in (theirs, mine)) / 2,
    }[divergence]()
    loss = 0.7 * temperature**2 * each / len(mine)
    loss.backward()
    result = run.step(split(batch, (8,)), now)
    assert result.loss == pytest.approx(float(loss), rel=1e-10) and result.loss > 0.01
    for name, parameter in plain.named_parameters():
        mine_too = found[f"full/{name}"]
        assert torch.allclose(mine_too, parameter.grad, rtol=1e-8, atol=1e-12), name


def test_a_model_that_is_its_own_teacher_learns_nothing(engine: Any, now: Now) -> None:
    run = engine(model=model_of(), objective="distill", load_others=apart(model_of()))
    assert max(float(one.abs().max()) for one in gradients(run, [rows_of_eight()], now).values()) < 1e-12


def test_a_teacher_stays_as_it_is_and_reads_without_dropout(engine: Any, now: Now) -> None:
    """Training mode of the run does not reach it, and no gradient does."""
    teacher = tiny("gpt2", seed=5).double()
    teacher.transformer.drop.p = 0.3
    before = fingerprint(teacher)
    run = engine(model=model_of(), objective="distill", load_others=apart(teacher))
    run.tune.model.train()
    teacher.train()
    losses = [run.step([rows_of_eight()], now._replace(learning_rate=0.0, step=step)).loss for step in range(2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert fingerprint(teacher) == before and all(one.grad is None for one in teacher.parameters())
    assert teacher.training


def test_a_teacher_reads_what_the_model_reads(engine: Any, now: Now) -> None:
    """With masked inputs both read the masked ones: a model that is its own teacher still learns nothing."""
    run = engine(
        model=model_of(),
        objective=["distill", {"masked_thought": {"random_share": 0.5, "mask_id": 3, "mask_probability": 0.9, "warmup": 0.0}}],
        load_others=apart(model_of()),
    )
    assert max(float(one.abs().max()) for one in gradients(run, [rows_of_eight()], now).values()) < 1e-12


@pytest.mark.parametrize("tune", ["prompt_tuning", "cpt"])
def test_a_teacher_does_not_read_the_models_prompt(engine: Any, now: Now, tune: str) -> None:
    """Virtual tokens belong to the model alone."""
    teacher, read = teacher_of(), []
    teacher.model.embed_tokens.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    run = engine(tune, model=model_of(), objective=["cross_entropy", "distill"], load_others=apart(teacher))
    run.step([rows_of_eight()], now)
    own = rows_of_eight()
    assert run.tune.prompt_length and read
    # Where the prompt is part of the rows it is padding to the teacher.
    assert all(torch.equal(ids[:, -own.token_ids_BT.shape[1] :], own.token_ids_BT) and not ids.lt(0).any() for ids in read)


def test_ids_that_stand_for_no_token_may_differ(engine: Any, now: Now) -> None:
    """A matrix that was padded to a round size is compared without its padding."""
    teacher, batch = teacher_of(), rows_of_eight()
    wide = teacher_of()
    wide.resize_token_embeddings(teacher.config.vocab_size + 13, mean_resizing=False)
    losses = []
    for one in (teacher, wide):
        run = engine(model=model_of(), objective="distill", load_others=apart(one))
        losses.append(run.step([batch], now).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_answers_are_compared_with_another_model(engine: Any, now: Now, loss: str) -> None:
    """The base under another name is the base; another model is another reference, by the likelihoods that it gives itself."""
    batch = rows_of_pairs()
    found = []
    for objective, other in (
        ([loss], model_of()),
        ([loss, "model_reference"], model_of()),
        ([loss, "model_reference"], teacher_of()),
    ):
        run = engine("lora", model=model_of(), objective=objective, load_others=apart(other))
        shake(run)
        found.append(run.step([batch], now._replace(learning_rate=0.0)))
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-12) and found[0].loss != pytest.approx(found[2].loss, rel=1e-3)
    if loss == "dpo":
        likely = [
            logits_at(model, batch).log_softmax(-1).gather(1, batch.label_BT[:, 1:][batch.label_BT[:, 1:] >= 0][:, None]).sum()
            for model in (model_of(), teacher_of())
        ]
        gained = [sum(one.notes[f"reward {side}"] for side in ("chosen", "rejected")) for one in found[1:]]
        # Rewards fall by as much as the reference is likelier, beta times, a mean over four pairs.
        assert gained[0] - gained[1] == pytest.approx(0.1 * float(likely[1] - likely[0]) / 4, rel=1e-9)


def test_options_out_of_range_are_refused(engine: Any) -> None:
    for options, words in (
        ({"top_k": 0}, "0 tokens"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": math.inf}, "inf"),
    ):
        with pytest.raises(LuthierError, match=words):
            engine(objective={"distill": options})


def test_a_technique_that_asks_for_a_model_needs_one(engine: Any) -> None:
    with pytest.raises(LuthierError, match="asks for a model `teacher`"):
        engine(objective="distill", load_others=None)


def test_hidden_states_are_compared_token_by_token(engine: Any, now: Now) -> None:
    """The mean over the rows' own tokens and over features of squared differences; padding is in no sum."""
    model, teacher, batch = model_of(), tiny("llama", seed=7).double(), rows_of_eight()
    run = engine(model=model, objective=["cross_entropy", {"self_distillation": {"weight": 0.3}}], load_others=apart(teacher))
    result = run.step(split(batch, (3, 5)), now._replace(learning_rate=0.0))
    own = batch.attend_BT
    states = [
        one.model(input_ids=batch.token_ids_BT, attention_mask=own.long()).last_hidden_state[own] for one in (model_of(), teacher)
    ]
    expected = float((states[0] - states[1]).square().sum() / (own.sum() * states[0].shape[-1]))
    assert result.parts["self_distillation"] == pytest.approx(0.3 * expected, rel=1e-9) and expected > 0.1
    assert result.notes["distance to the teacher"] == pytest.approx(expected, rel=1e-9)


def test_self_distillation_of_one_linear_map_by_hand() -> None:
    """w = 0, the teacher 2, the target 3, a rate of 0.1: w becomes 1; a padded position and a prompt's are left out: 2 and not 43.5 or
    34.5. The vocabulary's first id is a token like any other."""
    w = torch.zeros((), requires_grad=True)
    ((w - 3.0) ** 2 + (w - 2.0) ** 2).backward()
    assert w.grad is not None and float(-0.1 * w.grad) == pytest.approx(1.0)
    term = self_distillation()
    ids = torch.tensor([[-1, 0, 0]])
    batch = Batch(ids, torch.tensor([[True, True, False]]), torch.arange(3)[None], torch.full_like(ids, -100), ("row",))
    none = torch.zeros(0, dtype=torch.long)
    mine = torch.zeros(1, 3, 2, requires_grad=True)
    view = View(batch, {}, label_N=none, row_N=none, position_N=none, hidden_BTD=mine)
    view.other_hidden = {"teacher": torch.tensor([[[8.0, 1.0], [2.0, 0.0], [9.0, 9.0]]])}
    assert term.count is not None and term.count(batch) == 1.0
    total = term.total(view, {})
    total.backward()
    assert float(total) == 2.0 and mine.grad is not None and mine.grad.tolist() == [[[0.0, 0.0], [-2.0, 0.0], [0.0, 0.0]]]


def test_a_teacher_of_another_width_is_refused(engine: Any, now: Now) -> None:
    teacher = tiny("llama", seed=7, width=64).double()
    run = engine(model=model_of(), objective=["cross_entropy", "self_distillation"], load_others=apart(teacher))
    with pytest.raises(LuthierError, match="64 features"):
        run.step([rows_of_eight()], now)


@pytest.fixture
def taught(tmp_path: Path) -> luthier.Run:
    """A finished run whose change is low-rank."""
    run = luthier.train(
        {**recipe(tmp_path, name="first", tune="lora"), "train": {"steps": 4, "learning_rate": 0.05, "precision": "fp32"}}
    )
    assert (run.folder / "delta.safetensors").is_file()
    return run


def nll(tune: Tune, batch: Batch) -> Tensor:
    with torch.no_grad(), evaluating(tune.model):
        return view_of(tune, batch, chunked.resolve(["nll"]), Now(), pack=False)["nll"]


@pytest.mark.parametrize("tune", ["full", "lora", {"half": {"target_modules": ["mlp", "head"]}}])
def test_a_run_on_the_same_base_stands_beside_its_weights(taught: luthier.Run, tmp_path: Path, tune: Any) -> None:
    """It needs no second model, says what the run opened alone says, before and after steps, and acts only while it is run."""
    plan = make_plan(make_recipe(recipe(tmp_path, tune=tune, objective="distill", models={"teacher": str(taught.folder)})))
    assert any("beside the weights of tiny:llama" in line for line in plan.lines())
    _, batches = plan.feed.at(0)
    alone, _ = open_run(taught)
    expected = nll(alone, batches[0])
    base = nll(Tune(load_model("tiny:llama"), map_parts(load_model("tiny:llama"))), batches[0])
    assert float((expected - base).abs().max()) > 0.05
    run = plan.engine
    for step in range(3):
        with run.tune.running("teacher") as other:
            assert torch.allclose(nll(other, batches[0]), expected, atol=1e-4)
        with run.tune.at("base"):
            assert torch.allclose(nll(run.tune, batches[0]), base, atol=1e-4)
        mine = nll(run.tune, batches[0])
        assert step == 0 or not torch.allclose(mine, base, atol=1e-3)
        run.tune.model.train()
        run.step(batches, plan.clock.at(step, 0.0)._replace(learning_rate=0.01))


def test_what_a_run_learns_from_its_teacher(taught: luthier.Run, tmp_path: Path) -> None:
    """Trained on the teacher's distributions alone, a student comes nearer to them."""
    keys = {"tune": "full", "objective": "distill", "models": {"teacher": str(taught.folder)}, "name": "student"}
    run = luthier.train({**recipe(tmp_path, **keys), "train": {"steps": 30, "learning_rate": 0.003, "precision": "fp32"}})
    losses = [json.loads(line)["loss"] for line in (run.folder / "steps.jsonl").read_text().splitlines()]
    assert run.facts["inputs"]["models.teacher"] and any(line.startswith("models") for line in run.facts["plan"])
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_that_trained_in_place_is_a_model_of_its_own(tmp_path: Path) -> None:
    first = luthier.train({**recipe(tmp_path, name="first", tune="full"), "train": {"steps": 2, "precision": "fp32"}})
    plan = make_plan(make_recipe(recipe(tmp_path, tune="lora", objective="distill", models={"teacher": str(first.folder)})))
    assert any("a model of its own" in line for line in plan.lines())
    other = plan.engine.tune.others["teacher"]
    assert other.model is not plan.model and fingerprint(other.model) != plan.fingerprint


def test_models_are_named_as_they_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="asks for a model `teacher`") as refused:
        make_plan(make_recipe(recipe(tmp_path, objective="distill", models={"teachr": "tiny:llama"})))
    assert "did you mean" in refused.value.fix and "models: {teacher:" in refused.value.fix
    plan = make_plan(make_recipe(recipe(tmp_path, models={"teacher": "tiny:llama"})))
    assert any("no technique asks for the model `teacher`" in one for one in plan.warnings())
    with pytest.raises(LuthierError, match="names no model"):
        make_recipe(recipe(tmp_path, models={"not a name": "tiny:llama"}))


def test_a_teacher_with_other_tokens_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="`teacher` reads other tokens than tiny:llama"):
        make_plan(make_recipe(recipe(tmp_path, objective="distill", models={"teacher": "workshop-small"})))


def test_an_encoder_is_no_teacher(tmp_path: Path) -> None:
    """It has no language head: there was a traceback after the base had been measured."""
    with pytest.raises(LuthierError, match="`tiny:bert` is an encoder") as refused:
        make_plan(make_recipe(recipe(tmp_path, objective="distill", models={"teacher": "tiny:bert"})))
    assert refused.value.where == "models.teacher"


def test_a_teacher_that_is_not_there_is_told_by_its_key(taught: luthier.Run, tmp_path: Path) -> None:
    """A run's name without its number was looked for on the hub, and the error spoke of `model` and of no run."""
    with pytest.raises(LuthierError) as refused:
        make_plan(make_recipe(recipe(tmp_path, objective="distill", models={"teacher": "first"})))
    assert refused.value.where == "models.teacher" and "did you mean the run `first-1`" in refused.value.fix


def test_runs_with_and_without_other_models_are_compared_key_by_key() -> None:
    """Beside `models.teacher` stood a line for an empty mapping."""
    recipes = ({"models": {}, "tune": "lora"}, {"models": {"teacher": "first-1"}, "tune": "lora"})
    runs = [{"name": str(place), "run": f"runs/{place}", "recipe": one} for place, one in enumerate(recipes)]
    assert [(one.name, one.values) for one in recipe_lines(runs)] == [("models.teacher", ("not set", "first-1"))]
