"""Results of benchmarks to look at: one depth, one walk, a machine and cards that are so many times as fast."""

import dataclasses

from salalocal.bench.cards import Card
from salalocal.bench.ceilings import Ceilings
from salalocal.bench.subject import Drawn, SubjectFacts
from salalocal.bench.walk import DepthResult, SubjectResult
from salalocal.bench.work import QWEN3_8B, DenseCost

HERE = Ceilings(3.0e12, 3.1e12, 7.0e14, "bfloat16", 1.3e15)
DEPTH = DepthResult(
    num_tokens=40_000,
    read_s=2.0,
    chunk_tokens=8192,
    chunk_end=32_768,
    chunks_s=(0.3, 0.5, 0.4),
    drawn=Drawn(0.01, 0.2, (1.0, 1.4, 1.2)),
    gen_tokens=100,
    peak_memory_bytes=20 * 2**30,
    tested_at="2026-11-23T10:00:00Z",
)


def result(math: str = "bf16") -> SubjectResult:
    """A walk to one depth."""
    facts = SubjectFacts("model", "a model", 1, 1, "bf16", math, "bf16", 8192)
    return SubjectResult(facts, DenseCost(QWEN3_8B, 2), [DEPTH])


def card(factor: float, memory_gib: int = 24) -> Card:
    """A card that is so many times as fast as the machine in everything."""
    rates = {
        name: getattr(HERE, name) * factor
        for name in ("copy_bytes_per_s", "read_bytes_per_s", "float_flops_per_s", "int8_flops_per_s")
    }
    return Card("card", memory_gib * 2**30, dataclasses.replace(HERE, **rates))
