"""The built-in model in 4 bits on a CUDA device through the kernels, against the plain reference on the CPU."""

import pytest
import torch

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.hub import find_model
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.load import load_model
from salalocal.kernels.int4.linear import new_workspace
from salalocal.kernels.int4.route import Math
from salalocal.model.sala import SalaModel
from salalocal.quant.linear import KernelLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


def quantized_model(device: str, dtype: torch.dtype) -> SalaModel:
    return load_model(Checkpoint.open(find_model("builtin")), torch.device(device), dtype)


def set_math(model: SalaModel, math: Math) -> None:
    for module in model.modules():
        if isinstance(module, KernelLinear):
            module.math, module.workspace = math, new_workspace(CUDA, 2**20, math)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double().cpu() - expected.double()).norm() / expected.double().norm())


# Rounding activations to bf16 alone moves the logits of random tokens by up to 8 % (test_cuda.py); int8 activations
# may add as much again. 700 tokens in chunks of 512 and 188 take the route, chunks of 12 the kernel for few rows.
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("math", "bound"), [("bf16", 8e-2), ("int8", 1.6e-1)])
@pytest.mark.parametrize(("num_tokens", "chunk_size"), [(700, 512), (48, 12)])
def test_logits_are_those_of_the_reference(
    seed: int, math: Math, bound: float, num_tokens: int, chunk_size: int
) -> None:
    ids = torch.randint(3, 8_000, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    expected = Engine(quantized_model("cpu", torch.float32), EngineConfig(chunk_size)).logits(ids)
    model = quantized_model("cuda", torch.bfloat16)
    set_math(model, math)
    error = relative_error(Engine(model, EngineConfig(chunk_size)).logits(ids), expected)
    print(f"{math}, chunks of {chunk_size}: relative error {error:.2e}")
    assert error < bound


def test_every_quantized_matrix_has_a_kernel_and_lies_there_once() -> None:
    model = quantized_model("cuda", torch.bfloat16)
    linears = [module for module in model.modules() if isinstance(module, KernelLinear)]
    assert len(linears) >= 7 * 10 and len({id(linear.workspace) for linear in linears}) == 1
    words = sum(linear.words.nbytes for linear in linears)
    assert sum(buffer.nbytes for linear in linears for buffer in linear.buffers()) < 1.2 * words


def test_the_reference_is_taken_where_the_variable_says_so(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = next(one for one in quantized_model("cuda", torch.bfloat16).modules() if isinstance(one, KernelLinear))
    x = torch.randn(3, linear.words.shape[1] * 32 // linear.bits, device=CUDA).bfloat16()
    by_kernel = linear(x)
    monkeypatch.setattr("salalocal.quant.linear.use_triton", lambda *_: False)
    by_reference = linear(x)
    assert relative_error(by_kernel, by_reference.cpu()) < 1e-2
