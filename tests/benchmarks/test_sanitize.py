"""The cases for the sanitizer run without a card, and what a sanitizer finds, or does not end, is told."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import sanitizer_processes
from benchmarks.sanitizer_processes import Script, check_by, compile_all, find_sanitizer

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time
line = " ".join(sys.argv[1:])
print("case of", line)
if "--graphs" in line:
    print("FAILED answers: CUDA error")
    sys.exit(1)
if "1/6" in line and "--slow" in line:
    time.sleep(60)
print("done in 0 s; failed []; not reached []")
"""
# Finds something in one share alone; the rest is the program's own exit code.
SANITIZER = """#!/bin/sh
tool=$2
shift 6
"$@"
code=$?
case "$*" in
*2/6*) echo "========= Invalid __global__ read of size 4 bytes"; echo "========= ERROR SUMMARY: 1 error"; exit 9 ;;
esac
echo "========= ERROR SUMMARY: 0 errors of $tool"
exit $code
"""


def script(folder: Path, *flags: str, seconds: float = 20.0) -> Script:
    path = folder / "cases.py"
    path.write_text(SCRIPT)
    return Script(path, flags, seconds)


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "compute-sanitizer").write_text(SANITIZER)
    (folder / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_shares_cover_everything_once(tmp_path: Path) -> None:
    commands = script(tmp_path, "--only", "gemv").shares(3, True)
    assert [command[-1] for command in commands] == ["0/3", "1/3", "2/3", "--graphs"]
    assert all(command[2:6] == ["--only", "gemv", "--seconds", "20.0"] for command in commands)
    assert compile_all(script(tmp_path)) == 1, "a case that fails without the sanitizer"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_what_was_found_is_told(tmp_path: Path, sanitizer: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert check_by("memcheck", script(tmp_path), tmp_path / "out") == 9
    told = capfd.readouterr().out
    assert "Invalid __global__ read" in told and "FAILED answers: CUDA error" in told
    assert "exit codes [0, 0, 9, 0, 0, 0, 1]" in told
    assert len(list((tmp_path / "out").glob("memcheck-*.log"))) == 7


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_what_does_not_end_is_ended(
    tmp_path: Path, sanitizer: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitizer_processes, "START_S", 2.0)
    monkeypatch.setattr(sanitizer_processes, "COMPILE_LIMIT_S", 2.0)
    began_s = time.monotonic()
    assert check_by("racecheck", script(tmp_path, "--slow", seconds=1.0), tmp_path / "out") == 124
    assert time.monotonic() - began_s < 30
    assert "exit codes [0, 124, 9, 0, 0, 0]" in capfd.readouterr().out


def test_no_sanitizer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sanitizer_processes, "PLACES", ("nowhere",))
    with pytest.raises(SystemExit, match="compute-sanitizer is not on the PATH"):
        find_sanitizer()


@pytest.mark.parametrize(("flags", "case"), [(["--graphs"], "answers 11"), ([], "ring of picks")])
def test_a_dry_run_runs_the_cases(flags: list[str], case: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "sanitize.py", "--dry", "--only", case, "--seconds", "60", *flags],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{case}: " in done.stdout and "failed []; not reached []" in done.stdout
