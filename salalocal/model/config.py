"""The shape of a SALA model: `config.json` in, a frozen, checked `SalaConfig` out; for the model, the engine, `plan`.

Imports no torch, so that a memory table costs no seconds. Source: specification of MiniCPM-SALA, sections 1-3.
"""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from salalocal.errors import CheckpointError

SPARSE: Final = "minicpm4"
LIGHTNING: Final = "lightning-attn"

_MIXER_NAMES = {
    **dict.fromkeys(("minicpm4", "minicpm", "standard", "attention", "attn"), SPARSE),
    **dict.fromkeys(("lightning", "lightning_attn", "lightning-attn"), LIGHTNING),
}
_DTYPES = ("bfloat16", "float16", "float32")
_MAX_LAYERS = 1024
_MAX_WIDTH = 65_536
_MAX_VOCABULARY = 4 * 1024 * 1024
_MAX_TOKENS = 2**31

# Fields of which exactly one value is implemented; any other would change the function that the model computes.
_ONLY_VALUES: dict[str, Any] = {
    "model_type": "minicpm_sala",
    "hidden_act": "silu",
    "qk_norm": True,
    "use_output_norm": True,
    "use_output_gate": True,
    "attn_use_output_gate": True,
    "attn_use_rope": False,
    "lightning_use_rope": True,
    "lightning_scale": "1/sqrt(d)",
}
# The same for fields that may also be missing, since missing means "off".
_ONLY_IF_PRESENT: dict[str, Any] = {
    "rope_scaling": None,
    "attention_bias": False,
    "lightning_layerwise_decay": False,
}
# Known fields that do not change what is computed.
_IGNORED = frozenset(
    {
        "architectures",
        "attention_dropout",
        "auto_map",
        "initializer_range",
        "mup_denominator",
        "pretraining_tp",
        "shift_labels",
        "transformers_version",
        "use_cache",
        "_name_or_path",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseConfig:
    """The block-sparse softmax layers: heads and the geometry of block choice. Units: sizes and lengths in tokens."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    kernel_size: int
    kernel_stride: int
    block_size: int
    init_blocks: int
    window_size: int
    topk: int
    dense_len: int
    use_nope: bool = False

    def __post_init__(self) -> None:
        _check_heads("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        _check_range("head_dim", self.head_dim, 1, _MAX_WIDTH)
        for name in ("kernel_size", "kernel_stride", "block_size"):
            _check_range(f"sparse_config.{name}", getattr(self, name), 1, _MAX_WIDTH)
        for name in ("init_blocks", "window_size", "topk", "dense_len"):
            _check_range(f"sparse_config.{name}", getattr(self, name), 0, _MAX_TOKENS)
        _check_multiple("sparse_config.kernel_size", self.kernel_size, "kernel_stride", self.kernel_stride)
        _check_multiple("sparse_config.block_size", self.block_size, "kernel_stride", self.kernel_stride)
        _check_multiple("sparse_config.window_size", self.window_size, "block_size", self.block_size)
        if self.topk < self.init_blocks + 1:
            raise CheckpointError(
                f"config: sparse_config.topk = {self.topk} leaves no room for init_blocks = {self.init_blocks} "
                "and the block of the query itself"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LightningConfig:
    """The lightning layers: linear attention with one fixed decay per head."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _check_heads("lightning_nh", self.num_heads, "lightning_nkv", self.num_key_value_heads)
        _check_range("lightning_head_dim", self.head_dim, 2, _MAX_WIDTH)
        _check_multiple("lightning_head_dim", self.head_dim, "the two halves of a rotation", 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class SalaConfig:
    """Everything that fixes the function of a SALA model but its weights; made by `from_hf`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    rms_norm_eps: float
    rope_theta: float
    scale_emb: float
    scale_depth: float
    dim_model_base: int
    tie_word_embeddings: bool
    mixer_types: tuple[str, ...]
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    sparse: SparseConfig
    lightning: LightningConfig
    pad_token_id: int | None = None
    max_position_embeddings: int | None = None
    quantization_config: Mapping[str, Any] | None = field(default=None, hash=False)
    unknown_fields: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _check_range("vocab_size", self.vocab_size, 1, _MAX_VOCABULARY)
        for name in ("hidden_size", "dim_model_base"):
            _check_range(name, getattr(self, name), 1, _MAX_WIDTH)
        _check_range("intermediate_size", self.intermediate_size, 1, 16 * _MAX_WIDTH)
        _check_range("num_hidden_layers", self.num_hidden_layers, 1, _MAX_LAYERS)
        for name in ("rms_norm_eps", "rope_theta", "scale_emb", "scale_depth"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value < 1e12):
                raise CheckpointError(f"config: {name} = {value} is not a positive number")
        if len(self.mixer_types) != self.num_hidden_layers:
            raise CheckpointError(
                f"config: mixer_types names {len(self.mixer_types)} layers, num_hidden_layers says "
                f"{self.num_hidden_layers}"
            )
        for mixer in self.mixer_types:
            if mixer not in (SPARSE, LIGHTNING):
                raise CheckpointError(f"config: mixer_types holds {mixer!r}, known are {SPARSE!r} and {LIGHTNING!r}")
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"config: dtype = {self.dtype!r}, known are {', '.join(_DTYPES)}")
        self._check_token_ids()
        if self.max_position_embeddings is not None:
            _check_range("max_position_embeddings", self.max_position_embeddings, 1, _MAX_TOKENS)

    def _check_token_ids(self) -> None:
        _check_range("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        if not self.eos_token_ids:
            raise CheckpointError("config: eos_token_id names no token")
        for token in self.eos_token_ids:
            _check_range("eos_token_id", token, 0, self.vocab_size - 1)
        if self.pad_token_id is not None:
            _check_range("pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "SalaConfig":
        """Read a parsed `config.json`.

        Raises: CheckpointError naming a field that is missing, of the wrong type, out of range, contradictory or of a
        value that is not implemented. Fields that are not known at all are listed in `unknown_fields`.
        """
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"config: a JSON object is needed, not {type(raw).__name__}")
        fields = _Fields(raw)
        for name, value in _ONLY_VALUES.items():
            fields.only(name, value)
        for name, value in _ONLY_IF_PRESENT.items():
            if name in raw:
                fields.only(name, value)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers"),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=fields.number("rope_theta"),
            scale_emb=fields.number("scale_emb"),
            scale_depth=fields.number("scale_depth"),
            dim_model_base=fields.integer("dim_model_base"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
            mixer_types=fields.mixer_types(),
            bos_token_id=fields.integer("bos_token_id"),
            eos_token_ids=fields.integers("eos_token_id"),
            dtype=fields.dtype(),
            sparse=_sparse_from(fields),
            lightning=LightningConfig(
                num_heads=fields.integer("lightning_nh"),
                num_key_value_heads=fields.integer("lightning_nkv"),
                head_dim=fields.integer("lightning_head_dim"),
            ),
            pad_token_id=fields.optional_integer("pad_token_id"),
            max_position_embeddings=fields.optional_integer("max_position_embeddings"),
            quantization_config=fields.quantization_config(),
            unknown_fields=fields.unread(_IGNORED),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model: `from_hf` of it is equal to this config."""
        sparse = dataclasses.asdict(self.sparse)
        heads = {name: sparse.pop(name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
        raw: dict[str, Any] = {
            "architectures": ["MiniCPMSALAForCausalLM"],
            **_ONLY_VALUES,
            **_ONLY_IF_PRESENT,
            **{name: getattr(self, name) for name in _COPIED},
            **heads,
            "mixer_types": list(self.mixer_types),
            "eos_token_id": list(self.eos_token_ids),
            "sparse_config": sparse,
            "lightning_nh": self.lightning.num_heads,
            "lightning_nkv": self.lightning.num_key_value_heads,
            "lightning_head_dim": self.lightning.head_dim,
        }
        for name in ("pad_token_id", "max_position_embeddings"):
            if getattr(self, name) is not None:
                raw[name] = getattr(self, name)
        if self.quantization_config is not None:
            raw["quantization_config"] = copy.deepcopy(dict(self.quantization_config))
        return raw

    @classmethod
    def released(cls) -> "SalaConfig":
        """The released 9B model."""
        sparse_layers = (0, 9, 16, 17, 22, 29, 30, 31)
        return cls(
            vocab_size=73_448,
            hidden_size=4096,
            intermediate_size=16_384,
            num_hidden_layers=32,
            rms_norm_eps=1e-6,
            rope_theta=10_000.0,
            scale_emb=12.0,
            scale_depth=1.4,
            dim_model_base=256,
            tie_word_embeddings=False,
            mixer_types=tuple(SPARSE if layer in sparse_layers else LIGHTNING for layer in range(32)),
            bos_token_id=1,
            eos_token_ids=(2, 73_440),
            dtype="bfloat16",
            sparse=SparseConfig(
                num_attention_heads=32,
                num_key_value_heads=2,
                head_dim=128,
                kernel_size=32,
                kernel_stride=16,
                block_size=64,
                init_blocks=1,
                window_size=2048,
                topk=64,
                dense_len=8192,
            ),
            lightning=LightningConfig(num_heads=32, num_key_value_heads=32, head_dim=128),
            pad_token_id=2,
            max_position_embeddings=524_288,
        )

    @property
    def residual_scale(self) -> float:
        """The factor of every branch before it joins the residual stream."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logit_divisor(self) -> float:
        """What the last hidden states are divided by before `lm_head`."""
        return self.hidden_size / self.dim_model_base

    @property
    def num_parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        hidden = self.hidden_size
        sparse_width = self.sparse.num_attention_heads * self.sparse.head_dim
        sparse_kv_width = self.sparse.num_key_value_heads * self.sparse.head_dim
        lightning_width = self.lightning.num_heads * self.lightning.head_dim
        lightning_kv_width = self.lightning.num_key_value_heads * self.lightning.head_dim
        mixers = {
            SPARSE: hidden * (3 * sparse_width + 2 * sparse_kv_width),
            LIGHTNING: hidden * (3 * lightning_width + 2 * lightning_kv_width)
            + 2 * self.lightning.head_dim
            + lightning_width,
        }
        every_layer = 3 * hidden * self.intermediate_size + 2 * hidden
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * hidden
        return embeddings + hidden + sum(every_layer + mixers[mixer] for mixer in self.mixer_types)

    @property
    def digest(self) -> str:
        """A hash of what fixes the shapes and the function of the model; dtype, weights and their format stay out."""
        raw = self.to_hf()
        for name in ("architectures", "dtype", "quantization_config", "max_position_embeddings"):
            raw.pop(name, None)
        return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "rms_norm_eps",
    "rope_theta",
    "scale_emb",
    "scale_depth",
    "dim_model_base",
    "tie_word_embeddings",
    "bos_token_id",
    "dtype",
)


class _Fields:
    """Typed reading of a parsed JSON object; remembers what was read, names the field in every error."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self._raw = raw
        self._prefix = prefix
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        self._read.add(name)
        if name not in self._raw:
            raise CheckpointError(f"config: the field {self._prefix}{name} is missing")
        return self._raw[name]

    def only(self, name: str, allowed: Any) -> None:
        value = self.get(name)
        if type(value) is not type(allowed) or value != allowed:
            raise CheckpointError(
                f"config: {self._prefix}{name} = {_shown(value)} is not supported, only {_shown(allowed)} is"
            )

    def integer(self, name: str) -> int:
        return self._whole(name, self.get(name))

    def optional_integer(self, name: str) -> int | None:
        self._read.add(name)
        value = self._raw.get(name)
        return None if value is None else self._whole(name, value)

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.get(name)
        if isinstance(value, list | tuple):
            return tuple(self._whole(name, item) for item in value)
        return (self._whole(name, value),)

    def number(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        try:
            return float(value)
        except OverflowError:
            raise self._wrong(name, value, "a number") from None

    def boolean(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def object(self, name: str) -> "_Fields":
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object")
        return _Fields(value, f"{self._prefix}{name}.")

    def mixer_types(self) -> tuple[str, ...]:
        value = self.get("mixer_types")
        if not isinstance(value, list | tuple):
            raise self._wrong("mixer_types", value, "a list of names")
        for item in value:
            if not isinstance(item, str) or item not in _MIXER_NAMES:
                raise self._wrong("mixer_types", item, "a name of a mixer: " + ", ".join(_MIXER_NAMES))
        return tuple(_MIXER_NAMES[item] for item in value)

    def dtype(self) -> str:
        """`dtype`, or `torch_dtype` as older writers spell it; both may stand there if they agree."""
        names = [name for name in ("dtype", "torch_dtype") if name in self._raw] or ["dtype"]
        values = [self.get(name) for name in names]
        if not isinstance(values[0], str):
            raise self._wrong(names[0], values[0], "a name such as bfloat16")
        if len(values) == 2 and values[0] != values[1]:
            raise CheckpointError(
                f"config: dtype = {_shown(values[0])} and torch_dtype = {_shown(values[1])} contradict"
            )
        return values[0]

    def quantization_config(self) -> dict[str, Any] | None:
        self._read.add("quantization_config")
        value = self._raw.get("quantization_config")
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong("quantization_config", value, "an object")
        return copy.deepcopy(dict(value))

    def unread(self, ignored: frozenset[str]) -> tuple[str, ...]:
        return tuple(sorted(str(name) for name in self._raw if name not in self._read and name not in ignored))

    def _whole(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "a whole number")
        return value

    def _wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"config: {self._prefix}{name} = {_shown(value)} is not {expected}")


def _sparse_from(fields: _Fields) -> SparseConfig:
    inner = fields.object("sparse_config")
    return SparseConfig(
        num_attention_heads=fields.integer("num_attention_heads"),
        num_key_value_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim"),
        kernel_size=inner.integer("kernel_size"),
        kernel_stride=inner.integer("kernel_stride"),
        block_size=inner.integer("block_size"),
        init_blocks=inner.integer("init_blocks"),
        window_size=inner.integer("window_size"),
        topk=inner.integer("topk"),
        dense_len=inner.integer("dense_len"),
        use_nope=inner.boolean("use_nope"),
    )


def _shown(value: Any) -> str:
    """A value as JSON would show it, cut to a length that fits into an error line."""
    try:
        text = json.dumps(value, default=repr)
    except ValueError:  # Python writes no whole numbers of more than 4300 digits, and no circles
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 60 else text[:57] + "..."


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise CheckpointError(f"config: {name} = {_shown(value)} is outside {low}..{high}")


def _check_multiple(name: str, value: int, unit_name: str, unit: int) -> None:
    if value % unit:
        raise CheckpointError(f"config: {name} = {value} is not a multiple of {unit_name} = {unit}")


def _check_heads(name: str, heads: int, kv_name: str, kv_heads: int) -> None:
    for field_name, value in ((name, heads), (kv_name, kv_heads)):
        _check_range(field_name, value, 1, _MAX_WIDTH)
    _check_multiple(name, heads, kv_name, kv_heads)
