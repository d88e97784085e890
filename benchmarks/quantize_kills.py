"""Killing `salalocal quantize` at random moments: what is resumed must become the very bytes of an undisturbed run.

    python benchmarks/quantize_kills.py --kills 100 --work /tmp/kills
    python benchmarks/quantize_kills.py --kills 4 --methods rtn --work /tmp/kills --model some/folder

For every method one run is left alone and timed. Then runs are killed with SIGKILL after a random part of that time and
started again, until one ends by itself: its folder must equal the first, file by file. So it goes on until there have
been enough kills. A run is what the command does before it measures the result, in a process forked from this one, so
that the time goes into the work and not into starting Python. The seed is printed; `--seed` repeats the moments, as far
as the machine does.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from salalocal.quant.recipe import QuantizeOptions
from salalocal.session.quantizing import QuantizeRequest, quantize_model
from salalocal.session.start import Sources
from salalocal.settings import load_settings

Run = Callable[[Path], None]


@dataclass
class Tally:
    """What has happened. `steps_done`: how many kills came with so many steps stored."""

    kills: int = 0
    finished: int = 0
    steps_done: Counter[int] = field(default_factory=Counter)


def run_in_child(run: Run, out: Path, kill_after_s: float | None = None) -> bool:
    """Run in a process of its own, killed after so many seconds; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        run(out)
        os._exit(0)
    deadline_s = time.monotonic() + (kill_after_s if kill_after_s is not None else 1e9)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() >= deadline_s:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and kill_after_s is not None:
        return False
    if status:
        sys.exit(f"{out}: a run failed")
    return True


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def check_and_remove(out: Path, expected: dict[str, str]) -> None:
    """Stop if a file differs from the undisturbed run's."""
    found = digests(out)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if different:
        sys.exit(f"{out}: differs from the undisturbed run in {', '.join(different)}")
    shutil.rmtree(out)


def num_steps_stored(out: Path) -> int:
    """How many steps the unfinished job has stored."""
    job = out.with_name(out.name + ".quantizing") / "job.json"
    return len(json.loads(job.read_text())["steps"]) if job.exists() else 0


def kill_often(run: Run, work: Path, num_kills: int, number: random.Random) -> dict[str, object]:
    """One undisturbed run, then kills at random moments of it; the last run is left to its end."""
    alone, out, tally = work / "alone", work / "killed", Tally()
    for folder in (alone, out, out.with_name(out.name + ".quantizing")):
        shutil.rmtree(folder, ignore_errors=True)
    started_s = time.monotonic()
    run_in_child(run, alone)
    longest_s = time.monotonic() - started_s
    expected = digests(alone)
    while tally.kills < num_kills:
        if run_in_child(run, out, number.uniform(0, longest_s)):
            check_and_remove(out, expected)
            tally.finished += 1
        else:
            tally.kills += 1
            tally.steps_done[num_steps_stored(out)] += 1
    run_in_child(run, out)
    check_and_remove(out, expected)
    figures = {"undisturbed_s": round(longest_s, 2), "kills": tally.kills, "identical_results": tally.finished + 1}
    return figures | {"kills_by_steps_stored": dict(sorted(tally.steps_done.items()))}


def command(model: str, options: QuantizeOptions, texts: tuple[str, ...], num_tokens: int) -> Run:
    """What `salalocal quantize` does with these flags, up to the measuring of the result."""

    def run(out: Path) -> None:
        torch.set_num_threads(1)
        settings = load_settings({"model": model, "device": "cpu"})
        request = QuantizeRequest(options, out, Sources(texts, "path"), num_tokens)
        quantize_model(settings, request, lambda progress: None, lambda line: None)

    return run


def main() -> None:
    """Parse the flags, kill, print one JSON line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="all methods together")
    parser.add_argument("--methods", default="rtn,gptq")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--model", default="builtin:bf16")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calibration", action="append", default=[], help="text for gptq; else the shipped one")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    flags = parser.parse_args()
    print(f"seed {flags.seed}", flush=True)
    number, methods = random.Random(flags.seed), flags.methods.split(",")
    for method in methods:
        flags.work.joinpath(method).mkdir(parents=True, exist_ok=True)
        texts = tuple(flags.calibration) if method == "gptq" else ()
        run = command(flags.model, QuantizeOptions(method, 4, flags.group_size), texts, flags.calibration_tokens)
        figures = kill_often(run, flags.work / method, flags.kills // len(methods), number)
        print(json.dumps({"method": method, "seed": flags.seed, **figures}), flush=True)


if __name__ == "__main__":
    main()
