"""What a folder holds, tensor by tensor: a Checkpoint and its format come in, dense names and quantized matrices go
out; for the engine."""

from collections.abc import Mapping
from dataclasses import dataclass

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import EMBEDDING, TensorSpec, expected_tensors
from salalocal.quant.format import StoredMatrix, WeightFormat
from salalocal.quant.stored import LoadedWeight

_LEAF = ".weight"


@dataclass(frozen=True)
class WeightLayout:
    """`dense`: every tensor that is stored as it is. `matrices`: the quantized linear maps by the name of their
    module, in the order of the forward pass."""

    dense: Mapping[str, TensorSpec]
    matrices: Mapping[str, StoredMatrix]
    weight_format: WeightFormat

    @classmethod
    def find(cls, checkpoint: Checkpoint, weight_format: WeightFormat) -> "WeightLayout":
        """Ask the format about every linear map of the model. Raises: CheckpointError."""
        dense: dict[str, TensorSpec] = {}
        matrices: dict[str, StoredMatrix] = {}
        for name, shape in expected_tensors(checkpoint.config).items():
            module = name.removesuffix(_LEAF)
            matrix = None if len(shape) != 2 or name == EMBEDDING else weight_format.find(module, shape)
            if matrix is None:
                dense[name] = TensorSpec(shape)
            else:
                matrices[module] = matrix
        return cls(dense, matrices, weight_format)

    @property
    def expected(self) -> dict[str, TensorSpec]:
        """Every tensor that the folder must hold."""
        expected = dict(self.dense)
        for module, matrix in self.matrices.items():
            expected.update((f"{module}.{leaf}", spec) for leaf, spec in matrix.tensors.items())
        return expected

    def read(self, module: str) -> LoadedWeight:
        """A quantized linear map. Raises: CheckpointError for numbers that make no sense."""
        return self.weight_format.read(module)
