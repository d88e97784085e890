"""The first layers of the built-in model in 4 bits as cards hold it, on a CPU: packed matrices with kernels, bf16."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.hub import find_model
from salalocal.checkpoint.names import expected_tensors
from salalocal.engine.load import _assign
from salalocal.kernels.int4.linear import new_workspace
from salalocal.kernels.int4.route import Math
from salalocal.model.layers import DenseLinear
from salalocal.model.sala import SalaModel
from salalocal.model.state import ModelState
from salalocal.quant import weight_layout
from salalocal.quant.int4 import PackedWeight
from salalocal.quant.linear import KernelLinear

CPU = torch.device("cpu")
NUM_LAYERS = 3


def packed_model(math: Math) -> SalaModel:
    """Two lightning layers and a sparse one; every quantized matrix a `KernelLinear`, whose plain form a CPU runs.

    Six blocks of 64 tokens may be attended to, so that a row chooses from its 385th token on.
    """
    checkpoint = Checkpoint.open(find_model("builtin"))
    layout, workspace = weight_layout(checkpoint), new_workspace(CPU, 2**20, math)
    whole = checkpoint.config
    config = replace(
        whole,
        num_hidden_layers=NUM_LAYERS,
        mixer_types=whole.mixer_types[:NUM_LAYERS],
        sparse=replace(whole.sparse, topk=4, window_size=128, dense_len=256),
    )

    def linear(name: str, in_features: int, out_features: int) -> torch.nn.Module:
        if name not in layout.matrices:
            return DenseLinear(in_features, out_features, torch.device("meta"), torch.bfloat16)
        weight = layout.read(name).to(CPU)
        assert isinstance(weight, PackedWeight)
        return KernelLinear(weight, math, workspace)

    model = SalaModel(config, linear, device="meta", dtype=torch.bfloat16)
    for name in set(layout.dense) & set(expected_tensors(config)):
        _assign(model, name, checkpoint.tensor(name).bfloat16())
    return model.eval()


def read_by_modules(model: SalaModel, ids: Sequence[int], is_int8: bool = False) -> ModelState:
    """A state that holds these tokens, with room for a few more; no interpreter runs."""
    state = model.new_state(1, len(ids) + 32, is_int8=is_int8)
    with torch.inference_mode():
        model(torch.tensor([ids]), state)
    return state


def random_ids(seed: int, count: int) -> Sequence[int]:
    return torch.randint(3, 8_000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())
