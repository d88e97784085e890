"""A comparison of two models on a CUDA device finds what it finds on a CPU."""

import checkpoint_cases
import pytest
import torch

from salalocal.engine.engine import Engine, EngineConfig
from salalocal.evals.divergence import Divergence, compare, read_reference
from salalocal.model.sala import SalaModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def found_on(device: str, seed: int) -> Divergence:
    config = checkpoint_cases.small_config()
    engines = []
    for number in range(2):
        model = SalaModel(config, device=device, dtype=torch.float32)
        model.load_state_dict(checkpoint_cases.random_tensors(config, seed + number))
        engines.append(Engine(model, EngineConfig(64)))
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in (300, 90)]
    return compare(read_reference(engines[0], texts), engines[1])


def test_figures_are_those_of_a_cpu(seed: int) -> None:
    here, there = found_on("cpu", seed), found_on("cuda", seed)
    assert there.num_tokens == here.num_tokens
    assert there.top1_agreement == pytest.approx(here.top1_agreement, abs=3 / here.num_tokens)
    for name in ("perplexity_original", "perplexity_quantized", "kl_mean_nats", "kl_p99_nats"):
        assert getattr(there, name) == pytest.approx(getattr(here, name), rel=1e-2), name
