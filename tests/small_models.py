"""Small models to hold against the oracle: a drawn case in, the implementation's logits and choices out; for the laws.

Everything here goes through what the package shows to its users (SalaConfig, SalaModel, states); the one exception is
`choices`, which listens to the calls of `block_topk`.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import small_configs
import torch

from salalocal.model.config import SalaConfig
from salalocal.model.mixers import sparse as sparse_mixer
from salalocal.model.sala import SalaModel, SwitchRule
from salalocal.model.state import ModelState

RULES = {"position": SwitchRule.POSITION, "prompt": SwitchRule.PROMPT, "always": SwitchRule.ALWAYS}

# A choice this close may fall either way in fp32 and proves nothing, so cases with one are drawn again. Exact ties
# (margin 0: one compressed key lies under two blocks) are kept: the lower block is right.
CLOSE = 3e-5

Logits = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A configuration with weights and tokens, all drawn from one seed."""

    name: str
    seed: int
    config: small_configs.Config
    weights: small_configs.Weights
    tokens: tuple[int, ...]

    @property
    def geometry(self) -> oracle.Geometry:
        """The sizes of the block choice."""
        return oracle.Geometry.of(self.config["sparse_config"])

    @property
    def dense_len(self) -> int:
        """The switch of this configuration."""
        return int(self.config["sparse_config"]["dense_len"])

    def expected(self, rule: str = "position", prompt_tokens: int | None = None) -> oracle.Forward:
        """What the oracle says about the whole sequence."""
        return expected(self.name, self.seed, rule, prompt_tokens)

    def model(self, dtype: torch.dtype = torch.float64) -> SalaModel:
        """The implementation with these weights."""
        return built(self.name, self.seed, dtype)

    def with_sparse(self, **changes: int) -> SalaModel:
        """A float64 model with the same weights and another sparse_config."""
        return build({**self.config, "sparse_config": {**self.config["sparse_config"], **changes}}, self.weights)


def case_length(config: small_configs.Config) -> int:
    """Tokens enough for rows on both sides of the reach and of dense_len, if dense_len is within the tests' means."""
    geometry = oracle.Geometry.of(config["sparse_config"])
    dense_len = config["sparse_config"]["dense_len"]
    far = max(geometry.reach, dense_len if dense_len < 1000 else 0)
    return max(140, far + 4 * geometry.block_size + 3)


@functools.cache
def draw(name: str, seed: int) -> Case:
    """The case of this name and seed, without choices that fp32 could not settle."""
    config = small_configs.CONFIGS[name]
    for attempt in range(100):
        weights = small_configs.random_weights(config, 1000 * seed + attempt)
        tokens = small_configs.random_tokens(config, case_length(config), 1000 * seed + attempt)
        always = oracle.forward(weights, config, tokens, "always")
        position = oracle.forward(weights, config, tokens)
        if not _has_close_choice(always) and not _has_close_choice(position):
            return Case(name, seed, config, weights, tuple(tokens))
    raise RuntimeError(f"no case {name} without close choices from seed {seed}")


def _has_close_choice(result: oracle.Forward) -> bool:
    margins = [m for layer in result.layers for row in layer.margins if row is not None for m in row]
    return any(0 < margin < CLOSE for margin in margins)


@functools.cache
def expected(name: str, seed: int, rule: str, prompt_tokens: int | None) -> oracle.Forward:
    """The oracle's result for a drawn case; kept, since many tests ask for the same."""
    case = draw(name, seed)
    return oracle.forward(case.weights, case.config, case.tokens, rule, prompt_tokens)


def build(
    config: small_configs.Config, weights: small_configs.Weights, dtype: torch.dtype = torch.float64
) -> SalaModel:
    """The implementation for a config.json and weights by upstream name."""
    model = SalaModel(SalaConfig.from_hf(config), dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=True)
    return model.eval()


@functools.cache
def built(name: str, seed: int, dtype: torch.dtype) -> SalaModel:
    """The model of a drawn case; kept, since models do not change when they run."""
    case = draw(name, seed)
    return build(case.config, case.weights, dtype)


def feed(model: SalaModel, tokens: Sequence[int], state: ModelState, chunks: Sequence[int] = ()) -> Logits:
    """Read tokens into the state in chunks of these sizes (the last size repeats; none: in one go) -> logits [T, V]."""
    parts, start = [], 0
    sizes = iter(chunks)
    size = len(tokens)
    while start < len(tokens):
        size = next(sizes, size)
        piece = torch.tensor([tokens[start : start + size]])
        with torch.inference_mode():
            parts.append(model.logits(model(piece, state))[0].double().numpy())
        start += size
    return np.concatenate(parts)


def read(
    model: SalaModel,
    tokens: Sequence[int],
    chunks: Sequence[int] = (),
    rule: str = "position",
    prompt_tokens: int | None = None,
) -> Logits:
    """Read tokens from position 0 with a new state -> logits [T, V]."""
    return feed(model, tokens, new_state(model, rule, prompt_tokens), chunks)


def new_state(model: SalaModel, rule: str = "position", prompt_tokens: int | None = None) -> ModelState:
    """An empty state under the rule, by the oracle's name for it."""
    return model.new_state(switch=RULES[rule], prompt_tokens=prompt_tokens)


def row_error(got: Logits, wanted: Logits) -> float:
    """Largest difference of a row over the largest logit of that row, the worst of all rows."""
    assert got.shape == wanted.shape and np.isfinite(got).all()
    return float((np.abs(got - wanted).max(axis=1) / np.abs(wanted).max(axis=1)).max())


Choices = dict[tuple[int, int], tuple[oracle.Blocks, ...]]


@contextmanager
def choices(model: SalaModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Choices]:
    """Collect the blocks that the model chooses inside the context, by (layer, position); one tuple per KV head.

    Only rows beyond the reach count: before it every block is chosen, and whether a model asks there is its own affair.
    """
    chosen: Choices = {}
    sizes = model.config.sparse
    reach = sizes.topk * sizes.block_size + sizes.window_size
    layer_of_call = [-1]
    original = sparse_mixer.block_topk

    def listening(q: Any, k1: Any, k2: Any, first_position: int, *rest: Any, **named: Any) -> Any:
        blocks = original(q, k1, k2, first_position, *rest, **named)
        for i, row in enumerate(blocks[0].tolist()):
            if first_position + i >= reach:
                heads = tuple(tuple(x for x in head if x >= 0) for head in row)
                chosen[layer_of_call[0], first_position + i] = heads
        return blocks

    def note_layer(number: int) -> Any:
        return lambda *_: layer_of_call.__setitem__(0, number)

    hooks = [block.self_attn.register_forward_pre_hook(note_layer(n)) for n, block in enumerate(model.model.layers)]
    with monkeypatch.context() as patch:
        patch.setattr(sparse_mixer, "block_topk", listening)
        yield chosen
    for hook in hooks:
        hook.remove()


def expected_choices(case: Case, result: oracle.Forward, above: float | None = None) -> Choices:
    """The oracle's choices in the same form; `above` leaves out rows where a KV head's margin is not above it.

    Without it every row stays, ties too, since those have one right answer.
    """
    found: Choices = {}
    reach = case.geometry.reach
    for number, layer in enumerate(result.layers):
        for p, (blocks, margins) in enumerate(zip(layer.blocks, layer.margins, strict=True)):
            if p >= reach and blocks is not None and margins is not None and (above is None or min(margins) > above):
                found[number, p] = blocks
    return found
