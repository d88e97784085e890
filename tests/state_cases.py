"""What tests of states are made of: random rows, small states, and equality of two of them."""

import torch

from salalocal.model.mixers.lightning import LightningState
from salalocal.model.state import KVCache, ModelState, StateSpec


def spec(batch: int = 2, capacity: int = 0, dtype: torch.dtype = torch.float32) -> StateSpec:
    return StateSpec(batch_size=batch, capacity=capacity, sparse_from=7, device=torch.device("cpu"), dtype=dtype)


class Rows:
    """Random rows of one shape, from one seed."""

    def __init__(self, seed: int, batch: int = 2, heads: int = 3, dim: int = 4, dtype: torch.dtype = torch.float32):
        self._generator = torch.Generator().manual_seed(seed)
        self._shape, self._dtype = (batch, heads, dim), dtype

    def __call__(self, num: int) -> torch.Tensor:
        batch, heads, dim = self._shape
        return torch.randn(batch, num, heads, dim, generator=self._generator).to(self._dtype)


def model_state(seed: int, num_tokens: int = 70, digest: str = "a" * 64) -> ModelState:
    """A state of one attention layer and one lightning layer, as a model would leave it."""
    draw, cache = Rows(seed, dtype=torch.bfloat16), KVCache(spec(dtype=torch.bfloat16, capacity=100), 3, 4)
    cache.append(draw(num_tokens), draw(num_tokens))
    matrix = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    layers = (cache, LightningState(matrix, num_tokens))
    return ModelState(layers, num_tokens=num_tokens, sparse_from=7, config_digest=digest)


def empty_state(digest: str = "a" * 64, sparse_from: int = 7, heads: int = 3) -> ModelState:
    cache = KVCache(spec(dtype=torch.bfloat16), heads, 4)
    layers = (cache, LightningState(torch.zeros(2, 3, 4, 4), 0))
    return ModelState(layers, num_tokens=0, sparse_from=sparse_from, config_digest=digest)


def assert_same(one: ModelState, other: ModelState) -> None:
    assert (one.num_tokens, one.sparse_from, one.config_digest) == (
        other.num_tokens,
        other.sparse_from,
        other.config_digest,
    )
    for left, right in zip(one.layers, other.layers, strict=True):
        assert left.num_tokens == right.num_tokens
        mine, theirs = left.tensors(), right.tensors()
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])
