"""A safetensors header is read as the safetensors library reads it, or refused with a reason."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from salalocal.checkpoint.header import MAX_HEADER_BYTES, read_header
from salalocal.errors import CheckpointError

TABLE: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    "empty": {"dtype": "U8", "shape": [0, 7], "data_offsets": [34, 34]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [34, 42]},
}
DATA_BYTES = 42


def safetensors_bytes(table: object, data_bytes: int = DATA_BYTES, length: int | None = None) -> bytes:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data_bytes)


def entry(name: str, **changes: object) -> dict[str, Any]:
    table = copy.deepcopy(TABLE)
    table[name] = {**table[name], **changes}
    return table


def test_a_file_of_the_library_is_read(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = {
        "x": torch.randn(3, 5),
        "y": torch.randn(7).bfloat16(),
        "z": torch.zeros(0, 4),
        "s": torch.tensor(3.0, dtype=torch.float16),
        "q": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "größer"})
    header = read_header(path)
    assert {name: found.shape for name, found in header.entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    raw = path.read_bytes()
    for name, found in header.entries.items():
        assert raw[found.start : found.end] == tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_our_own_small_file_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(TABLE))
    assert set(read_header(path).entries) == {"a.weight", "b.weight", "empty", "scalar"}


CASES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes, too short"),
    "seven bytes": (b"1234567", "7 bytes, too short"),
    "no header": (bytes(8), "bad JSON"),
    "header too long": (
        safetensors_bytes(TABLE, length=MAX_HEADER_BYTES + 1),
        "header of 100,000,001 bytes, the limit",
    ),
    "header length of 2^64-1": (safetensors_bytes(TABLE, length=2**64 - 1), "the limit"),
    "header over the end": (safetensors_bytes(TABLE, length=5000), "truncated"),
    "truncated data": (safetensors_bytes(TABLE, DATA_BYTES - 1), "truncated"),
    "foreign bytes": (safetensors_bytes(TABLE, DATA_BYTES + 1), "foreign bytes"),
    "a list": (safetensors_bytes([TABLE]), "should be an object"),
    "doubled name": (safetensors_bytes(b'{"a":{},"a":{}}'), "'a' stands twice"),
    "metadata of numbers": (safetensors_bytes({**TABLE, "__metadata__": {"a": 1}}), "__metadata__"),
    "metadata list": (safetensors_bytes({**TABLE, "__metadata__": []}), "__metadata__"),
    "entry is a list": (safetensors_bytes({**TABLE, "b.weight": [1]}), "'b.weight': should have dtype"),
    "key missing": (safetensors_bytes({"a": {"dtype": "F32", "shape": []}}), "'a': should have dtype"),
    "key too many": (safetensors_bytes(entry("a.weight", extra=1)), "'a.weight': should have dtype"),
    "dtype unknown": (safetensors_bytes(entry("a.weight", dtype="F31")), "dtype 'F31'"),
    "dtype a list": (safetensors_bytes(entry("a.weight", dtype=["F32"])), "dtype"),
    "shape a number": (safetensors_bytes(entry("a.weight", shape=6)), "shape should be a list"),
    "negative dimension": (safetensors_bytes(entry("a.weight", shape=[-2, -3])), "shape should be a list"),
    "dimension a float": (safetensors_bytes(entry("a.weight", shape=[2.0, 3])), "shape should be a list"),
    "dimension a bool": (safetensors_bytes(entry("a.weight", shape=[True, 6])), "shape should be a list"),
    "dimension huge": (safetensors_bytes(entry("a.weight", shape=[2**63])), "shape should be a list"),
    "product wraps 2^64": (safetensors_bytes(entry("a.weight", shape=[2**62, 2**62, 16])), "takes"),
    "too many dimensions": (safetensors_bytes(entry("a.weight", shape=[1] * 9)), "9 dimensions"),
    "wrong size": (safetensors_bytes(entry("a.weight", shape=[2, 4])), "2x4 F32 takes 32 bytes, data_offsets give 24"),
    "offsets backwards": (safetensors_bytes(entry("a.weight", data_offsets=[24, 0])), "start <= end"),
    "one offset": (safetensors_bytes(entry("a.weight", data_offsets=[0])), "start, end"),
    "negative offset": (safetensors_bytes(entry("a.weight", data_offsets=[-24, 0])), "data_offsets should be a list"),
    "overlap": (safetensors_bytes(entry("b.weight", data_offsets=[20, 30])), "an overlap of 4 bytes"),
    "hole": (safetensors_bytes(entry("scalar", data_offsets=[36, 44]), DATA_BYTES + 2), "a hole of 2 bytes"),
    "hole at the start": (safetensors_bytes({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, 2), "a hole"),
    "all in one place": (safetensors_bytes(dict.fromkeys("ab", TABLE["a.weight"]), 24), "an overlap of 24 bytes"),
    "endless name": (safetensors_bytes({"n" * 1025: TABLE["a.weight"]}, 24), "name of 1,025 characters"),
    "hostile name": (safetensors_bytes({"\x1b[2J\n": {}}), r"\\x1b\[2J\\n"),
}


@pytest.mark.parametrize("case", CASES)
def test_malformed_headers_are_named(tmp_path: Path, case: str) -> None:
    data, reason = CASES[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(path)
    assert time.monotonic() - started < 2
    assert "m.safetensors" in caught.value.message and "\n" not in caught.value.message
    assert len(caught.value.message) <= 300 + len(str(path))


BYTES = safetensors_bytes(TABLE)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 23, 24, 33, 34, 2**31, 2**63 - 1, 2**64]) | st.integers()
ANY = st.none() | NUMBERS | st.text(max_size=4) | st.lists(NUMBERS, max_size=4) | st.floats() | st.booleans()
MUTATED_TABLES = st.builds(
    lambda name, key, value, data_bytes: safetensors_bytes(
        {**TABLE, name: {**TABLE.get(name, TABLE["a.weight"]), key: value}}, data_bytes
    ),
    st.sampled_from([*TABLE, "new", ""]),
    st.sampled_from(["dtype", "shape", "data_offsets", "other"]),
    ANY | st.sampled_from(["F32", "BF16", "BOOL", "F4"]),
    st.integers(0, 60),
)
MUTATED_BYTES = st.builds(
    lambda cut, place, put, skip: (BYTES[:place] + put + BYTES[place + skip :])[:cut],
    st.integers(0, len(BYTES) + 8),
    st.integers(0, len(BYTES)),
    st.binary(max_size=6),
    st.integers(0, 9),
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MUTATED_TABLES | MUTATED_BYTES)
def test_a_mutated_file_is_refused_or_agreed_on_by_the_library(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert "\n" not in error.message
        return
    try:
        with safe_open(path, "pt") as other:
            expected = {name: tuple(other.get_slice(name).get_shape()) for name in other.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AssertionError(f"we accept what the library refuses: {error}") from error
    assert {name: found.shape for name, found in header.entries.items()} == expected


def test_a_bomb_of_a_header_costs_little_time_and_memory(tmp_path: Path) -> None:
    """Headers at the size limit, made to be expensive: under 2 s each and 512 MiB over the base together."""
    bombs = {
        "lists": b'{"a":[' + b"[]," * 33_000_000 + b"[]]}",
        "names": b"{" + b",".join(b'"%d":{}' % number for number in range(330_000)) + b"}",
        "one string": b'{"' + b"x" * 99_000_000 + b'":{}}',
        "not ascii": b'{"' + "é".encode() * 10_000_000 + b'":{}}',
    }
    for name, header in bombs.items():
        (tmp_path / name).write_bytes(safetensors_bytes(header, 0))
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from salalocal.checkpoint.header import read_header\n"
        "from salalocal.errors import CheckpointError\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: int(status.read_text().split('VmHWM:')[1].split()[0]) * 1024\n"
        "base = peak()\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    start = time.process_time()\n"
        "    try:\n"
        "        read_header(path)\n"
        "    except CheckpointError:\n"
        "        pass\n"
        "    print(path.name, time.process_time() - start, (peak() - base) >> 20)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    for line in done.stdout.splitlines():
        name, seconds, mebibytes = line.rsplit(" ", 2)
        assert float(seconds) < 2 and int(mebibytes) < 512, line
    assert len(done.stdout.splitlines()) == len(bombs)
