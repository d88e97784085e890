"""Ceilings: what a roofline makes of work, and that rates are measured, not made up."""

import time

import pytest
import torch

from salalocal.bench import ceilings
from salalocal.bench.ceilings import Ceilings, measure_ceilings
from salalocal.bench.work import Work

MACHINE = Ceilings(50.0, 100.0, 1000.0, "bfloat16", 4000.0)


def test_the_longer_of_computing_and_reading_counts() -> None:
    work = Work(linear_flops=8000.0, attention_flops=500.0, num_bytes=200.0)
    assert MACHINE.seconds_at_least(work, "bf16") == pytest.approx(8.5)
    assert MACHINE.seconds_at_least(work, "int8") == pytest.approx(2.5)
    assert MACHINE.seconds_at_least(Work(8000.0, 500.0, 1000.0), "bf16") == pytest.approx(10.0)


def test_without_int8_units_whole_numbers_cost_what_floats_do() -> None:
    machine = Ceilings(50.0, 100.0, 1000.0, "float32")
    assert machine.seconds_at_least(Work(8000.0, 0.0, 0.0), "int8") == pytest.approx(8.0)


def test_rates_of_this_machine_hold_water(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_CPU_BYTES", 2**24)
    monkeypatch.setattr(ceilings, "_CPU_PRODUCT", (64, 256, 256))
    monkeypatch.setattr(ceilings, "_ENOUGH_S", 0.0)
    measured = measure_ceilings(torch.device("cpu"), torch.float32)
    for rate in (measured.read_bytes_per_s, measured.copy_bytes_per_s, measured.float_flops_per_s):
        assert 1e8 < rate < 1e15
    assert measured.int8_flops_per_s is None and measured.float_dtype in ("float32", "bfloat16")
    assert set(measured.to_json()) >= {"read_bytes_per_s", "float_flops_per_s"}


def test_a_call_is_timed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_ENOUGH_S", 0.0)
    calls: list[float] = []

    def call() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.004)

    assert 0.004 <= ceilings._least_s(torch.device("cpu"), call) < 0.5
    assert len(calls) == 1 + ceilings._MIN_RUNS
