"""A SALA model with random 4-bit weights, made on its device in seconds: a shape comes in, an Engine goes out; for
measuring speed where no checkpoint is at hand.

Every linear map of the layers is int4 in groups of 128, as `quantize` writes it; the output matrix is int8, the
embedding bf16. Scales keep the variance of what passes through, so that no number overflows.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import nn

from salalocal.checkpoint.names import EMBEDDING, HEAD, Shape, TensorSpec, expected_tensors
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.load import Placement
from salalocal.kernels.host_memory import page_locked_empty
from salalocal.model.config import SalaConfig
from salalocal.model.sala import SalaModel
from salalocal.quant.format import StoredMatrix
from salalocal.quant.int4 import IntScheme, PackedWeight
from salalocal.quant.layout import WeightLayout
from salalocal.quant.linear import QuantizedLinearFactory
from salalocal.quant.stored import LoadedWeight

GROUP_SIZE = 128
LAYER_BITS, HEAD_BITS = 4, 8

_EMBEDDING_STD = 0.1


@dataclass(frozen=True)
class RandomFormat:
    """The weight format of a folder that is not there: any matrix can be read, and is drawn anew."""

    device: torch.device
    shapes: dict[str, Shape]

    def find(self, module: str, shape: Shape) -> StoredMatrix | None:
        """How a linear map would be stored; None where its features do not fill groups."""
        bits = HEAD_BITS if f"{module}.weight" == HEAD else LAYER_BITS
        return None if shape[1] % GROUP_SIZE else StoredMatrix(shape, IntScheme(bits, GROUP_SIZE), {})

    def read(self, module: str) -> LoadedWeight:
        """Random codes, and scales that make every row of unit length."""
        num_out, num_in = self.shapes[module]
        found = self.find(module, (num_out, num_in))
        if found is None or not isinstance(found.scheme, IntScheme):
            raise KeyError(module)
        bits = found.scheme.bits
        with torch.device(self.device):
            words = torch.randint(-(2**31), 2**31 - 1, (num_out, num_in * bits // 32), dtype=torch.int32)
            spread = sqrt((4**bits - 1) / 12)  # of codes that are all equally likely
            scales = torch.full((num_out, num_in // GROUP_SIZE), 1 / (spread * sqrt(num_in)), dtype=torch.bfloat16)
        return PackedWeight(words, scales, bits, GROUP_SIZE)


def random_layout(config: SalaConfig, device: torch.device) -> WeightLayout:
    """What such a folder would hold."""
    shapes = expected_tensors(config)
    linear: dict[str, Shape] = {
        name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2
    }
    weight_format = RandomFormat(device, linear)
    found = {
        module: weight_format.find(module, shape) for module, shape in linear.items() if f"{module}.weight" != EMBEDDING
    }
    matrices = {module: matrix for module, matrix in found.items() if matrix is not None}
    dense = {name: TensorSpec(shape) for name, shape in shapes.items() if name.removesuffix(".weight") not in matrices}
    return WeightLayout(dense, matrices, weight_format)


def random_dtype(device: torch.device) -> torch.dtype:
    """What a model with random weights computes in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_engine(
    config: SalaConfig, layout: WeightLayout, device: torch.device, placement: Placement, engine_config: EngineConfig
) -> Engine:
    """A model of this shape on the device, placed as `load_model` does."""
    dtype = random_dtype(device)
    torch.manual_seed(0)
    factory = QuantizedLinearFactory(layout, device, dtype, placement.math)
    model = SalaModel(config, factory, device="meta", dtype=dtype)
    for name, spec in layout.dense.items():
        is_on_host = name == EMBEDDING and placement.is_embedding_on_host
        weight = torch.ones(spec.shape, device="cpu" if is_on_host else device, dtype=dtype)
        if len(spec.shape) == 2:
            weight.normal_(0.0, _EMBEDDING_STD if name == EMBEDDING else spec.shape[1] ** -0.5)
        module_name, _, leaf = name.rpartition(".")
        placed = page_locked_empty(weight.shape, dtype).copy_(weight) if is_on_host else weight
        setattr(model.get_submodule(module_name), leaf, nn.Parameter(placed, requires_grad=False))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # as `load_model`
    return Engine(model.eval(), engine_config)
