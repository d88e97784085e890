"""Page-locked memory: what is locked is what was asked for, and it is unlocked when the last view is gone."""

import gc
from types import SimpleNamespace

import pytest
import torch

from salalocal.errors import MemoryBudgetError
from salalocal.kernels import host_memory
from salalocal.kernels.host_memory import page_locked_empty


class FakeRuntime(SimpleNamespace):
    """The calls of the CUDA runtime that are made, where there is none."""

    def __init__(self, code: int = 0) -> None:
        super().__init__(code=code, locked={}, cudaError=int)

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if self.code == 0:
            self.locked[address] = (num_bytes, flags)
        return self.code

    def cudaHostUnregister(self, address: int) -> None:
        del self.locked[address]

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_pages_are_locked_as_long_as_anybody_looks_at_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    made = page_locked_empty((1, 2, 1000, 16), dtype)
    assert made.shape == (1, 2, 1000, 16) and made.dtype == dtype and made.is_contiguous()
    assert runtime.locked == {made.data_ptr(): (made.nbytes, 1)}
    made[:, 1] = 7
    view = made[0, 1, 5:9]
    del made
    gc.collect()
    assert len(runtime.locked) == 1 and bool((view == 7).all())
    del view
    gc.collect()
    assert runtime.locked == {}


def test_what_cannot_be_locked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeRuntime(2))
    with pytest.raises(MemoryBudgetError, match=r"0\.00 GiB of host memory cannot be locked for the card: error 2"):
        page_locked_empty((64, 64), torch.bfloat16)

    def full(file: int, length: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(host_memory.mmap, "mmap", full)
    with pytest.raises(MemoryBudgetError, match=r"8\.00 GiB .* Cannot allocate memory"):
        page_locked_empty((2**33,), torch.int8)


def test_nothing_needs_no_card() -> None:
    assert page_locked_empty((1, 2, 0, 16), torch.int8).shape == (1, 2, 0, 16)
    host_memory.wait_for_card()
