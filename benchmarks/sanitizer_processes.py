"""Shares of a script's cases in processes side by side, plain or each under compute-sanitizer; for `sanitize`.

The script takes `--part I/N` for a share of its kernels and `--graphs` for whole answers. No torch in here: what a
process sets before it imports torch is its own.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PLACES = ("usr/local/cuda*/bin", "usr/local/cuda*/compute-sanitizer", "opt/nvidia/*/*")
PROCESSES = 6  # under the sanitizer: they share the card
COMPILERS = 14
COMPILE_LIMIT_S = 90.0
START_S = 25.0  # imports under the sanitizer, and what is under way when the time is up
FOUND_ERRORS, WAS_ENDED = 9, 124
TOLD = ("FAILED", "done in", "========= ERROR SUMMARY", "========= RACECHECK SUMMARY")


@dataclass(frozen=True)
class Script:
    """What is run in shares. Units: seconds, of one process."""

    path: Path
    flags: tuple[str, ...]
    seconds: float

    def shares(self, count: int, has_graphs: bool) -> list[list[str]]:
        """Commands that run every case between them."""
        start = [sys.executable, str(self.path), *self.flags, "--seconds", str(self.seconds)]
        kernels = [[*start, "--part", f"{index}/{count}"] for index in range(count)]
        return kernels + [[*start, "--graphs"]] * has_graphs


def compile_all(script: Script) -> int:
    """Fill Triton's cache by all cores; the worst exit code."""
    began_s = time.monotonic()
    pool = [_started(command) for command in script.shares(min(COMPILERS, os.cpu_count() or 1), True)]
    codes = [_ended(process, began_s + COMPILE_LIMIT_S) for process in pool]
    print(f"compiled in {time.monotonic() - began_s:.0f} s, exit codes {codes}", flush=True)
    return max(codes)


def check_by(tool: str, script: Script, folder: Path) -> int:
    """All cases under the sanitizer; prints what it found, and gives 0 only if everything ran and nothing was found.

    Raises: SystemExit where there is no sanitizer.
    """
    sanitizer = find_sanitizer()
    folder.mkdir(parents=True, exist_ok=True)
    compile_all(script)
    began_s, running = time.monotonic(), []
    prefix = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--print-limit", "20"]
    for number, command in enumerate(script.shares(PROCESSES, has_graphs=tool == "memcheck")):
        log = folder / f"{tool}-{number}.log"
        with log.open("w") as output:
            running.append((log, _started([*prefix, *command], output)))
    codes = []
    for log, process in running:
        codes.append(_ended(process, began_s + script.seconds + START_S))
        print(f"{log}: exit code {codes[-1]}", flush=True)
        lines = log.read_text(errors="replace").splitlines()
        found = [line for line in lines if line.startswith("=========")][:30] if codes[-1] == FOUND_ERRORS else []
        print("\n".join([*found, *(line for line in lines if line.startswith(TOLD))]), flush=True)
    print(f"{tool}: {time.monotonic() - began_s:.0f} s, exit codes {codes}", flush=True)
    return max(codes)


def find_sanitizer() -> str:
    """Where compute-sanitizer is. Raises: SystemExit where there is none."""
    found = shutil.which("compute-sanitizer")
    for place in PLACES:
        for path in sorted(Path("/").glob(f"{place}/compute-sanitizer")):
            found = found or (str(path) if path.is_file() else None)
    if found is None:
        sys.exit(f"compute-sanitizer is not on the PATH, nor in /{', /'.join(PLACES)}")
    return found


def _started(command: list[str], output: IO[str] | None = None) -> "subprocess.Popen[bytes]":
    """In a group of its own, since the sanitizer starts the program as a process of its own."""
    return subprocess.Popen(command, stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True)


def _ended(process: "subprocess.Popen[bytes]", at_s: float) -> int:
    """The exit code; 124 for one that had to be ended, with all that it started."""
    try:
        return process.wait(max(1.0, at_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return WAS_ENDED
