"""Timing on a GPU: cold caches, medians and spreads, what the benchmarks of kernels share."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 * 2**20  # several times any card's L2 cache


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, least and most of `runs` runs."""

    median_us: float
    min_us: float
    max_us: float
    runs: int


class ColdTimer:
    """Times calls on the current device, each with an L2 cache that holds nothing useful."""

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def time(self, call: Callable[[], object], runs: int = 7, warmups: int = 2) -> Timing:
        """Wall time on the GPU by events, from launch to end; short kernels are better timed in a graph."""
        for _ in range(warmups):
            call()
        times = []
        for _ in range(runs):
            self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return Timing(statistics.median(times), min(times), max(times), runs)

    def time_graph(self, calls: list[Callable[[], object]], runs: int = 7, repeats: int = 1) -> Timing:
        """Per call, inside one CUDA graph of all `calls`, which must use different memory to find the cache cold."""
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for call in calls:
                    call()
        times = []
        for _ in range(runs + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / (len(calls) * repeats))
        times = times[1:]
        return Timing(statistics.median(times), min(times), max(times), runs)
