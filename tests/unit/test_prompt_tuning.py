"""Prompt tuning and DePT: embeddings in front, a change by position, and answers with and without a cache."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.generation.generate import generate
from luthier.kinds import Batch, Now
from luthier.methods.prompt._virtual import drawn_from, stand_before
from luthier.methods.prompt.dept import at_positions, dept, positions_after_prompt, shortest_question
from luthier.methods.prompt.prompt_tuning import prompt_tuning
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny_tokenizer
from luthier.training.services import RunServices
from luthier.tune import Tune
from luthier.tune.forward import hidden
from tests.conftest import make_batch
from tests.toys.helpers import gradients, model_of, rows_of_eight

BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def rows(count: int, source: str) -> list[Batch]:
    """What techniques see of the training rows."""
    return [rows_of_eight()]


def attached(value: Any, model: Any = None, looks: Any = rows) -> Tune:
    """A model with a prompt under one slot, so that the same draws give the same prompt."""
    model = model_of() if model is None else model
    tune = Tune(model, map_parts(model))
    tune.add("prompt", value, RunServices(tune, "prompt", Now(), looks), {})
    return tune


def master(tune: Any, name: str) -> Tensor:
    """A trained tensor by its own name."""
    found: Tensor = next(one.master.detach() for key, one in tune.trained.items() if key.endswith(f".{name}"))
    return found


def masters(run: Any) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: one.master.detach().clone() for name, one in run.tune.trained.items()}


def shake(tune: Tune, size: float = 0.3) -> None:
    """Move everything that trains away from its start."""
    for name, one in tune.trained.items():
        rng = torch.Generator().manual_seed(len(name))
        tune.set({name: one.master.detach() + size * torch.randn(one.master.shape, generator=rng)})


def behind(tune: Tune, embeds_BTD: Tensor, prompt_PD: Tensor) -> Tensor:
    """Last hidden states of the untouched model on embeddings behind a prompt, without the prompt's."""
    whole = torch.cat([prompt_PD.expand(len(embeds_BTD), -1, -1), embeds_BTD], dim=1)
    with tune.off():
        found: Tensor = tune.model.get_submodule(tune.parts.backbone)(inputs_embeds=whole, use_cache=False).last_hidden_state
    return found[:, len(prompt_PD) :]


@BOTH
def test_a_prompt_stands_in_front_as_embeddings_and_gets_their_gradient(engine: Any, now: Now, architecture: str) -> None:
    model = model_of(architecture)
    plain = copy.deepcopy(model)
    run = engine({"prompt_tuning": {"length": 5}}, model=model)
    batch = make_batch([(6, 3), (6, 2)])
    prompt_PD = master(run.tune, "prompt_PD").clone().requires_grad_(True)
    with torch.no_grad():
        embeds = plain.get_input_embeddings()(batch.token_ids_BT)
    whole = torch.cat([prompt_PD.expand(2, -1, -1), embeds], dim=1)
    logits_BTV = plain(inputs_embeds=whole).logits[:, 5:-1]
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.label_BT[:, 1:].flatten())
    loss.backward()
    found = gradients(run, [batch], now)
    assert torch.allclose(found["prompt_tuning.prompt_PD"], prompt_PD.grad, rtol=1e-9, atol=1e-12)
    result = run.step([batch], now)
    # b rows have as many targets as without the prompt.
    assert math.isclose(result.loss, float(loss.detach()), rel_tol=1e-12) and result.supervised == 5
    assert all(torch.equal(a, b) for a, b in zip(run.tune.model.parameters(), plain.parameters(), strict=True))


def test_virtual_ids_stand_for_rows_of_the_prompt_and_all_others_for_themselves() -> None:
    """The id 0 is a token like any other."""
    prompt_PD, embeds_BTD = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[[10.0], [11.0], [12.0], [13.0], [14.0]]])
    assert stand_before(prompt_PD, torch.tensor([[-1, -3, 0, 1, -2]]), embeds_BTD).flatten().tolist() == [1.0, 3.0, 12.0, 13.0, 2.0]


def test_a_prompt_holds_as_many_optimizer_numbers_as_it_must(engine: Any, now: Now) -> None:
    run = engine({"prompt_tuning": {"length": 5}}, optimizer="adamw")
    run.step([rows_of_eight()], now)
    assert run.tune.numbers() == 5 * 32
    assert sum(one.numel() for one in run.chain.tensors().values() if one.ndim) == 2 * 5 * 32


def test_a_start_from_the_vocabulary_copies_embeddings_of_common_tokens() -> None:
    services = RunServices(attached(prompt_tuning()), "prompt", Now())
    table_VD = torch.arange(15_000.0)[:, None].expand(-1, 2).contiguous()
    drawn_PD = drawn_from(table_VD, 100_000, services)
    assert torch.equal(drawn_PD[:, 0].unique(), torch.arange(5000.0)) and bool((drawn_PD[:, 0].histc(10, 0, 5000) > 9500).all())
    assert torch.equal(drawn_PD, drawn_from(table_VD, 100_000, services))
    drawn_PD.zero_()
    assert float(table_VD[5000, 0]) == 5000 and float(table_VD[7, 1]) == 7


