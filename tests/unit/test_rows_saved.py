"""Data sets that `save_to_disk` wrote are read as `datasets` itself reads them, a split by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from luthier.errors import LuthierError
from luthier.evaluate.planned import evaluation_sets
from luthier.models.tiny import tiny_tokenizer
from luthier.recipe import EvaluationSet, TrainRecipe, make_recipe, read_recipe
from luthier.rows.files import find
from luthier.rows.look import look
from luthier.rows.numbers import beside
from luthier.rows.read import files_of, name_of, read, stream
from luthier.rows.saved import place_of, splits_of
from luthier.rows.shapes import BadRow

TURNS = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes" * n}] for n in range(1, 8)]
RECORDS = [{"messages": turns, "score": 0.5 * n, "topic": f"t{n}"} for n, turns in enumerate(TURNS)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A `DatasetDict` of three splits, the first in two files and drawn out of order."""
    whole = datasets.Dataset.from_list(RECORDS)
    splits = {"train": whole.select([4, 0, 2]), "test": whole.select([1]), "extra": whole.select([3, 5])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1, "extra": 1})
    return tmp_path / "saved"


def _refused(call: Callable[[], Any]) -> LuthierError:
    with pytest.raises(LuthierError) as told:
        call()
    return told.value


def test_a_split_reads_as_datasets_reads_it(saved: Path) -> None:
    for split, expected in datasets.load_from_disk(str(saved)).items():
        rows = read(f"{saved}:{split}")
        assert [{**row.fields, **row.columns} for row in rows] == list(expected), split
        assert rows.name == f"saved:{split}" and len(rows) == len(expected)
        streamed = [row for row in stream(f"{saved}:{split}") if not isinstance(row, BadRow)]
        assert [row.id for row in streamed] == [row.id for row in rows]
        assert read(saved / split).fingerprint() == rows.fingerprint(), "the split's own folder is the same"
    assert [path.name for path in files_of(f"{saved}:train")] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert name_of(f"{saved}:train") == "saved:train"


def test_a_saved_data_set_reads_as_datasets_reads_it(tmp_path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).shuffle(seed=1).save_to_disk(str(tmp_path / "one"), num_shards=3)
    expected = datasets.load_from_disk(str(tmp_path / "one"))
    assert [{**row.fields, **row.columns} for row in read(tmp_path / "one")] == list(expected)
    assert "holds no saved DatasetDict" in _refused(lambda: read(f"{tmp_path / 'one'}:train")).what


def test_without_a_name_the_split_to_train_on_is_read(saved: Path) -> None:
    """Splits of other names were trained on too, as long as these were not known for tests."""
    rows = read(saved)
    assert rows.fingerprint() == read(f"{saved}:train").fingerprint() and rows.name == "saved"
    left = {Path(one.file).name: one.why for one in rows.left_out}
    assert left["test"] == f"it is another split, {saved}:test" and left["extra"].endswith("saved:extra")
    assert left["dataset_dict.json"] == left["state.json"] == "it describes a data set"
    looked = look(saved, tiny_tokenizer())
    assert (looked.name, looked.rows) == ("saved", 3) and look(f"{saved}:extra", tiny_tokenizer()).rows == 2
    (saved / "train").rename(saved / "first")
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["first", "test", "extra"]}))
    told = _refused(lambda: read(saved))
    assert told.what == "the data set was saved with the splits `first`, `test`, `extra`, and none is named"
    assert told.where == str(saved) and told.fix == f"name one, such as {saved}:extra"
    assert _refused(lambda: list(stream(saved))).what == told.what


def test_a_split_to_measure_is_named(saved: Path) -> None:
    def measured(source: str) -> int:
        return len(evaluation_sets({"held": EvaluationSet(rows=source, metric="loss")}, TrainRecipe())[0].rows)

    assert measured(f"{saved}:test") == 1
    assert "and none is named" in _refused(lambda: measured(str(saved))).what, "what is trained on would be measured"
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    assert measured(str(saved)) == 1


def test_a_split_that_is_not_there_is_refused(saved: Path) -> None:
    told = _refused(lambda: read(f"{saved}:tset"))
    assert told.what == "the data set has no split `tset`, but `train`, `test`, `extra`"
    assert told.fix == "did you mean `test`?"
    assert "no such file" in _refused(lambda: read(f"{saved}x:train")).what
    (saved / "test").rename(saved.parent / "moved")
    assert "has no split `test`, but `train`, `extra`" in _refused(lambda: read(f"{saved}:test")).what, (
        "it is listed, and not there"
    )
    (saved.parent / "a:b.jsonl").write_text('{"text": "a"}\n')
    assert len(read(saved.parent / "a:b.jsonl")) == 1, "a file may have such a name"


def test_what_a_description_names_stays_within_its_folder(saved: Path) -> None:
    (saved / "inner").mkdir()
    for listed in (["../saved/train", "/", "..", ".", "", 3], "train", None, {"train": 1}):
        (saved / "inner" / "dataset_dict.json").write_text(json.dumps({"splits": listed}))
        assert splits_of(saved / "inner") == (), listed
    (saved / "inner" / "dataset_dict.json").write_text("[")
    assert splits_of(saved / "inner") == () == splits_of(saved / "train")


def test_a_recipe_finds_splits_beside_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = saved.parent / "recipe.yaml"
    recipe.write_text(
        "model: tiny:llama\nrows: {train: ['saved:train', 'hub:saved:train']}\nevaluate: {held: {rows: 'saved:test'}}\n"
    )
    found = read_recipe(recipe)
    assert found.rows.train == [f"{saved}:train", "hub:saved:train"] and found.evaluate["held"].rows == f"{saved}:test"
    monkeypatch.chdir(saved.parent)
    assert read_recipe(recipe).evaluate["held"].rows == "saved:test", "the working folder goes first"
    assert make_recipe({"model": "m", "rows": {"train": "saved:train"}}).rows.train == "saved:train"


def test_what_models_say_of_a_split_lies_beside_it(saved: Path) -> None:
    place = beside(f"{saved}:train", "likelihood")
    assert place == saved / "train.stored" / "likelihood"
    place.mkdir(parents=True)
    (place / "part-0.parquet").write_bytes(b"PAR1")
    assert all(".stored" not in str(path) for path in find(f"{saved}:train").files)
    assert beside(f"{saved}:none", "likelihood") is None
    assert place_of(saved / "train") == saved / "train"
