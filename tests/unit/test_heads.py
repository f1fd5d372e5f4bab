"""Heads that read whole rows: their losses by hand, which state they read, and what is left of them when a run is over."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import luthier
from luthier import registry
from luthier.errors import LuthierError
from luthier.evaluate.by_head import OF_PLACE, placed
from luthier.evaluate.metrics import METRICS
from luthier.evaluate.readings import places_of, readings
from luthier.evaluate.sets import EvalSet, measure
from luthier.export.classifier import export_classifier
from luthier.kinds import Batch, Head, LossTerm, Now, RowTable, StepLoss, View
from luthier.methods.head.weak_to_strong import hardened
from luthier.models.attention import use_attention
from luthier.rows.encode import encode, encode_all
from luthier.rows.read import read
from luthier.training.objective import as_term
from luthier.training.readout import pooled
from luthier.training.readout import read as read_head
from tests.conftest import make_batch, split
from tests.tolerance import Exactly
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight, rows_of_pairs
from tests.unit.test_rows_encode import tiny_tokenizer

CLASSES = {"classify": {"labels": ["no", "yes"]}}
ROWS = [
    {"text": f"It was {word}.", "label": label}
    for word, label in (("warm", "good"), ("cold", "bad"), ("fine", "good"), ("dull", "bad"))
]


def parts(name: str, **options: Any) -> tuple[Head, LossTerm]:
    head, term = registry.make({name: options}, ("head",)).values
    assert isinstance(head, Head) and isinstance(term, LossTerm)
    return head, term


def view_with(output: list[list[float]], batch: Batch) -> View:
    view = View(batch, {}, label_N=torch.zeros(0), row_N=torch.zeros(0), position_N=torch.zeros(0))
    view.head_output_BK = torch.tensor(output, dtype=torch.float64, requires_grad=True)
    return view


def test_rewards_by_hand() -> None:
    """Bradley-Terry and the pull of a pair's mean to zero, at scores of 1 and 0.5, for each member by itself."""
    _, term = parts("reward_model", members=2, center_rewards_coefficient=0.01)
    batch = make_batch([(3, 1), (3, 1)])._replace(groups=((0, 1),))
    view = view_with([[1.0, 0.3], [0.5, -0.3]], batch)
    other = -math.log(1 / (1 + math.exp(-0.6)))
    found = term.total(view, {})
    assert found.item() == pytest.approx((0.496577 + other) / 2, abs=1e-6)
    (slope_BK,) = torch.autograd.grad(found, view.outputs_BK)
    assert (2 * slope_BK[:, 0]).tolist() == pytest.approx([-0.347541, 0.407541], abs=1e-6)
    assert float(slope_BK[:, 1].sum()) == pytest.approx(0.0, abs=1e-12), "members that are centred are pulled nowhere"
    margin = parts("reward_model", center_rewards_coefficient=0.0, margin="margin")[1]
    told = batch._replace(columns={"margin": torch.tensor([0.2, 0.2], dtype=torch.float64)})
    assert margin.total(view_with([[1.0], [0.5]], told), {}).item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.3))), rel=1e-12)
    assert term.count is not None and term.count(rows_of_pairs()) == 4.0


def test_what_is_told_of_rewards_by_hand() -> None:
    """Means over the members: the first pair is told apart by both, the second by one, the third is a tie and turned round."""
    head, term = parts("reward_model", members=2)
    batch = make_batch([(3, 1)] * 6)._replace(groups=((0, 1), (2, 3), (4, 5)))
    view = view_with([[1.0, 0.4], [0.5, -0.3], [2.0, 0.0], [0.0, 3.0], [0.5, 0.0], [0.5, 1.0]], batch)
    term.total(view, {})
    assert view.notes["accuracy"].tolist() == [1.0, 0.5, 0.25]
    assert view.notes["reward margin"].tolist() == pytest.approx([0.6, -0.5, -0.5], rel=1e-12)
    assert view.notes["reward chosen"].tolist() == pytest.approx([0.7, 1.0, 0.25], rel=1e-12)
    assert head.centered and not parts("reward_model", center_rewards_coefficient=0.0)[0].centered


