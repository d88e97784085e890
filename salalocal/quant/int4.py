"""Symmetric integer weights in groups: codes and scales in, the tensors of a GPTQ checkpoint out, and back; for the
quantizer and the formats.

    W[o, i] = scales[o, g(i)] * (codes[o, i] - 2**(bits - 1)),   g(i) = i // group_size or group_index[i]

GPTQ names, for a map of `in` to `out` features: `qweight` int32 [in * bits / 32, out], `qzeros` int32 [groups, out *
bits / 32], `scales` [groups, out], `g_idx` int32 [in]. Version 1 (`checkpoint_format` "gptq") stores each zero point
less one, version 2 ("gptq_v2") as it is. Source: AutoGPTQ and GPTQModel; specification of MiniCPM-SALA, section 14.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salalocal.checkpoint.strict_json import one_line
from salalocal.errors import CheckpointError
from salalocal.kernels.packing import PACKED_BITS, WORD_BITS, pack_codes, unpack_codes

GPTQ_LEAVES = ("qweight", "qzeros", "scales", "g_idx")
GPTQ_VERSIONS = ("gptq", "gptq_v2")
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class IntScheme:
    """How finely a matrix is quantized. Units: group_size in input features that share a scale."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in PACKED_BITS:
            raise ValueError(f"{self.bits} bits, known are {' and '.join(map(str, PACKED_BITS))}")
        if self.group_size < 1:
            raise ValueError(f"groups of {self.group_size}")

    def num_groups(self, in_features: int) -> int:
        """How many scales a row has; the last group may be short."""
        return -(-in_features // self.group_size)

    def num_bytes(self, out_features: int, in_features: int) -> int:
        """At most so many bytes of a matrix in memory: codes, scales of four bytes, the group of every feature."""
        codes = out_features * in_features * self.bits // 8
        return codes + 4 * out_features * self.num_groups(in_features) + 4 * in_features

    def can_pack(self, out_features: int, in_features: int) -> bool:
        """Whether codes and zero points of such a matrix fill whole words, as the GPTQ layout needs."""
        codes_per_word = WORD_BITS // self.bits
        return out_features % codes_per_word == 0 and in_features % codes_per_word == 0


@dataclass(frozen=True, eq=False)
class IntWeight:
    """A quantized matrix with one code per weight.

    Shapes: codes uint8 [out, in], below 2**bits; scales [out, groups] in a floating dtype; group_index int32 [in], the
    group of every input feature, or None for `i // group_size`. Raises: ValueError for other shapes or dtypes.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    group_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes are {self.codes.dtype}, needed is uint8")
        num_out, num_in = self.codes.shape
        _check_shapes(num_out, num_in, self.scheme, self.scales, self.group_index)

    @property
    def scheme(self) -> IntScheme:
        """Bits and group size."""
        return IntScheme(self.bits, self.group_size)

    def packed(self) -> "PackedWeight":
        """The same matrix as it is stored and computed with. Raises: ValueError if codes do not fill whole words."""
        words = pack_codes(self.codes, self.bits)
        return PackedWeight(words, self.scales, self.bits, self.group_size, self.group_index)

    @staticmethod
    def joined(pieces: Sequence["IntWeight"]) -> "IntWeight":
        """One matrix of pieces of its rows, in their order."""
        first = pieces[0]
        codes, scales = torch.cat([piece.codes for piece in pieces]), torch.cat([piece.scales for piece in pieces])
        return IntWeight(codes, scales, first.bits, first.group_size, first.group_index)

    @property
    def groups(self) -> Tensor:
        """The group of every input feature. Shapes: int32 [in]."""
        if self.group_index is not None:
            return self.group_index
        return group_numbers(self.codes.shape[1], self.group_size, self.codes.device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, computed in fp32 (float64 for that dtype) and then rounded. Shapes: [out, in]."""
        wide = torch.promote_types(dtype, torch.float32)
        centred = self.codes.to(wide) - float(2 ** (self.bits - 1))
        scales = self.scales.to(wide)[:, self.groups.long()]
        return (centred * scales).to(dtype)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized matrix at its stored size; words and scales may be views of a file that holds them transposed.

    Shapes: words int32 [out, in * bits / 32], see kernels.packing; the rest as in `IntWeight`. Raises: ValueError for
    other shapes or dtypes.
    """

    words: Tensor
    scales: Tensor
    bits: int
    group_size: int
    group_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.words.dtype != torch.int32:
            raise ValueError(f"words are {self.words.dtype}, needed is int32")
        num_out, num_words = self.words.shape
        scheme = IntScheme(self.bits, self.group_size)
        _check_shapes(num_out, num_words * WORD_BITS // self.bits, scheme, self.scales, self.group_index)

    def unpacked(self) -> IntWeight:
        """The same matrix with one code per weight."""
        codes = unpack_codes(self.words, self.bits)
        return IntWeight(codes, self.scales, self.bits, self.group_size, self.group_index)

    def to(self, device: torch.device) -> "PackedWeight":
        """The same matrix on a device, row by row: bytes travel as they lie, and it is the device that turns them."""
        words, scales = self.words.to(device).contiguous(), self.scales.to(device).contiguous()
        group_index = None if self.group_index is None else self.group_index.to(device)
        return PackedWeight(words, scales, self.bits, self.group_size, group_index)


def group_numbers(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """The group of every input feature without act-order. Shapes: int32 [in]."""
    return torch.arange(in_features, device=device, dtype=torch.int32) // group_size


def to_gptq(weight: IntWeight) -> dict[str, Tensor]:
    """The four tensors of GPTQ version 1, by their last name. Raises: ValueError if codes do not fill whole words."""
    num_out, num_in = weight.codes.shape
    if not weight.scheme.can_pack(num_out, num_in):
        raise ValueError(f"[{num_out}, {num_in}] does not fill whole words of {weight.bits}-bit codes")
    zeros = torch.full((weight.scales.shape[1], num_out), 2 ** (weight.bits - 1) - 1, dtype=torch.uint8)
    return {
        "qweight": pack_codes(weight.codes, weight.bits).t().contiguous(),
        "qzeros": pack_codes(zeros, weight.bits).to(weight.codes.device),
        "scales": weight.scales.t().contiguous(),
        "g_idx": weight.groups.clone(),
    }


def from_gptq(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> IntWeight:
    """The matrix that four GPTQ tensors stand for: `packed_from_gptq`, one code per weight."""
    return packed_from_gptq(tensors, record).unpacked()


def packed_from_gptq(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> PackedWeight:
    """The matrix that four GPTQ tensors (by their last name) stand for, as a view of them; `record` is the folder's
    quantization_config.

    Bits follow from the shapes and groups from `g_idx`: a matrix of a mixed checkpoint needs no pattern matched.
    Raises: CheckpointError for a version that is not known, zero points that are not symmetric, or groups that do not
    exist; ValueError for shapes that do not belong together.
    """
    qweight, qzeros, scales, group_index = (tensors[leaf] for leaf in GPTQ_LEAVES)
    num_in, num_groups = group_index.numel(), scales.shape[0]
    bits = qweight.shape[0] * WORD_BITS // num_in
    _check_zeros(qzeros, bits, record)
    check_groups(group_index, num_groups)
    group_size = _group_size(num_in, num_groups, record)
    in_order = torch.equal(group_index, group_numbers(num_in, group_size, group_index.device))
    return PackedWeight(
        words=qweight.t(),
        scales=scales.t(),
        bits=bits,
        group_size=group_size,
        group_index=None if in_order else group_index,
    )


def _check_shapes(num_out: int, num_in: int, scheme: IntScheme, scales: Tensor, group_index: Tensor | None) -> None:
    expected = (num_out, scheme.num_groups(num_in))
    if scales.shape != expected or scales.dtype not in SCALE_DTYPES:
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}, needed are {expected} floats")
    if group_index is not None and (group_index.shape != (num_in,) or group_index.dtype != torch.int32):
        raise ValueError(f"group_index is {group_index.dtype} {tuple(group_index.shape)}, needed is int32 {(num_in,)}")


def check_groups(group_index: Tensor, num_groups: int) -> None:
    """Raises CheckpointError if a feature belongs to a group that has no scale."""
    if group_index.numel() and not 0 <= int(group_index.min()) <= int(group_index.max()) < num_groups:
        raise CheckpointError(
            f"g_idx goes from {int(group_index.min()):,} to {int(group_index.max()):,}, groups are {num_groups:,}"
        )


def _check_zeros(qzeros: Tensor, bits: int, record: Mapping[str, Any]) -> None:
    """Refuse zero points other than the middle code, which are what `sym: false` makes."""
    version = record.get("checkpoint_format", GPTQ_VERSIONS[0])
    if version not in GPTQ_VERSIONS:
        raise CheckpointError(f"checkpoint_format {one_line(version, 30)} is not {' or '.join(GPTQ_VERSIONS)}")
    stored = 2 ** (bits - 1) - (1 if version == GPTQ_VERSIONS[0] else 0)
    word = pack_codes(torch.full((WORD_BITS // bits,), stored, dtype=torch.uint8), bits)
    if not bool((qzeros == word.to(qzeros.device)).all()):
        raise CheckpointError("zero points are not symmetric, which is the only kind that can be read")


def _group_size(in_features: int, num_groups: int, record: Mapping[str, Any]) -> int:
    """The recorded group size where it gives this many groups, else the one that divides the features evenly."""
    recorded = record.get("group_size")
    if type(recorded) is int and recorded > 0 and -(-in_features // recorded) == num_groups:
        return recorded
    return -(-in_features // num_groups)
