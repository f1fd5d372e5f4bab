"""What `luthier techniques`, `papers` and `replicate --list` show on a terminal of 80 columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier import registry
from luthier.cli import app
from luthier.cli import belonging as belongs
from luthier.cli.belonging import recipes_by_technique, replications_by_paper
from luthier.errors import LuthierError
from luthier.registry import purposes
from luthier.registry.catalogue import described, paper_rows, paper_table
from luthier.registry.listing import Line, grouped, known, like, lines, search
from luthier.registry.purposes import PURPOSES, sorted_out

VERDICTS = json.loads((Path(registry.__file__).parent / "verdicts.json").read_text())


def shown(*words: str) -> str:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_technique_has_one_purpose() -> None:
    found = [line.name for _, members in sorted_out(lines()) for line in members]
    assert sorted(found) == sorted(line.name for line in lines())
    assert sorted(kind for purpose in PURPOSES for kind in purpose.kinds) == sorted(registry.KINDS)
    assert not [name for purpose in PURPOSES for name in purpose.names if name not in found]


def test_purposes_hold_their_names_first_and_then_the_rest_of_their_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (("a", "head"), ("b", "head"), ("c", "probe"), ("d", "head"))
    cards = [registry.Card(title="", name=name, kind=kind) for name, kind in kinds]
    made = (
        purposes.Purpose("one", "", ("c", "b"), ()),
        purposes.Purpose("two", "", ("d",), ("head",)),
        purposes.Purpose("none", "", (), ("prompt",)),
    )
    monkeypatch.setattr(purposes, "PURPOSES", made)
    assert [(purpose.title, [card.name for card in found]) for purpose, found in sorted_out(cards)] == [
        ("one", ["c", "b"]),
        ("two", ["d", "a"]),
    ]


@pytest.mark.parametrize("width", [60, 80, 132])
def test_the_list_is_one_line_each_cut_at_a_word(width: int) -> None:
    found = lines()
    text = grouped(found, width, start=True).plain.split("\n")
    assert text[0] == "start here: lora, full, half" and [line.split()[0] for line in text[1:4]] == ["lora", "full", "half"]
    assert max(map(len, text[4:])) <= width
    listed = [line for line in text[5:] if line.startswith("  ")]
    assert sorted(line.split()[0] for line in listed) == sorted(one.name for one in found)
    whole = {one.name: one.summary.split() for one in found}
    for line in listed:
        name, *words = line.split()
        words = words[1:] if words[0] in "+-?" else words
        cut = words[-1].endswith("…")
        words = [*words[:-1], words[-1].rstrip("…")] if cut else words
        assert words == whole[name][: len(words)], "no word is cut"
        assert cut or len(words) == len(whole[name])


def test_marks_are_the_verdicts_of_the_package() -> None:
    listed = [line.split() for line in grouped(lines(), 80).plain.split("\n") if line.startswith("  ")]
    marks = {words[0]: words[1] if words[1] in ("+", "-", "?") else "" for words in listed}
    wanted = {"holds": "+", "does not hold": "-", "cannot tell": "?"}
    for card in registry.cards():
        verdict = VERDICTS.get(card.replication, {}).get("verdict")
        assert marks[card.name] == wanted.get(verdict, ""), card.name
    assert {"+", "-", "?", ""} == set(marks.values())


def test_the_command_begins_with_where_to_start() -> None:
    assert shown("techniques").startswith("start here: lora, full, half\n")
    for words in (("--kind", "prompt"), ("--like", "LoRA"), ("--search", "low-rank")):
        assert "start here" not in shown("techniques", *words)
    assert max(map(len, shown("techniques").splitlines())) <= 80


def test_search_looks_through_names_docstrings_and_papers() -> None:
    names = {line.name for line in search(lines(), "Low-Rank WEIGHT")}
    assert "lora" in names and "dpo" not in names
    assert {line.name for line in search(lines(), "parameter-efficient neuroada")} == {"neuroada"}, "the paper's title counts"
    with pytest.raises(LuthierError, match="no technique speaks of `zebra`"):
        search(lines(), "zebra")
    assert {one["name"] for one in json.loads(shown("techniques", "--search", "IA3", "--json"))} >= {"ia3"}


def test_like_is_of_the_same_group_and_the_nearest_first() -> None:
    def line(name: str, kind: str, row: int | None, summary: str) -> Line:
        return Line(name, kind, summary, row, "", "", "")

    one = line("dpo", "pair_loss", 7, "prefer the chosen answer")
    same_paper = line("aot", "step_loss", 7, "transport")
    near, far = line("ipo", "pair_loss", None, "prefer the chosen text"), line("exo", "pair_loss", 8, "reverse divergence")
    other_kind, other_group = (
        line("kto", "step_loss", None, "prefer chosen answer"),
        line("kl", "loss_term", 7, "prefer the chosen answer"),
    )
    among = [other_group, far, other_kind, one, near, same_paper]
    assert [found.name for found in like(among, "DPO")] == ["aot", "ipo", "exo", "kto"]


def test_names_as_papers_write_them() -> None:
    assert [known(name) for name in ("LoRA", "prompt-tuning", "Prompt Tuning", "lora")] == [
        "lora",
        "prompt_tuning",
        "prompt_tuning",
        "lora",
    ]
    with pytest.raises(LuthierError) as near:
        known("lorra")
    assert near.value.fix.startswith("did you mean `lora`")
    with pytest.raises(LuthierError) as nothing:
        known("zebra")
    assert "--search zebra" in nothing.value.fix


def test_options_have_their_meanings() -> None:
    def made(*, rank: int = 8, words: str = "a") -> None:
        """Do this.

        And that: in two paragraphs.

        Args:
            rank: R, the rank
                of each delta: small.
            words: what to say.

        Raises:
            LuthierError: never.
        """

    assert described(made) == (
        "Do this.\n\nAnd that: in two paragraphs.",
        {"rank": "R, the rank of each delta: small.", "words": "what to say."},
    )
    for card in registry.cards():
        technique = registry.find(card.name, (card.kind,))
        options = registry.options_model(technique.factory, card.name).model_fields
        text, meanings = described(technique.factory)
        assert set(meanings) == set(options) and "Args:" not in text, card.name


def test_one_technique_says_whose_claim_a_verdict_is_about() -> None:
    text = " ".join(shown("techniques", "LoRA").split())
    assert "replication LoRA learns less and forgets less than full fine-tuning" in text and "luthier replicate lora" in text
    assert "verdict on this claim: " + VERDICTS["lora"]["words"] in text
    assert "alpha 16.0 the delta is scaled by alpha / R. [number]" in text and "Args" not in text
    assert "claim" not in shown("techniques", "ssf"), "nothing was claimed, so nothing is said"


def test_papers_have_techniques_replications_and_recipes() -> None:
    rows = {row["number"]: row for row in paper_rows(None, False, replications_by_paper(), recipes_by_technique())}
    assert (rows[8]["techniques"], rows[8]["replications"], rows[8]["recipes"]) == (["half"], ["half"], ["quickstart.yaml"])
    assert rows[55]["techniques"] == [] and rows[55]["replications"] == ["on_policy"] and rows[12]["replications"] == []
    assert 55 in {row["number"] for row in paper_rows(None, True, replications_by_paper())}, "a replication alone is something, too"
    text = paper_table(list(rows.values()), 80).plain
    assert max(map(len, text.split("\n"))) <= 80
    assert "techniques: half; replications: half; recipes: quickstart.yaml;" in text
    for row in rows:
        assert any(line.startswith(f"{row:>5}  ") for line in text.split("\n"))
    assert "No paper" in paper_table([], 80).plain


def test_recipes_are_found_by_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.yaml").write_text("tune: [{half: {share: 0.5}}, lora]\nrows: {map: morepair}\n")
    (tmp_path / "a.yaml").write_text("tune: lora\n")
    monkeypatch.setattr(belongs, "RECIPES", (tmp_path / "none", tmp_path))
    assert recipes_by_technique() == {"lora": ["a.yaml", "b.yaml"], "half": ["b.yaml"], "morepair": ["b.yaml"]}


def test_replications_are_listed_with_the_packages_verdicts(tmp_path: Path) -> None:
    text = shown("replicate", "--list", "--out", str(tmp_path))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    whole = " ".join(text.split())
    for name, told in VERDICTS.items():
        assert told["words"] in whole, name
    unknown: list[Any] = [
        one for one in json.loads(shown("replicate", "--list", "--out", str(tmp_path), "--json")) if not one["verdict"]
    ]
    assert whole.count("not measured") == len(unknown)
