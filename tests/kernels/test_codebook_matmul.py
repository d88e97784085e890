"""Multiplying with entries of a codebook: reference = definition, in every dtype, whatever the blocks run over."""

import pytest
import torch
from torch.nn import functional

from salalocal.kernels import codebook_matmul as module
from salalocal.kernels.codebook_matmul import (
    codebook_matmul,
    codebook_matmul_bitsandbytes,
    codebook_matmul_definition,
    codebook_matmul_reference,
    dequantize_codes,
    pack_pairs,
    pair_table,
    row_multiple,
    unpack_pairs,
)
from salalocal.quant.codebook import CodebookScheme, round_to_codebook

TOLERANCE = {torch.float64: 3e-7, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(72, 256), (37, 52), (5, 6), (64, 32), (3, 50)]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def random_parts(
    shape: tuple[int, int], block_size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, maxima, codebook, and the matrix that they mean in float64, weight by weight."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1]
    codes = torch.randint(0, 16, (count,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-count // block_size), generator=generator) + 0.5
    codebook = torch.randn(16, generator=generator)
    flat = [codebook.double()[int(code)] * absmax.double()[i // block_size] for i, code in enumerate(codes)]
    return pack_pairs(codes), absmax, codebook, torch.stack(flat).view(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [(1,), (2, 3)])
def test_the_reference_is_the_definition(
    seed: int,
    shape: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    rows: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes, absmax, codebook, weight = random_parts(shape, block_size, seed)
    x = torch.randn(*rows, shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    exact = functional.linear(x.double(), weight)
    assert relative_error(codebook_matmul_definition(x.double(), codes, absmax, codebook, block_size), exact) < 1e-13
    monkeypatch.setattr(module, "TILE_WEIGHTS", 20 * shape[1])  # tiles of several rows, the last of them shorter
    for multiply in (codebook_matmul_reference, codebook_matmul):
        y = multiply(x, codes, absmax, codebook, block_size)
        assert y.dtype == dtype and y.shape == (*rows, shape[0])
        assert relative_error(y, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_reads_the_same_bytes(seed: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its form for CPUs stands for that of a card, which has no test without one."""
    weight = round_to_codebook(torch.randn(48, 128, generator=torch.Generator().manual_seed(seed)),
                               CodebookScheme(kind), torch.bfloat16)  # fmt: skip
    parts = (weight.codes, weight.absmax, weight.codebook, 64, kind)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()[..., ::2]
    exact = functional.linear(x.double(), weight.dequantize().double())
    asked: list[str] = []

    def by_bitsandbytes(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, size: int, kind: str):  # type: ignore[no-untyped-def]
        asked.append(kind)
        return codebook_matmul_bitsandbytes(x, codes, absmax, size, kind)

    monkeypatch.setattr(module, "codebook_matmul_bitsandbytes", by_bitsandbytes)
    assert relative_error(codebook_matmul(x, *parts), exact) < 4e-3 and not asked
    monkeypatch.setattr(module, "use_triton", lambda *_: True)
    assert relative_error(codebook_matmul(x, *parts), exact) < 8e-3 and asked == [kind]
    codebook_matmul(x.float(), *parts)
    codebook_matmul(x[..., :32], *parts)
    monkeypatch.setattr(module, "_has_bitsandbytes", lambda: False)
    codebook_matmul(x, *parts)
    assert asked == [kind]


def test_dequantized_codes_are_products_in_float32(seed: int) -> None:
    codes, absmax, codebook, _ = random_parts((37, 52), 64, seed)
    flat = dequantize_codes(codes, absmax, pair_table(codebook), 64)
    per_weight = absmax.repeat_interleave(64)[: len(flat)]
    assert torch.equal(flat, codebook[unpack_pairs(codes).long()] * per_weight)


def test_the_first_code_of_a_byte_is_in_its_upper_half() -> None:
    codes = torch.tensor([1, 2, 15, 0], dtype=torch.uint8)
    assert pack_pairs(codes).tolist() == [0x12, 0xF0]
    assert unpack_pairs(pack_pairs(codes)).tolist() == codes.tolist()


@pytest.mark.parametrize(("num_in", "rows"), [(64, 1), (4096, 1), (32, 2), (48, 4), (52, 16), (2, 32)])
def test_so_many_rows_hold_whole_blocks(num_in: int, rows: int) -> None:
    assert row_multiple(num_in, 64) == rows and rows * num_in % 64 == 0
