"""Blocks side by side: definition = reference = kernel, for codes, scales and bf16, at any strides."""

import math

import pytest
import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.block_gather import (
    gather_blocks,
    gather_blocks_definition,
    gather_blocks_reference,
    gather_blocks_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, HEADS = 16, 2


def draw(seed: int, num_tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows as a cache has them, [N, H, D] over [H, capacity, D], and blocks with gaps, the last one cut off."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(-127, 128, (HEADS, num_tokens + 9, dim), generator=generator).to(dtype)
    num_blocks = -(-num_tokens // BLOCK)
    blocks = torch.stack([torch.randperm(num_blocks, generator=generator) for _ in range(HEADS)])[:, : num_blocks - 1]
    blocks[0, 1], blocks[1, 2], blocks[1, 0] = -1, -1, num_blocks - 1
    return stored[:, :num_tokens].transpose(0, 1).to(DEVICE), blocks.to(DEVICE)


@pytest.mark.parametrize(("dim", "dtype"), [(16, torch.int8), (32, torch.bfloat16), (1, torch.bfloat16)], ids=str)
def test_forms_copy_the_same_blocks(dim: int, dtype: torch.dtype, seed: int) -> None:
    rows, blocks = draw(seed, 90, dim, dtype)
    expected = gather_blocks_definition(rows, blocks, BLOCK)
    assert expected.shape == (blocks.shape[1] * BLOCK, HEADS, dim) and expected.dtype == dtype
    for form in (gather_blocks_reference, gather_blocks_triton, gather_blocks):
        found = form(rows, blocks, BLOCK)
        assert torch.equal(found, expected), form
        assert form is gather_blocks_reference or found.transpose(0, 1).is_contiguous()
    assert torch.equal(gather_blocks_triton(rows, blocks[:, :0], BLOCK), expected[:0])


def test_every_copy_is_written_and_nothing_around_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, blocks = draw(seed, 90, 16, torch.bfloat16)
    expected = gather_blocks_definition(rows, blocks, BLOCK)
    memory = torch.full((expected.numel() + 128,), math.nan, dtype=torch.bfloat16, device=DEVICE)
    monkeypatch.setattr(torch, "empty", lambda shape, **_: memory[64:-64].view(shape))
    assert torch.equal(gather_blocks_triton(rows, blocks, BLOCK), expected)
    assert memory[:64].isnan().all() and memory[-64:].isnan().all()


def test_what_does_not_fit_is_named(seed: int) -> None:
    rows, blocks = draw(seed, 90, 16, torch.int8)
    for bad_rows, bad_blocks in [
        (rows[0], blocks),
        (rows, blocks[:1]),
        (rows, blocks.int()),
        (rows.transpose(0, 2).contiguous().transpose(0, 2), blocks),
        (rows, blocks.T.contiguous().T),
    ]:
        with pytest.raises(ValueError, match=r"fit|dense"):
            gather_blocks_triton(bad_rows, bad_blocks, BLOCK)
    with pytest.raises(BackendError, match="powers of two"):
        gather_blocks_triton(rows[..., :12], blocks, BLOCK)
