"""Attention over picked blocks of a cache in host memory, for many rows on a GPU; see the package.

Neighbouring rows pick much the same blocks, and the bus is the narrowest place: so the blocks that any row of a group
picked are brought to the card once, side by side and in their order, and the rows attend to the copies by their new
numbers. Groups are as large as the room for copies allows.

    copies of a group: the blocks it picked before its first row's own one, ascending; then every block up to its last
    row's own, so that keys ahead of a row keep their distance to it
The result is that of the blocks where they lay, bit by bit. Unlike any kernel this waits for the device, once a call,
to learn how many blocks were picked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.kv_cache import KeyValues

MOST_COPIES = 4096  # blocks a head: 130 MiB for two heads of 128 in int8, 256 MiB in bf16

Attend = Callable[[Tensor, KeyValues, Tensor, int], Tensor]
"""Queries [1, R, Hq, D], a cache, picks [1, R, Hkv, S] and the first row's position in; the result like the queries."""


@dataclass(frozen=True, eq=False, slots=True)
class _Grouping:
    """Groups of `rows` neighbouring rows. Shapes: is_picked bool [groups, Hkv, blocks + 1], the last place for picks of
    nothing. A head of a group picked at most `most` blocks before its first row's own."""

    rows: int
    is_picked: Tensor
    most: int


def is_on_host(cached: KeyValues, q: Tensor) -> bool:
    """Whether the cache of a card's queries is not on the card."""
    return q.is_cuda and not cached.keys.is_cuda


def host_block_attention(
    q: Tensor, cached: KeyValues, picks: Tensor, first_position: int, block_size: int, attend: Attend
) -> Tensor:
    """Let `attend` work on copies of the blocks that rows of one sequence picked, group by group.

    Shapes: as `block_attention`. Raises: BackendError for rows that pick more blocks than there is room for.
    """
    num_rows, num_tokens = q.shape[1], cached.keys.shape[1]
    grouping = _grouped(picks[0], first_position, -(-num_tokens // block_size), block_size)
    parts = []
    for number, is_picked in enumerate(grouping.is_picked):
        start = number * grouping.rows
        end = min(start + grouping.rows, num_rows)
        own, last = ((first_position + row) // block_size for row in (start, end - 1))
        sources, numbers = _renumbered(is_picked, own, last, grouping.most)
        moved = (grouping.most - own) * block_size  # where a token from the own block on has gone
        copies = cached.gathered(sources, block_size).first(num_tokens + moved)
        renamed = _renamed(picks[:, start:end], numbers)
        parts.append(attend(q[:, start:end], copies, renamed, first_position + start + moved))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _grouped(picks: Tensor, first_position: int, num_blocks: int, block_size: int) -> _Grouping:
    """The largest groups, of all rows or of half as many and so on, whose blocks have room. Shapes: picks [T, H, S]."""
    rows, num_picks = 1, picks.shape[2]
    if _most_copies(rows, num_picks, block_size) > MOST_COPIES:
        raise BackendError(f"{num_picks:,} blocks picked by a row, at most {MOST_COPIES - 2:,} of a cache on the host")
    while rows < len(picks) and _most_copies(2 * rows, 2 * rows * num_picks, block_size) <= MOST_COPIES:
        rows *= 2
    groupings = [(rows, _picked_by_group(picks, rows, num_blocks))]
    while len(groupings[-1][1]) > 1:
        rows, is_picked = groupings[-1]
        groupings.append((2 * rows, _joined(is_picked)))
    counts = [_most_before(is_picked, first_position, rows, block_size) for rows, is_picked in groupings]
    most = torch.stack(counts).tolist()  # waits for the device
    return next(
        _Grouping(rows, is_picked, count)
        for (rows, is_picked), count in reversed(list(zip(groupings, most, strict=True)))
        if _most_copies(rows, count, block_size) <= MOST_COPIES
    )


def _most_copies(rows: int, num_before: int, block_size: int) -> int:
    """Copies of a group that picked so many blocks before its first row's own."""
    return num_before + (rows - 1) // block_size + 2


def _picked_by_group(picks: Tensor, rows: int, num_blocks: int) -> Tensor:
    """Which blocks every group of rows picked. Shapes: picks [T, H, S] -> bool [groups, H, blocks + 1]."""
    num_rows, heads, _ = picks.shape
    group = (torch.arange(num_rows, device=picks.device) // rows)[:, None, None]
    head = torch.arange(heads, device=picks.device)[:, None]
    size = (-(-num_rows // rows), heads, num_blocks + 1)
    is_picked = torch.zeros(size, dtype=torch.bool, device=picks.device)
    is_picked.index_put_(
        (group, head, _or_last(picks, num_blocks)), torch.ones((), dtype=torch.bool, device=picks.device)
    )
    return is_picked


def _joined(is_picked: Tensor) -> Tensor:
    """The same for groups twice as large."""
    joined = is_picked[::2].clone()
    joined[: len(is_picked) // 2] |= is_picked[1::2]
    return joined


def _most_before(is_picked: Tensor, first_position: int, rows: int, block_size: int) -> Tensor:
    """The most blocks that a head of a group picked before the group's first row's own one, on the device."""
    own = (first_position + rows * torch.arange(len(is_picked), device=is_picked.device)) // block_size
    is_before = torch.arange(is_picked.shape[2], device=is_picked.device) < own[:, None, None]
    return (is_picked & is_before).sum(-1).amax()


def _renumbered(is_picked: Tensor, own: int, last: int, most: int) -> tuple[Tensor, Tensor]:
    """The block behind every copy, -1 for none, and the copy of every block.

    Shapes: is_picked bool [H, blocks + 1] -> int64 [H, copies], [H, blocks + 1].
    """
    heads, device = len(is_picked), is_picked.device
    before = is_picked[:, :own]
    place = torch.where(before, before.cumsum(1) - 1, most)
    sources = torch.full((heads, most + 1), -1, device=device)
    sources.scatter_(1, place, torch.arange(own, device=device).expand(heads, -1))
    following = torch.arange(own, last + 1, device=device).expand(heads, -1)
    numbers = torch.full(is_picked.shape, -1, device=device)
    numbers[:, :own] = place
    numbers[:, own : last + 1] = following + (most - own)
    return torch.cat([sources[:, :most], following], 1), numbers


def _renamed(picks: Tensor, numbers: Tensor) -> Tensor:
    """Picks as numbers of copies. Shapes: picks [1, R, H, S], numbers [H, blocks + 1] -> as picks."""
    by_row = numbers.expand(picks.shape[1], -1, -1)
    return by_row.gather(2, _or_last(picks[0], numbers.shape[1] - 1))[None]


def _or_last(picks: Tensor, num_blocks: int) -> Tensor:
    """Picks with the place behind the last block where nothing was picked."""
    return torch.where(picks < 0, num_blocks, picks)
