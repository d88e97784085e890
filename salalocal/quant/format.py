"""What a weight format must know, and the layout of one folder: a Checkpoint comes in, what is quantized how goes
out; for the engine.

A checkpoint describes itself: which linear maps are quantized is seen from the tensors that it holds, how is said by
`quantization_config` in config.json and must agree with their shapes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import Shape, TensorSpec
from salalocal.checkpoint.strict_json import one_line
from salalocal.errors import CheckpointError
from salalocal.kernels.packing import PACKED_BITS, WORD_BITS
from salalocal.quant.codebook import CodebookWeight
from salalocal.quant.int4 import IntScheme, PackedWeight
from salalocal.quant.stored import LoadedWeight, Scheme

MAX_SCHEMES = 256

_WORD_DTYPE = ("I32",)
_Loaded = TypeVar("_Loaded", PackedWeight, CodebookWeight)


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized linear map as it lies in a folder. `tensors`: by their last name, what must be there.

    Shapes: shape is [out, in].
    """

    shape: Shape
    scheme: Scheme
    tensors: Mapping[str, TensorSpec]

    @property
    def num_bytes(self) -> int:
        """At most so many bytes in memory."""
        num_out, num_in = self.shape
        return self.scheme.num_bytes(num_out, num_in)


class WeightFormat(Protocol):
    """One way to store quantized linear maps, bound to a folder."""

    def find(self, module: str, shape: Shape) -> StoredMatrix | None:
        """How the folder stores a linear map [out, in]; None if it is not quantized. Raises: CheckpointError."""

    def read(self, module: str) -> LoadedWeight:
        """A quantized linear map whose tensors have been checked. Raises: CheckpointError."""


class DenseFormat:
    """No linear map is quantized."""

    def find(self, module: str, shape: Shape) -> StoredMatrix | None:
        """None, always."""
        return None

    def read(self, module: str) -> LoadedWeight:
        """Raises KeyError: there is none."""
        raise KeyError(module)


@dataclass(frozen=True)
class DeclaredScheme:
    """What a record says of a group of matrices. `group_size` None: one scale per row."""

    bits: int
    group_size: int | None

    def scheme(self, in_features: int) -> IntScheme:
        """The scheme of a matrix of this width."""
        return IntScheme(self.bits, self.group_size or in_features)

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size or 'a row'}"


def declared_scheme(bits: Any, group_size: Any, where: str) -> DeclaredScheme:
    """A scheme from two fields of a record; a group size of null or -1 means one scale per row.

    Raises: CheckpointError naming the fields.
    """
    if type(bits) is not int or bits not in PACKED_BITS:
        known = " and ".join(map(str, PACKED_BITS))
        raise CheckpointError(f"quantization_config: {where}: {one_line(bits, 20)} bits, {known} can be read")
    if group_size is None or group_size == -1:
        return DeclaredScheme(bits, None)
    if type(group_size) is not int or not 1 <= group_size < 2**31:
        raise CheckpointError(f"quantization_config: {where}: group size {one_line(group_size, 20)} is not a count")
    return DeclaredScheme(bits, group_size)


def matching_scheme(
    module: str, shape: Shape, groups: int, words: int, declared: Iterable[DeclaredScheme]
) -> IntScheme:
    """The first declared scheme that gives this many groups and words of codes per row.

    Raises: CheckpointError naming the module if none does.
    """
    _, num_in = shape
    declared = tuple(declared)
    for candidate in declared:
        scheme = candidate.scheme(num_in)
        if scheme.num_groups(num_in) == groups and words * WORD_BITS == num_in * scheme.bits:
            return scheme
    raise CheckpointError(
        f"{one_line(module)}: {words:,} words and {groups:,} groups per row of {num_in:,} features fit none of "
        f"what quantization_config declares ({'; '.join(map(str, declared[:4]))})"
    )


def word_spec(*shape: int) -> TensorSpec:
    """What a tensor of int32 must be."""
    return TensorSpec(shape, _WORD_DTYPE)


def stored_shape(checkpoint: Checkpoint, name: str) -> Shape:
    """The shape of a matrix of a quantized map. Raises: CheckpointError if it is missing or no matrix."""
    try:
        shape = checkpoint.shape(name)
    except KeyError:
        raise CheckpointError(f"{one_line(name)} is missing, while other parts of its matrix are stored") from None
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{one_line(name)} is {list(shape)}, needed is a matrix")
    return shape


def naming(module: str, read: Callable[[], _Loaded]) -> _Loaded:
    """Read a matrix, with its name put in front of what is wrong with it, and check that its scales are numbers.

    Raises: CheckpointError.
    """
    try:
        weight = read()
    except CheckpointError as error:
        raise CheckpointError(f"{one_line(module)}: {error.message}", error.hint) from error
    scales = weight.scales if isinstance(weight, PackedWeight) else weight.absmax
    least_and_most = torch.stack(
        torch.aminmax(scales)
    )  # each is NaN if any is; one pass, isfinite takes twenty times it
    if not bool(torch.isfinite(least_and_most).all()):
        raise CheckpointError(f"{one_line(module)}: scales hold NaN or infinity")
    return weight