def test_members_start_from_small_numbers_of_their_own() -> None:
    head, _ = parts("reward_model", members=3)
    services: Any = SimpleNamespace(
        parts=SimpleNamespace(output_width=4096), rng=lambda key: torch.Generator().manual_seed(len(key) + int(key[-1]))
    )
    weight_KD = head.start(services)["weight"]
    assert weight_KD.shape == (3, 4096) and weight_KD.std(1).tolist() == pytest.approx([0.02] * 3, rel=0.05)
    assert float((torch.corrcoef(weight_KD) - torch.eye(3)).abs().max()) < 4.5 / 4096**0.5


def test_classes_by_hand() -> None:
    _, term = parts("classify", labels=("a", "b", "c"), label_smoothing=0.3)
    batch = make_batch([(3, 1), (3, 1)])._replace(texts={"label": ("c", "a")})
    logits = [[0.0, 1.0, 2.0], [0.5, 0.0, 0.0]]
    wanted = 0.0
    for row, right in zip(logits, (2, 0), strict=True):
        log_sum = math.log(sum(map(math.exp, row)))
        each = [log_sum - one for one in row]
        wanted += 0.7 * each[right] + 0.1 * sum(each)
    view = view_with(logits, batch)
    assert term.total(view, {}).item() == pytest.approx(wanted, rel=1e-12)
    assert view.notes["accuracy"].tolist() == [1.0, 1.0]
    wrong = view_with([[0.0, 1.0, 2.0], [0.0, 0.5, 0.0]], batch)
    term.total(wrong, {})
    assert wrong.notes["accuracy"].tolist() == [1.0, 0.0]
    numbered = batch._replace(texts={}, columns={"label": torch.tensor([2.0, 0.0])})
    assert term.total(view_with(logits, numbered), {}).item() == pytest.approx(wanted, rel=1e-12)


def test_numbers_by_hand() -> None:
    head, term = parts("regress", column="length")
    batch = make_batch([(3, 1), (3, 1)])._replace(columns={"length": torch.tensor([2.0, -1.0])})
    view = view_with([[2.5], [-3.0]], batch)
    assert term.total(view, {}).item() == pytest.approx(0.25 + 4.0, rel=1e-12)
    assert view.notes["absolute error"].tolist() == [0.5, 2.0] and term.count is not None and term.count(batch) == 2.0
    services: Any = SimpleNamespace(parts=SimpleNamespace(causal=True, output_width=7))
    assert head.start(services)["weight"].shape == (1, 7)


def test_the_state_of_the_last_own_token_is_read() -> None:
    """Neither padding on either side nor a prompt's virtual tokens are read; the mean is of own tokens alone."""
    hidden_BTD = torch.arange(24.0).reshape(2, 6, 2)
    own_BT = torch.tensor([[True, True, True, False, False, False], [False, False, True, True, True, False]])
    assert torch.equal(pooled(hidden_BTD, own_BT, "last"), torch.stack([hidden_BTD[0, 2], hidden_BTD[1, 4]]))
    assert torch.equal(pooled(hidden_BTD, own_BT, "mean"), torch.stack([hidden_BTD[0, :3].mean(0), hidden_BTD[1, 2:5].mean(0)]))
    head, _ = parts("classify", labels=("a", "b"))
    batch = make_batch([(3, 0), (5, 0)])
    virtual = batch._replace(token_ids_BT=batch.token_ids_BT.index_fill(1, torch.tensor([0]), -1))
    tensors = {"weight": torch.eye(2, dtype=torch.float64)}
    states = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(read_head(head, tensors, states, virtual), torch.stack([states[0, 2], states[1, 4]]))


def test_a_row_is_read_the_same_whatever_stands_beside_it(engine: Any, now: Now) -> None:
    """Packed or padded, in one micro-batch or several; and the output matrix of the language model is not run for it."""
    batch, model = rows_of_pairs(), model_of()
    use_attention(model)
    run = engine(objective=CLASSES, model=model)
    assert run.objective.columns() == () and run.step([batch], now).loss == pytest.approx(math.log(2.0), rel=1e-12)
    found = []
    for packs, sizes in ((False, (8,)), (True, (8,)), (False, (2, 4, 2))):
        run.tune.packs = packs
        with Exactly():
            found.append(gradients(run, split(batch, sizes), now))
    assert gap(found[1], found[0]) < 1e-9 and gap(found[2], found[0]) < 1e-9


