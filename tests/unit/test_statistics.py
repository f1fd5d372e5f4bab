"""Values of a whole set, against scikit-learn and by hand; their intervals and tests."""

from __future__ import annotations

import numpy
import pytest

from luthier.errors import LuthierError
from luthier.evaluate.compare import compare
from luthier.evaluate.intervals import exchanged, resampled
from luthier.evaluate.items import Item
from luthier.evaluate.sets import SetResult
from luthier.evaluate.statistics import auroc, average_precision, calibration_error, entity_f1, macro_f1, micro_f1

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with the extra `test`")


def of_classes(right: numpy.ndarray, probability: numpy.ndarray, *, several: bool) -> numpy.ndarray:
    """The items' numbers: the likeliest class is named, or all from one half on."""
    named = probability >= 0.5 if several else numpy.eye(probability.shape[1])[probability.argmax(1)]
    return numpy.concatenate([right, named, probability], axis=1).astype(float)


def drawn(classes: int, rows: int = 60, *, several: bool) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Right classes, and probabilities that say something of them; rounded, so that there are ties."""
    rng = numpy.random.default_rng(classes)
    if several:
        right = (rng.random((rows, classes)) < 0.35).astype(float)
        return right, (0.4 * right + 0.6 * rng.random((rows, classes))).round(1)
    truth = rng.integers(0, classes, rows)
    logits = rng.normal(size=(rows, classes)) + 1.2 * numpy.eye(classes)[truth]
    probability = numpy.exp(logits) / numpy.exp(logits).sum(1, keepdims=True)
    return numpy.eye(classes)[truth], probability


@pytest.mark.parametrize("classes", [2, 5])
def test_one_class_of_several_equals_scikit_learn(classes: int) -> None:
    right, probability = drawn(classes, several=False)
    truth, said, numbers = right.argmax(1), probability.argmax(1), of_classes(right, probability, several=False)
    assert macro_f1(numbers) == pytest.approx(sklearn.f1_score(truth, said, average="macro"), rel=1e-12)
    assert micro_f1(numbers) == pytest.approx(sklearn.f1_score(truth, said, average="micro"), rel=1e-12)
    score = probability[:, 1] if classes == 2 else probability
    assert auroc(numbers) == pytest.approx(sklearn.roc_auc_score(truth, score, multi_class="ovr"), rel=1e-12)
    assert average_precision(numbers) == pytest.approx(
        sklearn.average_precision_score(right, probability, average="macro"), rel=1e-12
    )


def test_several_labels_equal_scikit_learn() -> None:
    """With ties, and rows that have no label."""
    right, probability = drawn(4, several=True)
    numbers = of_classes(right, probability, several=True)
    said = probability >= 0.5
    assert (right.sum(1) == 0).any()
    assert macro_f1(numbers) == pytest.approx(sklearn.f1_score(right, said, average="macro"), rel=1e-12)
    assert micro_f1(numbers) == pytest.approx(sklearn.f1_score(right, said, average="micro"), rel=1e-12)
    assert auroc(numbers) == pytest.approx(sklearn.roc_auc_score(right, probability, average="macro"), rel=1e-12)
    assert average_precision(numbers) == pytest.approx(
        sklearn.average_precision_score(right, probability, average="macro"), rel=1e-12
    )


def test_classes_that_nothing_can_be_said_of_are_left_out() -> None:
    """A class that is neither there nor named has no F1; one that all rows have, or none, has no curve."""
    right = numpy.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    probability = numpy.array([[0.6, 0.4, 0], [0.3, 0.7, 0], [0.2, 0.8, 0], [0.1, 0.9, 0]])
    numbers = of_classes(right, probability, several=False)
    assert macro_f1(numbers) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert auroc(numbers) == 1.0
    with pytest.raises(LuthierError, match="nothing can be told apart"):
        auroc(numbers[:2])


def test_confidence_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    """By hand: two rows at 0.9, of which one is right, and two at 0.6, both right: (2 * |0.5 - 0.9| + 2 * |1 - 0.6|) / 4."""
    probability = numpy.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    right = numpy.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    assert calibration_error(of_classes(right, probability, several=False)) == pytest.approx(0.4)
    calibrated = numpy.array([[0.75, 0.25]] * 4)
    truth = numpy.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    assert calibration_error(of_classes(truth, calibrated, several=False)) == pytest.approx(0.0)
    # Neighbors on either side of a border of the 15 bins, at 2/3, are compared apart; in one bin they would be calibrated together.
    apart = numpy.array([[0.66, 0.34], [0.67, 0.33], [0.67, 0.33]])
    hits = numpy.array([[0.0, 1], [1, 0], [1, 0]])
    assert calibration_error(of_classes(hits, apart, several=False)) == pytest.approx((0.66 + 2 * 0.33) / 3)


def test_entities_are_counted_over_the_set() -> None:
    """2 of 5 found, 4 named: 2 * 2 / 9, and not the mean of the rows' 2/3 and 1/3."""
    numbers = numpy.array([[1.0, 2, 1], [1, 3, 3]])
    assert entity_f1(numbers) == pytest.approx(4 / 9)
    assert entity_f1(numpy.zeros((3, 3))) == 0.0


