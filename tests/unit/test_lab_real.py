"""Rows of public data sets: read from a folder of one's own, cut short, written alike, and refused where they are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.lab import real, replications
from luthier.lab.replication import Setting
from tests.unit.real_rows import write_sets


@pytest.fixture(autouse=True)
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up sets in their place."""
    write_sets(tmp_path)
    monkeypatch.setenv(real.FOLDER, str(tmp_path))
    return tmp_path


def words(row: dict[str, Any]) -> tuple[str, str]:
    assert row["prompt"][0] == {"role": "system", "content": ""}
    return row["prompt"][1]["content"], row["completion"]


@pytest.mark.parametrize(
    ("equation", "side"),
    [
        ("X=(4.0*3.0)", "4*3"),
        ("x=3*6", "3*6"),
        ("X=((22.0-14.0)/4.0)", "(22-14)/4"),
        ("X=(3.0*(7.0+3.0))", "3*(7+3)"),
        ("X=(1.0+2.0)*(3.0+4.0)", "(1+2)*(3+4)"),
        ("x=5.91+8.11", "5.91+8.11"),
        ("(6.0+x)*(x-6.0)=189.0", ""),
        ("X=3.0-x", ""),
        ("x=11.166666666666666-0.8333", ""),
    ],
)
def test_equations_are_written_alike(equation: str, side: str) -> None:
    assert real._equation({"equation": equation}) == side


def test_equations_of_short_problems(sets: Path) -> None:
    rows = real.equations("train", 50, 1)
    assert len({row["id"] for row in rows}) == 50 and rows == real.equations("train", 50, 1) != real.equations("train", 50, 2)
    assert all(
        words(row)[0] == f"train : {row['id'].split('-')[1]} apples and {words(row)[1].split('+')[1]} pears ." for row in rows
    )
    assert len(real.equations("test", 10_000, 0)) == 320, "all there are"
    long = sets / "mawps" / "long.jsonl"
    long.write_text('{"id": 1, "original_text": "%s", "equation": "x=1+2"}' % ("word " * (real.LONGEST + 1)))
    assert real.equations("long", 5, 0) == []


def test_facts_and_the_same_in_other_words() -> None:
    rows = real.changed_facts(20, 3)
    again = real.rephrased(rows)
    assert [row["id"] for row in rows] == [row["id"] for row in again] and len(rows) == 20
    for row, other in zip(rows, again, strict=True):
        assert words(row)[1] == words(other)[1] and words(row)[0].startswith("The edit") and words(other)[0].startswith("In edit")
    kept = real.other_facts(10)
    assert len(kept) == 10 and all(words(row)[0].startswith("The train river") for row in kept)


def test_intents_are_the_first_few() -> None:
    rows = real.intents("test", 10_000, 0)
    assert {words(row)[1] for row in rows} == {f"intent {number:02}" for number in range(real.INTENTS)}
    assert len(rows) == sum(number % 15 < real.INTENTS for number in range(400))


def test_wrong_answers_are_those_of_others() -> None:
    clean = real.intents("train", 60, 0)
    noisy = real.wrong_answers(clean, 0.2, 5)
    changed = [other for one, other in zip(clean, noisy, strict=True) if one != other]
    assert len(changed) == 12 and {row["completion"] for row in changed} <= {row["completion"] for row in clean}
    assert [row["prompt"] for row in clean] == [row["prompt"] for row in noisy]


def test_what_is_not_there_is_told(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replication = replications.find("dco_real")
    assert real.missing(replication) == []
    (sets / "banking77" / "test.jsonl").unlink()
    assert real.missing(replication) == ["banking77/test"]
    with pytest.raises(
        LuthierError, match=r"banking77/test.*\n.*LUTHIER_DATA\n.*set LUTHIER_DATA to a folder that has banking77/test"
    ):
        real.intents("test", 5, 0)
    monkeypatch.delenv(real.FOLDER)
    assert real.missing(replication) == ["banking77/train", "banking77/test"]


@pytest.mark.parametrize("name", [name for name in replications.names() if name.endswith("_real")])
def test_a_replication_names_all_that_it_reads(name: str, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    records = real.records
    monkeypatch.setattr(real, "records", lambda one: (read.add(one), records(one))[1])
    replication = replications.find(name)
    replication.stages(Setting(replication.model, 0))
    assert read and read <= set(replication.data)
    source = Path(replications.file_of(name)).read_text()
    for split in ("train", "validation", "test"):
        assert (f'equations("{split}"' in source) == (f"mawps/{split}" in replication.data)
    assert ("other_facts(" in source) == ("counterfact/train" in replication.data)
    assert ("changed_facts(" in source) == ("counterfact/edit" in replication.data)
    assert ("intents(" in source) == ("banking77/train" in replication.data)
