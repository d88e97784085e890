"""Which blocks the rows of an answer picked: what the sparse layers left behind comes in, a few tensors go out; for
sessions, which say what was read.

A row is a token that was fed: the last one of the prompt, which draws the answer's first token, then the answer's own.
A row below `first_picking` reads everything and picks nothing. Of a long answer the last rows are known.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.kernels.block_topk import pick_weights
from salalocal.model.config import SPARSE, SalaConfig
from salalocal.model.mixers.sparse import PickedRow, SparseState, block_geometry
from salalocal.model.state import ModelState

RING_ROWS = 512
"""Rows of an answer whose picks are kept: 4.5 MiB for the 9B."""

RowPicks = tuple[PickedRow, ...]
"""What a row picked, layer by layer."""


@dataclass(frozen=True, eq=False)
class Picks:
    """What some rows picked, on the CPU.

    Shapes: blocks int32 [R, L, H, S]: rows, sparse layers, KV heads, ascending, -1 behind the last; weights fp32 of the
    same shape, the binary logarithm of a block's score, -inf for those that are always read; positions int64 [R].
    """

    blocks: Tensor
    weights: Tensor
    positions: Tensor

    @classmethod
    def none(cls, config: SalaConfig) -> "Picks":
        """Those of no rows."""
        blocks = torch.empty(0, *picks_shape(config), dtype=torch.int32)
        return cls(blocks, blocks.float(), torch.empty(0, dtype=torch.int64))

    @classmethod
    def of(cls, rows: Sequence[RowPicks], first_position: int, state: ModelState, config: SalaConfig) -> "Picks":
        """Those of rows that stand one behind the other in a state; their weights are worked out here."""
        if not rows:
            return cls.none(config)
        layers = [layer for layer in state.layers if isinstance(layer, SparseState)]
        geometry, scale = block_geometry(config.sparse), config.sparse.head_dim**-0.5
        blocks, weights = [], []
        with torch.inference_mode():
            for layer, picked in zip(layers, zip(*rows, strict=True), strict=True):
                blocks.append(torch.cat([row.blocks for row in picked], 1))
                queries = torch.cat([row.queries for row in picked], 1)
                weights.append(pick_weights(queries, layer.k1, layer.k2, blocks[-1], first_position, geometry, scale))
        positions = first_position + torch.arange(len(rows))
        return cls(torch.cat(blocks).transpose(0, 1).int().cpu(), torch.cat(weights).transpose(0, 1).cpu(), positions)

    def __len__(self) -> int:
        return len(self.blocks)

    def __add__(self, other: "Picks") -> "Picks":
        pairs = ((self.blocks, other.blocks), (self.weights, other.weights), (self.positions, other.positions))
        return Picks(*(torch.cat(pair) for pair in pairs))

    def last(self, count: int) -> "Picks":
        """The last `count` rows, or as many as there are."""
        first = max(0, len(self) - count)
        return Picks(self.blocks[first:], self.weights[first:], self.positions[first:])


@dataclass(frozen=True, eq=False)
class AnswerPicks:
    """What was picked while an answer was written: by its last rows that picked.

    `num_tokens` were drawn, the first `num_dense` of them from everything.
    """

    picks: Picks
    num_tokens: int
    num_dense: int


def picks_shape(config: SalaConfig) -> tuple[int, int, int]:
    """Sparse layers, KV heads, and the most blocks that a row picks."""
    return (
        config.mixer_types.count(SPARSE),
        config.sparse.num_key_value_heads,
        block_geometry(config.sparse).budget,
    )


def first_picking(config: SalaConfig, state: ModelState) -> int:
    """The first position whose row picks some blocks rather than all of them."""
    return max(state.sparse_from, block_geometry(config.sparse).reach)


def newest_picks(state: ModelState) -> RowPicks | None:
    """What the row picked that was fed last; None if it read everything, or if that is not known."""
    picked = [layer.picked for layer in state.layers if isinstance(layer, SparseState)]
    known = tuple(row for row in picked if row is not None)
    return known if known and len(known) == len(picked) else None


class PickLog:
    """The picks of the newest rows, for a model that runs module by module."""

    def __init__(self) -> None:
        self._rows: deque[RowPicks] = deque(maxlen=RING_ROWS)

    def take(self, state: ModelState) -> None:
        """Note what the row picked that was fed last."""
        picked = newest_picks(state)
        if picked is not None:
            self._rows.append(picked)

    def picks(self, state: ModelState, config: SalaConfig) -> Picks:
        """What was noted of rows that end with the last one of `state`."""
        return Picks.of(list(self._rows), state.num_tokens - len(self._rows), state, config)
