"""Quantizing at full size: wall time, both memory peaks and time per layer, by the code that `salalocal quantize` runs.

    python benchmarks/quantize_full.py --work /tmp/full --out full.json               # the 9B shape, RTN and GPTQ
    python benchmarks/quantize_full.py --work /tmp/two --layers 2 --methods gptq      # a quick form
    python benchmarks/quantize_full.py --work /tmp/small --scale small --device cpu   # seconds, anywhere

First a check that refuses to go on if something is wrong: one matrix on the device against the same on the CPU, and two
layers quantized by every method, read again and run against their original. Then the checkpoint (made once; about
19 GB at full size, the results 5 GB each) and the methods, every one in a process of its own, so that peaks do not mix.
The text for GPTQ is a seeded source of Zipf-distributed ids that repeats itself. What is measured is printed at once
and JSON is written after every phase: a cut leaves what was done.
"""

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.synthetic_checkpoint import released_config, small_config, write_synthetic
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import CONFIG_FILE
from salalocal.device import peak_memory_bytes, pick_device
from salalocal.engine.load import load_model
from salalocal.model.config import SalaConfig
from salalocal.quant.gptq import make_feedback
from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.matrix import Inputs, MatrixErrors, quantize_matrix
from salalocal.quant.quantizer import Quantizer, StepProgress
from salalocal.quant.recipe import GPTQ, QuantizeOptions
from salalocal.quant.workers import Workers

RESULT = "RESULT "
CHECK_SEQUENCES, CHECK_ROWS = 4, 512
LEAST_EQUAL_CODES = 0.995  # on two devices sums round differently: near ties fall either way, and GPTQ passes them on
MOST_RELATIVE_DIFFERENCE = 1e-3

Figures = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is measured, where, on which calibration text."""

    work: Path
    config: SalaConfig
    device: torch.device
    num_sequences: int
    sequence_tokens: int
    seed: int

    @property
    def model(self) -> Path:
        return self.work / "model"


def calibration_ids(vocab_size: int, num_sequences: int, num_tokens: int, seed: int) -> list[tuple[int, ...]]:
    """Ids of Zipf's frequencies; three in ten repeat one of the last 256."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / (torch.arange(vocab_size, dtype=torch.float64) + 10)
    names = torch.randperm(vocab_size, generator=generator)
    shape = (num_sequences, num_tokens)
    drawn = torch.multinomial(frequencies, math.prod(shape), replacement=True, generator=generator)
    ids = names[drawn].view(shape)
    is_repeat = torch.rand(shape, generator=generator) < 0.3
    back = torch.randint(1, 257, shape, generator=generator)
    for position in range(1, num_tokens):
        source = (position - back[:, position]).clamp(min=0)
        ids[:, position] = torch.where(is_repeat[:, position], ids.gather(1, source[:, None])[:, 0], ids[:, position])
    return [tuple(row) for row in ids.tolist()]


def quantize(run: Run, out: Path, method: str, is_read: bool) -> Figures:
    """One method over the whole model, with the text read or not; nothing is taken over from an earlier run."""
    for folder in (out, out.with_name(out.name + ".quantizing")):
        shutil.rmtree(folder, ignore_errors=True)
    options = QuantizeOptions(method=method, group_size=128 if run.config.hidden_size % 128 == 0 else 32)
    ids = calibration_ids(run.config.vocab_size, run.num_sequences, run.sequence_tokens, run.seed)
    seconds: list[float] = []

    def show(progress: StepProgress) -> None:
        seconds.append(progress.elapsed_s)
        error = "" if progress.error is None else f"  worst error {progress.error:.4f}"
        left = "" if progress.left_s is None else f"  {progress.left_s:.0f} s left"
        memory = f"{progress.peak_bytes / 2**30:.2f} GiB host, {progress.device_peak_bytes / 2**30:.2f} GiB device"
        say(f"  {method} {progress.name}: {progress.elapsed_s:.1f} s{left}  {memory}{error}")

    with memory_watched() as peaks:
        started_s = time.monotonic()
        card = Quantizer(run.model, out, options, ids if is_read else (), device=run.device).run(show)
        wall_s = time.monotonic() - started_s
    layers = [later - earlier for earlier, later in pairwise(seconds[:-1])]
    errors = card["relative_errors"].values()
    return {
        "method": method,
        "wall_s": wall_s,
        "layer_s": [round(value, 3) for value in layers],
        "calibration_tokens": sum(map(len, ids)) if is_read else 0,
        "host_peak_bytes": peak_memory_bytes(torch.device("cpu")),
        "host_peak_anonymous_bytes": peaks["RssAnon"],
        **device_peaks(run.device),
        "mean_weight_error": sum(error["weights"] for error in errors) / len(errors),
        "mean_output_error": sum(error["outputs"] or 0 for error in errors) / len(errors),
        "result_bytes": card["result_bytes"],
    }