def test_texts_are_read_as_their_tokenizer_writes_them() -> None:
    """The tokens are those of plain `transformers`, and none is a target: rows without targets were dropped."""
    tokenizer: Any = tiny_tokenizer()
    rows = list(read(ROWS))
    encoded = encode_all(rows, tokenizer, purpose="read")
    assert len(encoded.rows) == 4 and not encoded.dropped
    for row, one in zip(ROWS, encoded.rows, strict=True):
        assert list(one.token_ids) == tokenizer(row["text"])["input_ids"] and not any(one.supervised)
        assert one.columns["label"] == row["label"]
    whole = encoded.rows[0].token_ids
    left = encode(rows[0], tokenizer, purpose="read", max_length=4, too_long="left").token_ids
    right = encode(rows[0], tokenizer, purpose="read", max_length=4, too_long="right").token_ids
    assert left == (whole[0], *whole[-3:]) and right == (*whole[:3], whole[-1])


@pytest.mark.parametrize(
    ("name", "options", "rows", "words"),
    [
        ("classify", {"labels": ("a", "b")}, {"texts": {"label": ("a", "c")}}, "label is `c`, and the classes are a, b"),
        ("classify", {"labels": ("a", "b")}, {"columns": {"label": torch.tensor([0.0, 2.0])}}, "label is `2.0`"),
        ("classify", {"labels": ("a", "b")}, {"columns": {"label": torch.tensor([0.0, -1.0])}}, "label is `-1.0`"),
        ("classify", {"labels": ("a", "b")}, {"columns": {"label": torch.tensor([0.0, 0.5])}}, "label is `0.5`"),
        ("classify", {"labels": ("a", "b")}, {"columns": {"label": torch.tensor([0.0, math.nan])}}, "label is `nan`"),
        ("classify", {"labels": ("a", "b")}, {}, "label is `None`"),
        ("regress", {}, {"columns": {"label": torch.tensor([0.0, math.nan])}}, "no number `label`"),
        ("reward_model", {}, {}, "needs rows with a chosen and a rejected answer"),
        ("reward_model", {"margin": "margin"}, {"groups": ((0, 1),)}, "no number `margin`"),
    ],
    ids=str,
)
def test_rows_without_what_a_head_learns_are_refused(name: str, options: dict[str, Any], rows: dict[str, Any], words: str) -> None:
    _, term = parts(name, **options)
    assert term.check is not None
    with pytest.raises(LuthierError, match=words):
        term.check(make_batch([(3, 1), (3, 1)])._replace(**rows))


