"""Folders in the `pack-quantized` layout of compressed-tensors: a record and tensors come in, matrices go out; for
FORMATS.

Names, for a map of `in` to `out` features: `weight_packed` int32 [out, in * bits / 32], `weight_scale` [out, groups],
`weight_shape` int64 [2], and with act-order `weight_g_idx` int32 [in]. Codes and words are those of `kernels.packing`,
so the words stay mapped from the file. Only symmetric integer weights without quantized activations are read.
Source: compressed-tensors, compressors/pack_quantized.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import Shape, TensorSpec
from salalocal.checkpoint.strict_json import one_line
from salalocal.errors import CheckpointError
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
from salalocal.quant.int4 import IntScheme, PackedWeight, check_groups, group_numbers

PACK_QUANTIZED = "pack-quantized"

_STRATEGIES = ("group", "channel")


class CompressedTensorsFormat:
    """The pack-quantized layout of one folder. Raises: CheckpointError for a record of another kind."""

    def __init__(self, checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._names = frozenset(checkpoint.tensor_names)
        self._declared = tuple(dict.fromkeys(_declared(record)))
        self._found: dict[str, tuple[Shape, IntScheme]] = {}

    def find(self, module: str, shape: Shape) -> StoredMatrix | None:
        """See `WeightFormat.find`."""
        if f"{module}.weight_packed" not in self._names:
            return None
        num_out, num_in = shape
        _, words = stored_shape(self._checkpoint, f"{module}.weight_packed")
        _, groups = stored_shape(self._checkpoint, f"{module}.weight_scale")
        scheme = matching_scheme(module, shape, groups, words, self._declared)
        tensors = {
            "weight_packed": word_spec(num_out, words),
            "weight_scale": TensorSpec((num_out, groups)),
            "weight_shape": TensorSpec((2,), ("I64", "I32")),
        }
        if f"{module}.weight_g_idx" in self._names:
            tensors["weight_g_idx"] = word_spec(num_in)
        self._found[module] = shape, scheme
        return StoredMatrix(shape, scheme, tensors)

    def read(self, module: str) -> PackedWeight:
        """See `WeightFormat.read`."""
        return naming(module, lambda: self._read(module, *self._found[module]))

    def _read(self, module: str, shape: Shape, scheme: IntScheme) -> PackedWeight:
        said = self._checkpoint.tensor(f"{module}.weight_shape").tolist()
        if said != list(shape):
            raise CheckpointError(f"weight_shape says {said}, the config {list(shape)}")
        scales = self._checkpoint.tensor(f"{module}.weight_scale")
        group_index = None
        if f"{module}.weight_g_idx" in self._names:
            group_index = self._checkpoint.tensor(f"{module}.weight_g_idx")
            check_groups(group_index, scales.shape[1])
            if torch.equal(group_index, group_numbers(shape[1], scheme.group_size)):
                group_index = None
        words = self._checkpoint.tensor(f"{module}.weight_packed")
        return PackedWeight(words, scales, scheme.bits, scheme.group_size, group_index)


def _declared(record: Mapping[str, Any]) -> Iterator[DeclaredScheme]:
    groups = record.get("config_groups")
    if not isinstance(groups, Mapping) or not 1 <= len(groups) <= MAX_SCHEMES:
        raise CheckpointError(f"quantization_config: config_groups is not an object of 1 to {MAX_SCHEMES} groups")
    for name, group in groups.items():
        where = one_line(name, 40)
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise CheckpointError(f"quantization_config: {where} has no weights")
        weights = group["weights"]
        is_packed = (group.get("format") or record.get("format")) == PACK_QUANTIZED
        is_weight_only = not group.get("input_activations") and not group.get("output_activations")
        is_plain = weights.get("type", "int") == "int" and weights.get("symmetric", True) is True
        strategy = weights.get("strategy") or ("channel" if weights.get("group_size") in (None, -1) else "group")
        if not (is_packed and is_weight_only and is_plain and strategy in _STRATEGIES):
            raise CheckpointError(
                f"quantization_config: {where} is not {PACK_QUANTIZED} with symmetric integer weights alone, "
                "by group or channel"
            )
        group_size = weights.get("group_size") if strategy == "group" else None
        yield declared_scheme(weights.get("num_bits"), group_size, where)
