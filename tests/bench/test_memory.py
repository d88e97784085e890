"""Peaks that count from a moment on, and caps that make sense."""

import numpy as np
import pytest
import torch

from salalocal.bench.memory import cap_memory, forget_peak, peak_bytes
from salalocal.errors import RequestError

CPU = torch.device("cpu")


def test_a_peak_is_forgotten() -> None:
    block = np.ones(2**24)  # 128 MiB
    high = peak_bytes(CPU)
    del block
    if not forget_peak(CPU):
        pytest.skip("this system does not let a process reset its peak")
    low = peak_bytes(CPU)
    assert low < high - 2**26
    assert np.ones(2**23).sum() == 2**23
    assert peak_bytes(CPU) > low + 2**25


def test_a_cap_needs_a_card() -> None:
    with pytest.raises(RequestError, match="none is used"):
        cap_memory(CPU, 2**30)
