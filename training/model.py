"""The embedded model for training: the runtime's function over whole batches, with what only training needs.

In: ids [B, T]. Out: hidden states [B, T, D] and the auxiliary losses of the sparse layers. Parameter names are the
checkpoint's. For: training/train.py, training/score.py, training/export.py.

Training only: the state cut (a row at or after `cut` sees no Lightning state from before it), and the two auxiliary
losses of training/selection.py. Without them the function is the one that salalocal.model.SalaModel computes.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.addresses import AddressRows
from training.selection import Geometry, SupervisedRows, auxiliary_losses, sparse_attention

LIGHTNING, SPARSE = "lightning-attn", "minicpm4"
CHUNK = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of the embedded model."""

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 640
    mixer_types: tuple[str, ...] = (LIGHTNING, LIGHTNING, SPARSE) * 3 + (LIGHTNING,)
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    lightning_heads: int = 8
    lightning_head_dim: int = 32
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    dense_len: int = 4096
    geometry: Geometry = field(default_factory=Geometry)

    def to_hf(self) -> dict[str, object]:
        """The config.json of this shape, with the keys of the released model."""
        sparse = {**asdict(self.geometry), "dense_len": self.dense_len, "use_nope": False}
        return {
            "architectures": ["MiniCPMSALAForCausalLM"],
            "model_type": "minicpm_sala",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": len(self.mixer_types),
            "mixer_types": list(self.mixer_types),
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "lightning_nh": self.lightning_heads,
            "lightning_nkv": self.lightning_heads,
            "lightning_head_dim": self.lightning_head_dim,
            "lightning_scale": "1/sqrt(d)",
            "lightning_use_rope": True,
            "attn_use_rope": False,
            "qk_norm": True,
            "use_output_norm": True,
            "use_output_gate": True,
            "attn_use_output_gate": True,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": 524288,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "scale_emb": self.scale_emb,
            "scale_depth": self.scale_depth,
            "dim_model_base": self.hidden_size,
            "mup_denominator": 32,
            "initializer_range": 0.1,
            "bos_token_id": 1,
            "eos_token_id": [2, self.vocab_size - 8],
            "pad_token_id": 2,
            "pretraining_tp": 1,
            "shift_labels": True,
            "use_cache": True,
            "dtype": "bfloat16",
            "sparse_config": sparse,
        }


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, mean square in fp32."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y.to(x.dtype) * weight).to(x.dtype)


def rotary(x: Tensor, theta: float) -> Tensor:
    """Half-rotation of x [B, T, H, D] by its position."""
    length, size = x.shape[1], x.shape[-1]
    frequency = theta ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(length, device=x.device, dtype=torch.float32), frequency)[None, :, None]
    first, second = x.float().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def slopes(num_heads: int, device: torch.device) -> Tensor:
    """Decay rates of the heads (a power of two of them)."""
    return 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, device=device, dtype=torch.float32) / num_heads)


