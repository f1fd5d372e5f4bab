"""The router's load balancing loss: the formula written out, transformers' own function, finite differences, and what does not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now, RowTable, StepLoss
from luthier.models.attention import use_attention
from luthier.models.parts import map_parts
from luthier.planning.needs import check_needs
from luthier.recipe.parts import completed
from luthier.rows.encode import encode_all
from luthier.rows.read import read
from luthier.training.build import build_engine
from luthier.training.services import view_of
from luthier.tune.forward import hidden
from tests.conftest import make_batch, parts_of, split
from tests.toys.helpers import gap, gradients, rows_of_pairs
from tests.toys.mixtures import MIXTURES, mixture
from tests.unit.test_rows_encode import tiny_tokenizer

NOW = Now(steps=20, learning_rate=0.1)
ROWS = [(5, 3), (11, 4), (2, 2), (7, 1), (9, 6)]


def engine_of(model: Any, objective: Any = None, tune: Any = "full") -> Any:
    use_attention(model)
    keys = {
        "objective": objective or ["cross_entropy", "load_balance"],
        "tune": tune,
        "optimizer": "sgd",
        "gradient_estimator": "backprop",
    }
    return build_engine(model, map_parts(model), parts_of(**keys), now=NOW)


def rows() -> Batch:
    return make_batch(ROWS)


def router_logits(model: Any, batch: Batch) -> list[Tensor]:
    """The logits [N, E] of each router at the tokens that are no padding, as the family's own code gives them."""
    with torch.no_grad():
        found = model.model(batch.token_ids_BT, attention_mask=batch.attend_BT.long(), output_router_logits=True).router_logits
    return [one[batch.attend_BT.flatten()].double() for one in found]


def balance(logits_NE: Tensor, top_k: int) -> float:
    """E * sum_e f_e P_e, token by token."""
    tokens, experts = logits_NE.shape
    f, P = [0.0] * experts, [0.0] * experts
    for token in logits_NE:
        exponentials = [float((one - token.max()).exp()) for one in token]
        for expert, one in enumerate(exponentials):
            P[expert] += one / sum(exponentials) / tokens
        for expert in sorted(range(experts), key=lambda e: -float(token[e]))[:top_k]:
            f[expert] += 1.0 / tokens
    return experts * sum(a * b for a, b in zip(f, P, strict=True))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_it_is_equations_4_to_6_added_up_over_the_blocks(family: str) -> None:
    model, batch = mixture(family), rows()
    by_block = router_logits(model, batch)
    wanted = sum(balance(one, 2) for one in by_block)
    run = engine_of(model, ["cross_entropy", {"load_balance": {"weight": 0.3}}])
    assert run.step(split(batch, (2, 3)), NOW).parts["load_balance"] == pytest.approx(0.3 * wanted, rel=1e-12)
    # By transformers, of one block at a time: its own pools all blocks.
    flat = model.config.num_experts_per_tok
    theirs = sum(load_balancing_loss_func((one.float(),), 4, flat) for one in by_block)
    assert float(theirs) == pytest.approx(wanted, rel=1e-5) and len(by_block) == 2


def test_the_default_is_the_papers() -> None:
    assert registry.make("load_balance", ("step_loss",)).values[0].weight == 0.01
    with pytest.raises(LuthierError, match="`weight` is -1"):
        registry.make({"load_balance": {"weight": -1.0}}, ("step_loss",))


def test_it_is_least_where_all_experts_are_used_alike() -> None:
    """One expert a token of two: 1 where both have half of the tokens and of the probability, 2 where one has all."""
    value = next(one for one in registry.make("load_balance", ("step_loss",)).values if isinstance(one, StepLoss))

    def loss(sent: list[float], probability: list[float], tokens: float) -> float:
        numbers = torch.tensor([[[*(2.0 * one for one in sent), *probability, tokens]]], dtype=torch.float64)
        return float(value.loss(RowTable(numbers, (), {}, Now())))

    assert loss([5.0, 5.0], [5.0, 5.0], 10.0) == pytest.approx(1.0, abs=1e-15)
    assert loss([10.0, 0.0], [10.0, 0.0], 10.0) == pytest.approx(2.0, abs=1e-15)
    assert loss([8.0, 2.0], [7.0, 3.0], 10.0) == pytest.approx(2 * (0.8 * 0.7 + 0.2 * 0.3), abs=1e-15)


def test_the_gradient_is_that_of_finite_differences() -> None:
    """The choice stays as it is: the gradient goes through the probabilities alone, and through what enters the routers."""
    model, batch = mixture("mixtral"), rows()
    run = engine_of(model, ["cross_entropy", {"load_balance": {"weight": 1.0}}])
    plain = gradients(engine_of(mixture("mixtral"), "cross_entropy"), [batch], NOW)
    found = {name: one - plain[name] for name, one in gradients(run, split(batch, (4, 1)), NOW).items()}
    # Norms and a router's shares are in fp32 whatever the model is in: what goes through them is rounded, then divided by the step.
    for name, step, within in (
        ("model.layers.0.mlp.gate.weight", 1e-3, 2e-3),
        ("model.layers.1.mlp.gate.weight", 1e-6, 1e-6),
        ("model.layers.0.mlp.experts.down_proj", 1e-3, 2e-3),
    ):
        live, gradient = model.get_parameter(name).data, found[f"full/{name}"]
        for place in gradient.abs().flatten().topk(3).indices.tolist():
            values = live.view(-1)
            before, losses = values[place].clone(), []
            for sign in (1, -1):
                values[place] = before + sign * step
                losses.append(sum(balance(one, 2) for one in router_logits(model, batch)))
            values[place] = before
            slope = gradient.flatten()[place].item()
            assert abs(slope) > 1e-3 and (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=within)


