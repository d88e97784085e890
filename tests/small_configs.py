"""Small configurations that together take every branch of the model, and random weights for them.

In: a name from CONFIGS and a seed. Out: the dict of a config.json, and tensors by upstream name whose values are
exact in bfloat16, so that float64, float32 and bfloat16 models all hold the same numbers. For the tests of the model.
"""

import math
from typing import Any

import torch

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]

S, L = "minicpm4", "lightning-attn"

RELEASED: Config = {
    "architectures": ["MiniCPMSALAForCausalLM"],
    "model_type": "minicpm_sala",
    "vocab_size": 73448,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "lightning_nh": 32,
    "lightning_nkv": 32,
    "lightning_head_dim": 128,
    "lightning_scale": "1/sqrt(d)",
    "lightning_use_rope": True,
    "attn_use_rope": False,
    "qk_norm": True,
    "use_output_norm": True,
    "use_output_gate": True,
    "attn_use_output_gate": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 524288,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "mup_denominator": 32,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": [2, 73440],
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "shift_labels": True,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "mixer_types": [S if n in (0, 9, 16, 17, 22, 29, 30, 31) else L for n in range(32)],
    "sparse_config": {
        "kernel_size": 32,
        "kernel_stride": 16,
        "block_size": 64,
        "init_blocks": 1,
        "window_size": 2048,
        "topk": 64,
        "dense_len": 8192,
        "use_nope": False,
    },
}


def sparse_sizes(kernel: tuple[int, int, int], init: int, window: int, topk: int, dense_len: int) -> Config:
    """A sparse_config; kernel is (kernel_size, kernel_stride, block_size)."""
    names = ("kernel_size", "kernel_stride", "block_size", "init_blocks", "window_size", "topk", "dense_len")
    return {**dict(zip(names, (*kernel, init, window, topk, dense_len), strict=True)), "use_nope": False}


def small(mixer_types: list[str], sparse: Config, **changes: Any) -> Config:
    """A config of small sizes over the released one; everything that is not a size stays as released."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "lightning_nh": 4,
        "lightning_nkv": 4,
        "lightning_head_dim": 16,
        "dim_model_base": 16,
        "scale_emb": 3,
        "mup_denominator": 4,
        "eos_token_id": [2, 89],
    }
    layers = {"mixer_types": mixer_types, "num_hidden_layers": len(mixer_types), "sparse_config": sparse}
    return {**RELEASED, **sizes, **layers, **changes}


CONFIGS: dict[str, Config] = {
    # Ratios as released: two compressed keys overlap, four a block. Reach 96: most rows past it choose two.
    "plain": small([S, L, L, S], sparse_sizes((8, 4, 16), init=1, window=32, topk=4, dense_len=130)),
    # Selection from the first row on; heads x head_dim below hidden; head counts that are no powers of two.
    "always": small(
        [S, L, S],
        sparse_sizes((8, 4, 16), init=1, window=16, topk=3, dense_len=0),
        hidden_size=72,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        lightning_nh=6,
        lightning_nkv=2,
        lightning_head_dim=8,
    ),
    # The released kernel and block, lightning first, tied embeddings, one KV head, grouped lightning keys.
    "tied": small(
        [L, S, L, L],
        sparse_sizes((32, 16, 64), init=1, window=64, topk=3, dense_len=300),
        tie_word_embeddings=True,
        num_attention_heads=3,
        num_key_value_heads=1,
        lightning_nh=12,
        lightning_nkv=3,
        lightning_head_dim=4,
        rope_theta=500.0,
    ),
    # Windows wider than a block and than the local blocks: the causal rule for compressed keys decides rows here.
    "wide": small(
        [S, S, L],
        sparse_sizes((32, 4, 8), init=1, window=8, topk=4, dense_len=33),
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        lightning_head_dim=12,
        lightning_nh=5,
        lightning_nkv=5,
    ),
    # Windows side by side, several init blocks, and one compressed key a block.
    "apart": small(
        [L, S],
        sparse_sizes((16, 16, 16), init=2, window=32, topk=4, dense_len=64),
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        lightning_nh=1,
        lightning_nkv=1,
        scale_depth=1.0,
        rms_norm_eps=1e-3,
    ),
    # Nothing forced but the row's own block.
    "bare": small(
        [S, L],
        sparse_sizes((8, 4, 8), init=0, window=0, topk=4, dense_len=1),
        head_dim=8,
        lightning_nh=3,
        lightning_nkv=1,
    ),
    # Never sparse within the tests' lengths, and lightning layers only.
    "dense": small([S, L], sparse_sizes((8, 4, 16), init=1, window=32, topk=3, dense_len=4096)),
    "lightning": small([L, L, L], sparse_sizes((8, 4, 16), init=1, window=32, topk=3, dense_len=4096)),
}


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint, from section 3 of the specification."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for n, mixer in enumerate(config["mixer_types"]):
        kind = "" if mixer == S else "lightning_"
        dim = config[kind + "head_dim"]
        wide = dim * config["lightning_nh" if kind else "num_attention_heads"]
        narrow = dim * config["lightning_nkv" if kind else "num_key_value_heads"]
        layer = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "self_attn.q_proj": (wide, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, wide),
        }
        if mixer == S:
            layer |= {"self_attn.o_gate": (wide, hidden)}
        else:
            layer |= {"self_attn.z_proj": (wide, hidden), "self_attn.o_norm": (wide,)}
            layer |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def random_weights(config: Config, seed: int) -> Weights:
    """Random tensors for the config, float32 holding bfloat16 values; every branch and every norm weight matters."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        tensor = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensor = 1.0 + 0.3 * tensor
        elif name == "model.embed_tokens.weight":
            tensor /= config["scale_emb"]
        else:
            tensor *= (1.3 if "q_proj" in name or "k_proj" in name else 1.0) / math.sqrt(shape[1])
        weights[name] = tensor.to(torch.bfloat16).float()
    return weights


def random_tokens(config: Config, length: int, seed: int) -> list[int]:
    """Token ids, uniform over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config["vocab_size"], (length,), generator=generator).tolist()
