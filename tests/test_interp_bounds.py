"""The memory check of interpreted kernels finds what it is for."""

import pytest
import torch
from triton.runtime.errors import InterpreterError

from salalocal.kernels.backend import tl, triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the card, not in the interpreter")


@triton.jit
def _copy_kernel(source_ptr, target_ptr, num_loaded, num_stored, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    loaded = tl.load(source_ptr + at, mask=at < num_loaded, other=0.0)
    tl.store(target_ptr + at, loaded, mask=at < num_stored)


def copy(num_loaded: int, num_stored: int) -> torch.Tensor:
    """Copies ones between the middles of larger memory."""
    source, target = torch.ones(100)[10:40], torch.zeros(100)[10:40]
    _copy_kernel[(1,)](source, target, num_loaded, num_stored, BLOCK=32)
    return target


def test_accesses_inside_pass() -> None:
    assert copy(30, 30).tolist() == [1] * 30


@pytest.mark.parametrize(("num_loaded", "num_stored", "name"), [(31, 30, "load"), (30, 31, "store")])
def test_an_access_behind_the_end_is_refused(num_loaded: int, num_stored: int, name: str) -> None:
    with pytest.raises(InterpreterError, match=f"{name}: 1 of 31 addresses lie in no argument"):
        copy(num_loaded, num_stored)