def test_a_start_from_a_text_repeats_or_cuts_it() -> None:
    model = model_of()
    table_VD = model.get_input_embeddings().weight.detach()
    text = prompt_tuning(length=5, init="text", token_ids=(7, 8, 9))
    assert torch.equal(master(attached(text, model), "prompt_PD"), table_VD[[7, 8, 9, 7, 8]])
    assert torch.equal(
        master(attached(prompt_tuning(length=2, init="text", token_ids=(7, 8, 9)), model), "prompt_PD"), table_VD[[7, 8]]
    )
    row_T = rows_of_eight().token_ids_BT[0, :9]
    asked: list[int] = []
    looks = lambda count, source: asked.append(count) or rows(count, source)  # noqa: E731
    own = master(attached(prompt_tuning(length=12, init="text"), model, looks), "prompt_PD")
    assert torch.equal(own, table_VD[torch.cat([row_T, row_T[:3]])]) and set(asked) == {1}


def test_a_random_start_is_even_between_its_bounds() -> None:
    prompt_PD = master(attached(prompt_tuning(length=400, init="random")), "prompt_PD")
    assert float(prompt_PD.abs().max()) <= 0.5 and abs(float(prompt_PD.std()) - 1 / math.sqrt(12)) < 0.01


def test_a_prompt_may_be_a_single_token_and_a_table_a_single_position() -> None:
    assert master(attached(prompt_tuning(length=1)), "prompt_PD").shape == (1, 32)
    assert master(attached(dept(length=1, rank=1, positions=1)), "left_SR").shape == (1, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 0}, "the prompt has 0 tokens"),
        ({"token_ids": (3,)}, "starts from vocabulary"),
        ({"init": "text", "token_ids": (3, 259)}, "the model has no token 259"),
        ({"init": "text", "token_ids": (-1,)}, "the model has no token -1"),
    ],
)
def test_impossible_prompts_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(LuthierError, match=says):
        attached(prompt_tuning(**options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 0}, "the prompt has 0 tokens"),
        ({"rank": -1}, "the rank is -1"),
        ({"positions": 0}, "0 positions change"),
    ],
)
def test_impossible_tables_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(LuthierError, match=says):
        dept(**options)


def test_positions_count_from_the_first_token_after_the_prompt() -> None:
    ids_BT = torch.tensor([[-1, -2, 5, 0, 7, 9], [0, 0, -1, -2, 6, 5]])
    assert positions_after_prompt(ids_BT).tolist() == [[-1, -1, 0, 1, 2, 3], [-1, -1, -1, -1, 0, 1]]
    # Rows one behind the other, and a token behind a cache.
    assert positions_after_prompt(torch.tensor([[-1, 5, 6, -1, 7]])).tolist() == [[-1, 0, 1, -1, 0]]
    assert positions_after_prompt(torch.tensor([[5]])).tolist() == [[-1]]


