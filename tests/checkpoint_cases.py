"""Small checkpoints for tests: a config with both mixers, random weights, a written folder."""

from pathlib import Path

import torch
from torch import Tensor

from salalocal.checkpoint.names import expected_tensors
from salalocal.checkpoint.writer import write_checkpoint
from salalocal.model.config import LIGHTNING, SPARSE, LightningConfig, SalaConfig, SparseConfig

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def small_config(
    tie_word_embeddings: bool = False,
    dtype: torch.dtype = torch.float32,
    mixer_types: tuple[str, ...] = (SPARSE, LIGHTNING, LIGHTNING, SPARSE),
    **sizes: int,
) -> SalaConfig:
    """Four layers, no two sizes equal where the model allows it, so that a swapped axis shows."""
    return SalaConfig(
        vocab_size=sizes.get("vocab_size", 96),
        hidden_size=sizes.get("hidden_size", 48),
        intermediate_size=sizes.get("intermediate_size", 80),
        num_hidden_layers=len(mixer_types),
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        scale_emb=12.0,
        scale_depth=1.4,
        dim_model_base=16,
        tie_word_embeddings=tie_word_embeddings,
        mixer_types=mixer_types,
        bos_token_id=1,
        eos_token_ids=(2, 90),
        dtype=DTYPE_NAMES[dtype],
        sparse=SparseConfig(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            kernel_size=4,
            kernel_stride=2,
            block_size=8,
            init_blocks=1,
            window_size=16,
            topk=3,
            dense_len=64,
        ),
        lightning=LightningConfig(num_heads=3, num_key_value_heads=3, head_dim=8),
    )


def random_tensors(config: SalaConfig, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights that keep activations in range: norms near one, the rest scaled by their fan-in."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        values = torch.randn(shape, generator=generator)
        scaled = 1 + 0.1 * values if len(shape) == 1 else values / shape[-1] ** 0.5
        tensors[name] = scaled.to(dtype)
    return tensors


def written(folder: Path, config: SalaConfig, tensors: dict[str, Tensor], max_shard_bytes: int = 2**30) -> Path:
    """A model folder with these tensors."""
    write_checkpoint(folder, config.to_hf(), tensors.items(), max_shard_bytes)
    return folder
