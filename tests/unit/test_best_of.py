"""Members of a reward as one, answers that are written once, and what the best of n of them is worth."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.evaluate.best_of import best_of, chances, kl_bound
from luthier.evaluate.planned import evaluation_sets
from luthier.evaluate.readings import answer_scores, readings
from luthier.evaluate.sets import EvalSet, measure
from luthier.recipe import EvaluationSet, TrainRecipe
from luthier.rows.encode import encode
from luthier.rows.read import read
from luthier.runs import answers as written
from luthier.runs.answers import best_of_answers, write_answers
from luthier.training.readout import MEAN, Combination, combination

ANSWERS = ["b", "aa", "", "a b a"]
STORED = [
    {
        "id": f"r{row}",
        "prompt": f"Say {word}.",
        "answer": word,
        "answers": [word, "no", f"{word}!", "nothing"],
        "worth": [3, row, 1, 0.5],
    }
    for row, word in enumerate(("one", "two", "three", "four", "five", "six"))
]
PAIRS = [
    {"prompt": f"Say {word}.", "chosen": f"{word}!", "rejected": "no"} for word in ("one", "two", "three", "four", "five", "seven")
]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Reward models: of three members, of one, and of two that were never centred; and a run that is none."""
    out = tmp_path_factory.mktemp("runs")
    specs: dict[str, Any] = {"three": {"members": 3}, "one": {}, "loose": {"members": 2, "center_rewards_coefficient": 0.0}}
    objectives: dict[str, Any] = {name: {"reward_model": options} for name, options in specs.items()}
    objectives["moods"] = {"classify": {"labels": ["good", "bad"]}}
    found = {}
    for seed, (name, objective) in enumerate(objectives.items()):
        rows = [{"text": "It rains.", "label": "bad"}] * 2 if name == "moods" else PAIRS
        run = luthier.train(
            model="tiny:llama",
            rows={"train": rows},
            tune="lora",
            objective=objective,
            train={"steps": 3, "batch_rows": 3, "learning_rate": 1e-2, "precision": "fp32"},
            seed=seed,
            repeat_baseline=False,
            name=name,
            out=str(out),
        )
        found[name] = str(run.folder)
    return found


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "stored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in STORED))
    return path


def numbers(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("how", "deviations", "wanted"),
    [
        ("mean", None, 3.0),
        ("median", None, 2.0),
        ("min", None, 1.0),
        ("mean_minus_deviation", None, 0.839753),
        ("mean_minus_deviation", 0.5, 3.0 - 2.160247 / 2),
        ("mean_minus_deviation", 0.0, 3.0),
    ],
)
def test_members_as_one_by_hand(how: str, deviations: float | None, wanted: float) -> None:
    """Rewards 1, 2 and 6; the deviation is that of the whole of them. One member is itself, and the median of two is between them."""
    found = combination(how, deviations)
    assert found.of(numbers([1.0, 2.0, 6.0], [6.0, 1.0, 2.0])).tolist() == pytest.approx([wanted] * 2, abs=1e-6)
    assert found.of(numbers([-1.25], [4.0])).tolist() == [-1.25, 4.0]
    if how == "median":
        assert found.of(numbers([1.0, 2.0, 4.0, 9.0])).tolist() == [3.0]


@pytest.mark.parametrize(
    ("shift", "picked"),
    [
        (0.0, {"mean": 1, "median": 1, "min": 1, "mean_minus_deviation": 1}),
        (5.0, {"mean": 1, "median": 0, "min": 1, "mean_minus_deviation": 0}),
        (-5.0, {"mean": 1, "median": 1, "min": 2, "mean_minus_deviation": 2}),
    ],
)
def test_what_one_members_constant_does_to_the_choice(shift: float, picked: dict[str, int]) -> None:
    """Three members score three answers. The mean alone does not mind a constant."""
    score_MK = numbers([1.0, 3.0, 2.0], [2.0, 2.2, 2.1], [2.5, 1.0, 1.9]) + torch.tensor([shift, 0.0, 0.0], dtype=torch.float64)
    assert {how: int(combination(how).of(score_MK).argmax()) for how in picked} == picked