def test_positions_outside_the_table_stay_as_they_are() -> None:
    table_SD = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = at_positions(table_SD, torch.tensor([[-1, 0, 1, 2]]))
    assert found.tolist() == [[[0.0, 0.0], [1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]]


def test_the_change_is_scaled_by_the_root_of_the_rank_and_goes_by_position_alone() -> None:
    tune = attached(dept(length=2, rank=4, alpha=8.0, positions=3))
    shake(tune)
    (_, prompt), *_ = tune.site(tune.parts.embedding).prompts
    tensors = {name.rpartition(".")[2]: one.master.detach() for name, one in tune.trained.items()}
    ids_BT = torch.tensor([[-1, -2, 5, 6, 7, 8], [-1, -2, 9, 10, 11, 12]])
    embeds_BTD = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change_BTD = prompt.apply(tensors, ids_BT, embeds_BTD) - stand_before(tensors["prompt_PD"], ids_BT, embeds_BTD)
    table_SD = 4.0 * tensors["left_SR"] @ tensors["right_RD"]
    for b in range(2):
        assert torch.allclose(change_BTD[b, 2:5], table_SD, rtol=1e-12, atol=1e-12)
        assert not change_BTD[b, :2].any() and not change_BTD[b, 5:].any()


def test_the_budget_of_the_paper() -> None:
    start = dept(positions=256).start
    services = RunServices(attached(prompt_tuning()), "prompt", Now())
    tensors = start(torch.zeros(10, 768), services)
    assert sum(one.numel() for one in tensors.values()) == 76_800 == 100 * 768
    # Kaiming's even draw with a = sqrt(5) over r inputs.
    assert float(tensors["left_SR"].abs().max()) <= 45**-0.5 and float(tensors["left_SR"].abs().max()) > 0.99 * 45**-0.5
    assert not tensors["right_RD"].any()


@BOTH
def test_step_zero_is_prompt_tuning_and_only_one_factor_has_a_gradient(engine: Any, now: Now, architecture: str) -> None:
    batch = rows_of_eight()
    short, plain = (
        attached(dept(length=3, positions=4), model_of(architecture)),
        attached(prompt_tuning(length=3), model_of(architecture)),
    )
    assert torch.equal(hidden(short, batch).values, hidden(plain, batch).values)
    run = engine({"dept": {"length": 3, "positions": 4}}, model=model_of(architecture))
    found = gradients(run, [batch], now)
    assert not found["dept.left_SR"].any() and found["dept.right_RD"].abs().max() > 1e-6


@BOTH
def test_the_model_reads_changed_embeddings_behind_a_short_prompt(architecture: str) -> None:
    tune = attached(dept(length=3, rank=2, alpha=5.0, positions=4), model_of(architecture))
    shake(tune)
    batch = make_batch([(7, 3), (7, 2)])
    tensors = {name.rpartition(".")[2]: one.master.detach() for name, one in tune.trained.items()}
    with torch.no_grad():
        with tune.off():
            embeds_BTD = tune.model.get_input_embeddings()(batch.token_ids_BT)
        embeds_BTD[:, :4] += 5.0 / math.sqrt(2) * tensors["left_SR"] @ tensors["right_RD"]
        expected = behind(tune, embeds_BTD, tensors["prompt_PD"])
        assert torch.allclose(hidden(tune, batch).values, expected, rtol=1e-10, atol=1e-10)


def test_rank_zero_is_prompt_tuning_at_every_step(engine: Any, now: Now) -> None:
    runs = [
        engine(tune, model=model_of(), optimizer="adamw")
        for tune in ({"dept": {"length": 4, "rank": 0}}, {"prompt_tuning": {"length": 4}})
    ]
    short, plain = runs
    short.tune.set({"dept.prompt_PD": master(plain.tune, "prompt_PD")})
    for i in range(3):
        losses = [run.step([rows_of_eight(seed=i)], now._replace(step=i)).loss for run in runs]
        assert losses[0] == losses[1]
    assert masters(short).keys() == {"prompt_PD"}
    assert torch.equal(masters(short)["prompt_PD"], masters(plain)["prompt_PD"])
    same = [
        master(attached(value), "prompt_PD")
        for value in (dept(length=4, rank=0), prompt_tuning(length=4), dept(length=4, positions=2))
    ]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


def test_the_table_learns_at_its_own_rate_under_every_schedule(engine: Any, now: Now) -> None:
    run = engine(
        {"dept": {"length": 3, "rank": 2, "positions": 4, "table_learning_rate_factor": 0.25}}, model=model_of(), optimizer="sgd"
    )
    shake(run.tune)
    for rate in (0.1, 0.05):
        before, slope = masters(run), gradients(run, [rows_of_eight()], now)
        run.step([rows_of_eight()], now._replace(learning_rate=rate))
        for name, factor in (("prompt_PD", 1.0), ("left_SR", 0.25), ("right_RD", 0.25)):
            step = masters(run)[name] - before[name]
            assert torch.allclose(step, -rate * factor * slope[f"dept.{name}"], rtol=1e-9, atol=1e-15)


def test_the_table_ends_before_the_first_answer_begins() -> None:
    assert shortest_question([make_batch([(9, 4), (5, 0)]), make_batch([(6, 3), (8, 2)])]) == 3
    # A target may be the first id of the vocabulary.
    short = make_batch([(9, 4), (4, 1)])
    assert shortest_question([short._replace(label_BT=short.label_BT.clamp(max=0))]) == 3
    assert master(attached(dept(rank=2)), "left_SR").shape == (1, 2)
    assert master(attached(dept(rank=2, positions=7)), "left_SR").shape == (7, 2)
    for batches in ([make_batch([(5, 0)])], [make_batch([(4, 4), (6, 3)])]):
        with pytest.raises(LuthierError, match="no question before its answer"):
            shortest_question(batches)


@BOTH
def test_answers_are_the_same_with_and_without_a_cache(architecture: str) -> None:
    tokenizer: Any = tiny_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("Who calls?", "What is the color of the gate?", "Where?")]
    tune = attached(dept(length=3, rank=2, positions=min(map(len, prompts))), model_of(architecture))
    shake(tune, 1.0)
    answers = generate(tune, tokenizer, prompts, max_new_tokens=6)
    plain = generate(attached(prompt_tuning(length=3), model_of(architecture)), tokenizer, prompts, max_new_tokens=6)
    assert answers != plain
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                row = torch.tensor([ids])
                batch = Batch(row, row >= 0, torch.arange(len(ids))[None], torch.full_like(row, -100), ("row",))
                ids.append(int(tune.model.get_output_embeddings()(hidden(tune, batch).values[0, -1]).argmax()))
        assert answer == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
