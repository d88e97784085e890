"""Quantized matrices as they lie in a folder: a matrix comes in, its tensors by their last names go out, and back; for
the quantizer. A new kind of matrix is named here."""

from collections.abc import Mapping

from torch import Tensor

from salalocal.quant.codebook import CodebookScheme, CodebookWeight, from_bitsandbytes, to_bitsandbytes
from salalocal.quant.int4 import IntScheme, IntWeight, PackedWeight, from_gptq, to_gptq

Scheme = IntScheme | CodebookScheme
QuantizedWeight = IntWeight | CodebookWeight
LoadedWeight = PackedWeight | CodebookWeight


def stored_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """What is written for a matrix. Raises: ValueError if its codes do not fill whole words or bytes."""
    return to_gptq(weight) if isinstance(weight, IntWeight) else to_bitsandbytes(weight)


def from_stored(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The matrix that was written so. Raises: CheckpointError if the tensors say something else than the scheme."""
    if isinstance(scheme, IntScheme):
        return from_gptq(tensors, {"group_size": scheme.group_size})
    return from_bitsandbytes(tensors)


def joined(pieces: list[QuantizedWeight]) -> QuantizedWeight:
    """One matrix of pieces of its rows, in their order."""
    if isinstance(pieces[0], IntWeight):
        return IntWeight.joined([piece for piece in pieces if isinstance(piece, IntWeight)])
    return CodebookWeight.joined([piece for piece in pieces if isinstance(piece, CodebookWeight)])
