"""Reading a prompt: token ids and a state come in, the state is grown chunk by chunk; for Engine.

Chunks end at absolute multiples of the chunk size, counted from the start of the sequence and wherever a reading
starts. So a prompt that is read on from a multiple (a cancel leaves it at one) runs the very same chunks as one read in
one go, and gives the same bits.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from salalocal.engine.sampling import FiniteCheck
from salalocal.errors import RequestError
from salalocal.model.state import ModelState

Forward = Callable[[Tensor, ModelState], Tensor]
"""Token ids [1, C] and a state in, hidden states [1, C, H] out; the state has taken the tokens in."""

ProgressCallback = Callable[[int, int], None]
"""Called after each chunk with how many of this call's tokens are read, and how many there are."""

CancelCheck = Callable[[], bool]
"""Asked between chunks and between tokens; True stops the work there."""


def chunk_ends(first_position: int, num_tokens: int, chunk_size: int) -> Iterator[int]:
    """Where the chunks of `num_tokens` tokens from `first_position` on end: multiples of the chunk size, then the
    end."""
    position, end = first_position, first_position + num_tokens
    while position < end:
        position = min(end, (position // chunk_size + 1) * chunk_size)
        yield position


def read_chunks(
    forward: Forward, ids: Tensor, state: ModelState, chunk_size: int, is_cancelled: CancelCheck | None = None
) -> Iterator[Tensor]:
    """Feeds `ids` and yields the last hidden states of each chunk, which the state then holds.

    A cancel is asked for before each chunk and ends the iterator; the state stays good for the tokens it says it holds.
    A device is given one chunk while it works on the one before, so that it never waits; a chunk is checked when the
    next one is under way, the last one before it is yielded.
    Shapes: ids [T] -> [1, C, H] each.
    Raises: NumericError if hidden states are NaN or infinite; the state is spoiled then and must be dropped.
    """
    first_position = start = state.num_tokens
    last_end = first_position + ids.numel()
    unchecked: FiniteCheck | None = None
    for end in chunk_ends(first_position, ids.numel(), chunk_size):
        if is_cancelled is not None and is_cancelled():
            break
        hidden = forward(ids[None, start - first_position : end - first_position], state)
        check = FiniteCheck(hidden, f"hidden states of tokens {start:,} to {end - 1:,}")
        if unchecked is not None:
            unchecked.wait()
        unchecked = check
        if end == last_end or not hidden.is_cuda:
            check.wait()
        yield hidden
        start = end
    if unchecked is not None:
        unchecked.wait()


def as_ids(ids: Sequence[int] | Tensor, vocab_size: int, device: torch.device) -> Tensor:
    """A sequence or a tensor of token ids as an int64 tensor on the device.

    Raises: RequestError if there are none, or one is outside the vocabulary.
    """
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"ids should be a list of token ids: {error}") from error
    if tensor.ndim != 1 or tensor.numel() == 0 or tensor.dtype not in (torch.int64, torch.int32):
        raise RequestError(f"ids should be a list of token ids, at least one; got shape {tuple(tensor.shape)}")
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= vocab_size:
        raise RequestError(f"ids: {low if low < 0 else high} is outside the vocabulary of {vocab_size:,} tokens")
    return tensor.to(device, torch.int64)