def device_peaks(device: torch.device) -> Figures:
    """Bytes of tensors, and of what torch has taken from the card for them."""
    if device.type != "cuda":
        return {}
    return {
        "device_peak_bytes": torch.cuda.max_memory_allocated(device),
        "device_peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


@contextmanager
def memory_watched() -> Iterator[dict[str, int]]:
    """The most anonymous memory of this process, looked up 50 times a second (Linux)."""
    peaks, is_over, status = {"RssAnon": 0}, threading.Event(), Path("/proc/self/status")

    def watch() -> None:
        while not is_over.wait(0.02):
            line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon:"))
            peaks["RssAnon"] = max(peaks["RssAnon"], int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    if status.exists():
        watcher.start()
    try:
        yield peaks
    finally:
        is_over.set()


def check_one_matrix(run: Run) -> Figures:
    """GPTQ of some rows on the device and on the CPU: nearly equal codes, equal errors."""
    width = run.config.hidden_size
    generator = torch.Generator().manual_seed(run.seed)
    weight = torch.randn(CHECK_ROWS, width, generator=generator).bfloat16()
    rows = torch.randn(4 * width, width, generator=generator) * torch.logspace(0, 1, width)
    moments = (rows.t() @ rows).double() / len(rows)
    made: list[IntWeight] = []
    errors: list[MatrixErrors] = []
    for device in (torch.device("cpu"), run.device):
        here = moments.to(device)
        inputs = Inputs(here.float(), make_feedback(here))
        with Workers() as workers:
            quantized, error = quantize_matrix(weight.to(device), IntScheme(4, 32), torch.bfloat16, inputs, workers)
        assert isinstance(quantized, IntWeight)
        made.append(quantized)
        errors.append(error)
    equal = float((made[0].codes == made[1].codes.cpu()).float().mean())
    outputs = [float(error.outputs or 0) for error in errors]
    difference = abs(outputs[0] - outputs[1]) / outputs[0]
    demand(equal >= LEAST_EQUAL_CODES, f"only {equal:.4f} of the codes are equal on both devices")
    demand(difference <= MOST_RELATIVE_DIFFERENCE, f"output errors differ by {difference:.1e} between the devices")
    return {"equal_codes": equal, "output_error_difference": difference}


def check_two_layers(run: Run) -> Figures:
    """Two layers by every method: errors as they must be, and GPTQ nearer to the original on the text that it read."""
    config = small_config() if run.config.hidden_size < 1024 else released_config(2)
    small = Run(run.work / "check", config, run.device, CHECK_SEQUENCES, run.sequence_tokens, run.seed)
    write_synthetic(small.model, config, run.seed, run.device)
    text = calibration_ids(config.vocab_size, CHECK_SEQUENCES, run.sequence_tokens, run.seed)
    ids = torch.tensor(text[:1], device=run.device)
    expected = hidden_states(small.model, run.device, ids)
    figures: Figures = {}
    for method in ("rtn", "gptq"):
        made = quantize(small, small.work / method, method, is_read=True)
        if method == "rtn":  # GPTQ moves weights on purpose, to make up for what was lost in front of them
            demand(0.02 < made["mean_weight_error"] < 0.4, f"weights err by {made['mean_weight_error']:.4f}")
        hidden = hidden_states(small.work / method, run.device, ids)
        error = float((hidden - expected).norm() / expected.norm())
        demand(error < 1, f"{method}: hidden states err by {error:.4f}")  # those of another model err by 1.4
        figures |= {f"{method}_hidden_error": error, f"{method}_output_error": made["mean_output_error"]}
    demand(figures["gptq_hidden_error"] < figures["rtn_hidden_error"], f"GPTQ is not better: {figures}")
    shutil.rmtree(small.work)
    return figures


def hidden_states(folder: Path, device: torch.device, ids: torch.Tensor) -> torch.Tensor:
    """What comes out of the last norm, in float32."""
    model = load_model(Checkpoint.open(folder), device, torch.float32)
    with torch.inference_mode():
        hidden: torch.Tensor = model(ids, model.new_state())
    demand(bool(hidden.isfinite().all()), f"{folder}: NaN or infinity")
    return hidden


def check(run: Run) -> Figures:
    """All checks."""
    return check_one_matrix(run) | check_two_layers(run)


def make_model(run: Run) -> Figures:
    """The checkpoint, unless it is there."""
    started_s = time.monotonic()
    if not (run.model / CONFIG_FILE).exists():
        write_synthetic(run.model, run.config, run.seed, run.device)
    checkpoint = Checkpoint.open(run.model)
    demand(checkpoint.config == run.config, f"{run.model} is another model")
    return {"wall_s": time.monotonic() - started_s, "num_bytes": checkpoint.num_bytes}


def demand(is_true: bool, message: str) -> None:
    """Stop with a message."""
    if not is_true:
        sys.exit(f"wrong: {message}")


def say(line: str) -> None:
    """To the log, at once."""
    print(line, flush=True)


def phases(run: Run, methods: list[str]) -> dict[str, Callable[[], Figures]]:
    """Everything that is done, in its order."""
    return {"check": lambda: check(run), "model": lambda: make_model(run)} | {
        method: lambda method=method: quantize(run, run.work / method, method, method == GPTQ)  # type: ignore[misc]
        for method in methods
    }


def run_phase(name: str, seconds: float) -> Figures | None:
    """One phase in a process of its own; None if it failed or its time ran out."""
    command = [sys.executable, __file__, *sys.argv[1:], "--phase", name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    figures = None
    for line in process.stdout or ():
        if line.startswith(RESULT):
            figures = json.loads(line.removeprefix(RESULT))
        else:
            say(line.rstrip())
    timer.cancel()
    return figures if process.wait() == 0 else None


def main() -> None:
    """Parse the flags; run all phases, or the one that a parent asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder on a disk with room")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    parser.add_argument("--methods", default="rtn,gptq")
    parser.add_argument("--scale", choices=("released", "small"), default="released")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048, help="of one sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=570, help="for everything; what is not done then is cut")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    config = small_config(flags.layers or 2) if flags.scale == "small" else released_config(flags.layers)
    device = pick_device(flags.device)
    run = Run(flags.work, config, device, flags.sequences, flags.tokens, flags.seed)
    todo = phases(run, flags.methods.split(","))
    if flags.phase:
        say(RESULT + json.dumps(todo[flags.phase]()))
        return
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    results: Figures = {"device": machine, "torch": torch.__version__, "num_parameters": config.num_parameters}
    deadline_s = time.monotonic() + flags.seconds
    for name in todo:
        figures = run_phase(name, deadline_s - time.monotonic())
        say(f"{name}: {json.dumps(figures)}")
        results[name] = figures
        if flags.out:
            flags.out.write_text(json.dumps(results, indent=2) + "\n")
        if figures is None:
            sys.exit(f"{name} failed or was cut")


if __name__ == "__main__":
    main()
