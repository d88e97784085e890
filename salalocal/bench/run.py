"""One benchmark from start to end: settings and options come in, a BenchReport goes out; for the `bench` command.

The model walks first, then it is let go, the machine's ceilings are measured (after an interrupted walk too, which has
figures to hold against them), and the baseline walks. All of it in one process and one run, so that its figures can be
held against each other.
"""

import gc
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from salalocal.bench.cards import find_card
from salalocal.bench.ceilings import measure_ceilings
from salalocal.bench.dense import DenseSubject
from salalocal.bench.memory import cap_memory, forget_peak
from salalocal.bench.opening import find_subject, open_subject
from salalocal.bench.report import BenchReport, Machine
from salalocal.bench.subject import Subject
from salalocal.bench.walk import OnProgress, SubjectResult, WalkPlan, walk
from salalocal.bench.work import QWEN3_8B, dense_shape_like
from salalocal.device import pick_device
from salalocal.errors import MemoryBudgetError, RequestError
from salalocal.model.config import SalaConfig
from salalocal.session.memory import naming_memory_errors
from salalocal.session.start import Tell
from salalocal.settings import Settings

DENSE = "dense"
CARD_DEPTHS = (4096, 65_536, 262_144)
CPU_DEPTHS = (4096, 16_384)
MAX_DEPTH = 2**24


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. Units: tokens; `memory_cap_bytes` holds a card to less than it has.

    `depths` empty: usual ones for the device. `cards`: names of cards to project to.
    """

    depths: tuple[int, ...] = ()
    gen_tokens: int = 128
    num_runs: int = 3
    baseline: str | None = None
    cards: tuple[str, ...] = ()
    memory_cap_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value, limit in (("--gen", self.gen_tokens, 65_536), ("--repetitions", self.num_runs, 100)):
            if not 1 <= value <= limit:
                raise RequestError(f"{name} is {value}, it should be from 1 to {limit:,}")
        if self.baseline not in (None, DENSE):
            raise RequestError(f"--baseline {str(self.baseline)[:40]!r} is not known", f"--baseline {DENSE}")
        if max(self.depths, default=0) > MAX_DEPTH:
            raise RequestError(f"--ctx {max(self.depths):,} is more than {MAX_DEPTH:,} tokens", "try --ctx 1m")


def run_bench(settings: Settings, options: BenchOptions, on_progress: OnProgress, tell: Tell) -> BenchReport:
    """Measure the chosen model, and the baseline if one is asked for; Ctrl-C keeps what was measured before it.

    Raises: RequestError, HubError, CheckpointError, BackendError, MemoryBudgetError if the deepest depth cannot fit.
    """
    cards = tuple(find_card(name) for name in options.cards)
    device = pick_device(settings.device)
    if cards and device.type != "cuda":
        raise RequestError("--project goes from one card to another, and none is used here", "leave it out")
    if options.memory_cap_bytes is not None:
        cap_memory(device, options.memory_cap_bytes)
    report = BenchReport(_machine(device), cards=cards, memory_cap_bytes=options.memory_cap_bytes)
    try:
        _measure(report, settings, options, device, (on_progress, tell))
    except KeyboardInterrupt:
        if not report.has_figures:
            raise
        report.is_interrupted = True
        report.notes.append("interrupted: depths and baselines that are not shown were not measured")
    return report


def _measure(
    report: BenchReport,
    settings: Settings,
    options: BenchOptions,
    device: torch.device,
    faces: tuple[OnProgress, Callable[[str], None]],
) -> None:
    on_progress, tell = faces
    settings, folder = find_subject(settings, device, tell)
    depths = tuple(sorted(set(options.depths))) or (CARD_DEPTHS if device.type == "cuda" else CPU_DEPTHS)
    plan = WalkPlan(depths, options.gen_tokens, options.num_runs)
    has_own_peak = forget_peak(device)
    subject = open_subject(folder, settings, device, depths[-1] + plan.drawn_tokens)
    config, dtype, chunk_size = subject.config, subject.dtype, subject.facts.chunk_size
    report.notes += subject.facts.notes
    made_for = config.max_position_embeddings
    if made_for is not None and depths[-1] > made_for:
        report.notes.append(f"the model was made for contexts of up to {made_for:,} tokens")
    is_interrupted = False
    try:
        _walk(report, subject, plan, on_progress, has_own_peak)
    except KeyboardInterrupt:
        if not report.has_figures:
            raise
        is_interrupted = True
    del subject  # here, where no traceback holds it any more
    _let_go(device)
    report.ceilings = measure_ceilings(device, dtype)
    if is_interrupted:
        raise KeyboardInterrupt
    if options.baseline == DENSE:
        _measure_dense(report, config, plan, (device, chunk_size), on_progress)


def _measure_dense(
    report: BenchReport,
    config: SalaConfig,
    plan: WalkPlan,
    place: tuple[torch.device, int],
    on_progress: OnProgress,
) -> None:
    device, chunk_size = place
    is_card = device.type == "cuda"
    shape, name = (QWEN3_8B, "Qwen3-8B shape") if is_card else (dense_shape_like(config), "the same sizes")
    has_own_peak = forget_peak(device)
    try:
        with naming_memory_errors("making the baseline"):
            subject = DenseSubject(shape, name, device, torch.bfloat16 if is_card else torch.float32, chunk_size)
    except MemoryBudgetError as error:
        report.notes.append(f"baseline: {error.message}")
        return
    report.notes += subject.facts.notes
    _walk(report, subject, plan, on_progress, has_own_peak)
    del subject
    _let_go(device)


def _walk(report: BenchReport, subject: Subject, plan: WalkPlan, on_progress: OnProgress, has_own_peak: bool) -> None:
    result = SubjectResult(subject.facts, subject.cost)
    report.results.append(result)
    walk(subject, plan, result, on_progress, has_own_peak)


def _let_go(device: torch.device) -> None:
    """Free what nobody holds: modules and captured graphs stand in circles, which only the collector breaks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _machine(device: torch.device) -> Machine:
    is_card = device.type == "cuda"
    return Machine(
        cpu_info=_cpu_name(),
        gpu_info=torch.cuda.get_device_name(device) if is_card else "",
        backends="CUDA" if is_card else "CPU",
        num_threads=torch.get_num_threads(),
        torch_version=torch.__version__,
    )


def _cpu_name() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or os.name