@pytest.mark.parametrize(
    ("how", "deviations", "words"),
    [("most", None, "no combination `most`"), ("min", 1.0, "the min subtracts none"), ("mean_minus_deviation", -1.0, "is -1")],
)
def test_combinations_that_mean_nothing_are_refused(how: str, deviations: float | None, words: str) -> None:
    with pytest.raises(LuthierError, match=words):
        combination(how, deviations)


@pytest.mark.parametrize("score_M", [[0.3, 2.0, -1.0, 0.9, 5.0], [1.0, 2.0, 1.0, 2.0, 2.0, 0.0], [1.0, 1.0, 1.0]], ids=str)
def test_chances_are_those_of_all_choices(score_M: list[float]) -> None:
    """Every choice of n of the answers, one by one; equals share what they win."""
    for n in range(1, len(score_M) + 1):
        wanted = [Fraction(0)] * len(score_M)
        choices = list(combinations(range(len(score_M)), n))
        for choice in choices:
            top = max(score_M[place] for place in choice)
            winners = [place for place in choice if score_M[place] == top]
            for place in winners:
                wanted[place] += Fraction(1, len(choices) * len(winners))
        assert chances(score_M, n) == pytest.approx([float(one) for one in wanted], rel=1e-14)


def test_the_best_of_n_is_told_without_bias() -> None:
    """Three outcomes of unlike chances; the mean over all 81 draws of four answers is what the best of two of the model is worth, whereas
    the first two of four tell it with more noise, and the best of all four tell something else."""
    chance, reward, gold = (0.5, 0.3, 0.2), (1.0, 2.0, 2.0), (4.0, 0.0, 7.0)
    wanted = 0.0
    for pair in product(range(3), repeat=2):
        top = max(reward[one] for one in pair)
        wanted += math.prod(chance[one] for one in pair) * fmean(gold[one] for one in pair if reward[one] == top)
    told, noise, first_noise = 0.0, 0.0, 0.0
    for drawn in product(range(3), repeat=4):
        weight = math.prod(chance[one] for one in drawn)
        (found,) = best_of([[reward[one] for one in drawn]], [[gold[one] for one in drawn]], sizes=[2])
        (first,) = best_of([[reward[one] for one in drawn[:2]]], [[gold[one] for one in drawn[:2]]], sizes=[2])
        assert found.gold is not None and first.gold is not None
        told += weight * found.gold
        noise += weight * (found.gold - wanted) ** 2
        first_noise += weight * (first.gold - wanted) ** 2
    assert told == pytest.approx(wanted, rel=1e-12) and noise < 0.8 * first_noise


def test_the_bound_of_the_divergence() -> None:
    """4 answers: ln 4 - 3/4. Where two outcomes are as likely and tie, the divergence is less; of many that differ it comes near."""
    assert (kl_bound(1), kl_bound(4)) == (0.0, pytest.approx(0.636294, abs=1e-6))
    right = 1 - 0.5**4
    true = right * math.log(right / 0.5) + (1 - right) * math.log((1 - right) / 0.5)
    assert true == pytest.approx(0.459356, abs=1e-6) and true < kl_bound(4)
    many, n = 4000, 4
    share = [((place + 1) / many) ** n - (place / many) ** n for place in range(many)]
    near = sum(one * math.log(one * many) for one in share)
    assert near < kl_bound(4) and near == pytest.approx(kl_bound(4), abs=2e-3)


def test_a_curve_by_hand() -> None:
    """Two rows of unlike lengths: gold rises, then falls; sizes end at what every row has."""
    reward, gold = [[0.0, 1.0, 2.0], [5.0, 3.0, 4.0, 6.0]], [[0.0, 1.0, 0.5], [1.0, 0.0, 2.0, 0.0]]
    found = best_of(reward, gold, [[0.1, 0.2, 0.3], [0.4, 0.4, 0.4, 0.8]])
    assert [one.n for one in found] == [1, 2, 3] and [one.kl for one in found] == [kl_bound(n) for n in (1, 2, 3)]
    assert [one.reward for one in found] == pytest.approx([(1 + 4.5) / 2, (5 / 3 + 16 / 3) / 2, (2 + 5.75) / 2])
    # Of two of four: the last wins 3 of 6, the first 2, the third 1.
    assert [one.gold for one in found] == pytest.approx([(0.5 + 0.75) / 2, (2 / 3 + 4 / 6) / 2, (0.5 + 0.25) / 2])
    assert found[1].disagreement == pytest.approx(((2 * 0.3 + 0.2) / 3 + (0.4 + 0.8) / 2) / 2)
    assert found[0].gold_interval is None, "of two rows there is no interval"
    with pytest.raises(LuthierError, match="the best of 4 among 3 answers"):
        best_of(reward, sizes=[4])


