"""What is done to which tensor: a model's shape and the options come in, steps with schemes go out; for the quantizer.

A step is what is read, quantized and stored at once: the embedding, every layer, and what comes after them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from salalocal.checkpoint.names import EMBEDDING, HEAD, Shape, expected_tensors
from salalocal.errors import RequestError
from salalocal.model.config import SPARSE, SalaConfig
from salalocal.quant.calibration import INPUT_OF
from salalocal.quant.codebook import FP4, NF4, CodebookScheme, state_bytes
from salalocal.quant.gptq import DEFAULT_DAMPING
from salalocal.quant.int4 import IntScheme
from salalocal.quant.stored import Scheme

RTN, GPTQ = "rtn", "gptq"
CODEBOOK_METHODS = (NF4, FP4)
METHODS = (RTN, GPTQ, *CODEBOOK_METHODS)
BITS = (4, 8)
ROW = -1  # as GPTQ files spell one scale for a whole row
GROUP_SIZES = (8, 16, 32, 64, 128, ROW)
CODEBOOK_BLOCK_SIZES = (32, 64, 128, 256)
HEAD_BITS = (8, 16)

_DEFAULT_GROUP_SIZES: Mapping[str, int] = MappingProxyType({RTN: 128, GPTQ: 128, NF4: 64, FP4: 64})
_NO_WAY = "a model of such sizes cannot be quantized"
_SENSITIVE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def parse_group_size(text: str | None, method: str) -> int:
    """How many weights share a scale: a number, `row`, or None for what the method takes by itself.

    Raises: RequestError for another word, or a method that is not known.
    """
    _check_known("method", method, METHODS)
    if text is None:
        return _DEFAULT_GROUP_SIZES[method]
    if text.lower() in ("row", str(ROW)):
        return ROW
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise RequestError(
            f"group size {text[:40]!r} is no number", f"choose from {', '.join(map(_spelled, GROUP_SIZES))}"
        )
    return int(text)


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize. Units: group_size in weights that share a scale, ROW for all of a row.

    `sensitive_bits` are those of q, k and v of the sparse layers, which choose blocks; `head_bits` those of lm_head,
    16 for as it is, which is the default since engines that share this format build the head of this family without
    a quantization. `damping` is what GPTQ adds to the diagonal of the moments, as a fraction of its mean. The
    methods with a codebook have 4 bits everywhere, in blocks along the whole matrix. Raises: RequestError.
    """

    method: str = RTN
    bits: int = 4
    group_size: int = 128
    sensitive_bits: int = 4
    damping: float = DEFAULT_DAMPING
    head_bits: int = 16

    def __post_init__(self) -> None:
        has_codebook = self.method in CODEBOOK_METHODS
        for name, value, known in (
            ("method", self.method, METHODS),
            ("bits", self.bits, BITS),
            ("sensitive bits", self.sensitive_bits, BITS),
            ("lm_head bits", self.head_bits, HEAD_BITS),
            ("group size", self.group_size, CODEBOOK_BLOCK_SIZES if has_codebook else GROUP_SIZES),
        ):
            _check_known(name, value, known)
        if has_codebook and (self.bits, self.sensitive_bits, self.head_bits) != (4, 4, 16):
            raise RequestError(f"{self.method} has 4 bits in every layer and leaves lm_head as it is", "--method gptq")
        if not 0 < self.damping <= 1:
            raise RequestError(f"damping {self.damping} is not above 0 and at most 1", "0.01 is usual")

    @property
    def label(self) -> str:
        """The options in a word, for names of folders."""
        group = "row" if self.group_size == ROW else f"g{self.group_size}"
        if self.method in CODEBOOK_METHODS:
            return f"{self.method}-{group}"
        extra = "".join(
            f"-{part}{bits}"
            for part, bits, usual in (("sensitive", self.sensitive_bits, self.bits), ("head", self.head_bits, 16))
            if bits != usual
        )
        return f"int{self.bits}-{group}-{self.method}{extra}"

    def scheme(self, in_features: int, bits: int) -> Scheme:
        """How a matrix of this width is quantized with so many bits."""
        if self.method in CODEBOOK_METHODS:
            return CodebookScheme(self.method, self.group_size)
        return IntScheme(bits, in_features if self.group_size == ROW else self.group_size)


@dataclass(frozen=True)
class Step:
    """One step: its tensors with their shapes; for the linear maps that are quantized, the scheme.

    `layer` is None for the first and the last step.
    """

    name: str
    layer: int | None
    shapes: dict[str, Shape]
    schemes: dict[str, Scheme]

    @property
    def num_quantized(self) -> int:
        """How many weights are quantized in it; its time goes by them."""
        return sum(math.prod(self.shapes[name]) for name in self.schemes)

    @property
    def result_bytes(self) -> int:
        """Bytes of the tensors that come of it."""
        return sum(_stored_bytes(shape, self.schemes.get(name)) for name, shape in self.shapes.items())


