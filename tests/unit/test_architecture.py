"""The house: every module in a room, no circle between rooms or files, one sentence a room, and a picture of it."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 500
"""Lines of a file."""


@pytest.fixture(scope="module")
def house() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs"))
    return importlib.import_module("generated.rooms")


def made(tmp_path: Path, files: dict[str, str]) -> Path:
    """A package of these files."""
    package = tmp_path / "house"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return package


def test_no_module_is_loose_and_no_file_is_long(house: ModuleType) -> None:
    assert house.loose() == house.GROUND
    long = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in house.PACKAGE.rglob("*.py")}
    assert not {path: lines for path, lines in long.items() if lines > LONGEST}


def test_no_circle_between_rooms_or_files(house: ModuleType) -> None:
    arrows = house.rooms()
    assert house.circle(arrows) == []
    assert house.circle(house.files()) == []
    # It did read the imports.
    assert {"kinds", "errors"} <= arrows["registry"] and arrows["errors"] == frozenset()


def test_every_room_says_what_it_is_and_the_picture_shows_it(house: ModuleType) -> None:
    arrows = house.rooms()
    assert all(house.sentence(room).endswith(".") for room in arrows)
    picture = house.draw(arrows)
    assert all(f">{room}</text>" in picture for room in arrows if room not in house.GROUND)


def test_circles_and_loose_modules_are_seen(house: ModuleType, tmp_path: Path) -> None:
    package = made(
        tmp_path,
        {
            "__init__.py": "",
            "stray.py": "",
            "one/__init__.py": "",
            "one/a.py": "from house.two.b import B",
            "two/__init__.py": "",
            "two/b.py": """
                from typing import TYPE_CHECKING
                if TYPE_CHECKING:
                    from house.one.a import A
                def late() -> None:
                    from .c import C
            """,
            "two/c.py": "import house.two.b",
        },
    )
    assert house.loose(package) == {"stray"}
    assert house.circle(house.rooms(package)) == ["one", "two", "one"]
    # What only a type checker or a call imports is no circle of files.
    assert house.circle(house.files(package)) == []
    assert house.files(package)["house.two.c"] == {"house.two.b"}
    (package / "two" / "b.py").write_text("from house import one\nfrom . import c", encoding="utf-8")
    assert house.circle(house.files(package)) == ["house.two.b", "house.two.c", "house.two.b"]


def test_arrows_that_others_imply_are_left_out(house: ModuleType) -> None:
    arrows = {"top": frozenset({"middle", "low"}), "middle": frozenset({"low"}), "low": frozenset()}
    assert house.draw(arrows).count('class="arrow"') == 2