def test_answers_are_those_of_their_seed_row_and_number(tmp_path: Path) -> None:
    """Neither other rows, their order nor more answers change them; another seed does. Records are kept whole."""
    records = [{"id": f"r{row}", "prompt": f"Name {row}.", "tags": ["x"], "n": row} for row in range(5)]

    def answered(name: str, some: list[Any], **options: Any) -> dict[str, list[str]]:
        source, out = tmp_path / f"{name}.in.jsonl", tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(one) + "\n" for one in some))
        facts = write_answers(source, "tiny:llama", out, **{"count": 3, "max_new_tokens": 6, **options})
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [{key: value for key, value in one.items() if key != "answers"} for one in found] == some
        assert facts["rows"] == len(some) and not out.with_name(f"{out.name}.begun").exists()
        return {one["id"]: one["answers"] for one in found}

    whole = answered("whole", records)
    assert len({answer for some in whole.values() for answer in some}) > 12, "answers are drawn apart"
    assert answered("fewer", records[3:0:-1]) == {name: whole[name] for name in ("r3", "r2", "r1")}
    more = answered("more", records, count=5)
    assert {name: some[:3] for name, some in more.items()} == whole
    assert answered("seed", records, seed=1) != whole
    (greedy,) = {len(set(some)) for some in answered("greedy", records, count=1, temperature=0.0).values()}
    assert greedy == 1


