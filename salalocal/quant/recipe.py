"""What is done to which tensor: a model's shape and the options come in, steps with schemes go out; for the quantizer.

A step is what is read, quantized and stored at once: the embedding, every layer, and what comes after them.
"""

import math
from dataclasses import dataclass
from typing import Any

from salalocal.checkpoint.names import EMBEDDING, Shape, expected_tensors
from salalocal.errors import RequestError
from salalocal.model.config import SPARSE, SalaConfig
from salalocal.quant.calibration import INPUT_OF
from salalocal.quant.gptq import DEFAULT_DAMPING
from salalocal.quant.int4 import IntScheme

RTN, GPTQ = "rtn", "gptq"
METHODS = (RTN, GPTQ)
BITS = (4, 8)
GROUP_SIZES = (8, 16, 32, 64, 128)

_SENSITIVE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize. Units: group_size in input features that share a scale.

    `sensitive_bits` are those of q, k and v of the sparse layers, which choose blocks. `damping` is what GPTQ adds to
    the diagonal of the moments, as a fraction of its mean. Raises: RequestError.
    """

    method: str = RTN
    bits: int = 4
    group_size: int = 128
    sensitive_bits: int = 4
    damping: float = DEFAULT_DAMPING

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("bits", self.bits, BITS),
            ("sensitive bits", self.sensitive_bits, BITS),
            ("group size", self.group_size, GROUP_SIZES),
        ):
            if value not in known:
                raise RequestError(f"{name} {value!r} is not known", f"choose from {', '.join(map(str, known))}")
        if not 0 < self.damping <= 1:
            raise RequestError(f"damping {self.damping} is not above 0 and at most 1", "0.01 is usual")


@dataclass(frozen=True)
class Step:
    """One step: its tensors with their shapes; for those that are linear maps of a layer, the scheme.

    `layer` is None for the first and the last step.
    """

    name: str
    layer: int | None
    shapes: dict[str, Shape]
    schemes: dict[str, IntScheme]

    @property
    def num_quantized(self) -> int:
        """How many weights are quantized in it; its time goes by them."""
        return sum(math.prod(self.shapes[name]) for name in self.schemes)

    @property
    def result_bytes(self) -> int:
        """Bytes of the tensors that come of it."""
        return sum(_stored_bytes(shape, self.schemes.get(name)) for name, shape in self.shapes.items())


def make_steps(config: SalaConfig, options: QuantizeOptions) -> list[Step]:
    """All steps in their order. Raises: RequestError naming a matrix that the groups do not fit."""
    shapes = expected_tensors(config)
    outside = {name: shape for name, shape in shapes.items() if not name.startswith("model.layers.")}
    steps = [Step("embedding", None, {EMBEDDING: outside.pop(EMBEDDING)}, {})]
    for layer, mixer in enumerate(config.mixer_types):
        prefix = f"model.layers.{layer}."
        held = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        schemes = {}
        for name, shape in held.items():
            module = name.removeprefix(prefix).removesuffix(".weight")
            if module in INPUT_OF:
                is_sensitive = mixer == SPARSE and module in _SENSITIVE
                scheme = IntScheme(options.sensitive_bits if is_sensitive else options.bits, options.group_size)
                _check_fit(name, shape, scheme)
                schemes[name] = scheme
        steps.append(Step(f"layer {layer}", layer, held, schemes))
    return [*steps, Step("head", None, outside, {})]


def gptq_record(config: SalaConfig, options: QuantizeOptions) -> dict[str, Any]:
    """The `quantization_config` of the result, as GPTQ readers know it.

    Maps that differ from the rest stand under `dynamic`, by layer, with the name under which engines fuse them.
    """
    record: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    if options.sensitive_bits != options.bits:
        layers = [layer for layer, mixer in enumerate(config.mixer_types) if mixer == SPARSE]
        pattern = r"+:^model\.layers\.{}\.self_attn\.(?:q|k|v|qkv)_proj$"
        record["dynamic"] = {pattern.format(layer): {"bits": options.sensitive_bits} for layer in layers}
    return record


def _check_fit(name: str, shape: Shape, scheme: IntScheme) -> None:
    num_out, num_in = shape
    if num_in % scheme.group_size or not scheme.can_pack(num_out, num_in):
        fitting = [size for size in GROUP_SIZES if num_in % size == 0]
        raise RequestError(
            f"{name} is [{num_out}, {num_in}]: groups of {scheme.group_size} do not fit",
            f"--group-size {fitting[-1]}" if fitting else "a model of such sizes cannot be quantized",
        )


def _stored_bytes(shape: Shape, scheme: IntScheme | None) -> int:
    if scheme is None:
        return 2 * math.prod(shape)
    num_out, num_in = shape
    num_groups = scheme.num_groups(num_in)
    words = num_out * (num_in + num_groups) * scheme.bits // 8  # codes and zero points
    return words + 2 * num_out * num_groups + 4 * num_in  # scales and the group of every column
