"""Mixtures: how many rows of each source an epoch takes, and which."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.errors import LuthierError
from luthier.kinds.parts import Reads
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.rows.encode import Encoded, EncodedRows, Sizes, encode_all
from luthier.rows.gather import encode_rows, mixture_of
from luthier.rows.mixture import Draw, Mixture, Source, apportioned, make_mixture, tempered
from luthier.rows.read import read
from luthier.training.feed import Feed
from luthier.training.world import World
from tests.toys.helpers import toys  # noqa: F401


def mixed(*sources: tuple[int, int, float | None], temperature: float = 1.0, share: Any = "rows", seed: int = 0) -> Mixture | None:
    """A mixture of sources, each of so many rows of so many tokens with a weight; a third of the tokens are targets."""
    places, tokens = [], []
    for number, (rows, length, weight) in enumerate(sources):
        places.append(Source(f"s{number}", weight, range(len(tokens), len(tokens) + rows)))
        tokens += [length] * rows
    return make_mixture(places, Sizes(tokens, [n // 3 for n in tokens]), temperature=temperature, share=share, seed=seed)


def counts(mixture: Mixture | None) -> tuple[int, ...]:
    assert mixture is not None
    return mixture.counts


def test_largest_remainders_by_hand() -> None:
    assert apportioned(10, [3, 1]) == [8, 2], "7.5 and 2.5: the tie goes to the first"
    assert apportioned(10, [1, 1, 1]) == [4, 3, 3]
    assert apportioned(7, [5, 3, 2]) == [4, 2, 1], "3.5, 2.1 and 1.4"
    assert apportioned(100, [0.2, 0.3, 0.5]) == [20, 30, 50]


def test_temperature_by_hand() -> None:
    assert tempered([100, 1], 1) == [1.0, 0.01]
    assert tempered([100, 1], 2) == [1.0, pytest.approx(0.1)]
    # 90 and 10 rows: the roots are 3 to 1.
    assert counts(mixed((90, 4, None), (10, 4, None), temperature=2)) == (75, 25)
    assert counts(mixed((90, 4, None), (10, 4, None), temperature=1e9)) == (50, 50)
    assert mixed((90, 4, None), (10, 4, None)) is None, "every row once"
    assert counts(mixed((90, 4, None), (10, 4, None), temperature=2, share="tokens")) == (75, 25)
    # 360 and 40 tokens: the roots are 3 to 1, which rows of 4 and of 1 token make as 3 to 4: 55.7 and 74.3 of 130.
    assert counts(mixed((90, 4, None), (40, 1, None), temperature=2, share="tokens")) == (56, 74)


def test_weights_by_hand() -> None:
    assert counts(mixed((6, 10, 3.0), (2, 10, None))) == (6, 2), "no weight is a weight of 1"
    assert counts(mixed((4, 10, 1.0), (4, 30, 1.0))) == (4, 4)
    assert counts(mixed((4, 10, 1.0), (4, 30, 1.0), share="tokens")) == (6, 2), "60 tokens of each"


def test_realized_shares_by_hand() -> None:
    mixture = mixed((4, 10, 1.0), (4, 30, 1.0), share="tokens")
    assert mixture is not None
    one, other = mixture.facts(Sizes([10] * 4 + [30] * 4, [3] * 4 + [10] * 4), epochs=2)
    assert (one["name"], one["weight"], one["unit"], one["wanted"]) == ("s0", 1.0, "tokens", 0.5)
    assert one["realized"] == {"rows": 0.75, "tokens": 0.5, "labels": pytest.approx(36 / 76)}
    assert other["realized"] == {"rows": 0.25, "tokens": 0.5, "labels": pytest.approx(40 / 76)}
    assert (one["passes"], other["passes"]) == (3.0, 1.0)


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0, 20.0])
def test_no_row_comes_again_before_its_whole_source_came(weight: float) -> None:
    mixture = mixed((7, 5, weight), (11, 5, 1.0))
    assert mixture is not None
    seen: Counter[int] = Counter(dict.fromkeys(range(18), 0))
    for number in range(9):
        drawn = mixture.epoch(number)
        assert len(drawn) == 18
        seen.update(draw.row for draw in drawn)
        for source, count in zip(mixture.sources, mixture.counts, strict=True):
            times = [seen[row] for row in source.rows]
            assert sum(times) == (number + 1) * count and max(times) - min(times) <= 1


def test_copies_are_counted_and_epochs_are_a_function_of_seed_and_number() -> None:
    mixture = mixed((2, 5, 3.0), (6, 5, 1.0))
    assert mixture is not None and mixture.counts == (6, 2)
    assert [draw for draw in mixture.epoch(0) if draw.row < 2] == [Draw(row, copy) for row in (0, 1) for copy in range(3)]
    later = mixture.epoch(5)
    assert later == mixed((2, 5, 3.0), (6, 5, 1.0)).epoch(5) != mixed((2, 5, 3.0), (6, 5, 1.0), seed=1).epoch(5)  # type: ignore[union-attr]
    assert len({tuple(mixture.epoch(number)) for number in range(6)}) > 1


def test_what_no_mixture_can_be_made_of() -> None:
    with pytest.raises(LuthierError, match="the share of `s1` is less than one of the 6 rows"):
        mixed((3, 5, 100.0), (3, 5, 1.0))
    with pytest.raises(LuthierError, match="no row of `s1` can be used"):
        mixed((3, 5, 1.0), (0, 5, 1.0))


def rows_of(lengths: Sequence[int]) -> EncodedRows:
    return EncodedRows.of(
        Encoded(f"r{i}", tuple(range(n)), (False,) + (True,) * (n - 1), "here", {}, 0, "text") for i, n in enumerate(lengths)
    )


def feed_of(mixture: Mixture | None, world: World | None = None) -> Feed:
    return Feed(
        rows_of([3, 4, 5, 6, 7, 8]), 0, 16, epochs=2.5, batch_rows=3, mixture=mixture, world=world or World()
    )  # fmt: skip


def weighted() -> Mixture | None:
    sources = [Source("few", 2.0, [0, 1]), Source("many", 1.0, [2, 3, 4, 5])]
    return make_mixture(sources, rows_of([3, 4, 5, 6, 7, 8]).sizes, temperature=1.0, share="rows", seed=0)


def test_steps_hold_each_copy_once_under_a_name_of_its_own() -> None:
    feed = feed_of(weighted())
    assert feed.total() == 5
    ids = [id for step in (0, 1) for batch in feed.at(step)[1] for id in batch.row_ids]
    assert sorted(id for id in ids if id[:2] in ("r0", "r1")) == ["r0", "r0#2", "r1", "r1#2"]
    assert len(ids) == len(set(ids)) == 6
    tokens = sum(int(batch.attend_BT.sum()) for step in (0, 1) for batch in feed.at(step)[1])
    assert feed.tokens()[0] == round(2.5 * tokens)


def test_every_step_can_be_found_by_its_number_alone() -> None:
    """Fault 27: a resumed run needs nothing but the step's number."""
    feed = feed_of(weighted())
    forwards = [[batch.row_ids for batch in feed.at(step)[1]] for step in range(5)]
    assert forwards == [[batch.row_ids for batch in feed_of(weighted()).at(step)[1]] for step in range(5)]
    assert forwards[::-1] == [[batch.row_ids for batch in feed.at(step)[1]] for step in reversed(range(5))]