def lightning(q: Tensor, k: Tensor, v: Tensor, cut: Tensor) -> Tensor:
    """Lightning attention from zero state, in chunks, with a state cut per sample.

    Shapes: q, k, v [B, T, H, D] with T a multiple of CHUNK; cut [B], T where nothing is cut; result [B, T, H, D].
    """
    batch, length, heads, size = q.shape
    count = length // CHUNK
    rate = slopes(heads, q.device)
    q, k, v = (t.transpose(1, 2).reshape(batch, heads, count, CHUNK, size) for t in (q, k, v))
    place = torch.arange(CHUNK, device=q.device)
    chunk = torch.arange(count, device=q.device)
    cut_chunk = (cut // CHUNK)[:, None]
    is_after = (chunk[:, None] * CHUNK + place)[None] >= cut[:, None, None]
    is_cut_chunk = (chunk[None] == cut_chunk)[:, :, None]
    gap = place[:, None] - place[None]
    decay = torch.where(gap >= 0, torch.exp(-rate[:, None, None] * gap.clamp(min=0)), 0.0)
    same_side = is_after[:, :, :, None] == is_after[:, :, None, :]
    inside = (q @ k.transpose(-1, -2)).float() * decay[None, :, None] * same_side[:, None]
    out = inside.to(v.dtype) @ v
    to_end = torch.exp(-rate[:, None] * (CHUNK - 1 - place))[None, :, None, :, None]
    keep = (is_after | ~is_cut_chunk)[:, None, :, :, None]
    state = ((k * (to_end * keep).to(k.dtype)).transpose(-1, -2) @ v).float()
    steps = chunk[:, None] - chunk[None] - 1
    carry = torch.where(steps >= 0, torch.exp(-rate[:, None, None] * CHUNK * steps.clamp(min=0)), 0.0)
    is_lost = (chunk[None, None] < cut_chunk[:, :, None]) & (chunk[None, :, None] > cut_chunk[:, :, None])
    carry = carry[None] * ~is_lost[:, None]
    state = (carry @ state.reshape(batch, heads, count, size * size)).reshape(batch, heads, count, size, size)
    from_start = torch.exp(-rate[:, None] * (place + 1))[None, :, None, :, None]
    sees_state = ~(is_after & is_cut_chunk)[:, None, :, :, None]
    out = out + (q * (from_start * sees_state).to(q.dtype)) @ state.to(q.dtype)
    return (out * size**-0.5).reshape(batch, heads, length, size).transpose(1, 2)


class Weight(nn.Module):
    """A norm weight under the checkpoint's name."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class LightningMixer(nn.Module):
    """Linear attention with a fixed decay per head."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.size = shape.lightning_heads, shape.lightning_head_dim
        self.eps, self.theta = shape.rms_norm_eps, shape.rope_theta
        inner = self.heads * self.size
        self.q_proj, self.k_proj, self.v_proj, self.z_proj = (linear(shape.hidden_size, inner) for _ in range(4))
        self.o_proj = linear(inner, shape.hidden_size)
        self.q_norm, self.k_norm, self.o_norm = Weight(self.size), Weight(self.size), Weight(inner)

    def forward(self, x: Tensor, cut: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, self.heads, self.size) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = rotary(rms_norm(q, self.q_norm.weight, self.eps), self.theta)
        k = rotary(rms_norm(k, self.k_norm.weight, self.eps), self.theta)
        out = lightning(q, k, v, cut).reshape(batch, length, -1).to(x.dtype)
        out = rms_norm(out, self.o_norm.weight, self.eps)
        return self.o_proj(out * torch.sigmoid(self.z_proj(x)))


Watched = list[tuple[SupervisedRows, int]]


@dataclass(frozen=True)
class Hints:
    """Rows under the auxiliary losses: `copies` look at the token to copy, `hops` at the asked name, `headers` at their
    file; `bodies` know the number of their document behind the first sparse layer, `asked` (answers and headers) that
    of the document in question in front of the last one.
    """

    copies: SupervisedRows
    hops: SupervisedRows
    headers: SupervisedRows
    bodies: AddressRows
    asked: AddressRows

    def watched(self, layer: int, num_layers: int) -> Watched:
        """What the sparse layer of that order has to look at, and with which group."""
        if layer == num_layers - 1:
            return [(self.copies, 0)]
        return [(self.hops, 0)] if layer else [(self.headers, 1)]


class SparseMixer(nn.Module):
    """Softmax attention without positions: dense for early rows, picked blocks for late ones."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.kv_heads, self.size = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.geometry, self.dense_len = shape.geometry, shape.dense_len
        inner = self.heads * self.size
        self.q_proj, self.o_gate = linear(shape.hidden_size, inner), linear(shape.hidden_size, inner)
        self.k_proj, self.v_proj = (linear(shape.hidden_size, self.kv_heads * self.size) for _ in range(2))
        self.o_proj = linear(inner, shape.hidden_size)

    def forward(self, x: Tensor, watched: Watched, is_zeroed: bool = False) -> tuple[Tensor, list[Tensor]]:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        k, v = (p(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        out = sparse_attention(q, k, v, self.dense_len, self.geometry)
        losses = [auxiliary_losses(q, k, rows, group, self.geometry) for rows, group in watched]
        out = out.transpose(1, 2).reshape(batch, length, -1) * torch.sigmoid(self.o_gate(x))
        return self.o_proj(out) * (0.0 if is_zeroed else 1.0), losses


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj, self.up_proj = (linear(shape.hidden_size, shape.intermediate_size) for _ in range(2))
        self.down_proj = linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer."""

    def __init__(self, shape: Shape, kind: str):
        super().__init__()
        self.is_sparse = kind == SPARSE
        self.eps = shape.rms_norm_eps
        self.branch_scale = shape.scale_depth / math.sqrt(len(shape.mixer_types))
        self.input_layernorm = Weight(shape.hidden_size)
        self.post_attention_layernorm = Weight(shape.hidden_size)
        self.self_attn = SparseMixer(shape) if self.is_sparse else LightningMixer(shape)
        self.mlp = Mlp(shape)

    def mlp_part(self, h: Tensor) -> Tensor:
        x = rms_norm(h, self.post_attention_layernorm.weight, self.eps)
        return h + self.mlp(x) * self.branch_scale

    def lightning_part(self, h: Tensor, cut: Tensor) -> Tensor:
        x = rms_norm(h, self.input_layernorm.weight, self.eps)
        return self.mlp_part(h + self.self_attn(x, cut) * self.branch_scale)

    def sparse_part(self, h: Tensor, watched: Watched, is_zeroed: bool) -> tuple[Tensor, list[Tensor]]:
        x = rms_norm(h, self.input_layernorm.weight, self.eps)
        y, losses = self.self_attn(x, watched, is_zeroed)
        return h + y * self.branch_scale, losses


class Body(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, kind) for kind in shape.mixer_types)
        self.norm = Weight(shape.hidden_size)


