"""Heavy-tailed random matrices under every method: a seed comes in, relative output errors go out; for
`quantization_study`.

Weights are Student-t with four degrees of freedom. Inputs are correlated, of a falling spectrum, heavy-tailed, and one
channel in two hundred is an outlier, twenty times as large: what large models show at o_proj and down_proj.
Half of the inputs calibrate, the other half measures.
"""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.study_variants import (
    DOWN,
    InputMoments,
    Variant,
    hadamard_basis,
    output_error,
    quantize_maps,
    simulate_int8,
)  # fmt: skip

NUM_OUT, NUM_IN, NUM_TOKENS = 256, 1024, 8192
OUTLIER_SHARE, OUTLIER_SIZE = 0.005, 20.0

_GPTQ = Variant("GPTQ")
_METHODS = (
    Variant("RTN", "rtn"),
    Variant("RTN, activation-aware", "rtn", is_activation_aware=True),
    Variant("RTN, rotated", "rtn", rotated=(DOWN,)),
    Variant("NF4", "nf4"),
    Variant("FP4", "fp4"),
    _GPTQ,
    replace(_GPTQ, name="GPTQ, activation-aware", is_activation_aware=True),
    replace(_GPTQ, name="GPTQ, rotated", rotated=(DOWN,)),
    replace(_GPTQ, name="GPTQ, scale search weighted by feedback", scale_search="feedback"),
    replace(_GPTQ, name="GPTQ, four sweeps", num_sweeps=4),
    replace(_GPTQ, name="GPTQ, groups of 32", group_size=32),
    replace(_GPTQ, name="GPTQ, 8 bits", bits=8),
)


@torch.no_grad()
def matrix_rows(seed: int) -> dict[str, dict[str, float]]:
    """Relative output errors by kind of inputs and method: of 4-bit weights, then of int8 inputs alone."""
    rows = {}
    for title, outlier_size in (("inputs with outlier channels", OUTLIER_SIZE), ("inputs without", 1.0)):
        weight, inputs = random_map(seed, outlier_size)
        known, held_out = inputs[::2], inputs[1::2]
        moments, measured = (x.t().double() @ x.double() / len(x) for x in (known, held_out))
        whole = output_error(weight, torch.zeros_like(weight), measured)
        errors = {}
        for variant in _METHODS:
            left = quantize_maps(variant, DOWN, {"map": weight}, InputMoments(moments), is_sparse=False)["map"]
            errors[variant.name] = (output_error(weight, left, measured) / whole) ** 0.5
        rows[title] = errors | int8_errors(weight, held_out)
    return rows


def random_map(seed: int, outlier_size: float, num_in: int = NUM_IN) -> tuple[Tensor, Tensor]:
    """Shapes: weight [out, in], inputs [T, in] float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = 0.02 * normal(NUM_OUT, num_in) / normal(4, NUM_OUT, num_in).square().mean(0).sqrt()
    spectrum = torch.arange(1, num_in + 1).float() ** -0.5
    mix = torch.linalg.qr(normal(num_in, num_in)).Q
    inputs = (normal(NUM_TOKENS, num_in) * spectrum) @ mix
    inputs *= 1 / normal(5, NUM_TOKENS, num_in).square().mean(0).sqrt()
    outliers = torch.randperm(num_in, generator=generator)[: int(OUTLIER_SHARE * num_in)]
    inputs[:, outliers] *= outlier_size
    return weight, inputs


def int8_errors(weight: Tensor, inputs: Tensor) -> dict[str, float]:
    """Relative output errors of int8 inputs, weights as they are."""
    rotation = hadamard_basis(weight.shape[1]).into.float()
    wanted = inputs @ weight.t()
    simulated = {
        "int8 inputs by token": simulate_int8(inputs, None),
        "int8 inputs by group of 128": simulate_int8(inputs, 128),
        "int8 inputs by token, rotated": simulate_int8(inputs @ rotation, None) @ rotation.t(),
    }
    return {name: float((x @ weight.t() - wanted).norm() / wanted.norm()) for name, x in simulated.items()}