def test_rows_that_are_refused_are_named() -> None:
    _, term = parts("classify", labels=("a", "b"))
    assert term.check is not None
    batch = make_batch([(3, 1)] * 3)._replace(texts={"label": ("a", "", "c")}, columns={"label": torch.tensor([0.0, 1.0, 0.0])})
    with pytest.raises(LuthierError, match="label is `c`") as caught:
        term.check(batch)
    assert caught.value.where == "row row2"
    term.check(batch.take(torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("classify", {"labels": ("a",)}),
        ("classify", {"labels": ("a", "a")}),
        ("classify", {"labels": ("a", "b"), "label_smoothing": 1.0}),
        ("reward_model", {"members": 0}),
        ("reward_model", {"center_rewards_coefficient": -0.1}),
        ("weak_to_strong", {"labels": ("a", "b"), "most": -0.1}),
        ("weak_to_strong", {"labels": ("a", "b"), "most": 1.1}),
        ("weak_to_strong", {"labels": ("a", "b"), "warmup": -0.1}),
        ("weak_to_strong", {"labels": ("a", "b"), "warmup": 1.1}),
        ("weak_to_strong", {"labels": ("a", "b", "c")}),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(LuthierError, match="fix"):
        registry.make({name: options}, ("head",))


def test_losses_of_tokens_beside_texts_without_targets_are_refused(engine: Any, tmp_path: Path) -> None:
    """They would have added nothing, without a word; and a rule would have left no row."""
    keys = {"model": "tiny:llama", "rows": {"train": ROWS}, "train": {"steps": 1, "batch_rows": 2}, "out": str(tmp_path)}
    with pytest.raises(LuthierError, match="`cross_entropy` learns from labels, and the texts"):
        luthier.train(**keys, objective=[{"classify": {"labels": ["bad", "good"]}}, "cross_entropy"])
    with pytest.raises(LuthierError, match="chooses among the labels of a step"):
        engine(objective=CLASSES, token_weight="random_step_rows")


def test_two_heads_are_refused(engine: Any) -> None:
    with pytest.raises(LuthierError, match="both put a head beside the model"):
        engine(objective=[CLASSES, "regress"])


def test_a_run_keeps_its_head(tmp_path: Path) -> None:
    """Opened again it tells the classes as the run did; exported, plain `transformers` does. Its weights alone are not saved in its
    place."""
    found = luthier.train(
        model="tiny:llama",
        rows={"train": ROWS},
        tune="lora",
        objective={"classify": {"labels": ["bad", "good"]}},
        train={"steps": 6, "batch_rows": 4, "learning_rate": 1e-2, "precision": "fp32"},
        evaluate={"same": {"rows": ROWS}},
        out=str(tmp_path),
    )
    assert found.metrics["same"]["before"] == 0.5
    with pytest.raises(LuthierError, match=r"`classify`.* would not be saved"):
        found.model.save_pretrained(tmp_path / "lost")
    tune, tokenizer = luthier.open_run(found.folder)
    rows = encode_all(list(read(ROWS)), tokenizer, purpose="read").rows
    said_BK = readings(tune, rows)
    assert tune.head is not None and tune.head[1].names == ("bad", "good")
    result = measure(tune, tokenizer, [EvalSet("same", list(read(ROWS)), "accuracy")])["same"]
    assert result.value == float((said_BK.argmax(-1) == torch.tensor([1, 0, 1, 0])).double().mean())
    facts = export_classifier(tune, tokenizer, tmp_path / "out")
    assert facts["max_logit_difference"] < 1e-5
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    with torch.no_grad():
        logits = [theirs(input_ids=torch.tensor([row.token_ids])).logits[0] for row in rows]
    assert torch.allclose(torch.stack(logits), said_BK.float(), atol=1e-5)
    with pytest.raises(LuthierError, match="a head that reads rows"):
        found.export(tmp_path / "adapter", form="peft")


def test_a_model_without_a_head_says_so(engine: Any) -> None:
    with pytest.raises(LuthierError, match="has no head that reads rows"):
        readings(engine().tune, [])
    assert rows_of_eight().groups == ()


def test_hard_labels_are_as_many_as_the_weak_ones_say() -> None:
    """Probabilities .9, .8, .3 and .1 of the first class, by hand for three means of the weak labels."""
    first_R = torch.tensor([0.9, 0.8, 0.3, 0.1], dtype=torch.float64)
    for mean, wanted in ((0.5, [0, 0, 1, 1]), (0.25, [0, 0, 0, 1]), (0.75, [0, 1, 1, 1])):
        assert hardened(first_R, torch.full((4,), mean, dtype=torch.float64)).tolist() == wanted
    # A row at the threshold is of the first class.
    five_R = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    assert hardened(five_R, torch.full((5,), 0.5, dtype=torch.float64)).tolist() == [1, 1, 0, 0, 0]


def weak_to_strong(**options: Any) -> StepLoss:
    values = registry.make({"weak_to_strong": {"labels": ("a", "b"), **options}}, ("head",)).values
    return next(one for one in values if isinstance(one, StepLoss))


@pytest.mark.parametrize(("most", "wanted"), [(0.0, 0.818074), (0.5, 0.507855), (1.0, 0.197635)])
def test_own_predictions_join_the_weak_labels(most: float, wanted: float) -> None:
    """A mean over rows; the share rises linearly to its end and stays; no gradient goes through the own predictions."""
    loss = weak_to_strong(most=most)
    logits = torch.tensor([[math.log(p), math.log(1 - p)] for p in (0.9, 0.8, 0.3, 0.1)], dtype=torch.float64, requires_grad=True)
    weak = {"weak": torch.tensor([0.3, 0.4, 0.8, 0.5], dtype=torch.float64)}
    late = Now(step=20, steps=100)
    found = loss.loss(RowTable(logits, (), weak, late))
    assert found.item() / 4 == pytest.approx(wanted, abs=1e-6)
    if most == 0.5:
        (slope_RK,) = torch.autograd.grad(found, logits)
        assert (slope_RK[:, 1] / 4).tolist() == pytest.approx([-0.0125, 0.0, -0.05, 0.0375], abs=1e-9)
        half = loss.loss(RowTable(logits, (), weak, late._replace(step=10)))
        assert half.item() / 4 == pytest.approx((0.818074 + 0.507855) / 2, abs=1e-6)
    assert loss.loss(RowTable(logits, (), weak, late._replace(step=0))).item() / 4 == pytest.approx(0.818074, abs=1e-6)
    assert loss.loss(RowTable(logits, (), weak, late._replace(step=70))).item() == found.item()
    # Without a warm-up it is at its end at once.
    assert weak_to_strong(most=most, warmup=0.0).loss(RowTable(logits, (), weak, Now(steps=100))).item() == found.item()


def test_weak_labels_are_probabilities() -> None:
    check = as_term(weak_to_strong()).check
    assert check is not None
    batch = make_batch([(3, 1)] * 2)
    check(batch._replace(columns={"weak": torch.tensor([0.0, 1.0])}))
    for wrong in (-0.1, 1.1):
        with pytest.raises(LuthierError, match="a row has no probability `weak`"):
            check(batch._replace(columns={"weak": torch.tensor([0.2, wrong])}))


def embedding(**options: Any) -> StepLoss:
    return next(one for one in registry.make({"embed": options}, ("head",)).values if isinstance(one, StepLoss))


def test_embeddings_by_hand() -> None:
    """Two questions, of which one brings a text that does not answer it: either is told from all three texts."""
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, -0.6], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    table = RowTable(vectors, ((0, 1), (2, 3, 4)), {}, Now())
    first, second = [0.6, 0.8, 1.0], [0.8, -0.6, 0.0]
    wanted = 0.0
    for cosines, right in ((first, 0), (second, 1)):
        logits = [one / 0.5 for one in cosines]
        wanted += math.log(sum(map(math.exp, logits))) - logits[right]
    assert embedding(temperature=0.5).loss(table).item() == pytest.approx(wanted, rel=1e-12)
    # Of the first number alone only its sign is left.
    short = sum(
        math.log(sum(math.exp(one / 0.5) for one in signs)) - signs[right] / 0.5
        for signs, right in (([1, 1, 1], 0), ([0, 0, 0], 1))
    )
    assert embedding(temperature=0.5, sizes=(1,)).loss(table).item() == pytest.approx((wanted + short) / 2, rel=1e-12)


def test_embeddings_of_many_numbers_by_hand() -> None:
    """Three questions with one, two and three texts: each is told from all six, by the whole vectors and by their first four numbers."""
    vectors = torch.randn(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = ((0, 1), (2, 3, 4), (5, 6, 7, 8))
    wanted = 0.0
    for size in (12, 4):
        unit = [one[:size] / one[:size].norm() for one in vectors]
        texts = [place for group in groups for place in group[1:]]
        for group in groups:
            logits = {place: float(unit[group[0]] @ unit[place]) / 0.3 for place in texts}
            wanted += math.log(sum(map(math.exp, logits.values()))) - logits[group[1]]
    found = embedding(temperature=0.3, sizes=(4,)).loss(RowTable(vectors, groups, {}, Now()))
    assert found.item() == pytest.approx(wanted / 2, rel=1e-12)
    # The model's own width counts once, though it is named, too.
    named = embedding(temperature=0.3, sizes=(4, 12)).loss(RowTable(vectors, groups, {}, Now()))
    assert named.item() == pytest.approx(wanted / 2, rel=1e-12)
    head = next(one for one in registry.make("embed", ("head",)).values if isinstance(one, Head))
    assert torch.allclose(head.read({}, vectors).norm(dim=1), torch.ones(9, dtype=torch.float64))


def test_places_among_all_texts() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, -0.6], [0.0, 2.0], [0.5, 0.5], [5.0, 5.0]])
    # The first is behind both others' and one of no question, the second behind all, the third is there at once.
    assert places_of(vectors, [2, 3, 2]) == [3, 4, 1]
    assert places_of(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), [2, 2]) == [2, 2], "ties are no finds"


