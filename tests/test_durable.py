"""Files that a crash cannot tear: the order of syncs and renames, and what a failure leaves behind."""

import os
import stat
from pathlib import Path

import pytest

from salalocal.durable import TEMPORARY, remove_strays, replace_file, write_beside


def test_the_file_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        steps.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        fsync(handle)

    def noted_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    replace_file(tmp_path / "file", lambda file: file.write(b"new"), 0o600)
    assert steps == ["sync file", "rename", "sync folder"]
    assert (tmp_path / "file").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


@pytest.mark.parametrize("failing", ["write", "os.fsync", "pathlib.Path.replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fails(*_: object) -> None:
        raise OSError("no room")

    if failing != "write":
        monkeypatch.setattr(failing, fails)
    with pytest.raises(OSError, match="no room"):
        replace_file(target, fails if failing == "write" else lambda file: file.write(b"new"))
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_strays_are_removed_and_nothing_else(tmp_path: Path) -> None:
    stray = write_beside(tmp_path, lambda file: file.write(b"killed here"))
    (tmp_path / "kept").write_bytes(b"")
    assert stray.name.startswith(TEMPORARY)
    remove_strays(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
