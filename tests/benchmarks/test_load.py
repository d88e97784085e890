"""The benchmark of loading: its folder is a model that loads, and a start that fails is a result."""

import argparse
from pathlib import Path

import torch

from benchmarks.load import measure, random_folder, start
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.quant import weight_layout


def test_the_folder_is_a_model_in_4_bits_that_answers(tmp_path: Path) -> None:
    random_folder(tmp_path, "small", "cpu")
    layout = weight_layout(Checkpoint.open(tmp_path))
    assert "lm_head" in layout.matrices and len(layout.matrices) > 4 * 7
    steps = measure(tmp_path, "cpu", 300)
    assert set(steps) >= {"import torch", "load", "first token", "all, to the first token"}
    assert 0 < steps["load"] < steps["all, to the first token"]


def test_words_are_laid_out_by_rows_wherever_they_go(tmp_path: Path) -> None:
    random_folder(tmp_path, "small", "cpu")
    layout = weight_layout(Checkpoint.open(tmp_path))
    name = next(iter(layout.matrices))
    stored = layout.read(name)
    moved = stored.to(torch.device("cpu"))
    assert not stored.words.is_contiguous() and moved.words.is_contiguous() and moved.scales.is_contiguous()
    assert torch.equal(stored.words, moved.words) and torch.equal(stored.scales, moved.scales)


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    arguments = argparse.Namespace(device="cpu", tokens=16)
    found = start(tmp_path / "nothing", arguments, tmp_path, 100)
    assert list(found) == ["error"] and "nothing" in found["error"]