def make_steps(config: SalaConfig, options: QuantizeOptions) -> list[Step]:
    """All steps in their order. Raises: RequestError naming a matrix that the groups do not fit, or tied embeddings
    whose head is to be quantized."""
    shapes = expected_tensors(config)
    outside = {name: shape for name, shape in shapes.items() if not name.startswith("model.layers.")}
    steps = [Step("embedding", None, {EMBEDDING: outside.pop(EMBEDDING)}, {})]
    for layer, mixer in enumerate(config.mixer_types):
        prefix = f"model.layers.{layer}."
        held = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        schemes = {}
        for name, shape in held.items():
            module = name.removeprefix(prefix).removesuffix(".weight")
            if module in INPUT_OF:
                is_sensitive = mixer == SPARSE and module in _SENSITIVE
                schemes[name] = _scheme(name, shape, options, options.sensitive_bits if is_sensitive else options.bits)
        steps.append(Step(f"layer {layer}", layer, held, schemes))
    head_schemes = {}
    if options.head_bits in BITS:
        if config.tie_word_embeddings:
            raise RequestError("this model has no lm_head to quantize: it shares the embedding", "--lm-head 16")
        head_schemes[HEAD] = _scheme(HEAD, outside[HEAD], options, options.head_bits)
    return [*steps, Step("head", None, outside, head_schemes)]


def quantization_record(config: SalaConfig, options: QuantizeOptions, dtype: str) -> dict[str, Any]:
    """The `quantization_config` of the result, as readers of its format know it; `dtype` is that of its other weights,
    spelled as in config.json."""
    if options.method in CODEBOOK_METHODS:
        return _bitsandbytes_record(options, dtype)
    return gptq_record(config, options)


def _bitsandbytes_record(options: QuantizeOptions, dtype: str) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig writes. The size of the blocks stands with every matrix."""
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": options.method,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
    }


def gptq_record(config: SalaConfig, options: QuantizeOptions) -> dict[str, Any]:
    """The `quantization_config` of the result, as GPTQ readers know it.

    Maps that differ from the rest stand under `dynamic`: those of a layer with the name under which engines fuse them.
    """
    record: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": options.head_bits in BITS,
        "pack_dtype": "int32",
    }
    dynamic = {}
    if options.sensitive_bits != options.bits:
        layers = [layer for layer, mixer in enumerate(config.mixer_types) if mixer == SPARSE]
        pattern = r"+:^model\.layers\.{}\.self_attn\.(?:q|k|v|qkv)_proj$"
        dynamic.update({pattern.format(layer): {"bits": options.sensitive_bits} for layer in layers})
    if options.head_bits not in (16, options.bits):
        dynamic["+:^lm_head$"] = {"bits": options.head_bits}
    return {**record, "dynamic": dynamic} if dynamic else record


def _check_known(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        shown = "row" if value == ROW else repr(value)
        raise RequestError(f"{name} {shown} is not known", f"choose from {', '.join(map(_spelled, known))}")


def _spelled(value: object) -> str:
    return "row" if value == ROW else str(value)


def _scheme(name: str, shape: Shape, options: QuantizeOptions, bits: int) -> Scheme:
    """The scheme of one matrix. Raises: RequestError if it cannot be stored so."""
    num_out, num_in = shape
    scheme = options.scheme(num_in, bits)
    if isinstance(scheme, CodebookScheme):
        if not scheme.can_pack(num_out, num_in):
            raise RequestError(f"{name} is [{num_out}, {num_in}]: {scheme.kind} needs rows of even length", _NO_WAY)
    elif num_in % scheme.group_size or not scheme.can_pack(num_out, num_in):
        size = "a row" if options.group_size == ROW else str(scheme.group_size)
        fitting = [size for size in GROUP_SIZES if size != ROW and num_in % size == 0]
        raise RequestError(
            f"{name} is [{num_out}, {num_in}]: groups of {size} do not fit",
            f"--group-size {fitting[-1]}" if fitting and options.group_size != ROW else _NO_WAY,
        )
    return scheme


def _stored_bytes(shape: Shape, scheme: Scheme | None) -> int:
    if scheme is None:
        return 2 * math.prod(shape)
    num_out, num_in = shape
    if isinstance(scheme, CodebookScheme):
        return scheme.num_bytes(num_out, num_in) + len(state_bytes(scheme, shape, torch.bfloat16))
    num_groups = scheme.num_groups(num_in)
    words = num_out * (num_in + num_groups) * scheme.bits // 8  # codes and zero points
    return words + 2 * num_out * num_groups + 4 * num_in  # scales and the group of every column
