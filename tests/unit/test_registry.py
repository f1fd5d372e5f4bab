"""The folder is the registry: what is found, what is refused, and how the refusal helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import GradientTransform, Now, Place, Select, Selective
from luthier.registry import KINDS, find, kind_of, kinds_under, make, make_all, method, names, techniques
from tests.toys.helpers import TOYS, toys  # noqa: F401

CARD = '''
from luthier.kinds import GradientTransform
from luthier.registry import method


@method(title="Mine")
def {name}(*, size: int = 1) -> GradientTransform:
    """Do nothing.

    Args:
        size: of nothing.
    """
    return GradientTransform(lambda trained: {{}}, lambda value, state, trained, now: value)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "gradient_transform").mkdir()
    monkeypatch.setenv("LUTHIER_METHODS", str(tmp_path))
    return tmp_path / "gradient_transform"


def test_a_dropped_in_file_is_found_with_no_edit_elsewhere(folder: Path) -> None:
    assert "mine" not in names("gradient_transform")
    (folder / "mine.py").write_text(CARD.format(name="mine"))
    (folder / "_helper.py").write_text("")
    assert "mine" in names("gradient_transform") and "_helper" not in names("gradient_transform")
    technique = find("mine")
    assert (technique.kind, technique.card.name, technique.card.title) == ("gradient_transform", "mine", "Mine")
    assert technique.card.summary == "Do nothing."
    assert make({"mine": {"size": 2}}, ("gradient_transform",)).options == {"size": 2}


def test_the_toys_are_found_and_gone_again() -> None:
    for path in TOYS.glob("*/[!_]*.py"):
        assert find(path.stem, (path.parent.name,)).name == path.stem
    registry.remove_folder(TOYS)
    assert "likely_less" not in names("token_loss")
    registry.add_folder(TOYS)
    registry.add_folder(TOYS)
    assert techniques._added.count(TOYS) == 1


def test_the_packages_own_technique_cannot_be_replaced(folder: Path) -> None:
    (folder / "clip.py").write_text(CARD.format(name="clip"))
    assert find("clip", ("gradient_transform",)).card.title == "Gradient clipping"


def test_a_file_without_its_function_or_card_is_refused(folder: Path) -> None:
    (folder / "mine.py").write_text("def mine(*, size: int = 1):\n    return size\n")
    with pytest.raises(LuthierError, match="must define a function `mine` with a card") as caught:
        find("mine", ("gradient_transform",))
    assert str(folder / "mine.py") in str(caught.value)
    (folder / "other.py").write_text(CARD.format(name="another"))
    with pytest.raises(LuthierError, match="must define a function `other`"):
        find("other", ("gradient_transform",))


def test_a_file_with_a_mistake_makes_the_same_mistake_twice(folder: Path) -> None:
    (folder / "mine.py").write_text("raise ZeroDivisionError\n")
    for _ in range(2):
        with pytest.raises(LuthierError, match="ZeroDivisionError"):
            find("mine", ("gradient_transform",))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="no such folder"):
        registry.add_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("spec", "kinds", "message"),
    [
        ("halv", kinds_under("tune"), "did you mean `half`"),
        ("clip", kinds_under("tune"), "its kind is gradient_transform: put it under `optimizer`"),
        ({"half": {"shar": 0.5}}, kinds_under("tune"), "`half` has no option `shar`(.|\n)*did you mean `share`"),
        ({"half": {"share": "much"}}, kinds_under("tune"), "the option `share` is 'much'"),
        ({"half": {"level": "layers"}}, kinds_under("tune"), "the option `level` is 'layers'(.|\n)*'layer'"),
        ({"half": {"share": 0.0}}, kinds_under("tune"), "the share is 0.0(.|\n)*half: share"),
        ({"lora": {"rank": 1.5}}, kinds_under("tune"), "the option `rank` is 1.5"),
        ({"lora": {"target_modules": "linear"}}, kinds_under("tune"), "the option `target_modules` is 'linear'"),
        ({"backprop": {"size": 1}}, ("gradient_estimator",), "`backprop` has no options"),
        ({"half": {1: 2}}, kinds_under("tune"), "`half` has no option `1`"),
        ({"half": [0.5]}, kinds_under("tune"), "must be a mapping"),
        ({"half": {}, "lora": {}}, kinds_under("tune"), "one technique at a time: this names half, lora"),
        ({}, kinds_under("tune"), "this names none"),
        (7, kinds_under("tune"), "7 is neither a technique's name nor a part"),
        ((), kinds_under("tune"), "neither a technique's name nor a part"),
        (GradientTransform(lambda t: {}, lambda *a: a), kinds_under("tune"), "a gradient_transform has no place here"),
    ],
)
def test_what_a_recipe_gets_wrong_is_said_and_helped(spec: Any, kinds: tuple[str, ...], message: str) -> None:
    with pytest.raises(LuthierError, match=message):
        make(spec, kinds, where="tune")


def test_an_unknown_kind_offers_the_nearest() -> None:
    with pytest.raises(LuthierError, match="did you mean `selective`"):
        names("selectiv")


def test_a_technique_without_options_may_be_written_bare_or_empty() -> None:
    assert (
        make("half", kinds_under("tune")).options
        == make({"half": None}, kinds_under("tune")).options
        == make({"half": {}}, kinds_under("tune")).options
    )
    assert [part.name for part in make_all(["half", {"lora": {"rank": 2}}], "tune")] == ["half", "lora"]
    assert make_all(None, "tune") == [] and make_all("half", "tune")[0].name == "half"


def test_values_made_in_python_and_tuples_of_kinds_go_together() -> None:
    value = Selective(lambda parts, services: {Place("a", "weight", "head", None): Select("whole")})
    part = make(value, kinds_under("tune"))
    assert (part.name, part.values) == ("selective", (value,)) and make(part, kinds_under("tune")) is part
    several = make((value, GradientTransform(lambda t: {}, lambda *a: a)), kinds_under("tune"))
    assert [kind_of(one) for one in several.values] == ["selective", "gradient_transform"]


def test_positional_options_are_refused_where_the_technique_is_written() -> None:
    with pytest.raises(TypeError, match="options are keyword-only, `rank` is not"):

        @method(title="Wrong")
        def wrong(rank: int = 1) -> None: ...


def test_cards_are_plain_data() -> None:
    cards = registry.cards()
    assert {card.kind for card in cards} == set(KINDS)
    half = next(card for card in cards if card.name == "half")
    assert half.as_json()["row"] == 8 and half.as_json()["needs"] == []


def test_a_technique_used_twice_gets_names_of_its_own(engine: Any, now: Now) -> None:
    run = engine([{"lora": {"target_modules": ["mlp_up"]}}, {"lora": {"target_modules": ["mlp_up"]}}])
    assert {one.slot for one in run.tune.trained.values()} == {"lora", "lora.2"}
    assert len(run.tune.trained) == 4 * 2 * 2
