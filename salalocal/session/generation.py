"""Tokens to text: a running generation of the engine goes in, pieces of text come out; for runtime and session."""

from collections.abc import Collection, Iterator, Sequence

from salalocal.engine.engine import Generation as TokenGeneration
from salalocal.engine.picks import AnswerPicks
from salalocal.prompt.text_stream import TextStream
from salalocal.prompt.tokenizer import Tokenizer
from salalocal.prompt.tokenizer_file import Place
from salalocal.session.events import TextDelta
from salalocal.session.memory import naming_memory_errors


class Generation(Iterator[TextDelta]):
    """Text as it is drawn: an iterator over its pieces; afterwards `text`, `token_ids` and `finish` say it all.

    `token_ids` are all tokens drawn but the stop token that ended them; with a stop string they go on past the text,
    which ends before it (`ids_of_text` cuts them). `finish` is None while it runs, then stop, length, repetition or
    cancelled.
    """

    def __init__(self, tokens: TokenGeneration, stream: TextStream, stop_ids: Collection[int]) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.finish: str | None = None
        self._tokens = tokens
        self._stream = stream
        self._stop_ids = frozenset(stop_ids)
        self._pending: list[int] = []

    @property
    def right_guesses(self) -> int:
        """Tokens that were guessed ahead."""
        return self._tokens.guesses.num_right

    @property
    def is_cut(self) -> bool:
        """Whether a stop string ended it."""
        return self._stream.stopped

    @property
    def picks(self) -> AnswerPicks:
        """What the sparse layers picked meanwhile."""
        return self._tokens.picks()

    def __iter__(self) -> "Generation":
        return self

    def __next__(self) -> TextDelta:
        while self.finish is None:
            piece = self._draw()
            if piece:
                return self._delta(piece)
        if self._pending:
            return self._delta("")
        raise StopIteration

    def stop_here(self) -> None:
        """End now, as if cancelled; what was drawn stays. Harmless after the end."""
        if self.finish is None:
            self.text += self._stream.flush()
            self.finish = "cancelled"
            self._tokens.close()

    def _draw(self) -> str:
        """Draw one token; the text that became certain with it."""
        with naming_memory_errors("writing the answer"):
            token = next(self._tokens, None)
        if token is None or token in self._stop_ids:
            return self._end(self._tokens.reason or "stop")
        self.token_ids.append(token)
        self._pending.append(token)
        piece = self._stream.push(token)
        if self._stream.stopped:
            self.finish = "stop"
            self._tokens.close()
            return piece
        return piece + self._end(self._tokens.reason) if self._tokens.reason else piece

    def _end(self, reason: str) -> str:
        self.finish = reason
        return self._stream.flush()

    def _delta(self, piece: str) -> TextDelta:
        self.text += piece
        delta = TextDelta(piece, tuple(self._pending))
        self._pending = []
        return delta


def ids_of_text(ids: Sequence[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of an answer that was cut at a stop string: those that lie before the cut, and what is left encoded anew.

    `text` is what the ids begin with.
    """
    wanted, held, count = text.encode(), b"", 0
    if tokenizer.has_prefix_space and ids and tokenizer.piece_bytes(ids[0]).startswith(b" "):
        wanted = b" " + wanted
    for number, token in enumerate(ids, 1):
        held += tokenizer.piece_bytes(token)
        if not wanted.startswith(held):
            break
        if _is_text(wanted[len(held) :]):
            count = number
    kept = list(ids[:count])
    rest = wanted[sum(len(tokenizer.piece_bytes(token)) for token in kept) :].decode()
    return kept + tokenizer.encode(rest, Place.TEXT) if rest else kept


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
