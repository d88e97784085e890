"""Fewer and larger programs: in Triton's interpreter every program costs milliseconds, whatever it does."""

from dataclasses import replace

import pytest

from salalocal.kernels import lightning_prefill
from salalocal.kernels.block_attention import decode as attention_decode
from salalocal.kernels.block_topk import decode as topk_decode


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of the kernels that run here are still several programs each, whose results are joined."""
    oldest = min(attention_decode.LAUNCH)
    attention = replace(attention_decode.LAUNCH[oldest], parts=2)
    monkeypatch.setattr(attention_decode, "LAUNCH", {oldest: attention})
    topk = replace(topk_decode.LAUNCH[oldest], programs_per_core=2)  # for two groups, on one core
    monkeypatch.setattr(topk_decode, "LAUNCH", {oldest: topk})
    prefill = replace(lightning_prefill.LAUNCHES[oldest], chunk=64, lag=0)
    monkeypatch.setattr(lightning_prefill, "LAUNCHES", {oldest: prefill})
