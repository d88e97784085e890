"""Memory that runs out in the middle of work, named as one of our errors; for sessions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from salalocal.errors import MemoryBudgetError

_HINT = "close other programs, give fewer files, or see: salalocal plan"


@contextmanager
def naming_memory_errors(work: str) -> Iterator[None]:
    """Turn an allocation that failed into a MemoryBudgetError. `work` says what was being done."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MemoryBudgetError(f"out of memory while {work}", _HINT) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise MemoryBudgetError(f"out of memory while {work}", _HINT) from error
