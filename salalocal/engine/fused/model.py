"""A model taken over for a GPU: token ids and a state in, hidden states out, a chunk at a time; for Engine."""

import torch
from torch import Tensor

from salalocal.engine.fused.head import Head
from salalocal.engine.fused.layers import FusedLightning, FusedMlp, FusedSparse, Place
from salalocal.engine.fused.projection import can_take
from salalocal.errors import StateError
from salalocal.kernels.backend import KERNELS_VARIABLE, OLDEST_CAPABILITY, compute_capability, use_triton
from salalocal.kernels.embedding import embed
from salalocal.kernels.norm import rms_norm
from salalocal.model.mixers.lightning import LightningMixer
from salalocal.model.mixers.sparse import SparseMixer
from salalocal.model.sala import SalaBlock, SalaModel
from salalocal.model.state import ModelState


class FusedModel:
    """The layers of a `SalaModel`, whose weights it shares."""

    def __init__(self, model: SalaModel) -> None:
        self.model = model
        self._config_digest = model.config.digest
        self.head = Head(model)
        self.layers = [_fused(model, block) for block in model.model.layers if isinstance(block, SalaBlock)]

    def __call__(self, tokens: Tensor, state: ModelState) -> Tensor:
        """As `SalaModel.forward`, for one sequence. Shapes: tokens [1, T] int64 -> hidden [1, T, hidden]."""
        if state.config_digest != self._config_digest:
            raise StateError("the state was made by another model")
        state.check_whole()
        first = state.num_tokens
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        place = Place(positions, first)
        hidden = self.embedded(tokens[0])
        for (mixer, mlp), layer_state in zip(self.layers, state.layers, strict=True):
            hidden = mlp(mixer.read(hidden, layer_state, place))
        state.num_tokens += tokens.shape[1]
        return self.normed(hidden)[None]

    def embedded(self, tokens: Tensor) -> Tensor:
        """The first hidden states. Shapes: tokens int64 [T] -> [T, hidden]."""
        return embed(self.model.model.embed_tokens.weight, tokens, self.model.config.scale_emb)

    def normed(self, hidden: Tensor) -> Tensor:
        """The last norm."""
        norm = self.model.model.norm
        return rms_norm(hidden, norm.weight, norm.eps)


def why_not_fused(model: SalaModel) -> str:
    """Why a model runs module by module instead, in words; empty if it need not."""
    config = model.config
    if model.device.type != "cuda":
        return "it is not on a CUDA device"
    if not use_triton(model.model.norm.weight):
        return f"Triton is not installed, or {KERNELS_VARIABLE} turns kernels off"
    if compute_capability(model.device) < OLDEST_CAPABILITY:
        return f"the card is older than compute capability {OLDEST_CAPABILITY / 10}"
    if model.dtype != torch.bfloat16:
        return f"it computes in {str(model.dtype).removeprefix('torch.')}, the kernels in bfloat16"
    if config.lightning.num_key_value_heads != config.lightning.num_heads:
        return "its lightning layers share keys between heads"
    for name, module in model.model.layers.named_modules():
        is_linear = name.endswith(("_proj", "o_gate"))
        if is_linear and not can_take(module):
            return f"layers.{name} is {type(module).__name__}"
    return ""


def _fused(model: SalaModel, block: SalaBlock) -> tuple[FusedSparse | FusedLightning, FusedMlp]:
    mixer = block.self_attn
    config = model.config
    mlp = FusedMlp(config, block.mlp, block.post_attention_layernorm)
    if isinstance(mixer, SparseMixer):
        return FusedSparse(config, mixer, block.input_layernorm), mlp
    assert isinstance(mixer, LightningMixer)
    return FusedLightning(config, mixer, block.input_layernorm), mlp