def test_padding_does_not_count_however_a_step_is_split() -> None:
    """Rows alone, padded together, packed, and with more padding than they need."""
    batch = rows()
    run = engine_of(mixture("mixtral"))
    found, told = [], []
    for sizes, packs in (((5,), False), ((1, 0, 2, 2), False), ((3, 2), True), ((1,) * 5, False)):
        run.tune.packs = packs
        found.append(gradients(run, split(batch, sizes), NOW))
    wider = batch._replace(
        **{
            name: torch.nn.functional.pad(getattr(batch, name), (0, 30), value=value)
            for name, value in (("token_ids_BT", 0), ("attend_BT", False), ("position_BT", 0), ("label_BT", -100))
        }
    )
    run.tune.packs = False
    found.append(gradients(run, [wider], NOW))
    assert all(gap(one, found[0]) < 1e-12 for one in found[1:])
    for one in (batch, wider):
        told.append(engine_of(mixture("mixtral")).step([one], NOW).parts["load_balance"])
    assert told[1] == pytest.approx(told[0], rel=1e-12)


def test_virtual_tokens_of_a_prompt_do_not_count() -> None:
    batch = rows()
    run = engine_of(mixture("mixtral"), tune={"prompt_tuning": {"length": 3}})
    view = view_of(run.tune, batch, (), NOW, keep_routed=True)
    assert [tuple(one.logits_BTE.shape) for one in view.routed] == [(*batch.token_ids_BT.shape, 4)] * 2
    value = next(one for one in registry.make("load_balance", ("step_loss",)).values if isinstance(one, StepLoss))
    numbers_BLK = value.value(view, {})
    assert torch.equal(numbers_BLK[:, 0, -1].long(), batch.attend_BT.sum(-1))
    assert torch.allclose(numbers_BLK[..., :4].sum(-1), 2 * 4 * numbers_BLK[..., -1])
    assert torch.allclose(numbers_BLK[..., 4:8].sum(-1), numbers_BLK[..., -1])


@pytest.mark.parametrize("family", MIXTURES)
def test_what_counts_is_where_the_router_sent_a_token(family: str) -> None:
    """A bias that takes no part in the probabilities makes GLM's routers choose the third expert always."""
    model, batch = mixture(family), rows()
    if family == "glm4_moe":
        model.model.layers[1].mlp.gate.e_score_correction_bias[2] = 100.0
    run = engine_of(model)
    use = run.tune.run(lambda: hidden(run.tune, batch, routed=True)).routed
    sent = {"llama4_text": 1}.get(family, 2)
    for one in use:
        assert bool((one.chosen_BTE.sum(-1) == sent).all()) and set(one.chosen_BTE.unique().tolist()) == {0.0, 1.0}
        likeliest_BTK = one.logits_BTE.topk(sent).indices
        follows = bool((one.chosen_BTE.gather(-1, likeliest_BTK) == 1.0).all())
        assert follows != (family == "glm4_moe")
    assert len(use) == (1 if family == "glm4_moe" else 2)
    if family == "glm4_moe":
        assert bool((use[0].chosen_BTE[..., 2] == 1.0).all())
    assert run.step([batch], NOW).parts["load_balance"] > 0.0


def test_reduces_to_nothing_at_weight_zero() -> None:
    both = ["cross_entropy", {"load_balance": {"weight": 0.0}}]
    found = [gradients(engine_of(mixture("mixtral"), one), [rows()], NOW) for one in (both, "cross_entropy")]
    assert gap(*found) == 0.0


def test_checkpointed_blocks_give_the_same_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model = mixture("mixtral")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = engine_of(
            model, ["cross_entropy", {"load_balance": {"weight": 1.0}}], {"lora": {"target_modules": ["expert", "router"]}}
        )
        run.tune.model.train()
        run.step([rows()], NOW)
        found.append(gradients(run, split(rows(), (3, 2)), NOW))
    assert gap(found[1], found[0]) == 0.0 and any(float(one.abs().max()) > 0.0 for one in found[0].values())


def test_a_router_that_trains_by_it_alone_evens_out() -> None:
    run = engine_of(
        mixture("mixtral"),
        ["cross_entropy", {"load_balance": {"weight": 1.0}}],
        {"lora": {"target_modules": ["router"], "rank": 4}},
    )
    told = [run.step([rows()], NOW._replace(step=step, learning_rate=0.3)).parts["load_balance"] for step in range(25)]
    assert told[-1] < told[0] - 0.05 and told[-1] > 2 * 2 - 0.2


def test_it_stands_beside_cross_entropy() -> None:
    parts = completed({"objective": list(registry.make_all("load_balance", "objective"))})
    assert {part.name for part in parts["objective"]} == {"cross_entropy", "load_balance"}


def test_it_compares_no_answers() -> None:
    """Beside cross-entropy it sees the rejected answers as well; rows of pairs still need a loss over them."""
    pairs = encode_all(list(read([{"prompt": "a", "chosen": "b", "rejected": "c"}])), tiny_tokenizer())
    run = engine_of(mixture("mixtral"))
    with pytest.raises(LuthierError, match="nothing in the objective compares them"):
        check_needs(run.objective, pairs)
    assert run.step([rows_of_pairs()], NOW).parts["load_balance"] > 0.0
