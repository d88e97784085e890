"""The benchmark of lightning prefill: its peer is compiled in shares, and measured with the time that is left."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from triton.runtime.autotuner import Autotuner, Config

from benchmarks import lightning_cases, lightning_prefill
from benchmarks.lightning_peers import limit_tuning

PEER = """
import json, pathlib, sys, time
if "--out" in sys.argv:
    pathlib.Path(sys.argv[-1]).write_text(json.dumps({"fla": {"ns": 3.0}}))
elif "--share" in sys.argv and sys.argv[-1].startswith("1/"):
    time.sleep(30)
"""


def tuned(count: int) -> Autotuner:
    def kernel(x: int) -> None: ...

    configs = [Config({"BLOCK": 16 * (i + 1)}) for i in range(count)]
    return Autotuner(kernel, ["x"], configs, ["x"], None, None)


def test_shares_hold_every_setting_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, found = Autotuner.__init__, []
    for index in range(5):
        monkeypatch.setattr(Autotuner, "__init__", begin)
        limit_tuning(index, 5)
        found += [config.kwargs["BLOCK"] for config in tuned(13).configs]
    assert sorted(found) == [16 * (i + 1) for i in range(13)]
    monkeypatch.setattr(Autotuner, "__init__", begin)
    limit_tuning(4, 5)
    assert len(tuned(3).configs) == 1, "a tuner needs one setting at least"


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "peer.py"
    path.write_text(PEER)
    monkeypatch.setattr(lightning_prefill, "PEERS", [sys.executable, str(path)])
    monkeypatch.setattr(lightning_prefill, "PEERS_S", 5.0)
    monkeypatch.setattr(lightning_prefill.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(lightning_cases, "results", {})


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_peer_is_measured_whatever_still_compiles(peers: None, capsys: pytest.CaptureFixture[str]) -> None:
    until_s = time.monotonic() + 8
    compiling = lightning_prefill.start_peers()
    assert len(compiling) == 2
    lightning_prefill.run_peers(compiling, lambda: until_s - time.monotonic())
    assert "1 of 2 processes were still compiling" in capsys.readouterr().out
    assert lightning_cases.results["peers"] == {"fla": {"ns": 3.0}}
    assert all(process.poll() is not None or process.wait(5) is not None for process in compiling)


def test_parts_that_are_not_known_are_refused() -> None:
    script = Path(lightning_prefill.__file__)
    done = subprocess.run(
        [sys.executable, script, "--only", "shipped,pears"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(script.parents[1])},
    )
    assert done.returncode == 2 and "pears is not one of" in done.stderr