def test_copies_have_the_same_names_on_any_number_of_processes() -> None:
    def steps(*worlds: World) -> list[set[str]]:
        feeds = [feed_of(weighted(), world) for world in worlds]
        return [{id for feed in feeds for batch in feed.at(step)[1] for id in batch.row_ids} for step in range(5)]

    assert steps(World()) == steps(World(2, 0), World(2, 1))


def test_weights_that_are_the_sizes_change_nothing() -> None:
    sources = [Source("few", 2.0, [0, 1]), Source("many", 4.0, [2, 3, 4, 5])]
    same = make_mixture(sources, rows_of([3, 4, 5, 6, 7, 8]).sizes, temperature=1.0, share="rows", seed=0)
    assert [feed_of(same).epoch(number) for number in range(3)] == [feed_of(None).epoch(number) for number in range(3)]


def recipe(tmp_path: Path, **rows: Any) -> dict[str, Any]:
    for name, count in (("a", 2), ("b", 4)):
        lines = [{"prompt": f"{name} asks {i}?", "completion": f"{name} says {i}."} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = {"steps": 4, "batch_rows": 3, "precision": "fp32", "learning_rate": 1e-3}
    sources = [{"rows": str(tmp_path / "a.jsonl"), "weight": 2}, str(tmp_path / "b.jsonl")]
    return {"model": "tiny:llama", "rows": {"train": sources, **rows}, "out": str(tmp_path), "train": train}


def test_a_recipe_mixes_and_the_run_says_how(tmp_path: Path) -> None:
    run = luthier.train(recipe(tmp_path))
    one, other = run.facts["rows"]["mixture"]
    assert (one["name"], one["weight"], one["wanted"], one["passes"]) == ("a", 2.0, pytest.approx(2 / 3), 4.0)
    assert other["realized"]["rows"] == pytest.approx(1 / 3)
    assert "Share of a" in run.report.read_text() and "66.7 % of rows" in run.report.read_text()
    assert any("a: 66.7 % of rows" in line and "wanted 66.7 % of rows; 4.00 passes" in line for line in run.facts["plan"])


def test_sources_in_a_recipe() -> None:
    def train_of(train: Any, **rows: Any) -> Any:
        return make_recipe({"model": "tiny:llama", "rows": {"train": train, **rows}}).rows

    asked = {"prompt": "a", "completion": "b"}
    assert [(one.rows, one.weight) for one in train_of("a").sources()] == [("a", None)]
    assert [(one.rows, one.weight) for one in train_of(["a", "b"]).sources()] == [("a", None), ("b", None)]
    assert [(one.rows, one.weight) for one in train_of([asked, asked]).sources()] == [([asked, asked], None)]
    assert [(one.rows, one.weight) for one in train_of(["a", {"rows": [asked], "weight": 3}]).sources()] == [
        ("a", None),
        ([asked], 3.0),
    ]
    with pytest.raises(LuthierError, match="there is no key `wieght` here"):
        train_of([{"rows": "a"}, {"rows": "b", "wieght": 1}])
    with pytest.raises(LuthierError, match="`weight` is -1"):
        train_of([{"rows": "a", "weight": -1}])
    with pytest.raises(LuthierError, match="the sources have weights"):
        train_of([{"rows": "a", "weight": 1}], temperature=2)


def test_paths_of_sources_are_looked_up_beside_the_recipe(tmp_path: Path) -> None:
    recipe(tmp_path)
    (tmp_path / "mix.yaml").write_text("model: tiny:llama\nrows:\n  train:\n  - {rows: a.jsonl, weight: 2}\n  - b.jsonl\n")
    found = [one.rows for one in luthier.read_recipe(tmp_path / "mix.yaml").rows.sources()]
    assert found == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


@pytest.mark.usefixtures("toys")
def test_rows_that_a_row_map_made_belong_to_no_source(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="was made by a row map"):
        make_plan(make_recipe(recipe(tmp_path, map="twice")))


def test_the_first_row_drawn_is_no_copy_wherever_it_stands() -> None:
    for place in range(3):
        mixture = Mixture((Source("one", None, [place]),), (1.0,), "rows", (2,), 0)
        assert mixture.epoch(0) == [Draw(place, 0), Draw(place, 1)]


def test_a_temperature_mixes_sources_without_weights() -> None:
    """Without either all rows come once, and those that row maps made are of no source."""
    few, many = (read([{"id": f"{name}{i}", "text": "a"} for i in range(count)], name=name) for name, count in (("a", 2), ("b", 6)))
    train = {"rows": {"train": ["a", "b"]}, "model": "tiny:llama"}
    level = make_recipe({**train, "rows": {"train": ["a", "b"], "temperature": 1e9}}).rows
    found = encode_all([*few, *many], tiny_tokenizer())
    assert counts(mixture_of(level, 0, [few, many], found)) == (4, 4)
    assert mixture_of(make_recipe(train).rows, 0, [few], found) is None


def test_rows_may_be_as_long_as_the_model_reads() -> None:
    rows = read([{"text": "abc"}])
    recipe = make_recipe({"model": "tiny:llama", "rows": {"train": "a", "max_length": 4}}).rows
    kept = encode_rows(recipe, [rows], rows, tiny_tokenizer(), Reads(context=4), lambda text: None)
    assert len(kept.rows.rows[0]) == 4
    with pytest.raises(LuthierError, match="rows of 4 tokens are longer than this model reads"):
        encode_rows(recipe, [rows], rows, tiny_tokenizer(), Reads(context=3), lambda text: None)
