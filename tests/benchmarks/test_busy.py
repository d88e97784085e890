"""How busy a card is, from a made-up trace: what overlaps counts once, copies are no kernels, waits are named."""

import argparse
import json
import random
from pathlib import Path

import pytest

from benchmarks import busy
from benchmarks.busy import Interval, busy_us, heaviest, longest_waits, measure, summary

TRACE = [
    Interval("gemm", 100.0, 140.0),
    Interval("norm", 130.0, 150.0),  # on another stream
    Interval("Memcpy DtoH (Device -> Pinned)", 150.0, 155.0),
    Interval("gemm", 160.0, 200.0),
    Interval("norm", 165.0, 170.0),  # wholly within
    Interval("pick", 230.0, 250.0),
    Interval("Memset (Device)", 250.0, 300.0),
]


def test_the_union_counts_every_microsecond_once(seed: int) -> None:
    rng = random.Random(seed)
    intervals = []
    for _ in range(60):
        start = rng.randrange(900)
        intervals.append(Interval("any", start, start + rng.randrange(30)))
    covered = {us for one in intervals for us in range(int(one.start_us), int(one.end_us))}
    assert busy_us(intervals) == len(covered)
    assert busy_us([]) == 0


def test_a_summary_of_two_units() -> None:
    found = summary(TRACE[::-1], 2, wall_ms=0.08)
    assert found["busy"] == pytest.approx(110 / 150)
    assert found["kernel_ms"] == pytest.approx(0.055) and found["profiled_ms"] == pytest.approx(0.075)
    assert found["kernels_of_wall"] == pytest.approx(0.055 / 0.08)
    assert (found["launches"], found["copies"]) == (2.5, 1.0)
    assert [row["name"] for row in found["heaviest"]] == ["gemm", "norm", "pick"]


def test_the_table_adds_up() -> None:
    kernels = [one for one in TRACE if not one.name.startswith("Mem")]
    gemm, norm, pick = heaviest(kernels, 2)
    assert (gemm["name"], gemm["launches"], gemm["ms"]) == ("gemm", 1.0, pytest.approx(0.04))
    assert norm["ms"] == pytest.approx(0.0125) and pick["share"] == pytest.approx(20 / 125)


def test_waits_are_charged_to_the_kernel_that_ends_them() -> None:
    kernels = [one for one in TRACE if not one.name.startswith("Mem")]
    assert longest_waits(kernels, 1) == [
        {"before": "pick", "us": 30.0, "waits": 1.0},
        {"before": "gemm", "us": 10.0, "waits": 1.0},
    ]


def test_a_trace_without_kernels_is_an_error() -> None:
    assert "error" in summary([Interval("Memset (Device)", 0.0, 5.0)], 1, 1.0)


def test_a_dry_run_measures_every_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "NUM_TOKENS", 3)  # a profiler takes its time over a CPU's many operations
    out = tmp_path / "busy.json"
    found = measure(argparse.Namespace(seconds=60.0, dry=True, out=out, depths=()))
    assert list(found["depths"]) == [256, 512]
    assert json.loads(out.read_text())["depths"]["512"]["token"]["units"] == 3
    for depth in found["depths"].values():
        assert all(0 < one["busy"] <= 1 and one["launches"] > 1 for one in depth.values())
