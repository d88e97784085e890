"""Memory before it is needed: a SalaConfig and a number of tokens come in, bytes by part go out; for `plan` and
refusals.

No torch and no device here. Source of the figures: specification of MiniCPM-SALA, sections 14 and 15.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from typing import Any, Literal

from salalocal.checkpoint.names import expected_tensors
from salalocal.errors import CheckpointError, MemoryBudgetError, RequestError
from salalocal.model.config import LIGHTNING, SPARSE, SalaConfig

# A CUDA context with the libraries that torch loads into it; about this much on cards from sm_80 to sm_120.
CUDA_DRIVER_BYTES = 512 * 2**20
CUDA_CHUNKS = (8192, 4096, 2048, 1024)
_SMALL_CARD_BYTES = 12 * 2**30
MAX_CONTEXT_TOKENS = 2**31
_MOST_BLOCKS = 2**16  # that the kernels of a card choose from, see `kernels.block_topk.decode_choice`

# What the attention kernels hold at once, whatever the context: unmerged outputs of picked blocks, and tiles of scores.
_MAX_PARTIAL_VALUES = 2**23
_TILE_BYTES = 32 * 2**20
_LIGHTNING_SEGMENT = 512  # tokens between the states that a prefill leaves
_FUSED_ROWS = 1024  # most rows whose products do not go by a scratch
_MAX_SCRATCH_BYTES = 256 * 2**20  # see `kernels.int4.route`
_GEMM_SCRATCH_BYTES = 32 * 2**20  # partial sums of products of few and of some rows
_RECENT_TOKENS = 256  # keys that an 8-bit cache keeps unquantized too, see `kernels.kv_cache`
_RECORDED_ROWS = 512  # rows of an answer whose picks are kept, see `engine.picks`
_STEP_ROWS = 16  # most rows of an answer's step
_HOST_COPIES = 4096  # blocks of a head that are brought from host memory at once, see `kernels.block_attention.host`
_HOST_GROUP_ROWS = 32  # of which it is noted what they picked
# What torch holds on a card beyond what is counted here: states of forks, memory of graphs, gaps. Nine runs of the
# released shape held 178 to 456 MiB more than was counted; with this the plan is within 1.9 % of their peaks.
_UNCOUNTED_BYTES = 272 * 2**20

_GROUP = 128
_PACKED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "o_gate", "z_proj", "gate_proj", "up_proj", "down_proj")
_CODEBOOK_BLOCK = 64
_KERNEL_GROUPS = (32, 64, 128)  # weights that share a scale, of the kernels for cards

Math = Literal["bf16", "int8", "fp8"]


class WeightFormat(Enum):
    """How weights are stored.

    Where there is no folder to count, they are what `salalocal quantize` writes: every linear map of the layers, gates
    too, in groups of 128 (`INT8`, `INT4`: GPTQ v1) or in blocks of 64 (`NF4`, `FP4`: bitsandbytes), and bf16 elsewhere.
    """

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    INT8 = "int8"
    INT4 = "int4"
    NF4 = "nf4"
    FP4 = "fp4"

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "WeightFormat":
        """What most weights of a quantized folder are, by its quantization_config.

        Raises: CheckpointError for a record that names no format known here.
        """
        method, word = record.get("quant_method"), None
        if method == "gptq":
            word = f"int{record.get('bits')}"
        elif method == "bitsandbytes":
            word = record.get("bnb_4bit_quant_type")
        elif method == "compressed-tensors":
            groups = record.get("config_groups")
            first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
            weights = first.get("weights") if isinstance(first, Mapping) else None
            word = f"int{weights.get('num_bits')}" if isinstance(weights, Mapping) else None
        found = next((known for known in _QUANTIZED if known.value == word), None)
        if found is None:
            names = ", ".join(known.value for known in _QUANTIZED)
            raise CheckpointError(f"quantization_config names none of the formats that can be read: {names}")
        return found


_INTEGERS = (WeightFormat.INT8, WeightFormat.INT4)
_QUANTIZED = (*_INTEGERS, WeightFormat.NF4, WeightFormat.FP4)


class CacheFormat(Enum):
    """How keys and values are stored; `INT8` adds one bf16 scale per token and head. Pooled keys are never below 16
    bit."""

    BF16 = "bf16"
    FP32 = "fp32"
    INT8 = "int8"


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a quantized folder, counted."""

    weights: WeightFormat
    num_bytes: int