def test_questions_and_their_texts_are_groups() -> None:
    (row,) = read([{"query": "q?", "positive": "yes", "negatives": ["no", "perhaps"]}])
    assert row.shape == "members" and [one.fields["text"] for one in row.fields["members"]] == ["q?", "yes", "no", "perhaps"]
    tokenizer: Any = tiny_tokenizer()
    assert [len(one.group) for one in encode_all([row], tokenizer, purpose="read").rows] == [4]
    with pytest.raises(LuthierError, match=r"`negatives\[1\]` must be text"):
        list(read([{"query": "q?", "positive": "yes", "negatives": ["no", 3]}]))
    term = as_term(embedding())
    assert term.check is not None
    with pytest.raises(LuthierError, match="a question and the text that answers it"):
        term.check(rows_of_eight())


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"sizes": (0,)}], ids=str)
def test_options_of_embeddings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LuthierError, match="fix"):
        registry.make({"embed": options}, ("head",))


def test_vectors_have_as_many_numbers_as_the_model(engine: Any) -> None:
    with pytest.raises(LuthierError, match="vectors of this model have 32 numbers, and 64 are asked for"):
        engine(objective={"embed": {"sizes": [64]}})
    assert engine(objective={"embed": {"sizes": [32]}}).tune.trained


def test_a_question_without_a_text_is_refused() -> None:
    check = as_term(embedding()).check
    assert check is not None
    batch = make_batch([(3, 1)] * 3)._replace(groups=((0, 1), (2,)))
    with pytest.raises(LuthierError, match="a question and the text that answers it") as caught:
        check(batch)
    assert caught.value.where == "row row2"


