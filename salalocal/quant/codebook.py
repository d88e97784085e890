"""Weights as entries of a codebook of 16 values, NF4 or FP4: a float matrix in, codes and block maxima out, the tensors
of a bitsandbytes checkpoint, and back; for the quantizer and the formats.

    flat[i] = absmax[i // block_size] * codebook[code[i]],   W = flat as [out, in]

Needs no calibration and no search: a block is divided by its largest magnitude and every weight takes the nearest
entry, in float32, as bitsandbytes does it on a CPU; codes and maxima are equal to its own. bitsandbytes names, for a
map of `in` to `out` features: `weight` uint8 [out * in / 2, 1], `weight.absmax` float32 [blocks], `weight.quant_map`
float32 [16], and `weight.quant_state.bitsandbytes__nf4` (or fp4), the bytes of a JSON object with `quant_type`,
`blocksize`, `dtype` and `shape`. With double quantization `weight.absmax` is uint8, each an index into
`weight.nested_quant_map` float32 [256] scaled by `weight.nested_absmax`, with `nested_offset` added.
Source: bitsandbytes, functional.quantize_4bit and QuantState; QLoRA, arXiv 2305.14314.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from salalocal.checkpoint.strict_json import one_line, parse_object
from salalocal.errors import CheckpointError
from salalocal.kernels.codebook_matmul import (
    codebook_matmul,
    dequantize_codes,
    pack_pairs,
    pair_table,
    row_multiple,
)

NF4, FP4 = "nf4", "fp4"

# By code. NF4: quantiles of the normal distribution; FP4: a sign, two bits of exponent and one of mantissa, over 12.
CODEBOOKS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        NF4: (
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ),
        FP4: tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
    }
)  # fmt: skip
# Codes by rising value; the two zeros of FP4 in the order that bitsandbytes gives them.
_RISING: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {NF4: tuple(range(16)), FP4: (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE_LEAF = "weight.quant_state.bitsandbytes__"
MAX_STATE_BYTES = 4096
NESTED_LEAVES = ("weight.nested_absmax", "weight.nested_quant_map")

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SMALLEST_DIVISOR = 1e-38
_CODEBOOK_TOLERANCE = 1e-5  # some writers round the entries of FP4


@dataclass(frozen=True)
class CodebookScheme:
    """How a matrix is quantized: the name of the codebook, and how many weights share a maximum."""

    kind: str
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.kind not in CODEBOOKS:
            raise ValueError(f"codebook {self.kind!r}, known are {' and '.join(CODEBOOKS)}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"blocks of {self.block_size}, known are {', '.join(map(str, BLOCK_SIZES))}")

    def num_blocks(self, out_features: int, in_features: int) -> int:
        """How many maxima a matrix has; the last block may be short."""
        return -(-out_features * in_features // self.block_size)

    def num_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a matrix in memory."""
        return out_features * in_features // 2 + 4 * self.num_blocks(out_features, in_features) + 4 * 16

    def row_multiple(self, in_features: int) -> int:
        """The fewest rows that hold whole blocks only: a matrix may be cut at its multiples."""
        return row_multiple(in_features, self.block_size)

    def can_pack(self, out_features: int, in_features: int) -> bool:
        """Whether the codes of a row fill whole bytes."""
        return in_features % 2 == 0


