"""The layout of a folder that is not quantized: every tensor as the config asks for it."""

from pathlib import Path

import pytest
from checkpoint_cases import random_tensors, small_config, written

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import expected_tensors
from salalocal.errors import CheckpointError
from salalocal.quant import weight_layout


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_folder_has_no_matrices(tmp_path: Path, tied: bool) -> None:
    config = small_config(tied)
    layout = weight_layout(Checkpoint.open(written(tmp_path, config, random_tensors(config, 1))))
    assert not layout.matrices
    assert {name: spec.shape for name, spec in layout.expected.items()} == expected_tensors(config)
    with pytest.raises(KeyError):
        layout.read("lm_head")


def test_a_dense_folder_is_checked(tmp_path: Path) -> None:
    config = small_config()
    tensors = random_tensors(config, 1)
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
        weight_layout(Checkpoint.open(written(tmp_path, config, tensors)))
