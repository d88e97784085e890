"""The whole model on a CUDA device against the CPU: the same logits, in float32 and in bfloat16, dense and picked rows.

Run on a machine with a card: `make test-gpu`.
"""

import pytest
import torch

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.hub import find_model
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.load import load_model
from salalocal.engine.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_TOKENS = 6_000  # the built-in model picks blocks from row 4,095 on


def engine(device: str, dtype: torch.dtype) -> Engine:
    checkpoint = Checkpoint.open(find_model("builtin:bf16"))
    return Engine(load_model(checkpoint, torch.device(device), dtype), EngineConfig(512))


@pytest.fixture
def ids(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 8_000, (NUM_TOKENS,), generator=generator)


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-3), (torch.bfloat16, 8e-2)], ids=["fp32", "bf16"])
def test_logits_are_those_of_the_cpu(ids: torch.Tensor, dtype: torch.dtype, bound: float) -> None:
    # Random tokens make near ties between blocks common; a flipped choice moves a row, hence the norm over all rows.
    torch.backends.cuda.matmul.allow_tf32 = False
    error = relative_error(engine("cuda", dtype).logits(ids), engine("cpu", torch.float32).logits(ids))
    print(f"relative error {error:.2e}")
    assert error < bound


def test_chunks_and_forks_agree_on_the_device(ids: torch.Tensor) -> None:
    runs = []
    for chunk_size in (512, 100):
        runner = engine("cuda", torch.float32)
        runner.config = EngineConfig(chunk_size)
        state = runner.new_state()
        logits = runner.prefill(ids, state)
        assert logits is not None
        before = state.fork()
        first = list(runner.generate(state, logits, SamplingParams(max_tokens=20)))
        again = list(runner.generate(before, logits, SamplingParams(max_tokens=20)))
        assert first == again
        runs.append(logits)
    assert relative_error(runs[1], runs[0]) < 2e-3
