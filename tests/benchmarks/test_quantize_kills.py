"""The killing of a quantizer: kills are counted, results compared, a difference is not passed over."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.quantize_kills import check_and_remove, digests
from benchmarks.synthetic_checkpoint import small_config, write_synthetic

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_become_the_undisturbed_one(tmp_path: Path, seed: int) -> None:
    write_synthetic(tmp_path / "model", small_config(6), seed, torch.device("cpu"))
    command = [sys.executable, "benchmarks/quantize_kills.py", "--model", str(tmp_path / "model"), "--methods", "rtn"]
    command += ["--group-size", "32", "--kills", "8", "--work", str(tmp_path / "work"), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["method"], figures["seed"], figures["kills"]) == ("rtn", seed, 8)
    assert figures["identical_results"] >= 1 and sum(figures["kills_by_steps_stored"].values()) == 8
    assert (tmp_path / "work/rtn/alone/quantization_card.json").exists()
    assert not list((tmp_path / "work/rtn").glob("killed*"))


def test_a_result_that_differs_stops_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same").write_bytes(b"x")
        (tmp_path / name / "other").write_bytes(name.encode())
    with pytest.raises(SystemExit, match="in other"):
        check_and_remove(tmp_path / "two", digests(tmp_path / "one"))
    (tmp_path / "two" / "other").unlink()
    with pytest.raises(SystemExit, match="in other"):
        check_and_remove(tmp_path / "two", digests(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    check_and_remove(tmp_path / "three", digests(tmp_path / "one"))
    assert not (tmp_path / "three").exists()
