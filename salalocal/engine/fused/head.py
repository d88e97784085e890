"""From the last hidden states of a step to tokens: as logits, or at once where the likeliest is all that is asked for.

The tokens are the same either way: a packed output matrix chooses among logits rounded as they would be stored.
Shapes: hidden [R, hidden], behind the last norm; tokens int64 [R].
"""

from torch import Tensor

from salalocal.kernels.backend import use_triton
from salalocal.kernels.int4.linear import int4_likeliest
from salalocal.kernels.sampling import SamplingTensors, greedy_tokens
from salalocal.model.sala import SalaModel
from salalocal.quant.linear import KernelLinear


class Head:
    """The output matrix of a model."""

    def __init__(self, model: SalaModel) -> None:
        self._model = model

    def logits(self, hidden: Tensor) -> Tensor:
        """Shapes: fp32 [R, vocab]."""
        return self._model.logits(hidden)

    def greedy(self, hidden: Tensor, sampling: SamplingTensors) -> Tensor:
        """The likeliest token behind every row, the lowest id among equals; `is_damaged` as in `greedy_tokens`."""
        linear = self._model.lm_head
        if not (isinstance(linear, KernelLinear) and use_triton(hidden, linear.words)):
            return greedy_tokens(self.logits(hidden), sampling)
        scaled = hidden / self._model.config.logit_divisor
        return int4_likeliest(scaled, linear, linear.math, linear.workspace, sampling.is_damaged)