@dataclass(frozen=True)
class PlanOptions:
    """What besides the model and the context decides about memory. Units: chunk_size in tokens.

    `math`: what many rows are multiplied in on a card. `stored` is what a quantized folder holds, if there is one;
    other weights are counted by formula. `has_kernels`: whether the kernels for cards take the model, which computes in
    bf16 then. `is_kv_on_host`: keys and values lie in host memory, which only those kernels read.
    """

    weights: WeightFormat = WeightFormat.BF16
    cache: CacheFormat = CacheFormat.BF16
    chunk_size: int = 512
    is_cuda: bool = True
    stored: StoredWeights | None = None
    math: Math = "int8"
    is_embedding_on_host: bool = False
    has_kernels: bool = True
    is_kv_on_host: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether `engine.fused` runs the model: it takes plain bf16 weights and integers, not codebooks."""
        is_known = self.weights in (WeightFormat.BF16, *_INTEGERS) and self.cache is not CacheFormat.FP32
        return self.is_cuda and self.has_kernels and is_known


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part for one sequence of `num_tokens` tokens, prompt and answer together.

    `activation_bytes` is an estimate of the largest set of temporary tensors of a chunk; every other part is exact for
    a state made with room for just these tokens. `recent_bytes`: last keys that an 8-bit cache keeps unquantized.
    `host_bytes`, page-locked, are not of the card: keys and values that lie there, and the embedding table.
    """

    num_tokens: int
    weight_bytes: int
    kv_bytes: int
    k1_bytes: int
    k2_bytes: int
    lightning_bytes: int
    activation_bytes: int
    logits_bytes: int
    driver_bytes: int
    recent_bytes: int = 0
    host_bytes: int = 0

    @property
    def pooled_key_bytes(self) -> int:
        """Both kinds of pooled keys."""
        return self.k1_bytes + self.k2_bytes

    @property
    def cache_bytes(self) -> int:
        """What grows with the context on the device: keys, values and pooled keys."""
        return self.kv_bytes + self.pooled_key_bytes

    @property
    def state_bytes(self) -> int:
        """Everything that a session keeps on the device: the cache and the lightning states."""
        return self.cache_bytes + self.recent_bytes + self.lightning_bytes

    @property
    def total_bytes(self) -> int:
        """The sum of all parts on the device."""
        return self.weight_bytes + self.state_bytes + self.activation_bytes + self.logits_bytes + self.driver_bytes


def most_tokens(config: SalaConfig, options: PlanOptions) -> int:
    """The longest context that can be run, whatever the memory."""
    return _MOST_BLOCKS * config.sparse.block_size if options.is_fused else MAX_CONTEXT_TOKENS


def check_length(config: SalaConfig, num_tokens: int, options: PlanOptions) -> None:
    """Raises: RequestError for a context that is longer than can be run."""
    most = most_tokens(config, options)
    if num_tokens > most:
        where = "on a card" if options.is_fused else "as a whole"
        raise RequestError(f"a context of {num_tokens:,} tokens: {where} {most:,} are supported", "try --ctx 1m")