class EmbeddedModel(nn.Module):
    """The whole model; `compile_blocks` compiles the parts that run in every layer."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        self.lightning_part = Block.lightning_part
        self.mlp_part = Block.mlp_part
        self.initialise()

    def compile_blocks(self) -> None:
        self.lightning_part = torch.compile(Block.lightning_part, dynamic=False)
        self.mlp_part = torch.compile(Block.mlp_part, dynamic=False)

    @torch.no_grad()
    def initialise(self) -> None:
        """Fan-in scaled weights; larger q and k in sparse layers (no norm there); a shared vector in all embeddings."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
            if "embed" in name:
                nn.init.normal_(parameter, 0.0, 0.06)
                parameter.add_(0.03 * torch.randn(1, parameter.shape[1]))
        for block in self.model.layers:
            if block.is_sparse:
                block.self_attn.q_proj.weight.mul_(1.6)
                block.self_attn.k_proj.weight.mul_(1.6)

    def forward(
        self,
        ids: Tensor,
        cut: Tensor | None = None,
        hints: Hints | None = None,
        is_zeroed: bool = False,
        probes: nn.ModuleList | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm [B, T, D]; with hints, by sparse layer, `auxiliary_losses` and what
        `probes`, one for the first layer and one for the last, find [layers, 5].
        """
        if cut is None:
            cut = torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
        h = self.model.embed_tokens(ids) * self.shape.scale_emb
        losses: list[Tensor] = []
        num_sparse = self.shape.mixer_types.count(SPARSE)
        is_training = torch.is_grad_enabled()
        lightning_part = self.lightning_part if is_training else Block.lightning_part
        mlp_part = self.mlp_part if is_training else Block.mlp_part
        for block in self.model.layers:
            if block.is_sparse:
                order = len(losses)
                watched = [] if hints is None else hints.watched(order, num_sparse)
                told = torch.zeros(2, device=h.device)
                if hints is not None and probes is not None and order == num_sparse - 1:
                    told = torch.stack(probes[1](h, hints.asked))
                h, found = block.sparse_part(h, watched, is_zeroed)
                if hints is not None and probes is not None and order == 0:
                    told = torch.stack(probes[0](h, hints.bodies))
                losses.extend(torch.cat([loss, told]) for loss in found)
                h = mlp_part(block, h)
            else:
                h = lightning_part(block, h, cut)
        stacked = torch.stack(losses) if losses else torch.zeros(num_sparse, 5, device=ids.device)
        return rms_norm(h, self.model.norm.weight, self.shape.rms_norm_eps), stacked

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary (hidden_size / dim_model_base is 1 here)."""
        return F.linear(hidden, self.model.embed_tokens.weight)
