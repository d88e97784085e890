"""What kernels over tiles of heads refuse, by name."""

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels.head_tiles import check_head_tiles, fits_shared_memory


def test_what_the_kernels_take_passes() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q = torch.zeros(2, 3, 16, dtype=dtype)
        check_head_tiles("attention", {"q": q, "k": q[:, ::2]}, {"head size": 16, "heads": 1, "block": 256})
        assert fits_shared_memory(q) == (dtype != torch.float32)


@pytest.mark.parametrize(
    ("q", "size", "message"),
    [
        (torch.zeros(4, 8, dtype=torch.float64), 8, "attention of torch.float64: one of bf16, fp16, fp32"),
        (torch.zeros(8, 4).t(), 8, "last axis of k must be dense"),
        (torch.zeros(4, 8), 48, "head size is 48"),
        (torch.zeros(4, 8), 512, "head size is 512"),
    ],
    ids=["dtype", "strides", "no power", "too large"],
)
def test_what_they_do_not_take_is_named(q: torch.Tensor, size: int, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        check_head_tiles("attention", {"q": q.contiguous(), "k": q}, {"head size": size})
