"""Writing beside and renaming: at every moment there is a whole old or a whole new one."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier import disk
from luthier.errors import LuthierError
from tests.faults.runs import full_disk

CHANGES = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"})


def write_folder(path: Path, text: str) -> None:
    with disk.written(path) as beside:
        beside.mkdir()
        (beside / "one").write_text(text)
        (beside / "two").write_text(text)


def killed_before_change(number: int, folder: Path) -> bool:
    """Replace `folder/thing` in a process that dies right before its n-th look at or change of the disk."""
    child = os.fork()
    if child == 0:
        left = [number]

        def hear(event: str, arguments: Any) -> None:
            if event in CHANGES:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hear)
        write_folder(folder / "thing", "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_folder_replaced_under_a_kill_at_any_moment_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    found: list[str] = []
    for number in range(100):
        folder = tmp_path / str(number)
        write_folder(folder / "thing", "old")
        killed = killed_before_change(number, folder)
        disk.sweep(folder)
        assert [path.name for path in folder.iterdir()] == ["thing"], "nothing else is left"
        one, two = ((folder / "thing" / name).read_text() for name in ("one", "two"))
        assert one == two
        found.append(one)
        if not killed:
            break
    assert not killed and found[-1] == "new"
    assert found.index("new") > 5 and found == sorted(found, reverse=True), "old up to one moment, new from then on"


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "thing").write_text("old")
    with pytest.raises(KeyboardInterrupt), disk.written(tmp_path / "thing") as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thing", "old")]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "thing", "old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == f".thing.{os.getpid()}":
            raise PermissionError(13, "not allowed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(LuthierError, match="this cannot be written"):
        write_folder(tmp_path / "thing", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["thing"] and (tmp_path / "thing" / "one").read_text() == "old"


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "thing").write_text("old")
    with full_disk(1000), pytest.raises(LuthierError) as caught, disk.written(tmp_path / "thing", "or write less") as beside:
        beside.write_text("x" * 5000)
    assert caught.value.what.startswith("the disk is full") and caught.value.where == str(tmp_path / "thing")
    assert caught.value.fix == f"make room in {tmp_path}; or write less"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thing", "old")]


def test_sweeping_leaves_alone_what_is_not_half_done(tmp_path: Path) -> None:
    for name in (".hidden", ".thing.12", "thing", ".other.old", ".thing.old", ".v1.5.txt"):
        (tmp_path / name).write_text(name)
    disk.sweep(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        ".hidden": ".hidden",
        "thing": "thing",
        "other": ".other.old",
        ".v1.5.txt": ".v1.5.txt",
    }
