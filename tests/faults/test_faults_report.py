"""What comparisons of before and after get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

from luthier import registry
from luthier.errors import LuthierError
from luthier.evaluate.compare import base_noise, compare
from luthier.evaluate.intervals import FALSE_POSITIVES
from luthier.evaluate.items import Item
from luthier.evaluate.overlap import overlap
from luthier.evaluate.sets import EvalSet, SetResult, measure, result_of
from luthier.kinds import Now
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.registry import kinds_under
from luthier.rows.batches import collate
from luthier.rows.encode import encode
from luthier.rows.read import read
from luthier.training.services import RunServices
from luthier.tune import Tune

TOKENIZER: Any = tiny_tokenizer()
THINGS = ["door", "gate", "tower", "bridge", "mill", "barn", "well", "roof", "wall", "lane", "ford", "hill"]
COLORS = ["red", "blue", "green", "gray", "white", "black", "pink", "gold"]
TEXTS = [{"text": f"The {thing} is {COLORS[i % 8]} and old."} for i, thing in enumerate(THINGS)]
PROSE = EvalSet("prose", read(TEXTS), "perplexity", "retention")


def result(scores: Any, metric: str, weights: Any = None) -> SetResult:
    record = {"text": "x"} if metric == "loss" else {"prompt": "x", "answer": "y"}
    weights = numpy.ones(len(scores)) if weights is None else weights
    pairs = zip(scores, weights, strict=True)
    items = [Item(str(i), "", "", "", float(score), float(weight)) for i, (score, weight) in enumerate(pairs)]
    return result_of(EvalSet("made up", read([record]), metric), items, "the same")


Pair = Callable[[numpy.random.Generator], tuple[SetResult, SetResult]]


def sampled_answers(rng: numpy.random.Generator) -> tuple[SetResult, SetResult]:
    """60 items, each with its own chance to be right; the model is asked twice."""
    chance = rng.beta(0.6, 0.6, 60)
    return result(rng.random(60) < chance, "contains"), result(rng.random(60) < chance, "contains")


def sampled_grades(rng: numpy.random.Generator) -> tuple[SetResult, SetResult]:
    """30 items with scores of five grades."""
    chance = rng.random(30)
    return result(rng.binomial(4, chance) / 4, "f1"), result(rng.binomial(4, chance) / 4, "f1")


def noisy_losses(rng: numpy.random.Generator) -> tuple[SetResult, SetResult]:
    """24 texts of very unequal length, with noise of heavy tails on both measurements."""
    loss, weights = rng.normal(3, 0.5, 24), rng.integers(5, 500, 24)
    first, second = (loss + 0.01 * rng.standard_t(3, 24) for _ in range(2))
    return result(first, "loss", weights), result(second, "loss", weights)


def few_losses(rng: numpy.random.Generator) -> tuple[SetResult, SetResult]:
    """6 texts, the fewest that can show a change."""
    loss = rng.normal(3, 0.5, 6)
    return result(loss + 0.01 * rng.normal(size=6), "loss"), result(loss + 0.01 * rng.normal(size=6), "loss")


@pytest.mark.parametrize("pair", [sampled_answers, sampled_grades, noisy_losses, few_losses])
def test_base_against_base_is_no_change_at_the_stated_rate(pair: Pair) -> None:
    """Fault 36: of 200 comparisons of a model with itself, at most 5 % (and the luck of the draw) call it changed."""
    seeds = 200
    verdicts = [compare(*pair(numpy.random.default_rng(seed)))["verdict"] for seed in range(seeds)]
    assert set(verdicts) <= {"better", "worse", "no change", "unclear"}
    false = sum(verdict in ("better", "worse") for verdict in verdicts)
    luck = 1.645 * (seeds * FALSE_POSITIVES * (1 - FALSE_POSITIVES)) ** 0.5
    assert false <= seeds * FALSE_POSITIVES + luck


def test_real_changes_are_found() -> None:
    """Fault 36: a verdict that never sees a change would pass the test above."""
    found = 0
    for seed in range(50):
        rng = numpy.random.default_rng(seed)
        loss, weights = rng.normal(3, 0.5, 24), rng.integers(5, 500, 24)
        before, after = (result(loss + shift + 0.01 * rng.normal(size=24), "loss", weights) for shift in (0, 0.02))
        found += compare(before, after)["verdict"] == "worse"
    assert found >= 45


def tune_of(model: Any) -> Tune:
    return Tune(model, map_parts(model))


def test_the_base_measured_twice_is_no_change() -> None:
    """Fault 36: the same model in other batches differs by rounding alone; that is the noise floor."""
    tune = tune_of(tiny("llama", dtype=torch.bfloat16))
    before = measure(tune, TOKENIZER, [PROSE])["prose"]
    noise = base_noise(tune, TOKENIZER, [PROSE], {"prose": before}, batch_tokens=60)["prose"]
    again = measure(tune, TOKENIZER, [PROSE], batch_tokens=60)["prose"]
    entry = compare(before, again, noise=noise)
    assert entry["verdict"] == "no change" and abs(entry["difference"]) == pytest.approx(noise)
    assert compare(before, measure(tune, TOKENIZER, [PROSE])["prose"])["difference"] == 0.0


@pytest.mark.parametrize("change", ["items", "order", "template", "decoding"])
def test_only_the_same_questions_are_compared(change: str) -> None:
    """Fault 37: tests are paired, on the same items, template and decoding; anything else is refused by name."""
    tune = tune_of(tiny("llama"))
    records = [{"prompt": f"Color of the {thing}?", "answer": "red"} for thing in THINGS]
    before = measure(tune, TOKENIZER, [EvalSet("asked", read(records), max_new_tokens=2)])["asked"]
    tokenizer: Any = tiny_tokenizer()
    new = 3 if change == "decoding" else 2
    if change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("{% for", "Be brief.{% for")
    other = {"items": records[1:], "order": records[::-1]}.get(change, records)
    after = measure(tune, tokenizer, [EvalSet("asked", read(other), max_new_tokens=new)])["asked"]
    words = "different items" if change in ("items", "order") else "asked in the same way"
    with pytest.raises(LuthierError, match=words):
        compare(before, after)


@pytest.fixture(scope="module")
def learnt() -> Iterator[Any]:
    """A tiny model that knows the texts."""
    yield taught(tiny("llama", seed=1), [encode(row, TOKENIZER) for row in PROSE.rows], steps=60)


def taught(model: Any, encoded: list[Any], steps: int) -> Any:
    batch = collate(encoded)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=batch.token_ids_BT, attention_mask=batch.attend_BT.long(), labels=batch.label_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def copied(model: Any) -> Any:
    other = tiny("llama", seed=1)
    other.load_state_dict(model.state_dict())
    return other


def verdict_on(before: Any, after: Any) -> str:
    results = [measure(tune_of(model), TOKENIZER, [PROSE])["prose"] for model in (before, after)]
    return str(compare(*results)["verdict"])


@pytest.mark.parametrize("seed", range(3))
def test_noise_on_one_layer_is_flagged(learnt: Any, seed: int) -> None:
    """Fault 38: known damage. The matrices of one layer get noise of half their own size."""
    damaged, generator = copied(learnt), torch.Generator().manual_seed(seed)
    for weight in damaged.model.layers[1].parameters():
        if weight.ndim == 2:
            weight.data += torch.randn(weight.shape, generator=generator) * weight.std() / 2
    assert verdict_on(learnt, damaged) == "worse"
    assert verdict_on(damaged, learnt) == "better"


def test_shuffled_labels_are_flagged(learnt: Any) -> None:
    """Fault 38: known damage. A few steps on the same texts with their letters in random order."""
    rng = numpy.random.default_rng(0)
    shuffled = read([{"text": "".join(rng.permutation(list(row["text"])))} for row in TEXTS])
    damaged = taught(copied(learnt), [encode(row, TOKENIZER) for row in shuffled], steps=3)
    assert verdict_on(learnt, damaged) == "worse"


def test_an_adapter_scaled_to_nothing_is_no_change(learnt: Any) -> None:
    """Fault 38: a known no-op, trained numbers at random and a scale of 0, changes no number; with a scale it does."""
    entries = {}
    for alpha in (0.0, 16.0):
        tune = tune_of(copied(learnt))
        (lora,) = registry.make({"lora": {"rank": 2, "alpha": alpha}}, kinds_under("tune")).values
        tune.add("lora", lora, RunServices(tune, "lora", Now()), {})
        generator = torch.Generator().manual_seed(0)
        tune.set({name: torch.randn(one.master.shape, generator=generator) for name, one in tune.trained.items()})
        with tune.at("base"):
            before = measure(tune, TOKENIZER, [PROSE])["prose"]
        entries[alpha] = compare(before, measure(tune, TOKENIZER, [PROSE])["prose"])
    assert entries[0.0]["verdict"] == "no change" and entries[0.0]["difference"] == 0.0
    assert entries[16.0]["verdict"] == "worse"


def test_what_was_not_measured_says_so() -> None:
    """Fault 39: a set that did not run, or is too small for any verdict, is `not measured`, never `no change` or 0."""
    before = result([1] * 8, "contains")
    entry = compare(before, None)
    assert entry["verdict"] == "not measured" and entry["before"] == 1.0
    assert {entry[key] for key in ("after", "difference", "p_value", "retained", "after_interval")} == {None}
    small = compare(result([1] * 3, "contains"), result([1] * 3, "contains"))
    assert small["verdict"] == "not measured" and "at least 6" in small["note"]


def test_overlap_with_training_is_found() -> None:
    """Fault 40: the same questions are found, whatever their spelling; another phrasing of the same fact is none."""
    train = read([{"id": f"t{i}", "prompt": f"Color of the {thing}?", "completion": "Red."} for i, thing in enumerate(THINGS)])
    held = read(
        [
            {"id": "same", "prompt": "Color of the door?", "answer": "red"},
            {"id": "spelled", "prompt": "color of  the GATE", "answer": "Red"},
            {"id": "rephrased", "prompt": "Which color has the mill?", "answer": "red"},
        ]
    )
    assert overlap(train, held) == [("same", "t0"), ("spelled", "t1")]
