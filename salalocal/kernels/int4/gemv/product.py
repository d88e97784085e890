"""What is multiplied and what becomes of it: the words that the forms of this product share."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from salalocal.kernels.int4.activations_by_group import GroupedActivations, RawActivations
from salalocal.kernels.int4.gemv.launch import GemvShape


class PackedMatrix(Protocol):
    """What is asked of a packed weight. Shapes: words int32 [N, K * bits / 32], scales [N, groups]."""

    @property
    def words(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def group_index(self) -> Tensor | None: ...


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of the products v before they are written. Shapes: residual [M, N].

    plain: factor * v; residual: residual + factor * v; swiglu: silu(v[:N / 2]) * v[N / 2:]; best: a key per program,
    that of its largest factor * v as a logit, see `epilogue.logit_key`, for `kernels.int4.vocabulary`.
    """

    kind: Literal["plain", "residual", "swiglu", "best"] = "plain"
    factor: float = 1.0
    residual: Tensor | None = None


PLAIN = Epilogue()
SWIGLU = Epilogue("swiglu")


@dataclass(frozen=True, eq=False)
class Scratch:
    """Memory for programs that share a row, allocated once: partial sums, and counters that are zero between calls."""

    partials: Tensor
    tickets: Tensor

    @classmethod
    def make(cls, device: torch.device, num_partials: int = 2**22, num_tickets: int = 2**12) -> "Scratch":
        """Room for every launch of the released shapes unless told otherwise."""
        partials = torch.empty(num_partials, dtype=torch.float32, device=device)
        return cls(partials, torch.zeros(num_tickets, dtype=torch.int32, device=device))


@dataclass(frozen=True, eq=False)
class Product:
    """One call: checked operands, and the memory for what comes out."""

    x: GroupedActivations | RawActivations
    weight: PackedMatrix
    epilogue: Epilogue
    out: Tensor

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.x.values.shape[0]

    @property
    def shape(self) -> GemvShape:
        """N, K, bits and group size."""
        return shape_of(self.weight)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the kernels of all forms are launched with, by name."""
        # A tensor that is not read stands for no residual.
        residual = self.out if self.epilogue.residual is None else self.epilogue.residual
        return {
            "scales_ptr": self.weight.scales,
            "residual_ptr": residual,
            "out_ptr": self.out,
            "factor": self.epilogue.factor,
            "num_tokens": self.num_tokens,
            "num_rows": self.shape.N,
            "residual_stride": residual.stride(0),
            "out_stride": self.out.stride(0),
            "K": self.shape.K,
            "GROUP": self.shape.group_size,
            "EPILOGUE": self.epilogue.kind,
        }


def shape_of(weight: PackedMatrix) -> GemvShape:
    """N, K, bits and group size of a packed weight."""
    num_out, num_words = weight.words.shape
    return GemvShape(num_out, num_words * 32 // weight.bits, weight.bits, weight.group_size)