def plan_memory(config: SalaConfig, num_tokens: int, options: PlanOptions | None = None) -> MemoryPlan:
    """The memory that a model needs for a context of `num_tokens` tokens.

    Raises: RequestError for a number of tokens that makes no sense.
    """
    options = options or PlanOptions()
    if type(num_tokens) is not int or not 0 <= num_tokens <= MAX_CONTEXT_TOKENS:
        raise RequestError(f"context should be a whole number of tokens up to {MAX_CONTEXT_TOKENS}, is {num_tokens!r}")
    sparse = config.sparse
    num_sparse = config.mixer_types.count(SPARSE)
    pooled_row = num_sparse * sparse.num_key_value_heads * sparse.head_dim * _pooled_width(options.cache)
    kv_bytes = num_tokens * 2 * num_sparse * sparse.num_key_value_heads * _kv_row_bytes(sparse.head_dim, options.cache)
    return MemoryPlan(
        num_tokens=num_tokens,
        weight_bytes=_weight_bytes(config, options),
        kv_bytes=0 if options.is_kv_on_host else kv_bytes,
        k1_bytes=-(-num_tokens // sparse.kernel_stride) * pooled_row,
        k2_bytes=-(-num_tokens // (4 * sparse.kernel_stride)) * pooled_row,
        lightning_bytes=_lightning_bytes(config),
        activation_bytes=_activation_bytes(config, num_tokens, options),
        logits_bytes=2 * 4 * config.vocab_size,  # fp32, and a copy in sampling
        driver_bytes=CUDA_DRIVER_BYTES if options.is_cuda else 0,
        recent_bytes=_RECENT_TOKENS * pooled_row if options.cache is CacheFormat.INT8 else 0,
        host_bytes=kv_bytes * options.is_kv_on_host + _table_bytes(config) * options.is_embedding_on_host,
    )


def why_no_kernels(config: SalaConfig) -> str:
    """Why the kernels for cards do not take a model, as its config says, in words; empty if they do.

    Weights that turn out to be grouped otherwise than their record says are found when they are loaded.
    """
    if config.lightning.num_key_value_heads != config.lightning.num_heads:
        return "its lightning layers share keys between heads"
    record = config.quantization_config or {}
    lightning, sparse = config.lightning, config.sparse
    widths = (lightning.num_heads * lightning.head_dim, sparse.num_attention_heads * sparse.head_dim)
    for scheme in _recorded_schemes(record):
        for num_in in (config.hidden_size, config.intermediate_size, *widths):
            if num_in % _GROUP:
                return f"{num_in:,} input features are not in groups of {_GROUP}"
        if scheme.get("desc_act") is True or scheme.get("actorder") in (True, "group", "dynamic"):
            return "its features are grouped by act-order"
        if scheme.get("strategy") == "channel" or scheme.get("group_size", _GROUP) not in _KERNEL_GROUPS:
            return f"its weights are not in groups of {', '.join(map(str, _KERNEL_GROUPS))}"
    return ""


def _recorded_schemes(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """How integer weights are grouped: by the record, and by its exceptions or its groups."""
    if record.get("quant_method") == "gptq":
        yield record
    for name in ("dynamic", "config_groups"):
        parts = record.get(name)
        for part in parts.values() if isinstance(parts, Mapping) else ():
            scheme = part.get("weights", part) if isinstance(part, Mapping) else None
            if isinstance(scheme, Mapping):
                yield scheme


def fitted(
    config: SalaConfig, num_tokens: int, memory_bytes: int, options: PlanOptions, chunk_size: int | None = None
) -> PlanOptions:
    """The options with the largest chunk that fits into `memory_bytes`, and the embedding table where there is room.

    A larger chunk reads faster, more than a table in host memory costs; small cards keep it there. `chunk_size` is kept
    if given, and where the model runs module by module. If nothing fits, the smallest.
    """
    if not options.is_fused:
        return options if chunk_size is None else replace(options, chunk_size=chunk_size)
    chunks = CUDA_CHUNKS if chunk_size is None else (chunk_size,)
    places = (False, True) if memory_bytes >= _SMALL_CARD_BYTES else (True,)
    if config.tie_word_embeddings:
        places = (False,)
    choices = [
        replace(options, chunk_size=chunk, is_embedding_on_host=on_host) for chunk in chunks for on_host in places
    ]
    fitting = (choice for choice in choices if plan_memory(config, num_tokens, choice).total_bytes <= memory_bytes)
    return next(fitting, choices[-1])


def longest_context(
    config: SalaConfig, memory_bytes: int, options: PlanOptions | None = None, host_bytes: int | None = None
) -> int:
    """The largest number of tokens whose plan fits into `memory_bytes`; 0 if not even the weights fit.

    `host_bytes`: most that may be locked in host memory, None for any amount.
    """
    options = options or PlanOptions()
    fits, too_many = 0, most_tokens(config, options) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        choice = fitted(config, middle, memory_bytes, options)
        plan = plan_memory(config, middle, choice)
        if plan.total_bytes <= memory_bytes and (host_bytes is None or plan.host_bytes <= host_bytes):
            fits = middle
        else:
            too_many = middle
    return fits


def check_fits(plan: MemoryPlan, memory_bytes: int, model: str = "MODEL", alternatives: Sequence[str] = ()) -> None:
    """Raises MemoryBudgetError, with the parts of the plan, if it does not fit into `memory_bytes`.

    The hint names the alternatives, commands that do fit, or else the command that shows the table of `model`.
    """
    if plan.total_bytes > memory_bytes:
        parts = {
            "weights": plan.weight_bytes,
            "cache": plan.cache_bytes,
            "lightning states": plan.lightning_bytes + plan.recent_bytes,
            "work": plan.activation_bytes + plan.logits_bytes + plan.driver_bytes,
        }
        shown = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        raise MemoryBudgetError(
            f"a context of {plan.num_tokens:,} tokens needs {plan.total_bytes / 2**30:.2f} GiB ({shown}), "
            f"{memory_bytes / 2**30:.2f} GiB are free",
            f"these would fit: {'; '.join(alternatives)}"
            if alternatives
            else f"salalocal plan {model} --ctx {plan.num_tokens} shows the table",
        )


def check_lockable(plan: MemoryPlan, host_bytes: int, alternatives: Sequence[str] = ()) -> None:
    """Raises MemoryBudgetError if the plan locks more than `host_bytes` of host memory."""
    if plan.host_bytes > host_bytes:
        raise MemoryBudgetError(
            f"a context of {plan.num_tokens:,} tokens needs {plan.host_bytes / 2**30:.2f} GiB of host memory that "
            f"stays locked, {host_bytes / 2**30:.2f} GiB may be",
            f"these would fit: {'; '.join(alternatives)}" if alternatives else "close other programs that use memory",
        )


def weight_bytes(config: SalaConfig, weights: WeightFormat) -> int:
    """Bytes of all tensors of a checkpoint."""
    if weights in _QUANTIZED:
        return sum(_quantized_bytes(name, shape, weights) for name, shape in expected_tensors(config).items())
    return config.num_parameters * (4 if weights is WeightFormat.FP32 else 2)


def _weight_bytes(config: SalaConfig, options: PlanOptions) -> int:
    is_stored = options.stored is not None and options.weights is options.stored.weights
    num_bytes = options.stored.num_bytes if options.stored and is_stored else weight_bytes(config, options.weights)
    if options.is_fused and options.weights in _INTEGERS:
        num_bytes += _folded_scale_bytes(config)
    return num_bytes - (_table_bytes(config) if options.is_embedding_on_host else 0)


def _table_bytes(config: SalaConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


def _folded_scale_bytes(config: SalaConfig) -> int:
    """Two fp32 numbers for every output feature of the packed maps, see `kernels.int4.scratch`."""
    shapes = expected_tensors(config).items()
    return sum(8 * shape[0] for name, shape in shapes if name.split(".")[-2] in _PACKED_MODULES)


def _quantized_bytes(name: str, shape: tuple[int, ...], weights: WeightFormat) -> int:
    module, count = name.split(".")[-2], prod(shape)
    if module not in _PACKED_MODULES:
        return 2 * count
    if weights in (WeightFormat.NF4, WeightFormat.FP4):
        return count // 2 + 4 * -(-count // _CODEBOOK_BLOCK)
    num_out, num_in = shape
    groups, bits = -(-num_in // _GROUP), 8 if weights is WeightFormat.INT8 else 4
    scales, group_index = 2 * groups * num_out, 4 * num_in
    return (num_in + groups) * num_out * bits // 8 + scales + group_index  # codes and zero points first


def _kv_row_bytes(head_dim: int, cache: CacheFormat) -> int:
    return {CacheFormat.BF16: 2 * head_dim, CacheFormat.FP32: 4 * head_dim, CacheFormat.INT8: head_dim + 2}[cache]


def _pooled_width(cache: CacheFormat) -> int:
    return 4 if cache is CacheFormat.FP32 else 2


def _lightning_bytes(config: SalaConfig) -> int:
    heads = config.lightning
    return config.mixer_types.count(LIGHTNING) * heads.num_heads * heads.head_dim**2 * 4


def _activation_bytes(config: SalaConfig, num_tokens: int, options: PlanOptions) -> int:
    """The largest set of temporary tensors: the residual stream, and the MLP or one mixer, whichever is larger."""
    rows = min(options.chunk_size, max(1, num_tokens))
    if options.is_fused:
        work = _fused_work_bytes(config, rows, options)
        return work + (_host_work_bytes(config, num_tokens, rows, options) if options.is_kv_on_host else 0)
    # The cache is in the dtype of the activations, unless it is quantized.
    item = 4 if options.weights is WeightFormat.FP32 or options.cache is CacheFormat.FP32 else 2
    mixers = {
        SPARSE: _sparse_work_bytes(config, num_tokens, rows, item),
        LIGHTNING: _lightning_work_bytes(config, rows, item),
    }
    mlp = 4 * rows * config.intermediate_size * item  # gate, its activation, up and their product
    stream = 4 * rows * config.hidden_size * item
    return stream + max(mlp, *(mixers[mixer] for mixer in config.mixer_types))


def _lightning_work_bytes(config: SalaConfig, rows: int, item: int) -> int:
    heads = config.lightning
    # q, k, v, gate and output in the model's dtype; in fp32 the same without the gate, their decayed copies and the
    # scores of a chunk; two states for each of the eight chunks that are worked on together.
    return rows * heads.num_heads * heads.head_dim * (5 * item + 12 * 4) + 16 * heads.num_heads * heads.head_dim**2 * 4


def _sparse_work_bytes(config: SalaConfig, num_tokens: int, rows: int, item: int) -> int:
    sparse = config.sparse
    width = sparse.num_attention_heads * sparse.head_dim
    num_picked = min(sparse.topk + sparse.window_size // sparse.block_size, -(-num_tokens // sparse.block_size))
    # What the rows read from each picked block, and from those they share, before it is merged, held twice; both kinds
    # of pooled keys in fp32.
    group_width = width // sparse.num_key_value_heads
    parts = 2 * 4 * (min(rows * num_picked * group_width, _MAX_PARTIAL_VALUES) + rows * group_width)
    pooled = 4 * sparse.num_key_value_heads * sparse.head_dim * (num_tokens // sparse.kernel_stride) * 5 // 4
    return rows * width * (5 * item + 2 * 4) + parts + pooled + _TILE_BYTES


def _fused_work_bytes(config: SalaConfig, rows: int, options: PlanOptions) -> int:
    """A chunk in `engine.fused`: hidden states in bf16, what a product takes in one byte a number, or two."""
    item = 2 if options.math == "bf16" else 1
    hidden, inner = config.hidden_size, config.intermediate_size
    lightning, sparse = config.lightning, config.sparse
    width = lightning.num_heads * lightning.head_dim
    # q, k, v and gate, q and k turned, outputs, what o_proj takes; a state for every segment, and the new one.
    states = 4 * (1 + -(-rows // _LIGHTNING_SEGMENT)) * lightning.num_heads * lightning.head_dim**2
    mixers = [rows * width * (2 * 7 + item) + states]
    sparse_width = sparse.num_attention_heads * sparse.head_dim
    kv_width = sparse.num_key_value_heads * sparse.head_dim
    num_picks = sparse.topk + sparse.window_size // sparse.block_size
    mixers.append(
        rows * (2 * (3 * sparse_width + 2 * kv_width) + item * sparse_width)
        + 8 * rows * num_picks * sparse.num_key_value_heads
        + _TILE_BYTES
    )
    # gate and up, or what became of them where the product itself joins them, and what down_proj takes.
    mlp = inner * (rows * (4 + item) if options.math != "int8" else max(3 * rows, 5 * min(rows, _FUSED_ROWS)))
    # The residual stream, and the last hidden states of the chunk before.
    stream = 2 * 2 * rows * hidden
    largest = max(hidden * inner, _largest_packed(config))
    scratch = min(largest * (2 if options.math == "bf16" else 1), _MAX_SCRATCH_BYTES) + _GEMM_SCRATCH_BYTES
    return stream + max(mlp, *mixers) + scratch + _recorded_bytes(config) + _UNCOUNTED_BYTES


def _recorded_bytes(config: SalaConfig) -> int:
    """What is noted of the blocks that an answer's rows picked, and that a step's rows pick: numbers and weights."""
    sparse = config.sparse
    lists = config.mixer_types.count(SPARSE) * sparse.num_key_value_heads
    num_picks = sparse.topk + sparse.window_size // sparse.block_size
    widest = max(num_picks, -(-sparse.dense_len // sparse.block_size))
    return lists * (6 * _RECORDED_ROWS * num_picks + 12 * _STEP_ROWS * widest)


def _host_work_bytes(config: SalaConfig, num_tokens: int, rows: int, options: PlanOptions) -> int:
    """Blocks of one layer brought from host memory, and notes, held thrice at most, of who picked which."""
    sparse = config.sparse
    num_blocks = -(-num_tokens // sparse.block_size)
    token = 2 * sparse.num_key_value_heads * _kv_row_bytes(sparse.head_dim, options.cache)
    copies = min(num_blocks + 2, _HOST_COPIES) * sparse.block_size * token
    return copies + 3 * -(-rows // _HOST_GROUP_ROWS) * sparse.num_key_value_heads * num_blocks


def _largest_packed(config: SalaConfig) -> int:
    shapes = expected_tensors(config).items()
    return max(prod(shape) for name, shape in shapes if name.split(".")[-2] in _PACKED_MODULES)
