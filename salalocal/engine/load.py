"""Loading: an opened Checkpoint comes in, a SalaModel with its weights on a device goes out; for the runtime.

The model is made without memory and gets its tensors one by one. On a CPU a tensor in its stored dtype stays mapped
from the file; any other is one cast or one copy, so a load never holds more than the model and one tensor. What the
folder holds quantized stays quantized.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import EMBEDDING
from salalocal.device import device_memory
from salalocal.errors import MemoryBudgetError
from salalocal.kernels.host_memory import page_locked_empty
from salalocal.kernels.int4.route import Math
from salalocal.model.sala import SalaModel
from salalocal.quant import weight_layout
from salalocal.quant.layout import WeightLayout
from salalocal.quant.linear import DEFAULT_MATH, QuantizedLinearFactory, quantized_bytes

# Up to here a CPU computes in float32, which is several times faster there than bfloat16 for more than a few rows.
MAX_DEFAULT_FLOAT32_BYTES = 4 * 2**30


def default_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype to compute in if nobody asks for one: float32 for a small model on a CPU, else that of the
    checkpoint."""
    if device.type == "cpu" and 4 * checkpoint.config.num_parameters <= MAX_DEFAULT_FLOAT32_BYTES:
        return torch.float32
    return checkpoint.weights_dtype


@dataclass(frozen=True)
class Placement:
    """How weights are used on a card: what many rows are multiplied in, and where the embedding table lies."""

    math: Math = DEFAULT_MATH
    is_embedding_on_host: bool = False


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    placement: Placement | None = None,
) -> SalaModel:
    """A model for inference with the weights of a checkpoint, in `dtype` or the default one of the device.

    Raises: CheckpointError if the checkpoint does not hold exactly this model; MemoryBudgetError if it cannot fit.
    """
    layout = weight_layout(checkpoint)
    dtype = dtype or default_dtype(checkpoint, device)
    placement = placement or Placement()
    on_host = {EMBEDDING} if placement.is_embedding_on_host else set()
    _check_memory(checkpoint, layout, device, dtype, on_host)
    factory = QuantizedLinearFactory(layout, device, dtype, placement.math)
    model = SalaModel(checkpoint.config, factory, device="meta", dtype=dtype)
    for name in layout.dense:
        if name in on_host:
            table = page_locked_empty(checkpoint.shape(name), dtype)
            _assign(model, name, table.copy_(checkpoint.tensor(name)))
        else:
            _assign(model, name, checkpoint.tensor(name).to(device=device, dtype=dtype))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what turning matrices took would stay beside the model
    return model.eval()


def weight_bytes(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of all weights once they are loaded, mapped ones too; of quantized matrices at most so many.

    Raises: CheckpointError as `load_model`.
    """
    layout = weight_layout(checkpoint)
    dense = sum(math.prod(spec.shape) for spec in layout.dense.values()) * dtype.itemsize
    return dense + quantized_bytes(layout)


def _check_memory(
    checkpoint: Checkpoint, layout: WeightLayout, device: torch.device, dtype: torch.dtype, on_host: set[str]
) -> None:
    sizes = {name: checkpoint.dtype(name) for name in layout.dense if name not in on_host}
    if device.type == "cpu":
        sizes = {name: stored for name, stored in sizes.items() if stored != dtype}  # the others stay in the file
    needed = sum(math.prod(checkpoint.shape(name)) for name in sizes) * dtype.itemsize
    needed += quantized_bytes(layout)
    free = device_memory(device).free_bytes
    if needed > free:
        raise MemoryBudgetError(
            f"the weights in {str(dtype).removeprefix('torch.')} need {needed / 2**30:.2f} GiB on {device}, "
            f"{free / 2**30:.2f} GiB are free",
            "close other programs that use this memory, or choose another dtype or device",
        )


def _assign(model: SalaModel, name: str, weight: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
