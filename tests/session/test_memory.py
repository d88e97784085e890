"""Memory that runs out is named; nothing else is."""

import pytest
import torch

from salalocal.errors import MemoryBudgetError
from salalocal.session.memory import naming_memory_errors


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_failed_allocations(error: Exception) -> None:
    with pytest.raises(MemoryBudgetError, match="while reading") as caught, naming_memory_errors("reading"):
        raise error
    assert caught.value.exit_code == 3 and caught.value.__cause__ is error


def test_a_real_one() -> None:
    with pytest.raises(MemoryBudgetError), naming_memory_errors("testing"):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), naming_memory_errors("testing"):
        raise RuntimeError("shape")