def test_a_head_is_as_wide_as_the_last_states(tmp_path: Path) -> None:
    """Some OPT narrow their states before the end, here from 32 to 16."""
    rows = {"train": ROWS}
    train = {"steps": 2, "batch_rows": 4, "learning_rate": 1e-2, "precision": "fp32"}
    objective = {"classify": {"labels": ["bad", "good"]}}
    found = luthier.train(model="tiny:opt", rows=rows, tune="lora", objective=objective, train=train, out=str(tmp_path))
    tune, _ = luthier.open_run(found.folder)
    assert tune.head is not None and tune.head[0].masters()["weight"].shape == (2, 16)
    found.export(tmp_path / "out")


def test_places_count_by_hand() -> None:
    """Third of all: found among ten, at 1 / log2(4); eleventh: not at all."""
    rows = list(read([{"query": f"{i}?", "positive": f"{i}."} for i in range(4)]))
    found = {metric: [item.score for item in placed(metric, rows, [1, 3, 10, 11])] for metric in OF_PLACE}
    assert found["recall_at_1"] == [1.0, 0.0, 0.0, 0.0] and found["recall_at_10"] == [1.0, 1.0, 1.0, 0.0]
    assert found["mean_reciprocal_rank"] == pytest.approx([1.0, 1 / 3, 0.1, 1 / 11])
    assert found["ndcg_at_10"] == pytest.approx([1.0, 0.5, 1 / math.log2(11), 0.0])
    assert {name for name, one in METRICS.items() if one.needs == "vector"} == OF_PLACE.keys()
    assert placed("recall_at_1", rows, [1, 3, 10, 11])[1][1:4] == ("1?", "1.", "place 3")
