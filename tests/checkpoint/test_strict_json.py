"""JSON of strangers gives a bounded dict or one CheckpointError line."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salalocal.checkpoint.strict_json import MAX_DEPTH, one_line, open_regular, parse_object, read_json_file
from salalocal.errors import CheckpointError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES))
def test_every_ordinary_object_is_read_as_json_reads_it(value: dict[str, object]) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"), "f") == value


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_an_object_or_an_error(data: bytes) -> None:
    try:
        assert isinstance(parse_object(data, "f"), dict)
    except CheckpointError as error:
        assert error.message.startswith("f: ") and "\n" not in error.message


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "bad JSON"),
        (b"[1]", "should be an object, is list"),
        (b'"x"', "should be an object, is str"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "'b' stands twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": 1} x', "bad JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "bad JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested deeper than 64"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested deeper than 64"),
        (b'{"a": [' + b"[]," * 1_000_000 + b"1]}", "more than 1,000,000 values"),
        (b'{"a": "' + "é".encode() * 8_000_001 + b'"}', "not ASCII"),
    ],
    ids=range(14),
)
def test_bad_json_is_named(data: bytes, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=reason) as caught:
        parse_object(data, "some/file.json")
    assert time.monotonic() - started < 2
    assert len(caught.value.message) <= 300
    assert caught.value.message.startswith("some/file.json: ")


def test_the_deepest_allowed_nesting_is_read() -> None:
    inner = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    assert "a" in parse_object(b'{"a": ' + inner + b"}", "f")


def test_files_are_bounded_and_regular(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"a": 1}')
    assert read_json_file(path, 8) == {"a": 1}
    with pytest.raises(CheckpointError, match="8 bytes, the limit is 7"):
        read_json_file(path, 7)
    with pytest.raises(CheckpointError, match="No such file"):
        read_json_file(tmp_path / "none.json", 100)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_regular(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_regular(Path("a\0b"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):  # and does not wait for a writer
        open_regular(tmp_path / "pipe")


@given(st.text(), st.integers(10, 100))
def test_one_line_is_one_printable_line(text: str, limit: int) -> None:
    shown = one_line(text, limit)
    assert shown.isprintable() and len(shown) <= limit
    if text.isprintable() and len(text) <= limit:
        assert shown == text


def test_control_characters_are_shown() -> None:
    assert one_line("a\x1b[2J\nb\u202e") == "a\\x1b[2J\\nb\\u202e"
