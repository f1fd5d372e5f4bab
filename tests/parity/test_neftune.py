"""NEFTune: the noise by hand, the same loss from a plain model, and who reads it."""

from __future__ import annotations

import copy
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import luthier
from luthier import draws, registry
from luthier.errors import LuthierError
from luthier.kinds import Batch, InputMap, Now
from luthier.models.attention import use_attention
from luthier.training.engine import with_context
from luthier.training.inputs import Inputs, Mapped, bare_vocabulary
from tests.conftest import make_batch, split
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight, toys  # noqa: F401

WIDTH = 32


def neftune(**options: Any) -> list[Any]:
    return ["cross_entropy", {"neftune": options}]


def noise_of(batch: Batch, now: Now, alpha: float = 5.0, width: int = WIDTH) -> Tensor:
    """What is added to embeddings [B, T, D]."""
    (value,) = registry.part("neftune", alpha=alpha).values
    change = Inputs(bare_vocabulary(259), [Mapped("neftune", value)]).embed(batch, now)
    assert change is not None
    return change(torch.zeros(*batch.token_ids_BT.shape, width, dtype=torch.float64))


def test_the_noise_is_uniform_and_as_large_as_the_paper_says(now: Now) -> None:
    """Each number within alpha / sqrt(L D), so a row's noise has a squared length of alpha^2 / 3 in the mean."""
    batch = make_batch([(40, 3), (10, 2), (1, 0)])
    noise_BTD = noise_of(batch, now, width=512)
    for row, length in enumerate((40, 10, 1)):
        size = 5.0 / sqrt(length * 512)
        part = noise_BTD[row, :length] / size
        assert float(part.abs().max()) <= 1.0 and float(part.abs().max()) > 0.97
        assert abs(float(part.mean())) < 4 / sqrt(3 * part.numel())
        assert float(noise_BTD[row, :length].square().sum()) == pytest.approx(25 / 3, abs=4 * 25 * sqrt(4 / 45 / part.numel()))
        assert float(torch.histc(part, bins=10, min=-1, max=1).std()) < 4 * sqrt(part.numel() / 10)
    # The first id is a token like others.
    assert torch.equal(noise_of(batch._replace(token_ids_BT=torch.zeros_like(batch.token_ids_BT)), now, width=512), noise_BTD)
    assert torch.allclose(noise_of(batch, now, alpha=15.0), 3 * noise_of(batch, now), rtol=1e-12)


def test_the_loss_is_that_of_a_plain_model_with_these_embeddings(engine: Any, now: Now) -> None:
    """Gemma scales its embeddings: what is read, not what is stored, gets the noise."""
    for architecture in ("llama", "gemma"):
        model, batch = model_of(architecture), rows_of_eight()
        plain = copy.deepcopy(model)
        row_B = torch.tensor([draws.seed_of(row) for row in batch.row_ids])
        key_BT = draws.keys(now.seed, now.step, row_B[:, None], batch.position_BT)
        uniform_BTD = draws.uniform(draws.features(key_BT, WIDTH), draws.seed_of("neftune", 0, 0))
        length_B = batch.attend_BT.sum(-1)
        read_BTD = plain.get_input_embeddings()(batch.token_ids_BT)
        read_BTD = read_BTD + (2 * uniform_BTD - 1) * (3.0 / (length_B * WIDTH).sqrt())[:, None, None]
        logits_BTV = plain(inputs_embeds=read_BTD, attention_mask=batch.attend_BT.long()).logits
        label_N = batch.label_BT[:, 1:].reshape(-1)
        wanted = functional.cross_entropy(logits_BTV[:, :-1].reshape(len(label_N), -1), label_N)
        result = engine(model=model, objective=neftune(alpha=3.0)).step([batch], now)
        assert result.loss == pytest.approx(float(wanted.detach()), rel=1e-6)
        clean = engine(model=plain).step([batch], now)
        assert abs(result.loss - clean.loss) > 1e-3


def test_alpha_zero_is_the_same_run_without_it(engine: Any, now: Now) -> None:
    found = []
    for objective in ("cross_entropy", neftune(alpha=0.0), neftune()):
        run = engine(objective=objective)
        found.append([run.step([rows_of_eight(seed=i)], now._replace(step=i)).loss for i in range(3)])
    assert found[0] == found[1] != found[2]