def test_an_interval_covers_what_resampling_gives() -> None:
    values = numpy.array([0.0, 1, 1, 1, 0, 1, 0, 1])
    found = resampled(lambda chosen: float(values[chosen].mean()), rows=8)
    assert found is not None and found[0] == pytest.approx(0.25) and found[1] == pytest.approx(0.875)

    def rare(chosen: numpy.ndarray) -> float:
        if 0 not in chosen or 1 not in chosen:
            raise LuthierError("lacking")
        return 1.0

    assert resampled(rare, rows=8) is None, "in less than half of the resamples both rows are there"


def test_rows_are_exchanged_whole() -> None:
    """Of six rows that all got better only the two exchanges of all rows go as far; of means it is the sign-flip test."""
    before, after = numpy.zeros((6, 1)), numpy.arange(1.0, 7.0)[:, None]
    assert exchanged(before, after, lambda numbers: float(numbers.mean())) == pytest.approx(2 / 64)
    assert exchanged(before, before, lambda numbers: float(numbers.mean())) == 1.0
    many = numpy.random.default_rng(0).normal(size=(40, 1))
    assert exchanged(many, many + 0.9, lambda numbers: float(numbers.mean())) < 0.01
    assert exchanged(many, many[::-1].copy(), lambda numbers: float(numbers.mean())) > 0.05


def test_a_change_of_f1_is_told_with_each_class() -> None:
    """Eight rows, all wrong before and all right after but the last."""

    def result(named: list[str]) -> SetResult:
        items = []
        for place, one in enumerate(named):
            right = "ab"[place % 2]
            hot = [[float(label == each) for each in "ab"] for label in (right, one)]
            counts = {
                label: (int(label == right), int(label == one), int(label == right == one)) for label in dict.fromkeys([right, one])
            }
            items.append(Item(f"{place}", "", right, one, float(right == one), numbers=(*hot[0], *hot[1], *hot[1]), counts=counts))
        value = macro_f1(numpy.array([item.numbers for item in items]))
        return SetResult("set", "macro_f1", "target", value, None, 8, "", tuple(items))

    entry = compare(result(["b", "a"] * 4), result([*["a", "b"] * 3, "a", "a"]))
    assert entry["before"] == 0.0 and entry["after"] == pytest.approx((8 / 9 + 6 / 7) / 2)
    assert entry["verdict"] == "better" and entry["difference_interval"][0] > 0.4 and entry["p_value"] < 0.02
    assert not entry["is_mean"] and entry["retained"] is None
    assert entry["by_class"]["a"] == {
        "n": 4,
        "before": {"precision": 0.0, "recall": 0.0, "f1": 0.0},
        "after": {"precision": 0.8, "recall": 1.0, "f1": pytest.approx(8 / 9)},
    }
    assert entry["confusion"] == {"a": {"a": 4, "b": 0}, "b": {"a": 1, "b": 3}}
    restored = SetResult.from_json(result(["a", "b"] * 4).as_json())
    assert macro_f1(numpy.array([item.numbers for item in restored.items])) == 1.0
