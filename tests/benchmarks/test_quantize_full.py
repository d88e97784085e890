"""The full-size run at a small size: every phase gives its figures; the checks refuse what is wrong."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import quantize_full
from benchmarks.quantize_full import Run, calibration_ids, check_one_matrix, phases, run_phase
from benchmarks.synthetic_checkpoint import small_config

ROOT = Path(__file__).parents[2]


def test_all_phases_give_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, small_config(), torch.device("cpu"), num_sequences=2, sequence_tokens=300, seed=0)
    figures = {name: phase() for name, phase in phases(run, ["rtn", "gptq"]).items()}
    assert list(figures) == ["check", "model", "rtn", "gptq"] and json.dumps(figures)
    assert figures["check"]["gptq_hidden_error"] < 0.9 * figures["check"]["rtn_hidden_error"]
    for method, tokens in (("rtn", 0), ("gptq", 600)):
        made = figures[method]
        assert made["calibration_tokens"] == tokens and len(made["layer_s"]) == 2
        assert 0 < sum(made["layer_s"]) < made["wall_s"] and made["host_peak_anonymous_bytes"] > 2**20
        assert made["result_bytes"] < 0.6 * figures["model"]["num_bytes"]
    assert "gptq layer 1:" in capsys.readouterr().out


def test_a_phase_that_fails_or_takes_too_long_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", ["quantize_full.py", "--work", str(tmp_path), "--scale", "unknown"])
    assert run_phase("model", 100) is None
    monkeypatch.setattr(sys, "argv", ["quantize_full.py", "--work", str(tmp_path), "--scale", "small"])
    started_s = time.monotonic()
    assert run_phase("model", 0.5) is None and time.monotonic() - started_s < 5


def test_ids_follow_zipf_and_repeat(seed: int) -> None:
    ids = calibration_ids(500, 20, 400, seed)
    assert ids == calibration_ids(500, 20, 400, seed) and ids != calibration_ids(500, 20, 400, seed + 1)
    counts = torch.bincount(torch.tensor(ids).flatten(), minlength=500).sort(descending=True).values
    assert len(counts) == 500 and counts[:10].sum() > 3 * counts[100:110].sum()
    repeats = [row[n] in row[max(0, n - 256) : n] for row in ids for n in range(1, 400)]
    assert sum(repeats) / len(repeats) > 0.4


def test_a_device_that_computes_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, small_config(), torch.device("cpu"), 2, 300, 0)
    real, calls = quantize_full.make_feedback, []

    def wrong_the_second_time(moments: torch.Tensor) -> object:
        calls.append(moments)
        return real(moments if len(calls) == 1 else moments.flip(0, 1))

    assert check_one_matrix(run)["equal_codes"] == 1
    monkeypatch.setattr(quantize_full, "make_feedback", wrong_the_second_time)
    with pytest.raises(SystemExit, match="wrong"):
        check_one_matrix(run)