@dataclass(frozen=True, eq=False)
class CodebookWeight:
    """A quantized matrix at its stored size.

    Shapes: codes uint8 [out * in / 2], see kernels.codebook_matmul; absmax float32 [blocks]; shape is [out, in].
    `dtype` is that of the matrix it was made from, to which bitsandbytes dequantizes. Raises: ValueError for other
    shapes or dtypes.
    """

    codes: Tensor
    absmax: Tensor
    scheme: CodebookScheme
    shape: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not self.scheme.can_pack(*self.shape):
            raise ValueError(f"{list(self.shape)} is odd: its rows do not fill whole bytes")
        parts = {
            "codes": (self.codes, torch.uint8, math.prod(self.shape) // 2),
            "absmax": (self.absmax, torch.float32, self.scheme.num_blocks(*self.shape)),
        }
        for name, (tensor, dtype, count) in parts.items():
            if tensor.dtype != dtype or tensor.shape != (count,):
                raise ValueError(f"{name} are {tensor.dtype} {tuple(tensor.shape)}, needed are {dtype} ({count},)")

    @property
    def codebook(self) -> Tensor:
        """The values that the codes stand for. Shapes: float32 [16]."""
        return torch.tensor(CODEBOOKS[self.scheme.kind], device=self.codes.device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, computed in fp32 and then rounded. Shapes: [out, in]."""
        flat = dequantize_codes(self.codes, self.absmax, pair_table(self.codebook), self.scheme.block_size)
        return flat.view(self.shape).to(dtype)

    def to(self, device: torch.device) -> "CodebookWeight":
        """The same matrix on a device."""
        return CodebookWeight(self.codes.to(device), self.absmax.to(device), self.scheme, self.shape, self.dtype)

    @staticmethod
    def joined(pieces: Sequence["CodebookWeight"]) -> "CodebookWeight":
        """One matrix of pieces of its rows, in their order; all but the last of whole blocks."""
        first = pieces[0]
        return CodebookWeight(
            torch.cat([piece.codes for piece in pieces]),
            torch.cat([piece.absmax for piece in pieces]),
            first.scheme,
            (sum(piece.shape[0] for piece in pieces), first.shape[1]),
            first.dtype,
        )


class CodebookLinear(nn.Module):
    """y = x @ dequantize(W)^T, in the dtype of x."""

    def __init__(self, weight: CodebookWeight) -> None:
        super().__init__()
        self.codes: Tensor
        self.absmax: Tensor
        self.codebook: Tensor
        self.block_size = weight.scheme.block_size
        self.kind = weight.scheme.kind
        self.register_buffer("codes", weight.codes)
        self.register_buffer("absmax", weight.absmax)
        self.register_buffer("codebook", weight.codebook, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return codebook_matmul(x, self.codes, self.absmax, self.codebook, self.block_size, self.kind)


def round_to_codebook(weight: Tensor, scheme: CodebookScheme, dtype: torch.dtype) -> CodebookWeight:
    """Give every weight the nearest entry; `dtype` is that of the stored matrix.

    Shapes: weight [out, in], finite. Raises: ValueError if the rows do not fill whole bytes.
    """
    num_out, num_in = weight.shape
    flat = weight.float().flatten()
    num_whole = len(flat) // scheme.block_size
    blocks, rest = (
        flat[: num_whole * scheme.block_size].view(-1, scheme.block_size),
        flat[num_whole * scheme.block_size :],
    )
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST_DIVISOR)).unsqueeze(1)).flatten()
    if len(rest):  # divided by, and stored no smaller than the divisor, as bitsandbytes has it
        largest = rest.abs().amax().clamp(min=_SMALLEST_DIVISOR)
        absmax, scaled = torch.cat((absmax, largest[None])), torch.cat((scaled, rest / largest))
    rising = torch.tensor(_RISING[scheme.kind], dtype=torch.uint8, device=weight.device)
    values = torch.tensor(CODEBOOKS[scheme.kind], device=weight.device)[rising.long()]
    middles = (values[:-1] + values[1:]) / 2
    places = torch.bucketize(scaled.clamp_(-1.0, 1.0), middles, out_int32=True)
    return CodebookWeight(pack_pairs(rising[places]), absmax, scheme, (num_out, num_in), dtype)


def to_bitsandbytes(weight: CodebookWeight) -> dict[str, Tensor]:
    """The tensors of a 4-bit bitsandbytes matrix without double quantization, by their last names."""
    state = state_bytes(weight.scheme, weight.shape, weight.dtype)
    return {
        "weight": weight.codes.unsqueeze(1),
        "weight.absmax": weight.absmax,
        "weight.quant_map": weight.codebook,
        f"{STATE_LEAF}{weight.scheme.kind}": torch.tensor(list(state), dtype=torch.uint8),
    }


def state_bytes(scheme: CodebookScheme, shape: Sequence[int], dtype: torch.dtype) -> bytes:
    """The JSON that stands with a matrix."""
    state = {"quant_type": scheme.kind, "blocksize": scheme.block_size}
    return json.dumps({**state, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}).encode()


@dataclass(frozen=True)
class Nesting:
    """Double quantization. Units: block_size in maxima that share a scale."""

    block_size: int
    offset: float


@dataclass(frozen=True)
class StoredState:
    """What the JSON of a stored matrix says."""

    scheme: CodebookScheme
    shape: tuple[int, ...]
    dtype: torch.dtype
    nesting: Nesting | None


def read_state(kind: str, data: Tensor) -> StoredState:
    """The state of a matrix out of its bytes; `kind` is the codebook that stands in the tensor's name.

    Shapes: data uint8 [N]. Raises: CheckpointError for what bitsandbytes would not have written.
    """
    if data.dtype != torch.uint8 or data.ndim != 1 or len(data) > MAX_STATE_BYTES:
        raise CheckpointError(f"quant_state is {data.dtype} {list(data.shape)}, needed are up to 4,096 bytes")
    state: Mapping[str, Any] = parse_object(bytes(data.tolist()), "quant_state")
    block_size, dtype, shape = state.get("blocksize"), str(state.get("dtype")), state.get("shape")
    is_known = kind in CODEBOOKS and kind == state.get("quant_type") and dtype in _DTYPES
    is_sized = type(block_size) is int and block_size in BLOCK_SIZES and isinstance(shape, list)
    if not (is_known and is_sized):
        raise CheckpointError(f"quant_state {one_line(dict(state), 160)} is not one of bitsandbytes' {kind}")
    scheme = CodebookScheme(kind, state["blocksize"])
    return StoredState(scheme, tuple(state["shape"]), _DTYPES[dtype], _nesting(state))


def _nesting(state: Mapping[str, Any]) -> Nesting | None:
    offset, block_size = state.get("nested_offset"), state.get("nested_blocksize")
    if offset is None and block_size is None:
        return None
    is_number = type(offset) in (int, float) and math.isfinite(state["nested_offset"])
    if not (is_number and type(block_size) is int and block_size > 0 and state.get("nested_dtype") == "float32"):
        raise CheckpointError(f"quant_state {one_line(dict(state), 160)}: its double quantization is not understood")
    return Nesting(block_size, float(state["nested_offset"]))


def from_bitsandbytes(tensors: Mapping[str, Tensor]) -> CodebookWeight:
    """The matrix that stored tensors (by their last names) stand for; doubly quantized maxima are unfolded.

    Raises: CheckpointError for a state or a codebook that bitsandbytes would not have written; ValueError for shapes
    that do not belong together.
    """
    leaf = next(leaf for leaf in tensors if leaf.startswith(STATE_LEAF))
    state = read_state(leaf.removeprefix(STATE_LEAF), tensors[leaf])
    codebook = tensors["weight.quant_map"]
    known = torch.tensor(CODEBOOKS[state.scheme.kind], device=codebook.device)
    if not torch.allclose(codebook, known, rtol=0.0, atol=_CODEBOOK_TOLERANCE):
        raise CheckpointError(f"quant_map does not hold the 16 values of {state.scheme.kind}")
    absmax = tensors["weight.absmax"]
    if state.nesting is not None:
        nested_absmax, nested_map = (tensors[leaf] for leaf in NESTED_LEAVES)
        scales = nested_absmax.repeat_interleave(state.nesting.block_size)[: len(absmax)]
        absmax = nested_map[absmax.long()] * scales + state.nesting.offset
    num_out, num_in = state.shape
    return CodebookWeight(tensors["weight"].flatten(), absmax, state.scheme, (num_out, num_in), state.dtype)
