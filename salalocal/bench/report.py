"""A benchmark as plain data: results come in, rows and figures go out; for views and files.

A row is one test as llama-bench has them, reading (`n_prompt`) or writing (`n_gen`) behind `n_depth` tokens, and its
keys are llama-bench's where they mean the same: `avg_ts` are tokens a second, `avg_ns` and `samples_ns` one sample.
Own keys have units in their names. A depth that was not reached is a row with `error`.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from salalocal import __version__
from salalocal.bench.cards import Card, Projection, data_sheet_of, project
from salalocal.bench.ceilings import Ceilings
from salalocal.bench.walk import DepthResult, SubjectResult

_NS = 1e9


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    cpu_info: str
    gpu_info: str
    backends: str
    num_threads: int
    torch_version: str


@dataclass
class BenchReport:
    """All results of one run; it fills while the run goes on. The first of the results is the model, others baselines.

    `memory_cap_bytes`: what the run was held to. `notes`: what a reader of the figures must know.
    """

    machine: Machine
    results: list[SubjectResult] = field(default_factory=list)
    ceilings: Ceilings | None = None
    cards: tuple[Card, ...] = ()
    memory_cap_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    is_interrupted: bool = False

    @property
    def has_figures(self) -> bool:
        """Whether anything was measured."""
        return any(result.depths for result in self.results)

    @property
    def projections(self) -> list[Projection]:
        """The results on other cards."""
        if self.ceilings is None:
            return []
        here = data_sheet_of(self.machine.gpu_info) or Card("this machine", 0, self.ceilings)
        return [
            project(result, depth, here, card)
            for card in self.cards
            for result in self.results
            for depth in result.depths
        ]

    def prefill_share(self, result: SubjectResult, depth: DepthResult) -> float | None:
        """Share of the roofline of the last chunks; None if ceilings were not measured."""
        if self.ceilings is None:
            return None
        work = result.cost.read(depth.chunk_end - depth.chunk_tokens, depth.chunk_end)
        return self.ceilings.seconds_at_least(work, result.facts.math) / depth.chunk_s

    def decode_share(self, result: SubjectResult, depth: DepthResult) -> float | None:
        """Share of the roofline of a token drawn."""
        if self.ceilings is None:
            return None
        return self.ceilings.seconds_at_least(result.cost.step(depth.num_tokens), result.facts.math) / depth.token_s

    def rows(self) -> list[dict[str, Any]]:
        """Every test, and every depth that was not reached, each complete in itself."""
        rows = []
        for result in self.results:
            about = self._about(result)
            for depth in result.depths:
                rows += [about | self._read_row(result, depth), about | self._write_row(result, depth)]
            rows += [
                about | {"n_prompt": 0, "n_gen": 0, "n_depth": failure.num_tokens, "error": failure.reason}
                for failure in result.failures
            ]
        return rows

    def to_json(self) -> dict[str, Any]:
        """The whole run as one document."""
        return {
            "salalocal_version": __version__,
            "tests": self.rows(),
            "ceilings": None if self.ceilings is None else self.ceilings.to_json(),
            "projections": [projection.to_json() for projection in self.projections],
            "notes": self.notes,
            "is_interrupted": self.is_interrupted,
        }

    def _about(self, result: SubjectResult) -> dict[str, Any]:
        facts, machine = result.facts, self.machine
        return {
            "salalocal_version": __version__,
            "torch_version": machine.torch_version,
            "cpu_info": machine.cpu_info,
            "gpu_info": machine.gpu_info,
            "backends": machine.backends,
            "model_filename": facts.name,
            "model_type": facts.description,
            "model_size": facts.model_bytes,
            "model_n_params": facts.num_parameters,
            "n_batch": facts.chunk_size,
            "n_threads": machine.num_threads,
            "type_k": facts.cache,
            "type_v": facts.cache,
            "dtype": facts.dtype,
            "math": facts.math,
            "memory_cap_bytes": self.memory_cap_bytes,
            "planned_memory_bytes": facts.planned_bytes,
        }

    def _read_row(self, result: SubjectResult, depth: DepthResult) -> dict[str, Any]:
        size = depth.chunk_tokens
        return {
            "n_prompt": size,
            "n_gen": 0,
            "n_depth": depth.chunk_end - size,
            "test_time": depth.tested_at,
            **_samples(size, depth.chunks_s),
            "ttft_s": depth.first_token_s,
            "read_s": depth.read_s,
            "peak_memory_bytes": depth.peak_memory_bytes,
            "roofline_share": self.prefill_share(result, depth),
        }

    def _write_row(self, result: SubjectResult, depth: DepthResult) -> dict[str, Any]:
        return {
            "n_prompt": 0,
            "n_gen": depth.gen_tokens,
            "n_depth": depth.num_tokens,
            "test_time": depth.tested_at,
            **_samples(depth.gen_tokens, depth.drawn.runs_s),
            "setup_s": depth.drawn.setup_s,
            "peak_memory_bytes": depth.peak_memory_bytes,
            "roofline_share": self.decode_share(result, depth),
        }


def _samples(num_tokens: int, seconds: tuple[float, ...]) -> dict[str, Any]:
    rates = [num_tokens / sample for sample in seconds]
    return {
        "avg_ns": round(statistics.mean(seconds) * _NS),
        "stddev_ns": round(_deviation(seconds) * _NS),
        "avg_ts": statistics.mean(rates),
        "stddev_ts": _deviation(rates),
        "samples_ns": [round(sample * _NS) for sample in seconds],
        "samples_ts": rates,
    }


def _deviation(values: tuple[float, ...] | list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