def test_a_stopped_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind the second batch, in the middle of writing a line, it ends in the same file; rows that were answered are kept."""
    source, out, begun = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.jsonl.begun"))
    source.write_text("".join(json.dumps({"id": f"r{row}", "prompt": f"Name {row}."}) + "\n" for row in range(5)))
    monkeypatch.setattr(written, "TOGETHER", 4)
    options: dict[str, Any] = {"count": 2, "max_new_tokens": 6}
    write_answers(source, "tiny:llama", tmp_path / "whole.jsonl", **options)
    asked: list[int] = []
    real = written.generate

    def killed(*given: Any, **named: Any) -> list[str]:
        asked.append(len(given[2]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(written, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        write_answers(source, "tiny:llama", out, **options)
    assert not out.exists() and len(begun.read_text().splitlines()) == 5
    # Of a batch of two rows one had reached the disk whole, and half of the other.
    header, *lines = begun.read_text().splitlines(keepends=True)
    begun.write_text("".join([header, *lines[:3], lines[3][:9]]))
    with pytest.raises(LuthierError, match=r"begun here for something else \(temperature differ\)"):
        write_answers(source, "tiny:llama", out, **options, temperature=0.7)
    write_answers(source, "tiny:llama", out, **options)
    assert asked == [4, 4, 2, 4, 2], "the first batch was not answered again"
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "at a temperature of 0 all 2 answers are the same"),
        ({"count": 0}, "0 answers a row"),
        ({"max_new_tokens": 10_000}, "exceed the model's context"),
        ({"column": "worth"}, "have a key `worth` already"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused(stored: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LuthierError, match=words):
        write_answers(stored, "tiny:llama", tmp_path / "out.jsonl", **{"count": 2, "column": "again", **options})
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_are_scored_as_the_pairs_that_taught_it(rewards: dict[str, str]) -> None:
    """The same tokens as in training, for each answer and member; an empty answer has a score, too."""
    tune, tokenizer = luthier.open_run(rewards["three"])
    rows = list(read([{"prompt": row["prompt"]} for row in PAIRS]))
    found = answer_scores(tune, tokenizer, rows, [[row["chosen"], row["rejected"]] for row in PAIRS])
    pairs = [one for row in read(PAIRS) for one in encode(row, tokenizer).group]
    assert torch.allclose(torch.cat(found), readings(tune, pairs), atol=1e-6) and found[0].shape == (2, 3)
    (empty,) = answer_scores(tune, tokenizer, rows[:1], [[""]])
    assert empty.isfinite().all()


def test_members_are_combined_as_asked_when_pairs_are_scored(rewards: dict[str, str]) -> None:
    """Pairs on which members disagree: each combination tells another share than some other, as the readings have it."""
    tune, tokenizer = luthier.open_run(rewards["three"])
    rows = read([{**row, "rejected": f"{row['chosen'][:-1]}?"} for row in PAIRS])
    pairs = [one for row in rows for one in encode(row, tokenizer).group]
    score_P2K = readings(tune, pairs).reshape(-1, 2, 3)
    for how in (MEAN, Combination("min"), Combination("mean_minus_deviation", 3.0)):
        result = measure(tune, tokenizer, [EvalSet("pairs", rows, "reward_accuracy", combination=how)])["pairs"]
        one_P2 = torch.stack([how.of(score_P2K[:, side]) for side in (0, 1)], -1)
        assert [item.score for item in result.items] == (one_P2[:, 0] > one_P2[:, 1]).double().tolist()
    made = evaluation_sets({"pairs": EvaluationSet(rows=PAIRS, combine="min")}, TrainRecipe(), tune.head[1] if tune.head else None)
    assert (made[0].metric, made[0].combination) == ("reward_accuracy", Combination("min"))
    less = EvaluationSet(rows=PAIRS, combine="mean_minus_deviation", deviations=0.5)
    (made_less,) = evaluation_sets({"pairs": less}, TrainRecipe(), tune.head[1] if tune.head else None)
    assert made_less.combination == Combination("mean_minus_deviation", 0.5)
    with pytest.raises(
        LuthierError, match="`min` combines scores of a reward model's members, and `preference_accuracy` measures none"
    ):
        evaluation_sets({"pairs": EvaluationSet(rows=PAIRS, combine="min")}, TrainRecipe())
    with pytest.raises(LuthierError, match="the mean subtracts none") as caught:
        evaluation_sets({"pairs": EvaluationSet(rows=PAIRS, deviations=1.0)}, TrainRecipe())
    assert caught.value.where == "evaluate.pairs"
    loose = luthier.open_run(rewards["loose"])
    with pytest.raises(LuthierError, match="trained without centering"):
        measure(*loose, [EvalSet("pairs", rows, "reward_accuracy", combination=Combination("min"))])


def test_the_best_by_runs_and_what_it_is_worth(stored: Path, rewards: dict[str, str]) -> None:
    """Members of two runs stand beside each other; gold is a metric, another run or a key; all as the pieces have it."""
    rows = list(read(STORED))
    texts = [row["answers"] for row in STORED]
    scores = [answer_scores(*luthier.open_run(rewards[name]), rows, texts) for name in ("three", "one")]
    score_RMK = [torch.cat(some, -1) for some in zip(*scores, strict=True)]
    how = Combination("mean_minus_deviation", 0.5)
    found = best_of_answers(stored, [rewards["three"], rewards["one"]], gold="equal", how=how)
    right = [[float(text == row["answer"]) for text in row["answers"]] for row in STORED]
    deviation = [one.std(-1, correction=0).tolist() for one in score_RMK]
    assert found.picked == tuple(best_of([how.of(one).tolist() for one in score_RMK], right, deviation))
    assert (found.rows, found.answers, found.members, found.combine) == (6, 4, 4, "mean_minus_deviation")
    assert found.picked[0].gold == 0.25 and found.picked[0].gold_interval is None, "all rows alike tell nothing of others"
    assert found.picked[1].gold_interval is not None and found.picked[0].reward_interval is not None
    (low, high), gold = found.picked[1].gold_interval, [one.gold or 0.0 for one in found.picked]
    assert low < gold[1] < high and found.peak == found.picked[gold.index(max(gold))].n
    one = best_of_answers(stored, [rewards["one"]], gold="worth")
    assert one.members == 1 and one.picked[0].disagreement is None
    assert one.picked[0].gold == pytest.approx(fmean(fmean(row["worth"]) for row in STORED))
    other = best_of_answers(stored, ["worth"], gold=rewards["three"])
    best = [scored.mean(-1)[max(range(4), key=row["worth"].__getitem__)] for row, scored in zip(STORED, scores[0], strict=True)]
    # Of one row the first and the second are worth as much.
    tied = scores[0][3].mean(-1)[:2].mean()
    assert other.picked[-1].gold == pytest.approx(float(sum(best) - best[3] + tied) / 6, rel=1e-5)
    assert best_of_answers(stored, ["worth"]).peak is None
    assert best_of_answers(stored, ["worth"], gold="tool_call").peak is None, "gold is the same at all n"


def test_members_without_centring_are_compared_when_they_are_standardized(stored: Path, rewards: dict[str, str]) -> None:
    how = Combination("min")
    with pytest.raises(LuthierError, match="trained without centering"):
        best_of_answers(stored, [rewards["one"], rewards["loose"]], how=how)
    assert best_of_answers(stored, [rewards["one"], rewards["loose"]]).members == 3, "the mean does not mind"
    found = best_of_answers(stored, [rewards["loose"]], how=how, standardize=True)
    score_RMK = answer_scores(*luthier.open_run(rewards["loose"]), list(read(STORED)), [row["answers"] for row in STORED])
    all_NK = torch.cat(score_RMK).double()
    wanted = [((one - all_NK.mean(0)) / (all_NK - all_NK.mean(0)).square().mean(0).sqrt()).amin(-1).tolist() for one in score_RMK]
    assert [one.reward for one in found.picked] == pytest.approx([one.reward for one in best_of(wanted)], abs=1e-5)


@pytest.mark.parametrize(
    ("reward", "gold", "words"),
    [
        ("wort", None, "neither a run nor a key of the rows"),
        ("answers", None, "no list of numbers under `answers`"),
        ("worth", "nothing", "neither a run nor a key"),
        ("moods", None, "gives each row a classes, and no score"),
    ],
)
def test_what_scores_no_answers_is_refused(
    stored: Path, rewards: dict[str, str], reward: str, gold: str | None, words: str
) -> None:
    with pytest.raises(LuthierError, match=words):
        best_of_answers(stored, [rewards.get(reward, reward)], gold=gold)


@pytest.mark.parametrize(
    ("change", "gold", "words"),
    [
        ({"answers": []}, None, "no list of texts under `answers`"),
        ({"worth": [1, 2]}, None, "2 finite numbers for 4 answers"),
        ({"worth": [1, 2, 3, math.inf]}, None, "3 finite numbers for 4 answers"),
        ({"answer": None}, "equal", "compares with an accepted answer"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_picked_from_are_named(tmp_path: Path, change: dict[str, Any], gold: str | None, words: str) -> None:
    rows = [STORED[0], {key: value for key, value in {**STORED[1], **change}.items() if value is not None}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LuthierError, match=words) as caught:
        best_of_answers(path, ["worth"], gold=gold)
    assert "rows.jsonl:2 (row r1)" in caught.value.where


def test_both_commands(stored: Path, tmp_path: Path, rewards: dict[str, str]) -> None:
    def call(*words: object) -> Any:
        result = CliRunner().invoke(app, ["rows", *map(str, words)])
        assert result.exit_code == 0, result.output
        return result.stdout

    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) + "\n" for row in STORED))
    facts = json.loads(call("answers", asked, "--model", "tiny:llama", "--out", out, "-n", 2, "--max-new-tokens", 4, "--json"))
    assert facts["rows"] == 6 and len(out.read_text().splitlines()) == 6
    members = ["--reward", rewards["three"], "--reward", rewards["one"]]
    found = json.loads(call("best-of", stored, *members, "--gold", "equal", "--combine", "min", "--json"))
    assert found["members"] == 4 and [one["n"] for one in found["picked"]] == [1, 2, 4] and found["peak"] in (1, 2, 4)
    shown = " ".join(
        call("best-of", stored, *members, "--gold", "equal", "--combine", "mean_minus_deviation", "--deviations", 2).split()
    )
    assert "KL at most" in shown and "gold is highest at" in shown
    assert "not measured" in call("best-of", stored, "--reward", "worth")
