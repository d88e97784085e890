"""Codebook weights on a CUDA device: the bytes of the CPU, and products no worse than torch's own in the same dtype."""

import pytest
import torch
from torch.nn import functional

from salalocal.kernels.codebook_matmul import codebook_matmul_bitsandbytes
from salalocal.quant.codebook import CodebookLinear, CodebookScheme, round_to_codebook

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 80)], ids=str)
def test_rounding_gives_the_bytes_of_the_cpu(seed: int, kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    on_cpu, on_card = (
        round_to_codebook(weight.to(device), CodebookScheme(kind), torch.bfloat16) for device in ("cpu", CUDA)
    )
    assert torch.equal(on_card.codes.cpu(), on_cpu.codes) and torch.equal(on_card.absmax.cpu(), on_cpu.absmax)
    assert torch.equal(on_card.dequantize().cpu(), on_cpu.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 513])
@pytest.mark.parametrize("shape", [(4096, 16384), (1000, 80)], ids=str)
def test_products_are_no_worse_than_those_of_a_dense_map(
    seed: int, dtype: torch.dtype, rows: int, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = round_to_codebook(torch.randn(shape, generator=generator), CodebookScheme("nf4"), dtype).to(CUDA)
    x = torch.randn(rows, shape[1], generator=generator).to(CUDA, dtype)
    exact = functional.linear(x.double(), weight.dequantize().double())
    ours = CodebookLinear(weight)(x).double()
    dense = functional.linear(x, weight.dequantize(dtype)).double()
    assert float((ours - exact).norm()) <= 2 * float((dense - exact).norm()) + 1e-6 * float(exact.norm())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 64, 2_000])
def test_the_kernels_of_bitsandbytes_read_our_bytes(seed: int, kind: str, dtype: torch.dtype, rows: int) -> None:
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(seed)
    weight = round_to_codebook(torch.randn(1_536, 1_024, generator=generator), CodebookScheme(kind), dtype).to(CUDA)
    x = torch.randn(2, rows, 2_048, generator=generator).to(CUDA, dtype)[..., ::2]
    exact = functional.linear(x.double(), weight.dequantize().double())
    made = codebook_matmul_bitsandbytes(x, weight.codes, weight.absmax, weight.scheme.block_size, kind)
    assert made.shape == exact.shape and made.dtype == dtype
    dense = functional.linear(x, weight.dequantize(dtype)).double()
    assert float((made.double() - exact).norm()) <= 2 * float((dense - exact).norm())
