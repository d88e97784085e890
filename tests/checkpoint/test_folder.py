"""The bytes of a folder's tensors, counted from headers."""

from pathlib import Path

import pytest
from checkpoint_cases import random_tensors, small_config, written

from salalocal.checkpoint.folder import read_headers, stored_bytes
from salalocal.errors import CheckpointError


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_bytes_are_those_of_all_tensors(tmp_path: Path, seed: int, max_shard_bytes: int) -> None:
    tensors = random_tensors(small_config(), seed)
    written(tmp_path, small_config(), tensors, max_shard_bytes)
    assert stored_bytes(tmp_path) == sum(tensor.nbytes for tensor in tensors.values())
    assert (len(read_headers(tmp_path)) > 1) == (max_shard_bytes == 20_000)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights here"):
        stored_bytes(tmp_path)
