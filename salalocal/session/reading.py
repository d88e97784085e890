"""Reading a prompt into a state, step by step: segments and saved states in, progress events and the state out."""

import bisect
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from salalocal.engine.engine import Engine
from salalocal.model.state import ModelState
from salalocal.prompt.template import Segment
from salalocal.session.events import ReadProgress
from salalocal.session.memory import naming_memory_errors
from salalocal.session.prefix import BYTES_PER_TOKEN, PrefixStore, SavePoint, token_bytes

SAVE_SPACING_CHUNKS = 2


class Prompt:
    """The tokens of a prompt, with what stands where and after which tokens a state is worth saving."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self.ids = [token for segment in self.segments for token in segment.ids]
        self.tokens = token_bytes(self.ids)
        self._ends: list[int] = []
        for segment in self.segments:
            self._ends.append(len(segment.ids) + (self._ends[-1] if self._ends else 0))
        self.documents = [segment for segment in self.segments if segment.kind == "document"]
        ends = zip(self._ends, self.segments, strict=True)
        self.documents_end = max((end for end, segment in ends if segment.kind == "document"), default=0)

    def save_positions(self, chunk_size: int) -> list[int]:
        """Where to stop and save: the end of the documents and of every earlier answer, and ends of documents apart.

        Depends only on the tokens in front of each position, so that a resumed read stops where a cold one did.
        """
        positions, last = [], 0
        for end, segment in zip(self._ends, self.segments, strict=True):
            is_far = segment.kind == "document" and end - last >= SAVE_SPACING_CHUNKS * chunk_size
            if segment.is_save_point or is_far:
                positions.append(end)
                last = end
        return positions

    def progress(self, position: int, cached: int, elapsed_s: float, is_paused: bool) -> ReadProgress:
        """The event that says the first `position` tokens are read."""
        index = min(bisect.bisect_left(self._ends, max(position, 1)), len(self.segments) - 1)
        segment = self.segments[index]
        start = self._ends[index] - len(segment.ids)
        document = sum(1 for earlier in self.segments[: index + 1] if earlier.kind == "document")
        return ReadProgress(
            path=segment.label if segment.kind == "document" else "",
            document=document,
            num_documents=len(self.documents),
            document_tokens=position - start,
            document_total=len(segment.ids),
            num_tokens=position,
            total_tokens=len(self.ids),
            cached_tokens=cached,
            elapsed_s=elapsed_s,
            is_paused=is_paused,
        )


@dataclass(frozen=True)
class Read:
    """How far a prompt has been read: the state that holds its first `num_tokens`, the logits [V] of the next one."""

    state: ModelState
    logits: Tensor | None
    num_tokens: int
    cached_tokens: int
    elapsed_s: float
    is_whole: bool


def read_prompt(
    engine: Engine,
    prompt: Prompt,
    store: PrefixStore,
    is_cancelled: Callable[[], bool],
    room: int,
    after_documents: Callable[[ModelState], None] | None = None,
) -> Generator[ReadProgress, None, Read]:
    """Read a prompt from the longest saved state on, saving states on the way.

    Units: room in tokens, what is expected behind the prompt; a new state is made large enough for both, so that it
    takes the memory that was planned and is never copied while it is read. `after_documents` is shown the state when it
    holds all documents and nothing behind them.

    A cancelled read (or one no longer iterated) loses nothing: it ends in a paused event, the state of the last whole
    chunk is saved, and the next read goes on from there.
    """
    point = store.longest(prompt.tokens)
    started_s = time.monotonic()
    with naming_memory_errors(f"making room for {len(prompt.ids) + room:,} tokens"):
        state = engine.new_state(len(prompt.ids) + room) if point is None else point.state.fork()
    logits = None if point is None else point.logits
    cached = position = 0 if point is None else point.num_tokens
    if after_documents is not None and 0 < position == prompt.documents_end:
        after_documents(state)
    saves = [save for save in prompt.save_positions(engine.config.chunk_size) if save > position]
    is_saved = is_paused = False
    while position < len(prompt.ids) and not is_paused:
        end = _step_end(position, engine.config.chunk_size, saves, len(prompt.ids))
        with naming_memory_errors(f"reading token {position:,} of {len(prompt.ids):,}"):
            logits = engine.prefill(prompt.ids[position:end], state)
        position = end
        is_saved = end in saves or end == len(prompt.ids)
        if is_saved:
            store.put(_save_point(prompt, end, state.fork(), logits))
        if after_documents is not None and end == prompt.documents_end:
            after_documents(state)
        is_paused = is_cancelled() and position < len(prompt.ids)
        if is_paused and not is_saved:
            store.put(_save_point(prompt, position, state, logits))
        try:
            yield prompt.progress(position, cached, time.monotonic() - started_s, is_paused)
        except GeneratorExit:
            if not is_saved and not is_paused:
                store.put(_save_point(prompt, position, state, logits))
            raise
    return Read(state, logits, position, cached, time.monotonic() - started_s, not is_paused)


def _step_end(position: int, chunk_size: int, saves: Sequence[int], total: int) -> int:
    next_save = saves[bisect.bisect_right(saves, position)] if saves and saves[-1] > position else total
    return min((position // chunk_size + 1) * chunk_size, next_save, total)


def _save_point(prompt: Prompt, position: int, state: ModelState, logits: Tensor | None) -> SavePoint:
    tokens = prompt.tokens[: position * BYTES_PER_TOKEN]
    return SavePoint(tokens, state, logits, is_pinned=position == prompt.documents_end)
