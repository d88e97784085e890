"""The benchmark of loading: its folder is a model that loads, and a start that fails is a result and an exit code."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import load
from benchmarks.load import config_of, copy_tokenizer, measure, random_folder, start
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.model.config import SalaConfig
from salalocal.quant import weight_layout
from salalocal.session.tokens import TextCodec


@pytest.mark.parametrize("scale", ["small", "released"])
def test_the_tokenizer_fits_the_shape_beside_it(tmp_path: Path, scale: str) -> None:
    config = config_of(scale)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    copy_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()  # so that the ids of config.json are looked up too
    codec = TextCodec.from_folder(tmp_path)
    assert codec.tokenizer.vocab_size < config.vocab_size
    assert set(config.eos_token_ids) <= set(codec.tokenizer.eos_ids)
    if scale == "released":
        assert config.vocab_size == SalaConfig.released().vocab_size


def test_the_folder_is_a_model_in_4_bits_that_answers(tmp_path: Path) -> None:
    random_folder(tmp_path, "small", "cpu")
    layout = weight_layout(Checkpoint.open(tmp_path))
    assert "lm_head" in layout.matrices and len(layout.matrices) > 4 * 7
    steps = measure(tmp_path, "cpu", 300)
    assert set(steps) >= {"import torch", "open", "load", "first token", "all, to the first token"}
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


def test_a_run_starts_processes_and_fails_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "load.json"
    flags = ["--device", "cpu", "--runs", "1", "--tokens", "40", "--work", str(tmp_path), "--out", str(out)]
    for model, code in ((["--scale", "small", "--layers", "2"], 0), (["--model", str(tmp_path)], 1)):
        monkeypatch.setattr(sys, "argv", ["load.py", *model, *flags])
        with pytest.raises(SystemExit) as stopped:
            load.main()
        found = json.loads(out.read_text())
        (run,) = found["runs"]
        assert stopped.value.code == code and ("error" in run) == (code == 1)
        assert (found["median_of_warm"] is None) == (code == 1)


def test_compiled_kernels_come_before_the_start_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start may take longer than there is time for; the others must have been measured by then."""
    asked: list[Path | None] = []

    def fake_start(folder: Path, arguments: object, kernels: Path | None, limit_s: float) -> dict[str, float | str]:
        asked.append(kernels)
        return {"error": "not done"} if kernels else {"load": float(len(asked))}

    monkeypatch.setattr(load, "start", fake_start)
    arguments = argparse.Namespace(device="cuda", tokens=16, seconds=9, model=tmp_path, runs=2, scale="released")
    found = load.measure_all(arguments, tmp_path)
    assert asked == [None, None, None, tmp_path / "kernels"]
    assert found["median_of_warm"] == {"load": 2.5}
