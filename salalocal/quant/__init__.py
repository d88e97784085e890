"""Weight formats: how the linear maps of a checkpoint are stored, read and computed with.

`weight_layout` finds the format of a folder; a new format is one line in FORMATS.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.strict_json import one_line
from salalocal.errors import CheckpointError
from salalocal.quant.bitsandbytes_format import BitsAndBytesFormat
from salalocal.quant.compressed_tensors import CompressedTensorsFormat
from salalocal.quant.format import DenseFormat, WeightFormat
from salalocal.quant.gptq_format import GptqFormat
from salalocal.quant.layout import WeightLayout

FORMATS: Mapping[str, Callable[[Checkpoint, Mapping[str, Any]], WeightFormat]] = MappingProxyType(
    {"gptq": GptqFormat, "compressed-tensors": CompressedTensorsFormat, "bitsandbytes": BitsAndBytesFormat}
)


def weight_layout(checkpoint: Checkpoint) -> WeightLayout:
    """What a folder stores dense and what quantized, by its own record; its tensors are checked.

    Raises: CheckpointError for a format that is not known, or tensors that do not fit it.
    """
    record = checkpoint.config.quantization_config
    if record is None:
        weight_format: WeightFormat = DenseFormat()
    else:
        method = record.get("quant_method")
        if not isinstance(method, str) or method not in FORMATS:
            raise CheckpointError(
                f"{one_line(checkpoint.folder, 160)}: quantized by {one_line(method, 30)}, "
                f"{', '.join(FORMATS)} can be read"
            )
        weight_format = FORMATS[method](checkpoint, record)
    layout = WeightLayout.find(checkpoint, weight_format)
    checkpoint.validate(layout.expected)
    return layout
