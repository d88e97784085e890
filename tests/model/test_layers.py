"""The modules every layer is built from: they compute what the kernels say and ask for linears by full name."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from salalocal.kernels.norm import rms_norm
from salalocal.model.layers import DenseLinear, DenseLinearFactory, Mlp, RMSNorm


@pytest.mark.parametrize("num_tokens", (1, 17, 64))
def test_mlp_is_the_formula(num_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mlp = Mlp("m", 6, 10, DenseLinearFactory("cpu", torch.float64))
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, generator=generator)
    x = torch.randn(2, num_tokens, 6, generator=generator, dtype=torch.float64)
    weights = {name: parameter.detach() for name, parameter in mlp.named_parameters()}
    hidden = functional.silu(x @ weights["gate_proj.weight"].T) * (x @ weights["up_proj.weight"].T)
    torch.testing.assert_close(mlp(x).detach(), hidden @ weights["down_proj.weight"].T, rtol=1e-12, atol=1e-12)


def test_rms_norm_uses_the_weight_as_stored(seed: int) -> None:
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed))
    norm = RMSNorm(8, 1e-3, dtype=torch.float32)
    nn.init.constant_(norm.weight, 0.5)
    assert torch.equal(norm(x), rms_norm(x, norm.weight, 1e-3))


def test_dense_linear_has_no_bias_and_stands_on_the_device_asked_for() -> None:
    linear = DenseLinear(4, 6, device="meta", dtype=torch.bfloat16)
    assert [name for name, _ in linear.named_parameters()] == ["weight"]
    assert linear.weight.shape == (6, 4) and linear.weight.is_meta and linear.weight.dtype == torch.bfloat16


def test_linears_are_asked_for_by_full_name_and_size() -> None:
    asked = []

    def factory(name: str, in_features: int, out_features: int) -> nn.Module:
        asked.append((name, in_features, out_features))
        return nn.Identity()

    Mlp("model.layers.3.mlp", 6, 10, factory)
    assert asked == [
        ("model.layers.3.mlp.gate_proj", 6, 10),
        ("model.layers.3.mlp.up_proj", 6, 10),
        ("model.layers.3.mlp.down_proj", 10, 6),
    ]