def test_draws_are_by_step_row_position_and_feature(now: Now) -> None:
    batch = rows_of_eight()
    first = noise_of(batch, now)
    assert torch.equal(noise_of(batch, now), first)
    for other in (now._replace(step=1), now._replace(seed=1), now._replace(stage=1)):
        assert not torch.allclose(noise_of(batch, other), first)
    pieces = [noise_of(piece, now)[piece.attend_BT] for piece in split(batch, (3, 1, 4))]
    assert torch.equal(torch.cat(pieces), first[batch.attend_BT])
    assert len(first[batch.attend_BT].unique()) == 61 * WIDTH


@pytest.mark.parametrize("tune", ["half", "lora", "prompt_tuning", {"spiel": {"every": 3, "gather": 1}}, "cpt"], ids=str)
def test_it_goes_with_every_kind_of_tune(engine: Any, now: Now, tune: Any) -> None:
    """The same gradient in every split, with and without padding and checkpointing; virtual tokens are not counted as the row's."""
    found = []
    for sizes, packs, checkpointing in (
        ((8,), False, False),
        ((3, 0, 4, 1), False, False),
        ((8,), True, False),
        ((8,), False, True),
    ):
        model = model_of()
        use_attention(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        run = engine(tune, model=model, objective=neftune())
        run.tune.packs = packs
        run.tune.model.train()
        batches = [with_context(one, run.tune.prompt_labels) for one in split(rows_of_eight(), sizes) if one.row_ids]
        found.append(gradients(run, batches, now))
        losses = [run.step(split(rows_of_eight(), sizes), now._replace(step=i)).loss for i in range(2)]
        assert all(0.0 < loss < 1e3 for loss in losses)
    assert max(gap(other, found[0]) for other in found[1:]) < 1e-10
    clean = gradients(engine(tune, model=model_of()), batches, now)
    assert gap(clean, found[0]) > 1e-3


def test_virtual_tokens_do_not_change_a_rows_noise(engine: Any, now: Now) -> None:
    batch = rows_of_eight()
    context = with_context(batch, torch.full((4,), -100))
    again = context._replace(position_BT=torch.cat([context.position_BT[:, :4], batch.position_BT], 1))
    assert torch.equal(noise_of(again, now)[:, 4:], noise_of(batch, now))


def test_evaluation_reads_no_noise(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {word}.", "completion": f"{word}, {word}!"} for word in ("one", "two", "three", "four")]
    facts = {}
    for name, objective in (("plain", "cross_entropy"), ("noisy", {"neftune": {"alpha": 50.0}})):
        recipe = {
            "name": name,
            "model": "tiny:llama",
            "rows": {"train": rows},
            "objective": objective,
            "train": {"steps": 1, "batch_rows": 4, "precision": "fp32"},
            "evaluate": {"held out": {"rows": rows, "metric": "loss"}},
            "out": str(tmp_path),
        }
        facts[name] = luthier.train(recipe).facts
    before = {name: one["metrics"]["held out"]["before"] for name, one in facts.items()}
    assert before["plain"] == before["noisy"] == pytest.approx(facts["plain"]["history"][0]["loss"], abs=1e-4)
    assert abs(facts["noisy"]["history"][0]["loss"] - before["noisy"]) > 0.05


def test_what_no_model_can_read_and_alpha_below_zero_are_refused(engine: Any, now: Now) -> None:
    for alpha in (-1.0, float("inf"), float("nan")):
        with pytest.raises(LuthierError, match="`alpha` is"):
            registry.part("neftune", alpha=alpha)
    odd = Inputs(bare_vocabulary(259), [Mapped("odd", InputMap(embed=lambda embeds, batch, reading: embeds[:, 1:]))])
    change = odd.embed(rows_of_eight(), now)
    assert change is not None
    with pytest.raises(LuthierError, match=r"`odd` returned embeddings of shape \(8, 11, 4\) for \(8, 12, 4\)"):
        change(torch.zeros(8, 12, 4))
