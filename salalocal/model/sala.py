"""The SALA language model: token ids and a `ModelState` in, hidden states and logits out; for the engine.

The tree of modules names its parameters exactly as the released checkpoint does. Source: specification, section 4.
"""

import enum

import torch
from torch import Tensor, nn
from torch.nn import functional

from salalocal.errors import StateError
from salalocal.model.config import SalaConfig
from salalocal.model.layers import DenseLinearFactory, Device, LinearFactory, Mlp, RMSNorm
from salalocal.model.mixers import MIXERS, Mixer
from salalocal.model.state import LayerState, ModelState, StateSpec

MODEL_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SwitchRule(enum.Enum):
    """Which rows of the sparse layers choose blocks, the others attending to everything. Source: section 10.

    POSITION: row p is sparse iff p + 1 >= dense_len; the default, since it alone makes a saved prefix worth the same
    in every longer prompt. PROMPT: the rows of a prompt are all sparse iff it has dense_len tokens or more, generated
    rows go by position; what the released code does. ALWAYS: every row, as if dense_len were 0.
    """

    POSITION = "position"
    PROMPT = "prompt"
    ALWAYS = "always"

    def sparse_from(self, dense_len: int, prompt_tokens: int | None = None) -> int:
        """The first sparse position. Raises: ValueError when PROMPT is not told the length of the prompt."""
        if self is SwitchRule.ALWAYS:
            return 0
        if self is SwitchRule.PROMPT:
            if prompt_tokens is None:
                raise ValueError("the rule PROMPT needs prompt_tokens, the length of the whole prompt")
            if prompt_tokens >= dense_len:
                return 0
        return max(dense_len - 1, 0)


class SalaBlock(nn.Module):
    """One layer: a mixer and an MLP, each on a normed copy of the residual stream and scaled before it joins it."""

    def __init__(
        self, config: SalaConfig, layer: int, linear: LinearFactory, device: Device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.self_attn: Mixer = MIXERS[config.mixer_types[layer]](config, f"{name}.self_attn", linear, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.mlp = Mlp(f"{name}.mlp", config.hidden_size, config.intermediate_size, linear)
        self._residual_scale = config.residual_scale

    def forward(self, hidden: Tensor, state: LayerState) -> Tensor:
        # Two roundings, product and sum, as the released code has them: a fused multiply-add would differ in bf16.
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), state) * self._residual_scale
        branch: Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + branch * self._residual_scale


class SalaDecoder(nn.Module):
    """The embedding, the layers and the last norm: everything named `model.` in a checkpoint."""

    def __init__(self, config: SalaConfig, linear: LinearFactory, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        table = torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(
            SalaBlock(config, layer, linear, device, dtype) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)


class SalaModel(nn.Module):
    """The whole model. Its weights are not initialised: load them, or draw them with `init_weights`.

    `dtype` None means the one that the config names; `linear_factory` None means dense weights.
    """

    def __init__(
        self,
        config: SalaConfig,
        linear_factory: LinearFactory | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = MODEL_DTYPES[config.dtype] if dtype is None else dtype
        linear = linear_factory or DenseLinearFactory(device, dtype)
        self.config = config
        self._config_digest = config.digest
        self.model = SalaDecoder(config, linear, device, dtype)
        self.lm_head = None if config.tie_word_embeddings else linear("lm_head", config.hidden_size, config.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the model runs; its embedding table may lie in host memory."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its hidden states."""
        return self.model.norm.weight.dtype

    def new_state(
        self,
        batch_size: int = 1,
        capacity: int = 0,
        switch: SwitchRule = SwitchRule.POSITION,
        prompt_tokens: int | None = None,
        is_int8: bool = False,
        is_kv_on_host: bool = False,
    ) -> ModelState:
        """An empty state for sequences of one common length.

        Units: capacity in tokens, the room made at once (it grows by itself past it); prompt_tokens is needed by
        `SwitchRule.PROMPT` alone. `is_int8`: keys and values in 8 bits; `is_kv_on_host`: in host memory, for the
        kernels of a card. Either is for one sequence. Raises: ValueError; MemoryBudgetError for host memory.
        """
        if (is_int8 or is_kv_on_host) and batch_size != 1:
            raise ValueError(f"keys and values in 8 bits or in host memory are for one sequence, not for {batch_size}")
        sparse_from = switch.sparse_from(self.config.sparse.dense_len, prompt_tokens)
        spec = StateSpec(
            batch_size=batch_size,
            capacity=capacity,
            sparse_from=sparse_from,
            device=self.device,
            dtype=self.dtype,
            is_int8=is_int8,
            is_kv_on_host=is_kv_on_host,
        )
        layers = tuple(block.self_attn.new_state(spec) for block in self._blocks())
        return ModelState(layers, num_tokens=0, sparse_from=sparse_from, config_digest=self._config_digest)

    def forward(self, tokens: Tensor, state: ModelState) -> Tensor:
        """Read the next tokens of every sequence; the state is updated in place.

        Shapes: tokens [B, T] int64 -> hidden [B, T, hidden], after the last norm, in the model's dtype.
        Raises: ValueError for another shape; StateError for a state of another model, or one that an interrupted call
        left half way.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens are {tuple(tokens.shape)}, needed is [B, T] with T >= 1")
        if state.config_digest != self._config_digest:
            raise StateError("the state was made by another model")
        state.check_whole()
        table = self.model.embed_tokens
        hidden = table(tokens.to(table.weight.device)).to(self.device) * self.config.scale_emb
        for block, layer_state in zip(self._blocks(), state.layers, strict=True):
            hidden = block(hidden, layer_state)
        state.num_tokens += tokens.shape[1]
        normed: Tensor = self.model.norm(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Shapes: hidden [..., hidden] as `forward` returns it -> [..., vocab] fp32 (float64 in a float64 model)."""
        scaled = hidden / self.config.logit_divisor
        if self.lm_head is None:
            logits = functional.linear(scaled, self.model.embed_tokens.weight)
        else:
            logits = self.lm_head(scaled)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def init_weights(self, std: float = 0.1, generator: torch.Generator | None = None) -> None:
        """Draw every matrix from a normal distribution and set every norm weight to one, in the order of names."""
        for _, parameter in sorted(self.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std, generator=generator)

    def _blocks(self) -> list[SalaBlock]:
        return [block for block in self.model.layers if isinstance(block, SalaBlock)]
