"""Tensors come out of a file as they went in: mapped, writable without touching the file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from salalocal.checkpoint.header import read_header
from salalocal.checkpoint.shard import TORCH_DTYPES, Shard
from salalocal.errors import CheckpointError


def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    tensors |= {"empty": torch.zeros(2, 0), "scalar": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    shard = Shard(read_header(tmp_path / "x.safetensors"))
    for name, expected in load_file(tmp_path / "x.safetensors").items():
        found = shard.tensor(name)
        assert found.dtype == expected.dtype and found.shape == expected.shape, name
        assert torch.equal(found.float(), expected.float()), name


def test_a_tensor_is_a_view_of_the_mapping_and_writing_to_it_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(8.0), "b": torch.ones(4)}, path)
    before = path.read_bytes()
    shard = Shard(read_header(path))
    first = shard.tensor("a")
    assert first.data_ptr() == shard.tensor("a").data_ptr()
    first.add_(1)
    assert torch.equal(first, torch.arange(8.0) + 1)
    assert path.read_bytes() == before
    del shard
    assert torch.equal(first, torch.arange(8.0) + 1)  # keeps the mapping alive


def test_an_unaligned_tensor_is_copied_into_place(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * ((1 - len(header)) % 4)
    data = torch.tensor([1.0, -2.0, 3.5])
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data.numpy().tobytes())
    assert (8 + len(header)) % 4
    found = Shard(read_header(path)).tensor("a")
    assert torch.equal(found, data) and found.data_ptr() % 4 == 0


def test_a_replaced_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(8.0)}, path)
    shard = Shard(read_header(path))
    save_file({"a": torch.arange(8.0) + 1}, tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").replace(path)
    with pytest.raises(CheckpointError, match="changed since"):
        shard.tensor("a")


def test_samples_lie_inside_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(100, dtype=torch.uint8), "b": torch.zeros(0)}, path)
    shard = Shard(read_header(path))
    assert dict(shard.samples(10)) == {"a": bytes(range(45, 55)), "b": b""}
    assert dict(shard.samples(1000)) == {"a": bytes(range(100)), "b": b""}
