"""Small files of a model folder: what is missing, what is refused, and how the refusal reads."""

import os
from pathlib import Path

import pytest

from salalocal.errors import CheckpointError
from salalocal.prompt import model_folder
from salalocal.prompt.model_folder import damaged, read_json, read_text


def test_missing_files_are_none(tmp_path: Path) -> None:
    assert read_text(tmp_path / "x", 10) is None
    assert read_json(tmp_path / "x", 10) is None
    (tmp_path / "file").write_text("{}")
    assert read_json(tmp_path / "file" / "x", 10) is None


def test_the_cap_counts_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"é": 1}', encoding="utf-8")
    assert read_json(path, 9) == {"é": 1}
    with pytest.raises(CheckpointError, match=r"x\.json: larger than 8 bytes"):
        read_json(path, 8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"x": {"a": 1, "b": 2, "a": 1}}', "'a' stands twice"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xef\xbb\xbf{", "not valid JSON"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_json(path, 10**6)


def test_the_number_of_values_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "MAX_VALUES", 3)
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2]}')
    assert read_json(path, 100) == {"a": [1, 2]}
    path.write_text('{"a": [1, 2, 3]}')
    with pytest.raises(CheckpointError, match="more than 3 values"):
        read_json(path, 100)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(CheckpointError, match=r"x: cannot be read"):
        read_text(tmp_path / "x", 10)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_text(tmp_path / "pipe", 10)


def test_refusals_are_one_short_clean_line() -> None:
    error = damaged(Path("/" + "d" * 4000 + "/tokenizer.json"), "bad \x1b[2J\nerror: fake" + "x" * 4000)
    assert len(error.message) <= 300 and error.message.isprintable()
    assert "tokenizer.json" in error.message and "\\x1b[2J" in error.message
