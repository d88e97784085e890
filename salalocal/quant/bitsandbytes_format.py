"""Folders quantized to 4 bits by bitsandbytes, NF4 or FP4: a record and tensors come in, matrices go out; for FORMATS.

Also read: double quantization, and folders in which some linear maps are not quantized. The library itself is not
needed. Source: bitsandbytes, QuantState; transformers, BitsAndBytesConfig; see `quant.codebook` for the tensors.
"""

from collections.abc import Mapping
from typing import Any

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import Shape, TensorSpec
from salalocal.checkpoint.strict_json import one_line
from salalocal.errors import CheckpointError
from salalocal.quant.codebook import (
    CODEBOOKS,
    NESTED_LEAVES,
    STATE_LEAF,
    CodebookWeight,
    StoredState,
    from_bitsandbytes,
    read_state,
)
from salalocal.quant.format import StoredMatrix, naming

_CODEBOOK_ENTRIES = 16
_NESTED_ENTRIES = 256


class BitsAndBytesFormat:
    """The 4-bit layout of bitsandbytes in one folder. Raises: CheckpointError for a record of another kind."""

    def __init__(self, checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
        if record.get("load_in_4bit") is not True or record.get("load_in_8bit"):
            raise CheckpointError("quantization_config: bitsandbytes with 4 bits (load_in_4bit) alone can be read")
        storage = record.get("bnb_4bit_quant_storage") or "uint8"
        if storage != "uint8":
            raise CheckpointError(
                f"quantization_config: bnb_4bit_quant_storage {one_line(storage, 30)}, uint8 can be read"
            )
        self._checkpoint = checkpoint
        self._names = frozenset(checkpoint.tensor_names)
        self._leaves: dict[str, tuple[str, ...]] = {}

    def find(self, module: str, shape: Shape) -> StoredMatrix | None:
        """See `WeightFormat.find`."""
        kind = next((kind for kind in CODEBOOKS if f"{module}.{STATE_LEAF}{kind}" in self._names), None)
        if kind is None:
            return None
        state = self._state(module, kind)
        num_out, num_in = shape
        if state.shape != shape or not state.scheme.can_pack(num_out, num_in):
            raise CheckpointError(
                f"{one_line(module)}: quant_state says {one_line(list(state.shape), 60)}, the config {list(shape)}"
                + ("" if num_in % 2 == 0 else ", and an odd number of inputs cannot be read")
            )
        num_blocks = state.scheme.num_blocks(num_out, num_in)
        state_name = f"{STATE_LEAF}{kind}"
        tensors = {
            "weight": TensorSpec((num_out * num_in // 2, 1), ("U8",)),
            "weight.absmax": TensorSpec((num_blocks,), ("F32",)),
            "weight.quant_map": TensorSpec((_CODEBOOK_ENTRIES,), ("F32",)),
            state_name: TensorSpec(self._checkpoint.shape(f"{module}.{state_name}"), ("U8",)),
        }
        if state.nesting is not None:
            tensors["weight.absmax"] = TensorSpec((num_blocks,), ("U8",))
            absmax, codebook = NESTED_LEAVES
            tensors[absmax] = TensorSpec((-(-num_blocks // state.nesting.block_size),), ("F32",))
            tensors[codebook] = TensorSpec((_NESTED_ENTRIES,), ("F32",))
        self._leaves[module] = tuple(tensors)
        return StoredMatrix(shape, state.scheme, tensors)

    def read(self, module: str) -> CodebookWeight:
        """See `WeightFormat.read`."""
        tensors = {leaf: self._checkpoint.tensor(f"{module}.{leaf}") for leaf in self._leaves[module]}
        return naming(module, lambda: from_bitsandbytes(tensors))

    def _state(self, module: str, kind: str) -> StoredState:
        try:
            return read_state(kind, self._checkpoint.tensor(f"{module}.{STATE_LEAF}{kind}"))
        except CheckpointError as error:
            raise CheckpointError(f"{one_line(module)}: {error.message}", error.hint) from error
