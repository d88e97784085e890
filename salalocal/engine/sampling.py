"""Choosing the next token: logits come in, one token id goes out; for the decode loop.

Filters, in this order, each on what the one before left, as in transformers:

    p = softmax(logits / temperature)
    top_k   the k most probable tokens, ties to the lower id
    top_p   the shortest run of the most probable tokens whose sum is at least top_p of what top_k left; ties as above
    min_p   the tokens with p >= min_p * max(p)

Then one token is drawn from what is left, by a random number that the seed and the token's position in the sequence
alone decide: forks and runs that go on later draw what one that never stopped would. Everything after the logits is
float64 on the CPU, so one seed and the same logits give the same token on every device.
"""

import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import NumericError

_RANDOM_BITS = 53  # of a float64 in [0, 1)
_BLOCK_NUMBERS = 4  # that Philox makes at a time


class Sampler:
    """Draws tokens; its random numbers are those of a seed, one for every position. Without a seed, one is drawn."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._seed = secrets.randbits(63) if params.seed is None else params.seed

    @property
    def params(self) -> SamplingParams:
        """How it draws."""
        return self._params

    def uniforms(self, first: int, count: int) -> Tensor:
        """The random numbers, from [0, 1), of the tokens at `count` positions from `first` on. Shapes: float64 [count].

        Source: Philox, a generator that can begin anywhere (Salmon et al. 2011).
        """
        stream, skipped = np.random.Philox(key=self._seed), first % _BLOCK_NUMBERS
        stream.advance(first // _BLOCK_NUMBERS)
        bits = stream.random_raw(skipped + count)[skipped:] >> np.uint64(64 - _RANDOM_BITS)
        return torch.from_numpy(bits.astype(np.float64) * 2.0**-_RANDOM_BITS)

    def sample(self, logits: Tensor, position: int) -> int:
        """The token that is to stand at `position`.

        Shapes: logits [V], any float dtype and device. Raises: NumericError if one of them is NaN or infinite.
        """
        check_finite(logits, "logits")
        if self._params.temperature == 0:
            return int(torch.argmax(logits))  # the first of equals
        probabilities = token_probabilities(logits, self._params)
        kept = torch.nonzero(probabilities).squeeze(-1)
        cumulative = probabilities[kept].cumsum(0)
        drawn = self.uniforms(position, 1) * cumulative[-1]
        place = torch.searchsorted(cumulative, drawn, right=True)
        return int(kept[min(int(place), kept.numel() - 1)])


def token_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that a token is drawn from, for a temperature above 0: zero where a filter cut, sum 1.

    Shapes: logits [V] -> float64 [V] on the CPU.
    """
    scaled = logits.detach().to("cpu", torch.float64)
    probabilities = torch.softmax((scaled - scaled.max()) / params.temperature, dim=0)
    if 0 < params.top_k < probabilities.numel() or params.top_p < 1:
        probabilities = _most_probable(probabilities, params)
    if params.min_p > 0:
        probabilities = probabilities * (probabilities >= params.min_p * probabilities.max())
    return probabilities / probabilities.sum()


def _most_probable(probabilities: Tensor, params: SamplingParams) -> Tensor:
    values, ids = torch.sort(probabilities, descending=True, stable=True)  # stable: ties to the lower id
    count = params.top_k or values.numel()
    values = values[:count]
    if params.top_p < 1:
        cumulative = values.cumsum(0)
        count = 1 + int((cumulative[:-1] < params.top_p * cumulative[-1]).sum())
    kept = torch.zeros_like(probabilities)
    kept[ids[:count]] = values[:count]
    return kept


class FiniteCheck:
    """Whether values are all finite, computed where they are and asked for later; `what` names them in the error."""

    def __init__(self, values: Tensor, what: str) -> None:
        self._values, self._what = values, what
        # A sum is finite only if all of its parts are, and costs no tensor of flags; fp64 cannot overflow from finite
        # fp32.
        self._sum = values.sum(dtype=torch.float64)

    def wait(self) -> None:
        """Raises NumericError if any value is NaN or infinite."""
        if not math.isfinite(float(self._sum)):
            num_bad = int((~torch.isfinite(self._values)).sum())
            raise NumericError(
                f"{self._what}: {num_bad:,} of {self._values.numel():,} numbers are NaN or infinite",
                "nothing of this step was kept; check the model's files, or try another dtype",
            )


def check_finite(values: Tensor, what: str) -> None:
    """Raises NumericError if any value is NaN or infinite; `what` names them in the error."""
    FiniteCheck(values, what).wait()


class RepetitionGuard:
    """Notices that an answer runs in an endless loop, token by token.

    A loop is a cycle of p <= 256 tokens that the answer has repeated without a single change over its last
    max(256, 4p) tokens. Why this rule: greedy decoding that has gone round so long does not leave again, while the
    things that people ask for repeat less or not exactly: rulers, rows of equal cells, zero-filled arrays and short
    lists stay under 256 tokens, and longer tables and logs differ somewhere in each row (a number, a name). The cost of
    being late is at most some hundred wasted tokens, the cost of a false alarm is a lost answer.
    """

    MAX_CYCLE = 256
    MIN_TOKENS = 256
    MIN_CYCLES = 4

    def __init__(self, ids: Sequence[int] = ()) -> None:
        # For each cycle length p: how many of the last tokens equal the one p places before them.
        self._runs = torch.zeros(self.MAX_CYCLE, dtype=torch.int64)
        self._recent = torch.full((self.MAX_CYCLE,), -1, dtype=torch.int64)  # newest first
        self._needed = torch.tensor(
            [max(self.MIN_TOKENS, self.MIN_CYCLES * cycle) - cycle for cycle in range(1, self.MAX_CYCLE + 1)]
        )
        self._is_looping = False
        for token in ids:
            self.push(token)

    @property
    def is_looping(self) -> bool:
        """Whether the tokens so far end in a loop."""
        return self._is_looping

    def push(self, token: int) -> bool:
        """Takes in one token and says whether the answer now ends in a loop."""
        self._runs = (self._runs + 1) * (self._recent == token)
        self._recent = self._recent.roll(1)
        self._recent[0] = token
        self._is_looping = bool((self._runs >= self._needed).any())
        return self._is_looping
