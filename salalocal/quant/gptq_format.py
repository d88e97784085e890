"""Folders quantized to the GPTQ layout, versions 1 and 2: a record and tensors come in, matrices go out; for FORMATS.

Also read: act-order (`desc_act`), a mixture of 4 and 8 bits (`dynamic`), and folders in which some linear maps, such
as the gates, are not quantized. Zero points must be symmetric. Source: GPTQModel; see `quant.int4` for the layout.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import Shape, TensorSpec
from salalocal.checkpoint.strict_json import one_line
from salalocal.errors import CheckpointError
from salalocal.kernels.packing import WORD_BITS
from salalocal.quant.format import (
    MAX_SCHEMES,
    DeclaredScheme,
    StoredMatrix,
    declared_scheme,
    matching_scheme,
    naming,
    stored_shape,
    word_spec,
)
from salalocal.quant.int4 import GPTQ_LEAVES, GPTQ_VERSIONS, PackedWeight, packed_from_gptq


class GptqFormat:
    """The GPTQ layout of one folder. Raises: CheckpointError for a record that cannot be understood."""

    def __init__(self, checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
        version = record.get("checkpoint_format", GPTQ_VERSIONS[0])
        if version not in GPTQ_VERSIONS:
            known = " and ".join(GPTQ_VERSIONS)
            raise CheckpointError(
                f"quantization_config: checkpoint_format {one_line(version, 30)}, {known} can be read"
            )
        self._checkpoint = checkpoint
        self._record = record
        self._names = frozenset(checkpoint.tensor_names)
        self._declared = tuple(dict.fromkeys(_declared(record)))

    def find(self, module: str, shape: Shape) -> StoredMatrix | None:
        """See `WeightFormat.find`."""
        if f"{module}.qweight" not in self._names:
            return None
        num_out, num_in = shape
        words, _ = stored_shape(self._checkpoint, f"{module}.qweight")
        groups, _ = stored_shape(self._checkpoint, f"{module}.scales")
        scheme = matching_scheme(module, shape, groups, words, self._declared)
        tensors = {
            "qweight": word_spec(words, num_out),
            "qzeros": word_spec(groups, num_out * scheme.bits // WORD_BITS),
            "scales": TensorSpec((groups, num_out)),
            "g_idx": word_spec(num_in),
        }
        return StoredMatrix(shape, scheme, tensors)

    def read(self, module: str) -> PackedWeight:
        """See `WeightFormat.read`."""
        tensors = {leaf: self._checkpoint.tensor(f"{module}.{leaf}") for leaf in GPTQ_LEAVES}
        return naming(module, lambda: packed_from_gptq(tensors, self._record))


def _declared(record: Mapping[str, Any]) -> Iterator[DeclaredScheme]:
    """The scheme of the record and those of its exceptions, whose patterns need not be matched: tensors show them."""
    bits, group_size = record.get("bits"), record.get("group_size")
    yield declared_scheme(bits, group_size, "bits, group_size")
    dynamic = record.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or len(dynamic) > MAX_SCHEMES:
        raise CheckpointError(f"quantization_config: dynamic is not an object of at most {MAX_SCHEMES} patterns")
    for pattern, changes in dynamic.items():
        if isinstance(changes, Mapping) and not pattern.startswith("-:"):
            yield declared_scheme(
                changes.get("bits", bits), changes.get("group_size", group_size), f"dynamic {one_line(pattern, 60)}"
            )
