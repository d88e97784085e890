"""The report as plain data: llama-bench's keys and arithmetic, shares of the roofline, failures that stay visible."""

import json

import pytest
from bench_cases import DEPTH, HERE, card, result

from salalocal.bench.report import BenchReport, Machine
from salalocal.bench.walk import Failure

MACHINE = Machine("a CPU", "a card", "CUDA", 4, "2.13.0")


def report(has_ceilings: bool = True) -> BenchReport:
    ours = result()
    ours.failures.append(Failure(2**20, "out of memory while reading to 1,048,576 tokens"))
    return BenchReport(MACHINE, [ours], HERE if has_ceilings else None, (card(0.5),))


def test_a_depth_is_a_row_of_reading_and_one_of_writing() -> None:
    read, write, failed = report().rows()
    assert (read["n_prompt"], read["n_gen"], read["n_depth"]) == (8192, 0, 32_768 - 8192)
    assert (write["n_prompt"], write["n_gen"], write["n_depth"]) == (0, 100, 40_000)
    assert read["samples_ns"] == [300_000_000, 500_000_000, 400_000_000]
    assert read["avg_ns"] == 400_000_000 and read["stddev_ns"] == 100_000_000
    assert read["avg_ts"] == pytest.approx((8192 / 0.3 + 8192 / 0.5 + 8192 / 0.4) / 3)
    assert write["samples_ts"] == pytest.approx([100.0, 100 / 1.4, 100 / 1.2])
    assert read["ttft_s"] == pytest.approx(2.01)
    assert failed["n_depth"] == 2**20 and "out of memory" in failed["error"]


def test_every_row_is_complete_in_itself() -> None:
    keys = {"model_filename", "model_type", "model_size", "model_n_params", "n_batch", "n_threads", "type_k", "type_v"}
    keys |= {"cpu_info", "gpu_info", "backends", "n_prompt", "n_gen", "n_depth"}
    assert all(keys <= set(row) for row in report().rows())


def test_shares_are_the_least_time_over_the_time_measured() -> None:
    shown = report()
    ours = shown.results[0]
    work = ours.cost.read(32_768 - 8192, 32_768)
    seconds = (work.linear_flops + work.attention_flops) / 7.0e14
    assert shown.prefill_share(ours, DEPTH) == pytest.approx(seconds / 0.4)
    assert shown.decode_share(ours, DEPTH) == pytest.approx(ours.cost.step(40_000).num_bytes / 3.1e12 / 0.012)


def test_the_document_is_json_with_and_without_ceilings() -> None:
    for has_ceilings in (True, False):
        document = json.loads(json.dumps(report(has_ceilings).to_json()))
        assert len(document["tests"]) == 3
        assert (document["ceilings"] is not None) == has_ceilings
        assert len(document["projections"]) == has_ceilings
        assert (document["tests"][0]["roofline_share"] is not None) == has_ceilings
    assert report().has_figures and not BenchReport(MACHINE).has_figures
