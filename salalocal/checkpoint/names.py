"""The names in a model folder: its files, and its tensors with their shapes by config; for Checkpoint, writers, plans.

No torch here. Source: specification of MiniCPM-SALA, section 3.
"""

from dataclasses import dataclass

from salalocal.model.config import LIGHTNING, SPARSE, SalaConfig

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 4 * 2**20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

WEIGHT_DTYPES = ("BF16", "F16", "F32")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """What a stored tensor must be; dtypes are spelled as in safetensors."""

    shape: Shape
    dtypes: tuple[str, ...] = WEIGHT_DTYPES


def expected_tensors(config: SalaConfig) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this config must hold, in the order of the forward pass; linears are [out, in].

    With tied embeddings `lm_head.weight` is not among them.
    """
    tensors: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer, mixer in enumerate(config.mixer_types):
        for name, shape in _layer_tensors(config, mixer).items():
            tensors[f"model.layers.{layer}.{name}.weight"] = shape
    tensors["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        tensors[HEAD] = (config.vocab_size, config.hidden_size)
    return tensors


def ignored_tensors(config: SalaConfig, names: tuple[str, ...]) -> dict[str, Shape | None]:
    """Those of `names` that a checkpoint may hold and a model does not read, with the shape they must have, if any.

    They are rotary tables, which are computed, and `lm_head.weight` beside tied embeddings: some writers store it,
    and the embedding counts, as in transformers.
    """
    ignored: dict[str, Shape | None] = {name: None for name in names if "rotary_emb" in name.split(".")}
    if config.tie_word_embeddings and HEAD in names:
        ignored[HEAD] = (config.vocab_size, config.hidden_size)
    return ignored


def _layer_tensors(config: SalaConfig, mixer: str) -> dict[str, Shape]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    return {
        "input_layernorm": (hidden,),
        **{f"self_attn.{name}": shape for name, shape in _MIXER_TENSORS[mixer](config).items()},
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def _sparse_tensors(config: SalaConfig) -> dict[str, Shape]:
    heads, hidden = config.sparse, config.hidden_size
    width, kv_width = heads.num_attention_heads * heads.head_dim, heads.num_key_value_heads * heads.head_dim
    return {
        "q_proj": (width, hidden),
        "k_proj": (kv_width, hidden),
        "v_proj": (kv_width, hidden),
        "o_gate": (width, hidden),
        "o_proj": (hidden, width),
    }


def _lightning_tensors(config: SalaConfig) -> dict[str, Shape]:
    heads, hidden = config.lightning, config.hidden_size
    width, kv_width = heads.num_heads * heads.head_dim, heads.num_key_value_heads * heads.head_dim
    return {
        "q_proj": (width, hidden),
        "k_proj": (kv_width, hidden),
        "v_proj": (kv_width, hidden),
        "q_norm": (heads.head_dim,),
        "k_norm": (heads.head_dim,),
        "o_norm": (width,),
        "z_proj": (width, hidden),
        "o_proj": (hidden, width),
    }


_MIXER_TENSORS = {SPARSE: _sparse_tensors, LIGHTNING: _lightning_tensors}
