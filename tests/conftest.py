"""Fixtures for every test: a seed that is new in each run and printed when a test fails.

Without a GPU, Triton kernels run in its interpreter, whose switch is read when a kernel is defined: so it is set here,
before anything of salalocal is imported.
"""

import math
import os
import random
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interp_bounds  # noqa: F401
    import interp_compat  # noqa: F401


@pytest.fixture
def seed() -> int:
    """A fresh random seed; set SALALOCAL_TEST_SEED to repeat a failing run."""
    value = int(os.environ.get("SALALOCAL_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"SALALOCAL_TEST_SEED={value}")
    return value


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written shows: NaN in floats, -77 in whole numbers."""
    allocate = torch.empty

    def empty(*shape: Any, **settings: Any) -> torch.Tensor:
        made = allocate(*shape, **settings)
        return made.fill_(math.nan if made.dtype.is_floating_point else -77)

    monkeypatch.setattr(torch, "empty", empty)
